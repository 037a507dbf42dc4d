"""Which Parquet files a source to stream has, and in which splits: hf://, http(s)://, or files on a disk."""

from __future__ import annotations

import fnmatch
import glob
import html.parser
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vultus._download import HUB
from vultus.data.items import counted
from vultus.data.stream.remote import Attempts, Broken, LocalFile, RemoteFile
from vultus.data.tables import datasets_library, hub_errors, parquet_files, split_name
from vultus.errors import UserError

WEB = ("http://", "https://")
MAX_LISTING = 1 << 26  # bytes of a list of files


@dataclass(frozen=True)
class Place:
    """A Parquet file: its name in the source, which is the same on another server, its split, and how to read it."""

    name: str
    split: str
    file: RemoteFile | LocalFile


@dataclass(frozen=True)
class Places:
    """The files of a source, and the revision of a data set on the hub."""

    places: list[Place]
    revision: str | None = None


def is_streamed(data: str | Path) -> bool:
    """Whether `--data` names a source to stream: an address, or Parquet files on a disk."""
    text = str(data)
    if text.startswith((HUB, *WEB)):
        return True
    path = Path(text)
    if path.is_dir():
        prepared = (path / "manifest.json").exists() or (path / "progress").is_dir()
        return not prepared and bool(_in_folder(path))
    return text.endswith(".parquet") and (path.is_file() or glob.has_magic(text))


def find_places(source: str, attempts: Attempts, *, revision: str | None = None) -> Places:
    """The Parquet files of a source, in order. Raises UserError that names what is wrong in a line.

    `revision` is that of an earlier call, for a data set on the hub whose own is not given.
    """
    if source.startswith(HUB):
        return _hub(source, attempts, revision)
    if source.startswith(WEB):
        return Places(_web(source, attempts))
    path = Path(source)
    files = _in_folder(path) if path.is_dir() else [path]
    if not path.exists():
        files = [Path(name) for name in sorted(glob.glob(source, recursive=True)) if name.endswith(".parquet")]
    if not files:
        raise UserError(f"{source}: no Parquet file matches")
    return Places([Place(file.name, split_name(file), LocalFile(file)) for file in files])


def _in_folder(folder: Path) -> list[Path]:
    return parquet_files(folder) or parquet_files(folder, "*/*.parquet")


# --- the hub ---------------------------------------------------------------------------------------------------------


def _hub(source: str, attempts: Attempts, revision: str | None) -> Places:
    name, _, given = source.removeprefix(HUB).removeprefix("datasets/").strip("/").partition("@")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]*\w)?", name):
        raise UserError(f"{source}: not the address of a data set; give hf://user/name, or hf://user/name@revision")
    library = datasets_library()
    import huggingface_hub

    with hub_errors(source):
        # A single request first: without a network the others would be tried for half a minute.
        wanted = urllib.parse.unquote(given) or revision
        sha = str(huggingface_hub.HfApi().dataset_info(name, revision=wanted, timeout=20).sha)
        splits = library.load_dataset_builder(name, revision=sha).config.data_files or {}
        paths = [(str(split), str(path)) for split, files in splits.items() for path in files]
    if not paths or not all(path.endswith(".parquet") for _, path in paths):
        raise UserError(
            f"{source}: its files are not Parquet, so it can't be streamed in a mixed order; stream its Parquet copy, "
            f"hf://{name}@refs%2Fconvert%2Fparquet, or prepare it: vultus prepare {name} --out DIR"
        )
    headers = huggingface_hub.utils.build_hf_headers  # type: ignore[attr-defined]
    places = []
    for split, path in paths:
        file = path.partition(f"@{sha}/")[2]  # of hf://datasets/user/name@revision/path
        url = huggingface_hub.hf_hub_url(name, file, repo_type="dataset", revision=sha)
        shown = f"{HUB}{name}/{file}"
        places.append(
            Place(
                file,
                split,
                RemoteFile(url, attempts, name=shown, headers=headers, revision=sha),
            )
        )
    return Places(places, sha)


# --- HTTP ------------------------------------------------------------------------------------------------------------


def _web(source: str, attempts: Attempts) -> list[Place]:
    """The file itself, the matches of a pattern in the listing of its folder, or the files that a list names."""
    parts = urllib.parse.urlsplit(source)
    folder, _, last = parts.path.rpartition("/")
    if last.endswith(".parquet") and not glob.has_magic(last):
        urls = [source]
    elif last.endswith(".parquet") or not last:
        listing = urllib.parse.urlunsplit(parts._replace(path=f"{folder}/", query="", fragment=""))
        pattern = last or "*.parquet"
        links = {urllib.parse.urljoin(listing, link) for link in _links(_text(listing, attempts))}
        urls = [url for url in links if fnmatch.fnmatch(_file_name(url), pattern)]
        if not urls:
            raise UserError(
                f"{source}: the page of this folder links no file that matches {pattern}; give a list of the files, "
                "one address a line, as --data https://.../files.txt"
            )
    else:
        lines = [line.strip() for line in _text(source, attempts).splitlines()]
        urls = [urllib.parse.urljoin(source, line) for line in lines if line and not line.startswith("#")]
        wrong = next((url for url in urls if not url.startswith(WEB) or not _file_name(url).endswith(".parquet")), None)
        if wrong is not None or not urls:
            what = f"names {wrong[:80]!r}" if wrong else "is empty"
            raise UserError(f"{source}: not a Parquet file and not a list of them, one address a line (it {what})")
    urls = sorted(urls, key=_file_name)
    return [Place(_file_name(url), split_name(Path(_file_name(url))), RemoteFile(url, attempts)) for url in urls]


def _file_name(url: str) -> str:
    return urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])


def _text(url: str, attempts: Attempts) -> str:
    file = RemoteFile(url, attempts)
    try:
        return file.whole(MAX_LISTING).decode("utf-8", "replace")
    except Broken as error:
        raise UserError(f"{error}; check the address and the network") from None


def _links(page: str) -> Iterator[str]:
    parser = _Links()
    parser.feed(page)
    yield from parser.found


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def too_many(source: str, broken: list[Broken], count: int) -> UserError:
    """The error where so many shards are broken that the rest would be another data set."""
    first = broken[0]
    return UserError(
        f"{source}: {counted(len(broken), 'file')} of {count} can't be read (the first: {first.name}: {first.reason}); "
        "check the address and the network, then run the same command again"
    )
