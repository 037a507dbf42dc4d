"""What the server may log of an error: where it was raised, and its message without data of the request."""

from __future__ import annotations

import logging
import re
import traceback

MAX_MESSAGE = 300  # characters
MAX_WORD = 40  # characters; base64 of a photo has no spaces
# Fractions (entries of an embedding), escaped bytes, and what is not printable ASCII (bytes read as text).
DATA = re.compile(r"\d\.\d|\\x[0-9a-f]{2}|[^ -~]")


def redacted(text: str) -> str:
    """A message on one line, in which words that may be data of a request are replaced by [...]."""
    words = ("[...]" if len(word) > MAX_WORD or DATA.search(word) else word for word in text[:10_000].split())
    return re.sub(r"\[\.\.\.\]( \[\.\.\.\])+", "[...]", " ".join(words))[:MAX_MESSAGE]


def redacted_traceback(error: BaseException) -> str:
    """The traceback of an error and of those that it followed: source lines as usual, messages redacted."""
    parts: list[str] = []
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        frames = "".join(traceback.format_tb(link.__traceback__))
        parts.append(
            f"Traceback (most recent call last):\n{frames}{type(link).__qualname__}: {redacted(str(link))}".rstrip(" :")
        )
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "\n\nWhile that error was handled, or because of it:\n\n".join(reversed(parts))


class RedactErrors(logging.Filter):
    """Replaces the traceback of a record by a redacted one.

    Messages of errors may quote what they could not use, and that may be of a photo or an embedding.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """True: the record is always logged."""
        if isinstance(record.exc_info, tuple) and record.exc_info[1] is not None:
            record.exc_text = redacted_traceback(record.exc_info[1])  # formatters take it as it is
            record.exc_info = None
            record.msg, record.args = record.getMessage().partition("\n")[0], ()  # asyncio adds repr(error)
        return True


def redact_errors() -> None:
    """Redact the errors in the logs of the server, of asyncio and of vultus."""
    for name in ("uvicorn.error", "asyncio", "vultus.serving.app"):
        logger = logging.getLogger(name)
        if not any(isinstance(one, RedactErrors) for one in logger.filters):
            logger.addFilter(RedactErrors())
