"""The folder of a prepared data set while it is written.

Incomplete: shard-*.arrow, progress/begun.json, progress/shard-*.json (a sidecar: its shard is complete)
Complete:   shard-*.arrow, skipped.jsonl, shards.jsonl (the sidecars), manifest.json (written last)

A complete folder is reopened to add photos or to make lost shards again: then it has both, and its readers see the old
state until the new manifest is written. A shard is one uncompressed Arrow file, which readers memory-map.
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

from vultus._files import LOCK, atomic_path, json_value, read_json, sha256_file, write_json
from vultus._formats import VERSIONS
from vultus.data.integrity import checked_sha256, lost_shards
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
        self.sidecars_file = folder / "shards.jsonl"

    def remove_temporary(self) -> None:
        """Remove temporary files of killed processes. No process may write to the folder."""
        for parent in (self.folder, self.progress):
            for temporary in parent.glob(".*.tmp"):
                temporary.unlink()

    def clean(self) -> None:
        """Remove temporary files of killed processes, and the progress of one that had written its manifest."""
        self.remove_temporary()
        if not self.manifest_file.exists():
            return
        begun = self.begun()
        if begun is None or begun.get("extends") != sha256_file(self.manifest_file):
            shutil.rmtree(self.progress, ignore_errors=True)

    def begun(self) -> Json | None:
        """The argument of `begin`, or None in a new folder. Raises UserError for shards of unknown origin."""
        file = self.progress / "begun.json"
        if file.exists():
            begun: Json = read_json(file)
            return begun
        if not self.manifest_file.exists() and next(self.folder.glob("shard-*.arrow"), None):
            raise UserError(
                f"{self.folder}: holds shards but neither manifest.json nor progress/; choose another --out"
            )
        return None

    def begin(self, begun: Json) -> None:
        """Start from the first item. `begun` is stored for a process that resumes."""
        shutil.rmtree(self.progress, ignore_errors=True)
        self.progress.mkdir()
        write_json(self.progress / "begun.json", begun)

    def reopen(self, begun: Json, entries: Sequence[Json]) -> None:
        """Start from the sidecars of a complete folder, to add shards or to make lost ones again."""
        shutil.rmtree(self.progress, ignore_errors=True)
        self.progress.mkdir()
        for index, entry in enumerate(entries):
            write_json(self.progress / _sidecar(index), entry)
        # Last: without it, the folder is complete as before.
        write_json(self.progress / "begun.json", begun | {"extends": sha256_file(self.manifest_file)})

    def recorded(self) -> dict[str, str]:
        """{file: sha256} of the shards in the manifest, if the folder is complete or was."""
        if not self.manifest_file.exists():
            return {}
        return {shard["file"]: shard["sha256"] for shard in read_json(self.manifest_file)["shards"]}

    def sidecars(self) -> list[Json]:
        """The sidecars of a complete folder, in order; empty if a version wrote it that did not keep them."""
        if not self.sidecars_file.is_file():
            return []
        try:
            lines = self.sidecars_file.read_text(encoding="utf-8").splitlines()
            return [json_value(line) for line in lines]
        except ValueError as error:
            raise UserError(f"{self.sidecars_file}: damaged ({error}); delete it, then run the same command") from None

    def done(self) -> list[Json]:
        """The sidecars, in order. Those whose shard is missing or damaged have `lost`, with the reason."""
        entries: list[Json] = []
        for index in itertools.count():
            sidecar = self.progress / _sidecar(index)
            if not sidecar.exists():
                break
            entries.append(read_json(sidecar))
        lost = lost_shards(self.folder, [entry for entry in entries if entry["rows"]])
        for index, entry in enumerate(entries):
            if entry["rows"] and entry["file"] in lost:
                if "listing" not in entry and "last" in entry["position"]:
                    return entries[:index]  # of a folder, by a version that did not keep the names of its photos
                entry["lost"] = lost[entry["file"]]
        return entries

    def write(
        self, index: int, rows: Sequence[Mapping[str, Any]], dims: Mapping[str, int], expected: str | None = None
    ) -> Json:
        """Write shard `index`, with embeddings of these lengths. Returns its file name, number of rows and sha256.

        Raises UserError if `expected` is given and not the sha256 of the shard, which is not written then.
        """
        file = self.folder / _shard(index)
        # A shard without a usable photo has no file.
        sha256 = _write_rows(file, rows, dims, expected) if rows else None
        return {"file": file.name, "rows": len(rows), "sha256": sha256}

    def record(self, index: int, entry: Json) -> None:
        """Write the sidecar of shard `index`, with which it is complete."""
        write_json(self.progress / _sidecar(index), entry)

    def people(self, entry: Json) -> Iterator[tuple[str, str]]:
        """(identity, split) of each row of a shard; its images are not read."""
        yield from zip(*(self.column(entry, name) for name in ("identity", "split")), strict=True)

    def column(self, entry: Json, name: str) -> list[Any]:
        """The values of a column of a shard."""
        if not entry["rows"]:
            return []
        with pa.memory_map(str(self.folder / entry["file"])) as mapped:
            values: list[Any] = pa.ipc.open_file(mapped).read_all()[name].to_pylist()
            return values

    def finish(self, entries: Iterable[Json], head: Json, tail: Json) -> Json:
        """Write skipped.jsonl, shards.jsonl, then manifest.json: `head`, counts, `tail`, shards. Returns the manifest.

        Raises UserError if there is no row; the same command then starts from the first photo again.
        """
        entries = list(entries)
        skips = _latest_skips(entries)
        _write_lines(self.skipped_file, ({key: skip[key] for key in ("key", "reason")} for skip in skips))
        shards = [{name: entry[name] for name in ("file", "rows", "sha256")} for entry in entries if entry["rows"]]
        if not shards:
            shutil.rmtree(self.progress)
            first = f" (the first, {skips[0]['key']}: {skips[0]['reason']})" if skips else ""
            raise UserError(f"none of {len(skips)} photos can be used{first}; the reasons are in {self.skipped_file}")
        names = {entry["file"] for entry in entries}
        for file in self.folder.glob("shard-*.arrow"):
            if file.name not in names:  # of a process that was killed before photos were removed from the source
                file.unlink()
        _write_lines(self.sidecars_file, map(_lasting, entries))
        content = "".join(f"{shard['file']} {shard['rows']} {shard['sha256']}\n" for shard in shards)
        manifest = {
            "schema": VERSIONS["prepared data set"],
            **head,
            "counts": self._counts(entries, len(skips)),
            **tail,
            "shards": shards,
            "content_sha256": hashlib.sha256(content.encode()).hexdigest(),
        }
        earlier = self._earlier(manifest["content_sha256"])
        if earlier:
            manifest["earlier"] = earlier
        write_json(self.manifest_file, manifest)
        shutil.rmtree(self.progress)
        return manifest

    def _earlier(self, content_sha256: str) -> list[Json]:
        """The states that a run may have begun with: number of shards, counts, content_sha256."""
        if not self.manifest_file.exists():
            return []
        before = read_json(self.manifest_file)
        states: list[Json] = before.get("earlier", [])
        if before["content_sha256"] == content_sha256:
            return states
        state = {"shards": len(before["shards"]), "counts": before["counts"]}
        return [*states, state | {"content_sha256": before["content_sha256"]}]

    def _counts(self, entries: Iterable[Json], skipped: int) -> Json:
        images = dict.fromkeys(SPLITS, 0)
        people: dict[str, set[str]] = {split: set() for split in SPLITS}
        for entry in entries:
            for identity, split in self.people(entry):
                images[split] += 1
                people[split].add(identity)
        splits = {split: {"images": images[split], "people": len(people[split])} for split in SPLITS}
        return {"images": sum(images.values()), "skipped": skipped, "splits": splits}


def check_place(source: str, out: Path) -> None:
    """Raise UserError unless a data set can be written to `out`, or is there already.

    Refused are the source itself, a folder inside it (which would be read as a part of it the next time), and a folder
    that holds other files.
    """
    place, origin = out.resolve(), Path(source).resolve()
    if place == origin:
        raise UserError(f"--out {out}: is the source; choose another folder, which is not in the source")
    if not place.is_dir():
        if origin.is_dir() and origin in place.parents:
            raise UserError(f"--out {out}: is inside the source {source}; choose a folder outside of it")
        return
    begun = place / "progress" / "begun.json"
    if (place / "manifest.json").exists():
        manifest = read_json(place / "manifest.json")
        if not (isinstance(manifest, dict) and {"schema", "shards", "content_sha256"} <= manifest.keys()):
            raise UserError(f"--out {out}: its manifest.json is not one of a prepared data set; choose another folder")
        return
    if begun.exists():
        return
    if origin.is_dir() and origin in place.parents:
        raise UserError(f"--out {out}: is inside the source {source}; choose a folder outside of it")
    if place in origin.parents:
        raise UserError(f"--out {out}: contains the source {source}; choose an empty or new folder")
    names = [path.relative_to(place).as_posix() for path in place.iterdir() if not _is_own(path)]
    if (place / "progress").is_dir():
        names += [f"progress/{path.name}" for path in (place / "progress").iterdir() if not _is_own(path)]
    if names:
        shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        raise UserError(f"--out {out}: holds other files ({shown}); choose an empty or new folder")


def _is_own(path: Path) -> bool:
    name = path.name
    return (
        name in ("progress", "skipped.jsonl", "shards.jsonl", LOCK)
        or name.startswith(".")
        or (name.startswith("shard-") and path.suffix in (".arrow", ".json"))
    )


def _shard(index: int) -> str:
    return f"shard-{index:05d}.arrow"


def _sidecar(index: int) -> str:
    return f"shard-{index:05d}.json"


def _latest_skips(entries: Sequence[Json]) -> list[Json]:
    """The skipped photos, without those that a later shard took up again, and folders that were read later."""
    latest = {item[0]: index for index, entry in enumerate(entries) for item in entry.get("listing", ())}

    def stands(skip: Json, index: int) -> bool:
        key = skip["key"]
        if key.endswith("/") and any(other.startswith(key) and other != key for other in latest):
            return False
        return latest.get(key, index) == index

    return [skip for index, entry in enumerate(entries) for skip in entry["skipped"] if stands(skip, index)]


def _lasting(entry: Json) -> Json:
    """A sidecar without the state of a stream, which differs between an interrupted preparation and a whole one."""
    if "stream" not in (entry.get("position") or {}):
        return entry
    return {**entry, "position": {"row": entry["position"]["row"]}}


def _write_lines(path: Path, values: Iterable[Json]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]], dims: Mapping[str, int], expected: str | None) -> str:
    """Write `rows` as one record batch and return the sha256 of the file. Equal rows give equal bytes.

    Raises UserError if that is not `expected`.
    """
    schema = pa.schema(
        [
            ("image", pa.binary()),  # JPEG
            ("embedding", pa.list_(pa.float32(), dims["embedding"])),  # unit norm
            ("identity", pa.string()),
            ("key", pa.string()),
            ("split", pa.string()),  # one of SPLITS
            # FaceNet's, where "embedding" is another encoder's.
            *((name, pa.list_(pa.float32(), dim)) for name, dim in dims.items() if name != "embedding"),
        ]
    )
    columns = [pa.array([row[field.name] for row in rows], field.type) for field in schema]
    with atomic_path(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch(columns, schema=schema))
        return checked_sha256(
            temporary,
            path,
            expected,
            changed="the photos, the versions of the libraries or the machine",
            remedy="prepare the data set into another --out",
        )
