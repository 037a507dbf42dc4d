"""Local Parquet files as a source, which is read from any row on."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vultus.data.items import Item, Position
from vultus.errors import UserError, in_one_line

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 32  # that are read at a time; bounds the memory
BUFFER = 1 << 20  # bytes of a column that are read at a time


def row_item(
    row: int, image: dict[str, Any] | None, identity: Any, *, source: str, name: str, column: str | None, required: bool
) -> Item:
    """The item of a row of the split `name`.

    Raises UserError if the row has no identity in the `column`, and one is `required`.
    """
    image = image or {}
    key = image.get("path") or f"{name}/{row:07d}"
    if isinstance(identity, float) and math.isnan(identity):
        identity = None
    if identity is None and required:
        raise UserError(
            f"{source}: --id-column {column} has no value in row {row} of {name}; name another column, or leave the "
            "row out"
        )
    return Item(key, key if identity is None else str(identity), image.get("bytes"))


def broke_off(source: str, name: str, row: int, reason: str) -> UserError:
    """The error for a source whose reading ended with an error."""
    return UserError(
        f"{source}: reading broke off at row {row} of {name} ({reason}); what is done is kept: repair the source or "
        "the network and run the same command again"
    )


class ParquetPart:
    """One split in Parquet files. It can be pickled."""

    seekable = True

    def __init__(
        self,
        name: str,
        split: str,
        files: Sequence[tuple[Path, int]],
        source: str,
        columns: tuple[str, str | None],
        *,
        identity_required: bool = False,
    ) -> None:
        """`files`: in order, each with its number of rows; they have the `columns`, of the image and of the
        identity. `source` is for messages."""
        self.name = name
        self.split: str | None = split
        self.files = [(path.absolute(), rows) for path, rows in files]
        self.total: int | None = sum(rows for _, rows in files)
        self.source = source
        self._columns = columns
        self._required = identity_required
        self._row = 0

    def items(self, position: Position | None) -> Generator[Item, None, None]:
        """Rows after `position`. Raises UserError if a file is damaged, or a row lacks an identity that is required."""
        self._row = position["row"] if position else 0
        image, identity = self._columns
        batches = self._batches(self._row)
        while True:
            try:
                batch = next(batches)
                images = batch[image].to_pylist()  # fails for text that is not UTF-8
                people = batch[identity].to_pylist() if identity else [None] * len(images)
            except StopIteration:
                return
            except Exception as error:  # of pyarrow, which has its own classes
                reason = f"{type(error).__name__}: {in_one_line(error)}"
                raise broke_off(self.source, self.name, self._row, reason) from error
            for cell, person in zip(images, people, strict=True):
                given = {"bytes": cell} if isinstance(cell, bytes) else cell
                item = row_item(
                    self._row,
                    given,
                    person,
                    source=self.source,
                    name=self.name,
                    column=identity,
                    required=self._required,
                )
                self._row += 1
                yield item

    def position(self) -> Position:
        """The number of rows before the next one."""
        return {"row": self._row}

    def _batches(self, first: int) -> Iterator[pa.RecordBatch]:
        """The rows from `first` on. Row groups before it are not read."""
        import pyarrow.parquet as pq

        names = [name for name in self._columns if name is not None]
        kind = None
        for path, rows in self.files:
            with pq.ParquetFile(path, buffer_size=BUFFER) as file:
                if self._columns[1] is not None and kind is None:
                    kind = file.schema_arrow.field(self._columns[1]).type
                if first >= rows:
                    first -= rows
                    continue
                for group in range(file.num_row_groups):
                    count = file.metadata.row_group(group).num_rows
                    if first >= count:
                        first -= count
                        continue
                    for batch in file.iter_batches(ROWS, row_groups=[group], columns=names):
                        rest = batch.slice(min(first, batch.num_rows))
                        first -= batch.num_rows - rest.num_rows
                        yield _as(rest, self._columns[1], kind)


def _as(batch: pa.RecordBatch, column: str | None, kind: pa.DataType | None) -> pa.RecordBatch:
    """The batch with a column of this type. Files may differ, and a person has one name in all: 5, not 5.0."""
    if column is None or batch.schema.field(column).type == kind:
        return batch
    index = batch.schema.get_field_index(column)
    return batch.set_column(index, column, batch[column].cast(kind))
