"""Photos in `multipart/form-data`, as HTML forms and `curl -F` send them (RFC 7578)."""

from __future__ import annotations

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from vultus.serving.errors import ApiError

FORM = "multipart/form-data"
FIELD = "photo"  # name of the only field


class _PhotoPart:
    """Callbacks of the parser: keeps the data of the field `photo` and refuses every other."""

    def __init__(self) -> None:
        self.data: bytearray | None = None
        self.complete = False
        self._name, self._value = bytearray(), bytearray()
        self._disposition = b""

    def on_part_begin(self) -> None:
        self._disposition = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._name, self._value = bytearray(), bytearray()

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if options.get(b"name") != FIELD.encode():
            # Its name is not repeated: it may be anything, and so may what a client takes for a name.
            raise ApiError(422, f"the form: only the field {FIELD} is read; options are query parameters")
        if self.data is not None:
            raise ApiError(422, f"the form: the field {FIELD} is there more than once; send one photo per request")
        self.data = bytearray()

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        assert self.data is not None
        self.data += data[start:end]

    def on_end(self) -> None:
        self.complete = True


def photo_of_form(data: bytes, content_type: str) -> bytes:
    """The file in the field `photo` of a form.

    In memory: Starlette's own parser would write a photo of more than 1 MB to a temporary file, and photos are not
    stored.

    Args:
        data: the body.
        content_type: the header of the request, which names the boundary.

    Raises ApiError: 400 not a form, 422 no photo, more than one, an empty one, another field.
    """
    boundary = parse_options_header(content_type.encode("latin-1"))[1].get(b"boundary")
    if not boundary:
        raise ApiError(400, f"Content-Type {FORM} names no boundary")
    part = _PhotoPart()
    names = ("part_begin", "header_field", "header_value", "header_end", "headers_finished", "part_data", "end")
    try:
        parser = MultipartParser(boundary, {f"on_{name}": getattr(part, f"on_{name}") for name in names})  # type: ignore[arg-type]
        parser.write(data)
        parser.finalize()
    except FormParserError:
        raise ApiError(400, "the form: not valid multipart data") from None
    if not part.complete:
        raise ApiError(400, "the form: the last boundary is missing")
    if part.data is None:
        raise ApiError(422, f"the form: no field {FIELD}; send the photo in it, as curl -F {FIELD}=@me.jpg")
    if not part.data:
        raise ApiError(422, f"the form: the field {FIELD} is empty")
    return bytes(part.data)
