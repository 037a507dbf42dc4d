"""Pretrained weights: from a local folder, the cache, or their official address.

No file is used before its sha256 has been checked.
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

HUB = "hf://"  # begins the address of a model or a data set on the Hugging Face hub


@dataclass(frozen=True)
class WeightFile:
    """A file and the sha256 of its content. `url` is None for a file that cannot be downloaded."""

    name: str
    sha256: str
    url: str | None = None


def local_folder() -> Path | None:
    """The folder that VULTUS_WEIGHTS names, or None if it is not set."""
    value = os.environ.get("VULTUS_WEIGHTS")
    return Path(value) if value else None


def cache_folder() -> Path:
    """The folder for downloads: VULTUS_CACHE, or `vultus` in the cache folder of the user."""
    value = os.environ.get("VULTUS_CACHE")
    return Path(value) if value else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vultus"


def find_weights(*candidates: WeightFile, fetch: bool = True) -> tuple[Path, WeightFile]:
    """The path of the first of `candidates` that is found, and the candidate.

    Order: the VULTUS_WEIGHTS folder, the cache, then, if `fetch`, a download of the first candidate that has a URL. A
    file with another sha256 is refused; in the cache it is also removed. Raises UserError that says what is missing or
    damaged and how to get it.
    """
    local = _locate(candidates)
    if local is not None:
        path, weights, cached = local
        _check(path, weights, remove=cached)
        return path, weights
    for weights in candidates if fetch else ():
        if weights.url is not None:
            return _download(weights), weights
    raise UserError(missing_weights(*candidates))


def weights_available(*candidates: WeightFile) -> bool:
    """Whether `find_weights` would find a file without a download; its content is not read.

    Raises UserError if VULTUS_WEIGHTS is set to a folder that does not exist.
    """
    return _locate(candidates) is not None


def missing_weights(*candidates: WeightFile) -> str:
    """Error message for files that are missing: their names, and how to get one of them."""
    names = " or ".join(weights.name for weights in candidates)
    urls = [weights.url for weights in candidates if weights.url is not None]
    remedy = f"fetch {urls[0]} into" if urls else "put it into"
    return f"{names} not found; {remedy} a folder and set VULTUS_WEIGHTS to that folder"


def _locate(candidates: Sequence[WeightFile]) -> tuple[Path, WeightFile, bool] | None:
    """The first candidate that exists: its path, the candidate, and whether it is in the cache."""
    folder = local_folder()
    if folder is not None and not folder.is_dir():
        raise UserError(f"VULTUS_WEIGHTS={folder}: no such folder; point it at the folder that holds the weights")
    for parent in (cache_folder(),) if folder is None else (folder, cache_folder()):
        for weights in candidates:
            path = parent / weights.name
            if path.is_file():
                return path, weights, parent is not folder
    return None


def _check(path: Path, weights: WeightFile, *, remove: bool, shown: str | None = None) -> None:
    """Raise UserError, which names `shown` or `path`, if the sha256 differs; `remove` the file in that case."""
    sha256 = sha256_file(path)
    if sha256 == weights.sha256:
        return
    remedy = "fetch it again"
    if remove:
        path.unlink()
        remedy = "it was removed, run the command again to download it again"
    raise UserError(
        f"{shown or path}: sha256 is {sha256[:16]}..., expected {weights.sha256[:16]}...; the file is damaged or not "
        f"{weights.name}: {remedy}"
    )


def _download(weights: WeightFile) -> Path:
    assert weights.url is not None
    path = make_folder(cache_folder()) / weights.name
    print(f"downloading {weights.url}", file=sys.stderr)
    try:
        with atomic_path(path) as temporary:
            with urllib.request.urlopen(weights.url, timeout=30) as response, open(temporary, "wb") as file:
                shutil.copyfileobj(response, file, 1 << 20)
            _check(temporary, weights, remove=True, shown=weights.url)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # or the connection stays open
        reason = " ".join(str(getattr(error, "reason", error)).split())  # may contain line breaks
        raise UserError(
            f"{weights.name} could not be fetched from {weights.url} ({reason}); download it elsewhere, put it into a "
            f"folder and set VULTUS_WEIGHTS to that folder"
        ) from None
    return path
