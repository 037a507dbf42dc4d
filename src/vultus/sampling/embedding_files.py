"""Read face embeddings from a file or a prepared data set, in chunks.

A source is `PATH` or `PATH:NAME`:

| file | read | NAME |
|---|---|---|
| `.npy` | rows of the array | |
| `.npz` | rows of one array of the archive | the array; without it `embeddings`, `embedding` or the first |
| `.safetensors` | rows of one tensor | the tensor; as for `.npz` |
| `.parquet` | a column of lists | the column; without it `embedding` |
| `.csv` | the columns of numbers after the key of the photo; without a key all columns | |
| `.json` | what `vultus embed`, the page or the HTTP API writes, or a list of numbers or of lists | |
| folder | the embeddings of a prepared data set | the split; without it all rows |

Arrays are [N, dim], or [dim] for one embedding. Memory does not grow with N, except for `.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vultus.errors import UserError
from vultus.sampling.embedding_arrays import read_npy, read_npz, read_safetensors
from vultus.sampling.embedding_rows import Embeddings, Needed, reading
from vultus.sampling.embedding_tables import read_csv, read_folder, read_json_file, read_parquet

_READERS: dict[str, Callable[[str, Path, str | None, Needed], Embeddings]] = {
    ".npy": read_npy,
    ".npz": read_npz,
    ".safetensors": read_safetensors,
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".json": read_json_file,
}


def open_embeddings(source: str | Path, dim: int = 512, encoder: Mapping[str, Any] | None = None) -> Embeddings:
    """Open a source (see above) and check its shape, type and, where it names one, its encoder.

    `encoder` describes the one that is needed, if it is known, as encoder_entry() does. Raises UserError that names the
    source and the remedy.
    """
    text = str(source)
    path, name = split_source(source)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    reader = read_folder if path.is_dir() else _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: cannot read embeddings from {path.suffix or 'this'}; use {', '.join(_READERS)}")
    with reading(path):
        return reader(text, path, name, Needed(dim, encoder or {}))


def split_source(source: str | Path) -> tuple[Path, str | None]:
    """`PATH:NAME` or `PATH` -> (PATH, NAME or None)."""
    path = Path(source)
    if not path.exists() and ":" in str(source):
        head, _, tail = str(source).rpartition(":")
        return Path(head), tail or None
    return path, None
