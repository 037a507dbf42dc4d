"""`vultus publish`: a snapshot as a folder for the Hugging Face hub, and its upload.

OUT/README.md and OUT/LICENSE.md, config.json, model.safetensors, people.safetensors (see models/hub.py), samples.jpg:
people who do not exist. No photo of a data set is among these files, and no image of an evaluation.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vultus._files import folder_lock, make_folder, write_text
from vultus._progress import message
from vultus._ranges import Seed, checks_arguments
from vultus.errors import UserError
from vultus.evaluation.headlines import with_training_data
from vultus.evaluation.results import FILE, read_results
from vultus.evaluation.stored import find_evaluations, own_columns, run_folder, snapshot_sha256
from vultus.export.model_card import SAMPLES, licence_of, model_card, result_in
from vultus.images.xmp import Origin, model_id, save_marked
from vultus.models.hub import CARD, CONFIG, MODEL, check_repo, is_published, problem, write_folder
from vultus.models.hub import PEOPLE as POPULATION_FILE
from vultus.models.snapshot import Snapshot, load_snapshot
from vultus.sampling.grids import OVERVIEW_IDENTITIES, OVERVIEW_NOISES, overview_sheet
from vultus.sampling.latents import sample_identities

LICENCE = "LICENSE.md"
FILES = (CARD, LICENCE, CONFIG, MODEL, POPULATION_FILE, SAMPLES)  # what is uploaded, and nothing else
BEGUN = ".publish-begun"  # is in a folder that is not complete: an interrupted call knows its own files by it
FEW = 1000  # training photos below which the covariance of their embeddings may reveal something about single people
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@checks_arguments
def publish(
    snapshot: str | Path,
    repo: str,
    *,
    out: str | Path | None = None,
    dry_run: bool = False,
    private: bool = False,
    evaluation: str | Path | None = None,
    licence: str | None = None,
    dtype: str = "float32",
    population: bool = True,
    seed: Seed = 0,
) -> str:
    """Write a snapshot as a folder with a model card, and upload it to the Hugging Face hub.

    Args:
        snapshot: a snapshot or its name: file, run folder, `default`, or a folder that an earlier call wrote, which is
            uploaded as it is.
        repo: user/name on the hub.
        out: folder to write; default: `publish` in the run folder, else ./publish.
        dry_run: write the folder and upload nothing.
        private: create the model as a private one.
        evaluation: folder of an evaluation; default: the one of this snapshot that is stored in its run folder (of
            several the one on most photos of unseen people), else what the snapshot carries.
        licence: licence id of the hub, where the data are not restricted; default: the terms of the data.
        dtype: of the weights, "float32" or "float16".
        population: publish the distribution of the training embeddings.
        seed: of the identities and the noise in samples.jpg.

    Returns: the URL of the model; with `dry_run` the folder.

    Raises UserError: no token, no network, no such snapshot, a licence that the data do not allow, an evaluation of
    another snapshot.
    """
    source = Path(snapshot)
    if not dry_run:
        check_token()  # before the work
    opened = load_snapshot(snapshot, "cpu")
    if source.is_dir() and is_published(source) and not (source / "snapshot.safetensors").is_file():
        folder = source  # as it is: its card may have been edited
        for name, value in (("out", out), ("evaluation", evaluation), ("licence", licence)):
            if value is not None:
                raise UserError(f"{folder}: is uploaded as it is; --{name} needs a snapshot or a run folder")
    else:
        folder = Path(out or (source / "publish" if source.is_dir() else "publish"))
        write_publication(
            opened,
            repo,
            folder,
            evaluation=None if evaluation is None else (Path(evaluation), str(snapshot)),
            licence=licence,
            dtype=dtype,
            population=population,
            seed=seed,
        )
    return str(folder) if dry_run else upload(folder, repo, private=private)


def write_publication(
    snapshot: Snapshot,
    repo: str,
    out: str | Path,
    *,
    evaluation: tuple[Path, str] | None = None,
    licence: str | None = None,
    dtype: str = "float32",
    population: bool = True,
    seed: int = 0,
) -> Path:
    """Write the folder `out`, each file atomically; the card last. Returns `out`.

    Args:
        snapshot: the generator and its metadata.
        repo: user/name, which the card names.
        out: an empty or new folder, or one of an earlier call.
        evaluation: folder of an evaluation, and the name of this snapshot, for results that do not record its hash;
            default: the one that is stored in the run folder, else what the snapshot carries.
        licence: licence id of the hub, where the data are not restricted; default: the terms of the data.
        dtype: of the weights in the file, float32 or float16.
        population: publish the distribution of the training embeddings. Samples need it either way.
        seed: of the samples.

    Raises UserError for a malformed repo or licence, a folder of something else, results of another snapshot.
    """
    check_repo(repo, f"--repo {repo}")
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype}: not known; choose {' or '.join(DTYPES)}")
    terms = licence_of(snapshot.metadata.get("licence"), licence)
    result = _given(snapshot, *evaluation) if evaluation else _stored(snapshot)
    out = Path(out)
    own = is_published(out) or (out / BEGUN).is_file()
    if any((out / name).exists() for name in FILES) and not own:
        raise UserError(f"{out}: contains other files that would be overwritten; choose another --out")
    make_folder(out)
    if terms.research_only:
        known = f"the terms of its data ('{terms.data_terms}')" if terms.data_terms else "the unknown terms of its data"
        message(f"note: the card says research only; check whether {known} allow a model to be redistributed")
    images = (snapshot.metadata.get("data") or {}).get("images")
    if population and images is not None and images < FEW:
        message(
            f"note: {POPULATION_FILE} describes the embeddings of {images} photos only, which may reveal something "
            "about the people in them; --people false omits it"
        )
    with folder_lock(out, "publish"):
        write_text(out / BEGUN, "")
        write_folder(snapshot.network, out, dtype=DTYPES[dtype], people=population)
        samples = _samples(snapshot, seed)
        if samples:
            save_marked(samples[0], out / SAMPLES, Origin(model_id(snapshot.path), seed, "people who do not exist"))
        else:
            (out / SAMPLES).unlink(missing_ok=True)
        write_text(out / LICENCE, f"# Licence of the weights\n\n{terms.text}\n")
        card = model_card(
            snapshot.metadata,
            snapshot.network.settings(),
            repo=repo,
            result=result,
            licence=terms,
            licence_file=True,
            samples=samples[1] if samples else None,
            population=population and bool(snapshot.population),
        )
        write_text(out / CARD, card)
        (out / BEGUN).unlink()
    return out


def _samples(snapshot: Snapshot, seed: int) -> tuple[Image.Image, str] | None:
    """A sheet of random identities and its caption; None where the snapshot has no population prior."""
    if "factor" not in snapshot.population:
        return None
    sheet = overview_sheet(snapshot, sample_identities(snapshot.population, OVERVIEW_IDENTITIES, seed=seed), seed=seed)
    return sheet, (
        f"Nobody here exists. Rows: the first {OVERVIEW_IDENTITIES} random identities of seed {seed}, not selected, "
        f"each with {OVERVIEW_NOISES} noises; the last row interpolates from the first identity to the second with "
        "one noise."
    )


def _stored(snapshot: Snapshot) -> dict[str, Any] | None:
    """The result of this snapshot that is stored in its run folder, else what the snapshot carries."""
    carried = result_in(snapshot.metadata.get("metrics"))
    path = snapshot.path
    run = None if path is None else run_folder(path)
    if path is None or run is None:
        return carried
    current = snapshot.metadata.get("cur_nimg")
    found = find_evaluations(run, snapshot_sha256(path), current)
    if found and found[0].current:
        message(f"note: the card shows the evaluation in {found[0].folder}")
        return _of_its_data(snapshot, found[0].result)
    if found:
        images = found[0].result["context"].get("cur_nimg")
        message(
            f"note: the evaluation in {found[0].folder} is of another snapshot of this run ({images} images; this one: "
            f"{current}), so the card does not show it; run vultus evaluate {run} --data DATA first"
        )
    return carried


def _given(snapshot: Snapshot, folder: Path, name: str) -> dict[str, Any]:
    """The result of this snapshot in FOLDER/results.json: by its hash, else its name, else the only one."""
    path = folder / FILE
    results = read_results(path)
    sha256 = None if snapshot.path is None else snapshot_sha256(snapshot.path)
    current = snapshot.metadata.get("cur_nimg")
    stored = own_columns(folder, results, Path(name), sha256, current, own=True)
    if stored is None:
        raise UserError(f"{path}: no column {name}, only {', '.join(results)}; evaluate this snapshot")
    if not stored.current:
        evaluated = stored.result["context"].get("cur_nimg")
        images = f"at {evaluated} images, the snapshot is of {current}"
        why = images if evaluated != current else "on another snapshot of as many images"
        raise UserError(f"{path}: measured {why}; evaluate it again")
    return _of_its_data(snapshot, stored.result)


def _of_its_data(snapshot: Snapshot, result: dict[str, Any]) -> dict[str, Any]:
    return with_training_data(result, (snapshot.metadata.get("data") or {}).get("content_sha256"))


# --- the upload -------------------------------------------------------------------------------------------------------


def check_token() -> None:
    """Raise UserError if there is no Hugging Face token."""
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise UserError(
            "no Hugging Face token; create one with write permission (https://huggingface.co/settings/tokens), pass it "
            "to `hf auth login` or set HF_TOKEN, then run the same command again (--dry-run needs none)"
        )


def upload(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload a published folder to the hub as one commit; return the URL of the model.

    The model is created if it does not exist. Files of an earlier upload that the folder no longer has are deleted;
    other files of the model stay. Raises UserError in one line: no token, no permission, no network, or `private` for a
    model that is public already.
    """
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    folder = Path(folder)
    check_repo(repo, f"--repo {repo}")
    check_token()
    if not is_published(folder) or not (folder / CARD).is_file():
        raise UserError(f"{folder}: {CARD}, {CONFIG} or {MODEL} is missing; write the folder with --dry-run first")
    api = huggingface_hub.HfApi()
    with _quiet():
        try:
            url = api.create_repo(repo, private=private or None, exist_ok=True)
            info = api.model_info(repo)
            if private and not info.private:
                raise UserError(f"{repo}: is public already; make it private in its settings, or omit --private")
            local = [name for name in FILES if (folder / name).is_file()]
            remote = {sibling.rfilename for sibling in info.siblings or []}
            operations: list[Any] = [CommitOperationAdd(name, folder / name) for name in local]
            operations += [CommitOperationDelete(name) for name in FILES if name in remote and name not in local]
            message = f"Published with vultus {importlib.metadata.version('vultus')}"
            api.create_commit(repo, operations, commit_message=message)
        except UserError:
            raise
        except Exception as error:  # requests, httpx and huggingface_hub have classes of their own
            raise UserError(f"{repo}: {problem(error)}; the folder {folder} is ready") from None
    return str(url)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the hub's retries and warnings: an error is reported as one line."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
