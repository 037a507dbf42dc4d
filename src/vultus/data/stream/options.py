"""The options of a stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

from vultus._ranges import Range, ShareBelowOne, Side, checked
from vultus.errors import UserError


@dataclass(frozen=True)
class StreamOptions:
    """How a source is streamed. Raises UserError for a value out of range.

    Attributes:
        resolution: side of the images in pixels; default: that of the preset.
        split: read only this split of the source.
        test_fraction: share of identities that are kept for validation, if the source has no splits of its own.
        align: find and align the face first (extra `align`).
        licence: terms of the photos, recorded in every model that is trained on them.
        image_column: column of the images; default: image.
        id_column: column of the identities; default: celeb_id, identity, person, ... or label, if there is one.
        mix: row groups of the source that are mixed at a time; the memory is in proportion to it.
        workers: threads that decode photos; 0 decodes in the reading thread. The order does not depend on it.
        cache_gb: size of the cache of embeddings in GB (2 KB for each photo); 0 keeps none.
        timeout: seconds without data after which a request is given up.
        retries: how often a request that failed is tried again, each time after twice the pause.
        pause: seconds before the first of these.
    """

    resolution: Side | None = None
    split: str | None = None
    test_fraction: ShareBelowOne = 0.1
    align: bool = False
    licence: str | None = None
    image_column: str | None = None
    id_column: str | None = None
    mix: Annotated[int, Range(1, 4096)] = 16
    workers: Annotated[int, Range(0, 256)] = 2
    cache_gb: Annotated[float, Range(0, 1e6)] = 2.0
    timeout: Annotated[float, Range(0, 3600, above=True)] = 30.0
    retries: Annotated[int, Range(0, 100)] = 5
    pause: Annotated[float, Range(0, 600)] = 0.5

    def __post_init__(self) -> None:
        for name, hint in stream_types().items():
            checked(getattr(self, name), hint, option_name(name))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> StreamOptions:
        """The options with these values. Raises UserError that names an unknown one."""
        known = stream_types()
        for name in values:
            if name not in known:
                raise UserError(f"{name}: no such option of a stream; there are {', '.join(known)}")
        return cls(**values)

    def content(self) -> dict[str, Any]:
        """The options that determine which images a run sees and in which order."""
        names = ("resolution", "split", "test_fraction", "align", "image_column", "id_column", "mix")
        return {name: getattr(self, name) for name in names}


def stream_types() -> dict[str, Any]:
    """The type of each option."""
    hints = get_type_hints(StreamOptions, include_extras=True)
    return {field.name: hints[field.name] for field in fields(StreamOptions)}


def option_name(name: str) -> str:
    """An option as the user types it: --image-column."""
    return f"--{name.replace('_column', '-column')}"
