"""The Parquet files of a source: their row groups, whose photos they hold, and the rows of one row group."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from vultus.data.items import Item, counted
from vultus.data.stream.cache import Cache
from vultus.data.stream.places import Place, too_many
from vultus.data.stream.remote import Broken, Reader
from vultus.data.tables import Columns, check_split, choose_columns, split_of
from vultus.errors import UserError, in_one_line

READERS = 8  # files that are asked for their index at a time
FOOTERS = 64  # footers in memory


@dataclass
class Shard:
    """A Parquet file of a source.

    Attributes:
        place: see Place.
        use: "test" or "train"; a source without a test split has "train" only.
        groups: number of rows of each row group.
        first_row: number of its first row in its split.
        codes: int32 [rows], the number of the identity of each row in `names`; -1 where the row has none.
        names: identities.
    """

    place: Place
    use: str
    groups: list[int]
    first_row: int = 0
    codes: npt.NDArray[np.int32] | None = None
    names: Sequence[str] = ()

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.place.file.name

    def entry(self) -> list[Any]:
        """What a run records: name, size in bytes, ETag, rows."""
        return [self.place.name, self.place.file.size, self.place.file.etag, sum(self.groups)]

    def identities(self) -> list[str]:
        """The identity of each row; of a row without one, a name that no other row has."""
        assert self.codes is not None
        return [self.names[code] if code >= 0 else self.default_key(row) for row, code in enumerate(self.codes)]

    def default_key(self, row: int) -> str:
        """The key of a row whose image has no path."""
        return f"{self.place.split}/{self.first_row + row:07d}"


class Shards:
    """Opens the files of a source and reads them."""

    def __init__(self, source: str, places: Sequence[Place], cache: Cache) -> None:
        self.source, self.places, self.cache = source, places, cache
        self.columns: Columns = ("", None)
        self.missing_identities = 0
        self.broken: list[Broken] = []
        self._footer = functools.lru_cache(FOOTERS)(self._read_footer)
        self._local = threading.Lock()

    def open(self, split: str | None, image_column: str | None, id_column: str | None) -> list[Shard]:
        """The files with their index, those of a test split first, as `prepare` reads them.

        A file for training that cannot be read is left out (`broken`). Raises UserError if no other can be read, if a
        file for validation cannot (its people could not be kept out of the training), and for columns as `prepare`.
        """
        check_split(self.source, split, {place.split for place in self.places})
        chosen = [place for place in self.places if split in (None, place.split)]
        with ThreadPoolExecutor(READERS, "vultus-index") as pool:
            footers = list(pool.map(self._try_footer, chosen))
            readable = [place for place, footer in zip(chosen, footers, strict=True) if footer is not None]
            self._check_broken(chosen)
            # The schema in the footer is that of the file: all must have the same columns.
            schemas = {footer.name: footer.schema for footer in footers if footer is not None}
            self.columns = choose_columns(schemas, image_column, id_column)
            groups = {footer.name: footer.groups for footer in footers if footer is not None}
            shards = [Shard(place, split_of(place.split), groups[place.file.name]) for place in readable]
            shards.sort(key=lambda shard: (shard.use != "test", shard.place.split))  # keeps the order of the files
            rows: dict[str, int] = {}
            for shard in shards:
                shard.first_row = rows.get(shard.place.split, 0)
                rows[shard.place.split] = shard.first_row + sum(shard.groups)
            list(pool.map(lambda shard: self._read_identities(shard, required=id_column is not None), shards))
        self._check_broken(chosen)
        broken = {error.name for error in self.broken}
        shards = [shard for shard in shards if shard.name not in broken]
        if not any(sum(shard.groups) for shard in shards):
            raise UserError(f"{self.source}: no rows in its Parquet files")
        return shards

    def _check_broken(self, chosen: Sequence[Place]) -> None:
        uses = {place.file.name: split_of(place.split) for place in chosen}
        test = [error for error in self.broken if uses[error.name] == "test"]
        if test and set(uses.values()) != {"test"}:
            raise UserError(
                f"{test[0]}; it holds the people for validation, who can't be told from the others without it: run "
                "the same command again, or stream the training split alone with --split"
            )
        if 2 * len(self.broken) > len(chosen):
            raise too_many(self.source, self.broken, len(chosen))

    # --- the index ---------------------------------------------------------------------------------------------------

    def _try_footer(self, place: Place) -> _Footer | None:
        try:
            place.file.open()
            metadata = self._footer(place)
        except Broken as error:
            self.broken.append(error)
            return None
        groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        return _Footer(place.file.name, metadata.schema.to_arrow_schema(), groups)

    def _read_footer(self, place: Place) -> pq.FileMetaData:
        return self._parquet(place, lambda reader: pq.read_metadata(reader))

    def _parquet(self, place: Place, read: Any, spans: Sequence[tuple[int, int]] = ()) -> Any:
        """What `read` makes of a file object that holds `spans`. Raises Broken and UserError."""
        reader = Reader(place.file, spans)
        try:
            return read(reader)
        except (Broken, UserError):
            raise
        except (pa.ArrowException, OSError, ValueError, EOFError) as error:
            if isinstance(reader.error, Broken | UserError):
                raise reader.error from None
            raise Broken(place.file.name, f"not Parquet that can be read ({in_one_line(error)})") from None

    def _read_identities(self, shard: Shard, *, required: bool) -> None:
        image, identity = self.columns
        key = Cache.key("index", shard.entry(), image, identity)
        cached = self.cache.get(key)
        if cached is not None:
            shard.codes, (shard.names, missing) = cached[0]["codes"], cached[1]
        else:
            try:
                missing = self._compute_identities(shard)
            except Broken as error:
                self.broken.append(error)
                return
            assert shard.codes is not None
            self.cache.put(key, {"codes": shard.codes}, [list(shard.names), missing])
        if missing and required:
            raise UserError(
                f"{shard.name}: --id-column {identity} has no value in {counted(missing, 'row')}; name another column, "
                "or leave these rows out"
            )
        self.missing_identities += missing if identity is not None else 0

    def _compute_identities(self, shard: Shard) -> int:
        image, identity = self.columns
        rows = sum(shard.groups)
        values: list[str | None] = [None] * rows
        if identity is not None:
            values = [_text(value) for value in self._column(shard, identity)]
        missing = values.count(None)
        if missing:  # a person of its own, named as the photo is
            field = self._footer(shard.place).schema.to_arrow_schema().field(image)
            if pa.types.is_struct(field.type) and "path" in [each.name for each in field.type]:
                paths = [image and image.get("path") for image in self._column(shard, f"{image}.path")]
                values = [path if value is None else value for value, path in zip(values, paths, strict=True)]
        names = list(dict.fromkeys(value for value in values if value))
        numbers = {name: number for number, name in enumerate(names)}
        shard.codes = np.asarray([numbers[value] if value else -1 for value in values], np.int32)
        shard.names = names
        return missing

    def _column(self, shard: Shard, name: str) -> list[Any]:
        metadata = self._footer(shard.place)

        def read(reader: Reader) -> pa.Table:
            return _valid(pq.ParquetFile(reader, metadata=metadata).read(columns=[name], use_threads=False))

        spans = _spans(metadata, range(metadata.num_row_groups), [name])
        return self._parquet(shard.place, read, spans).column(0).to_pylist()

    # --- the rows ----------------------------------------------------------------------------------------------------

    def items(self, shard: Shard, group: int, rows: npt.NDArray[np.int64]) -> list[Item]:
        """The photos of these rows of a row group, by their numbers in it. Raises Broken and UserError."""
        image, identity = self.columns
        wanted = [image] if identity is None else [image, identity]
        metadata = self._footer(shard.place)

        def read(reader: Reader) -> pa.Table:
            file = pq.ParquetFile(reader, metadata=metadata)
            return _valid(file.read_row_group(group, columns=wanted, use_threads=False).take(rows))

        table = self._parquet(shard.place, read, _spans(metadata, [group], wanted))
        before = sum(shard.groups[:group])
        names = [None] * len(rows) if identity is None else table.column(identity).to_pylist()
        items = []
        for row, value, name in zip(rows.tolist(), table.column(image), names, strict=True):
            picture = value.as_py()
            data, path = (picture, None) if isinstance(picture, bytes) else ((picture or {}).get(part) for part in KEYS)
            key = path or shard.default_key(before + row)
            items.append(Item(key, _text(name) or key, data))
        return items


KEYS = ("bytes", "path")


@dataclass(frozen=True)
class _Footer:
    name: str
    schema: pa.Schema
    groups: list[int]


def _valid(table: pa.Table) -> pa.Table:
    """The table. Raises pa.ArrowInvalid if a text in it is not UTF-8, which would fail where it is used."""
    table.validate(full=True)
    return table


def _spans(metadata: pq.FileMetaData, groups: Iterable[int], columns: Sequence[str]) -> list[tuple[int, int]]:
    """Where the values of these columns, or fields of columns, are in the file."""
    spans = []
    for number in groups:
        group = metadata.row_group(number)
        for index in range(group.num_columns):
            chunk = group.column(index)
            if any(chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.") for name in columns):
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                start = min(start, chunk.data_page_offset)
                spans.append((start, start + chunk.total_compressed_size))
    return spans


def _text(value: Any) -> str | None:
    """An identity as text; None for a missing value."""
    return None if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)
