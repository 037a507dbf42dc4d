"""Photos to a prepared data set: crops, embeddings, identities and splits.

A shard covers a fixed number of items of the source, unusable photos included, and no batch spans two shards. A killed
run therefore resumes after the last complete shard and ends with the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vultus._device import resolve_device
from vultus._engines import Engine, check_workers
from vultus._files import folder_lock, make_folder
from vultus._ranges import Count, checked
from vultus.data.crops import Encoders
from vultus.data.embedding_table import read_table
from vultus.data.existing import Existing
from vultus.data.items import ONE_PER_IMAGE, Source, nobody_named
from vultus.data.options import Options
from vultus.data.photo_folder import FolderPart
from vultus.data.preparation import Preparation, Workers, describe
from vultus.data.shards import PreparedFolder, check_place
from vultus.data.sources import open_source
from vultus.errors import UserError
from vultus.models.encoders import FACENET, NAMES, CropEncoder, load_face_encoder
from vultus.models.facenet import DTYPES, fastest_dtype, load_facenet
from vultus.models.onnx_runtime import is_onnx

KEYS_TRIED = 1000  # photos that are looked up in a table before the work begins
SHARD_ITEMS = 1024  # items per shard: about 20 s of work on two cores, which is what a kill can cost


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    resolution: int = 128,
    split: str | None = None,
    test_fraction: float = 0.1,
    align: bool = False,
    licence: str | None = None,
    limit: int | None = None,
    batch: int = 32,
    device: str = "auto",
    dtype: str = "auto",
    image_column: str | None = None,
    id_column: str | None = None,
    encoder: str | Path | CropEncoder = FACENET,
    embeddings: str | Path | None = None,
    facenet: bool = True,
    shard_items: int = SHARD_ITEMS,
    workers: int | None = None,
    engine: Engine = "processes",
) -> dict[str, Any]:
    """Prepare `source` into the folder `out` and return the manifest.

    Args:
        source: a folder of photos, Parquet (file, folder or glob) or the id of a Hugging Face data set.
        out: the folder to write; the same call again resumes it. If it is complete, photos that were added to a source
            folder since are added as further shards, and shards that are lost are made again.
        resolution: side of the stored crops in pixels, 16 to 1024.
        split: read only this split of the source.
        test_fraction: fraction of the identities in the test split, if the source does not have train and test splits.
        align: detect the face and align it first; photos without a face are skipped.
        licence: of the photos; free text for the manifest.
        limit: read at most this many photos; if the source has splits, `test_fraction` of them from its test split.
        batch: photos per batch of the encoder.
        device: of the encoder: auto (cuda, else mps, else cpu), or its name.
        dtype: of the encoder: "float32", "bfloat16", or "auto" for the faster one.
        image_column: of a table, the column of the images; default "image".
        id_column: of a table, the column of the identities; default the first of celeb_id, identity, identity_id,
            person, person_id, subject, subject_id and label that is there. Without one, every image counts as a person
            of its own.
        encoder: of the condition: "facenet", "mobilefacenet", "dlib", or FILE.onnx (see vultus.models.encoders); with
            `embeddings`, the name of the encoder that computed them. A CropEncoder is used as it is, on `device`; on a
            CPU several threads call it, and FaceNet's embedding is not stored beside its own.
        embeddings: a table of a vector for each photo (see vultus.data.embedding_table), instead of an encoder. Its
            keys are those of the photos: the path in a folder, the name in a table. Photos without a row are skipped.
        facenet: with another encoder, store FaceNet's embedding beside the condition, for the losses of the presets.
        shard_items: items of the source per shard.
        workers: number of processes that write shards; None: this one does. The result is the same. A program that
            starts processes must be importable: `if __name__ == "__main__":`. They get a copy of `encoder`.
        engine: of the workers: "processes" of this machine, or "ray", on the cluster that RAY_ADDRESS names or else on
            this machine (extra `scale`). `source`, `out` and the weights are on a disk that all machines of it reach.

    If an identity is in both splits of the source, its train photos are skipped. Messages and progress go to stderr.

    Raises UserError for an invalid option or source, a folder that is locked, holds other files, lies in the source or
    was begun with other options, and OSError if `out` cannot be written. What is done is kept; the same call resumes.
    """
    checked(workers, Count | None, "--workers")
    check_workers(workers, checked(engine, Engine, "--engine"))
    source, device = str(source), resolve_device(device) if device == "auto" else device
    options = Options(
        source,
        resolution,
        split,
        test_fraction,
        align,
        licence,
        limit,
        batch,
        device,
        dtype,
        shard_items,
        image_column,
        id_column,
        *_condition(encoder, embeddings, facenet),
    )
    check_place(source, Path(out))
    out = make_folder(out)
    with folder_lock(out, "prepare"):
        folder = PreparedFolder(out)
        folder.clean()
        begun = folder.begun()
        existing = None
        if folder.manifest_file.exists() and begun is None:
            existing = Existing(folder, options)
            if not existing.needs_work():
                counts = describe(existing.manifest["counts"])
                print(f"{out}: already complete, {counts}; nothing to do", file=sys.stderr)
                return existing.manifest
            begun = existing.begun
        elif begun:
            options.check_same(out, begun["options"])
        opened = (existing and existing.source) or open_source(
            source, split, revision=begun["revision"] if begun else None, image_column=image_column, id_column=id_column
        )
        if isinstance(encoder, str | Path):
            # "auto" depends on a measurement, so it is resolved once for the whole folder.
            name = (begun.get("facenet") or begun["encoder"])["dtype"] if begun else dtype
            exact = fastest_dtype(device) if name == "auto" else DTYPES[name]
            load: Callable[[], Encoders] = functools.partial(load_encoders, options, str(encoder), exact)
        else:
            load = functools.partial(Encoders, encoder)
        encoders = load()
        _check_keys(encoders, opened, source)
        now = {
            "options": vars(options),
            **encoders.entries(),
            "revision": opened.revision,
            "columns": opened.columns,
        }
        if begun is None:
            folder.begin(now)
        elif any(now.get(key) != begun.get(key) for key in ("encoder", "facenet")):
            raise UserError(f"{out}: was begun with another encoder, {begun['encoder']}; choose another --out")
        elif now["revision"] != begun["revision"]:
            raise UserError(f"{out}: the files of {source} have changed since it was begun; choose another --out")
        elif opened.columns and list(opened.columns) != begun.get("columns", _columns_before(opened.columns)):
            raise UserError(f"{out}: was begun with other columns than {opened.columns}; choose another --out")
        if existing is not None:
            folder.reopen(now, existing.entries)
        _say_what_is_read(source, opened)
        several = None if workers is None else Workers(workers, engine, load)
        return Preparation(folder, options, opened, encoders, several).run()


def _condition(
    encoder: str | Path | CropEncoder, embeddings: str | Path | None, facenet: bool
) -> tuple[str | None, str | None, bool | None]:
    """The options `encoder`, `embeddings` and `facenet`. Raises UserError for an encoder that there is not."""
    if not isinstance(encoder, str | Path):
        return None, None, None
    name = str(encoder)
    if embeddings is not None:
        if is_onnx(name):
            raise UserError(f"--encoder {name} and --embeddings {embeddings} both give the embeddings; leave one out")
        return None if name == FACENET else name, str(embeddings), facenet
    if name not in NAMES and not is_onnx(name):
        raise UserError(f"--encoder {name[:80]}: no such face encoder; give {', '.join(NAMES)} or FILE.onnx")
    return (None, None, None) if name == FACENET else (name, None, facenet)


def load_encoders(options: Options, encoder: str, dtype: torch.dtype) -> Encoders:
    """The encoders of a preparation; FaceNet in `dtype`, dlib's in float32."""
    facenet = load_facenet(device=options.device, dtype=dtype) if options.facenet else None
    if options.embeddings is not None:
        return Encoders(read_table(options.embeddings, options.encoder), facenet)
    if encoder == FACENET:
        return Encoders(load_facenet(device=options.device, dtype=dtype))
    return Encoders(load_face_encoder(encoder, device=options.device, dtype=torch.float32), facenet)


def _check_keys(encoders: Encoders, opened: Source, source: str) -> None:
    """Raise UserError if the first photos of the source are not in the table."""
    table = encoders.table
    if table is None:
        return
    with contextlib.closing(opened.parts[0].items(None)) as items:
        keys = [item.key for item in itertools.islice(items, KEYS_TRIED)]
    if keys and not any(key in table for key in keys):
        raise UserError(
            f"--embeddings {table.path}: has no row for the first {len(keys)} photos of {source}; photos are named "
            f"like {keys[0]!r} there, rows like {table.example!r}"
        )


def _columns_before(columns: tuple[str, str | None]) -> list[str | None]:
    """The columns that the versions read that did not record them."""
    return ["image", "celeb_id" if columns[1] == "celeb_id" else None]


def _say_what_is_read(source: str, opened: Source) -> None:
    """Print where the identities come from, and what is passed over."""
    if opened.identities == ONE_PER_IMAGE:
        remedy = (
            "put the photos of each person into a sub-folder"
            if opened.columns is None
            else "name the column of the identity with --id-column"
        )
        print(nobody_named(source, f"if it shows people more than once, {remedy}"), file=sys.stderr)
    else:
        print(f"{source}: identities from {opened.identities}", file=sys.stderr)
    survey = [part.survey.others() for part in opened.parts if isinstance(part, FolderPart)]
    for note in itertools.chain(opened.notes, *survey):
        print(f"  {note}", file=sys.stderr)
