"""Weights that others trained: found in a local folder, then in the cache, then at their official address.

Nothing is used before its sha256 has been checked.
"""

from __future__ import annotations

import http.client
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vultus._files import atomic_path, make_folder, sha256_file
from vultus.errors import UserError


@dataclass(frozen=True)
class WeightFile:
    """A file with pinned content. `url` is None for a file that can only stand in a local folder."""

    name: str
    sha256: str
    url: str | None = None


def local_folder() -> Path | None:
    """The folder that VULTUS_WEIGHTS names, or None."""
    value = os.environ.get("VULTUS_WEIGHTS")
    return Path(value) if value else None


def cache_folder() -> Path:
    """Where downloads are kept: VULTUS_CACHE, or `vultus` in the user's cache folder."""
    value = os.environ.get("VULTUS_CACHE")
    return Path(value) if value else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vultus"


def find_weights(*candidates: WeightFile, fetch: bool = True) -> tuple[Path, WeightFile]:
    """Return the first of `candidates` at hand, checked, with its path; download it if none is and `fetch` allows.

    Order: the VULTUS_WEIGHTS folder, the cache, then the first candidate that has a URL. A file whose sha256 is not
    the pinned one is refused; in the cache, which is ours, it is removed too (a file in the user's own folder is left
    for the user). Raises UserError that says what is missing and how to get it.
    """
    found = _look(candidates)
    if found is not None:
        path, weights, ours = found
        _check(path, weights, remove=ours)
        return path, weights
    for weights in candidates if fetch else ():
        if weights.url is not None:
            return _download(weights), weights
    raise UserError(missing_weights(*candidates))


def weights_at_hand(*candidates: WeightFile) -> bool:
    """Whether `find_weights` would find a file without a download; its content is not read.

    Raises UserError if VULTUS_WEIGHTS names no folder.
    """
    return _look(candidates) is not None


def missing_weights(*candidates: WeightFile) -> str:
    """One line: the names of files that are not at hand, and how to get one of them."""
    names = " or ".join(weights.name for weights in candidates)
    urls = [weights.url for weights in candidates if weights.url is not None]
    remedy = f"fetch {urls[0]} into" if urls else "put it into"
    return f"{names} not found; {remedy} a folder and set VULTUS_WEIGHTS to that folder"


def _look(candidates: Sequence[WeightFile]) -> tuple[Path, WeightFile, bool] | None:
    """The first candidate that stands somewhere: its path, itself, and whether it stands in the cache."""
    folder = local_folder()
    if folder is not None and not folder.is_dir():
        raise UserError(f"VULTUS_WEIGHTS={folder}: no such folder; point it at the folder that holds the weights")
    for place in (cache_folder(),) if folder is None else (folder, cache_folder()):
        for weights in candidates:
            path = place / weights.name
            if path.is_file():
                return path, weights, place is not folder
    return None


def _check(path: Path, weights: WeightFile, *, remove: bool, shown: str | None = None) -> None:
    found = sha256_file(path)
    if found == weights.sha256:
        return
    remedy = "fetch it again"
    if remove:
        path.unlink()
        remedy = "it was removed, run the command again to fetch it anew"
    raise UserError(
        f"{shown or path}: sha256 is {found[:16]}..., expected {weights.sha256[:16]}...; the file is damaged or not "
        f"{weights.name}: {remedy}"
    )


def _download(weights: WeightFile) -> Path:
    assert weights.url is not None
    path = make_folder(cache_folder()) / weights.name
    print(f"fetching {weights.url}", file=sys.stderr)
    try:
        with atomic_path(path) as temporary:
            with urllib.request.urlopen(weights.url, timeout=30) as response, open(temporary, "wb") as file:
                shutil.copyfileobj(response, file, 1 << 20)
            _check(temporary, weights, remove=True, shown=weights.url)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        reason = " ".join(str(getattr(error, "reason", error)).split())  # a server may answer with line breaks
        raise UserError(
            f"{weights.name} could not be fetched from {weights.url} ({reason}); fetch it elsewhere, put it into a "
            f"folder and set VULTUS_WEIGHTS to that folder"
        ) from None
    return path
