"""The shards of a synthetic data set, in the forms that `datasets.load_dataset` reads. Equal rows give equal bytes.

Parquet: the columns image (PNG: bytes and path), identity, noise, score and embedding; `vultus prepare` reads it too.
WebDataset: a tar file with two members for each image, KEY.png and KEY.json, which holds the other columns.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from vultus._files import atomic_path
from vultus.data.integrity import checked_sha256
from vultus.synthesis.faces import Row

Format = Literal["parquet", "webdataset"]
SUFFIXES: dict[Format, str] = {"parquet": ".parquet", "webdataset": ".tar"}


def shard_name(number: int, kind: Format) -> str:
    """The file of a shard. Its start names the split, for `datasets` and for `vultus prepare`."""
    return f"train-{number:05d}{SUFFIXES[kind]}"


def write_shard(path: Path, rows: Sequence[Row], kind: Format, expected: str | None) -> str:
    """Write the rows of a shard atomically. Returns the sha256 of the file.

    Raises UserError if that is not `expected`, the one of a shard that is made again.
    """
    with atomic_path(path) as temporary:
        # Python's file: its errors say which one it is, for instance that the disk is full; those of pyarrow do not.
        with open(temporary, "wb") as file:
            _WRITERS[kind](file, rows)
        return checked_sha256(
            temporary,
            path,
            expected,
            changed="the versions of the libraries or the machine",
            remedy="synthesize into another --out",
        )


def _write_parquet(file: BinaryIO, rows: Sequence[Row]) -> None:
    dim = len(rows[0].embedding)
    features = {  # from which `datasets` learns that the column holds images
        "image": {"_type": "Image"},
        "identity": {"dtype": "int64", "_type": "Value"},
        "noise": {"dtype": "int32", "_type": "Value"},
        "score": {"dtype": "float32", "_type": "Value"},
        "embedding": {"feature": {"dtype": "float32", "_type": "Value"}, "length": dim, "_type": "Sequence"},
    }
    schema = pa.schema(
        [
            ("image", pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            ("identity", pa.int64()),
            ("noise", pa.int32()),
            ("score", pa.float32()),
            ("embedding", pa.list_(pa.float32(), dim)),
        ],
        {"huggingface": json.dumps({"info": {"features": features}})},
    )
    values = [
        {
            "image": {"bytes": row.image, "path": f"{_key(row)}.png"},
            "identity": row.identity,
            "noise": row.noise,
            "score": row.score,
            "embedding": row.embedding,
        }
        for row in rows
    ]
    # PNG is compressed already, and floats hardly get smaller. Small row groups: a stream reads one at a time.
    pq.write_table(pa.Table.from_pylist(values, schema), file, row_group_size=100, compression="none")


def _write_tar(file: BinaryIO, rows: Sequence[Row]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            for suffix, data in _members(row):
                member = tarfile.TarInfo(f"{_key(row)}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _members(row: Row) -> Iterator[tuple[str, bytes]]:
    yield "png", row.image
    values = {"identity": row.identity, "noise": row.noise, "score": row.score, "embedding": row.embedding.tolist()}
    yield "json", json.dumps(values).encode()


def _key(row: Row) -> str:
    return f"{row.identity:08d}_{row.noise:04d}"


_WRITERS: dict[Format, Callable[[BinaryIO, Sequence[Row]], None]] = {
    "parquet": _write_parquet,
    "webdataset": _write_tar,
}
