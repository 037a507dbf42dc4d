"""The folder of a prepared data set while it is written.

Incomplete: shard-*.arrow, progress/begun.json, progress/shard-*.json (a sidecar: its shard is complete)
Complete:   shard-*.arrow, skipped.jsonl, manifest.json (written last)

A shard is one uncompressed Arrow file, which readers memory-map.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from vultus._files import atomic_path, read_json, sha256_file, write_json
from vultus._formats import VERSIONS
from vultus.errors import UserError

SPLITS = ("train", "test")

Json = dict[str, Any]


class PreparedFolder:
    """Writes the folder. The caller holds its lock, so that there is one writer at a time."""

    def __init__(self, folder: Path) -> None:
        """`folder` must exist."""
        self.folder = folder
        self.progress = folder / "progress"
        self.manifest_file = folder / "manifest.json"
        self.skipped_file = folder / "skipped.jsonl"

    def clean(self) -> None:
        """Remove temporary files of a killed process."""
        for parent in (self.folder, self.progress):
            for temporary in parent.glob(".*.tmp"):
                temporary.unlink()
        if self.manifest_file.exists():
            shutil.rmtree(self.progress, ignore_errors=True)

    def begun(self) -> Json | None:
        """The argument of `begin`, or None in a new folder. Raises UserError for shards of unknown origin."""
        file = self.progress / "begun.json"
        if file.exists():
            begun: Json = read_json(file)
            return begun
        if next(self.folder.glob("shard-*.arrow"), None):
            raise UserError(
                f"{self.folder}: holds shards but neither manifest.json nor progress/; choose another --out"
            )
        return None

    def begin(self, begun: Json) -> None:
        """Start from the first item. `begun` is stored for a process that resumes."""
        shutil.rmtree(self.progress, ignore_errors=True)
        self.progress.mkdir()
        write_json(self.progress / "begun.json", begun)

    def done(self) -> list[Json]:
        """The sidecars, in order, up to the first whose shard is missing or damaged."""
        entries: list[Json] = []
        for index in itertools.count():
            sidecar = self.progress / f"shard-{index:05d}.json"
            if not sidecar.exists():
                break
            entry = read_json(sidecar)
            file = self.folder / entry["file"]
            if entry["rows"] and not (file.exists() and sha256_file(file) == entry["sha256"]):
                break
            entries.append(entry)
        return entries

    def write(self, index: int, rows: Sequence[Mapping[str, Any]], dim: int, skipped: list[Json], **more: Any) -> Json:
        """Write shard `index`, then its sidecar, which contains `more` too. Returns the sidecar."""
        file = self.folder / f"shard-{index:05d}.arrow"
        # A shard without a usable photo has no file.
        sha256 = _write_rows(file, rows, dim) if rows else None
        entry = {"file": file.name, "rows": len(rows), "sha256": sha256, **more, "skipped": skipped}
        write_json(self.progress / f"shard-{index:05d}.json", entry)
        return entry

    def people(self, entry: Json) -> Iterator[tuple[str, str]]:
        """(identity, split) of each row of a shard; its images are not read."""
        if entry["rows"]:
            with pa.memory_map(str(self.folder / entry["file"])) as mapped:
                table = pa.ipc.open_file(mapped).read_all()
                yield from zip(table["identity"].to_pylist(), table["split"].to_pylist(), strict=True)

    def finish(self, entries: Iterable[Json], head: Json, tail: Json) -> Json:
        """Write skipped.jsonl, then manifest.json: `head`, counts, `tail`, shards. Returns the manifest.

        Raises UserError if there is no row; the same command then starts from the first photo again.
        """
        entries = list(entries)
        skips = [skip for entry in entries for skip in entry["skipped"]]
        with atomic_path(self.skipped_file) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(skip, ensure_ascii=False) + "\n" for skip in skips)
        shards = [{name: entry[name] for name in ("file", "rows", "sha256")} for entry in entries if entry["rows"]]
        if not shards:
            shutil.rmtree(self.progress)
            first = f" (the first, {skips[0]['key']}: {skips[0]['reason']})" if skips else ""
            raise UserError(f"none of {len(skips)} photos can be used{first}; the reasons are in {self.skipped_file}")
        content = "".join(f"{shard['file']} {shard['rows']} {shard['sha256']}\n" for shard in shards)
        manifest = {
            "schema": VERSIONS["prepared data set"],
            **head,
            "counts": self._counts(entries, len(skips)),
            **tail,
            "shards": shards,
            "content_sha256": hashlib.sha256(content.encode()).hexdigest(),
        }
        write_json(self.manifest_file, manifest)
        shutil.rmtree(self.progress)
        return manifest

    def _counts(self, entries: Iterable[Json], skipped: int) -> Json:
        images = dict.fromkeys(SPLITS, 0)
        people: dict[str, set[str]] = {split: set() for split in SPLITS}
        for entry in entries:
            for identity, split in self.people(entry):
                images[split] += 1
                people[split].add(identity)
        splits = {split: {"images": images[split], "people": len(people[split])} for split in SPLITS}
        return {"images": sum(images.values()), "skipped": skipped, "splits": splits}


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]], dim: int) -> str:
    """Write `rows` as one record batch and return the sha256 of the file. Equal rows give equal bytes."""
    schema = pa.schema(
        [
            ("image", pa.binary()),  # JPEG
            ("embedding", pa.list_(pa.float32(), dim)),  # unit norm
            ("identity", pa.string()),
            ("key", pa.string()),
            ("split", pa.string()),  # one of SPLITS
        ]
    )
    columns = [pa.array([row[field.name] for row in rows], field.type) for field in schema]
    with atomic_path(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch(columns, schema=schema))
        return sha256_file(temporary)
