"""`vultus publish`: a snapshot as a folder for the Hugging Face hub, and its upload.

OUT/README.md and OUT/LICENSE.md, config.json, model.safetensors, people.safetensors (see pretrained.py), samples.jpg:
people who do not exist. No photo of a data set is ever among them; what an evaluation drew stays where it is.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vultus._files import folder_lock, make_folder, read_json, write_text
from vultus.errors import UserError
from vultus.export.model_card import SAMPLES, licence_of, model_card, result_in
from vultus.images.xmp import Origin, model_id, save_marked
from vultus.models.hub import CARD, CONFIG, MODEL, check_repo, is_published, problem, write_folder
from vultus.models.hub import PEOPLE as PEOPLE_FILE
from vultus.models.snapshot import Snapshot
from vultus.sampling.grids import NOISES, PEOPLE, overview_sheet
from vultus.sampling.population import sample_identities

LICENCE = "LICENSE.md"
FILES = (CARD, LICENCE, CONFIG, MODEL, PEOPLE_FILE, SAMPLES)  # what is uploaded, and nothing else
FEW = 1000  # training photos below which the spread of their embeddings may tell about single people
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def write_publication(
    snapshot: Snapshot,
    repo: str,
    out: str | Path,
    *,
    evaluation: tuple[Path, str] | None = None,
    licence: str | None = None,
    dtype: str = "float32",
    people: bool = True,
    seed: int = 0,
) -> Path:
    """Write the folder `out`, each file atomically; the card last. Returns `out`.

    Args:
        snapshot: the generator and where it comes from.
        repo: user/name, which the card speaks of.
        out: an empty or new folder, or one of an earlier call.
        evaluation: folder of an evaluation, and the column of this snapshot; by default what the snapshot carries.
        licence: an id of the hub, where the data are not restricted; by default the terms of the data.
        dtype: of the weights in the file, float32 or float16.
        people: whether to publish the distribution of the training embeddings. Samples need it either way.
        seed: of the samples.

    Raises UserError for a malformed repo or licence, a folder of something else, results of another snapshot.
    """
    check_repo(repo, f"--repo {repo}")
    terms = licence_of(snapshot.metadata.get("licence"), licence)
    result = _result(snapshot, *evaluation) if evaluation else result_in(snapshot.metadata.get("metrics"))
    out = Path(out)
    if any((out / name).exists() for name in FILES) and not is_published(out):
        raise UserError(f"{out}: holds files of something else, which would be overwritten; choose another --out")
    make_folder(out)
    if terms.research_only:
        known = f"the terms of its data ('{terms.noted}')" if terms.noted else "the terms of its data, not recorded,"
        print(f"note: the card says research only; see whether {known} let a model be passed on", file=sys.stderr)
    images = (snapshot.metadata.get("data") or {}).get("images")
    if people and images is not None and images < FEW:
        print(
            f"note: {PEOPLE_FILE} sums up the embeddings of {images} photos only, which may tell something about the "
            "people in them; --people false leaves it out",
            file=sys.stderr,
        )
    with folder_lock(out, "publish"):
        write_folder(snapshot.network, out, dtype=DTYPES[dtype], people=people)
        drawn = _samples(snapshot, seed)
        if drawn:
            save_marked(drawn[0], out / SAMPLES, Origin(model_id(snapshot.path), seed, "people who do not exist"))
        else:
            (out / SAMPLES).unlink(missing_ok=True)
        write_text(out / LICENCE, f"# Licence of the weights\n\n{terms.words}\n")
        card = model_card(
            snapshot.metadata,
            snapshot.network.settings(),
            repo=repo,
            result=result,
            licence=terms,
            licence_file=True,
            samples=drawn[1] if drawn else None,
            people=people and bool(snapshot.population),
        )
        write_text(out / CARD, card)
    return out


def _samples(snapshot: Snapshot, seed: int) -> tuple[Image.Image, str] | None:
    """A sheet of random people, and what it shows; None where the snapshot does not say how people are spread."""
    if "factor" not in snapshot.population:
        return None
    sheet = overview_sheet(snapshot, sample_identities(snapshot.population, PEOPLE, seed=seed), seed=seed)
    return sheet, (
        f"Nobody here exists. Rows: the first {PEOPLE} random people of seed {seed}, not chosen, each with "
        f"{NOISES + 1} noises; the last row goes from the first person to the second with one noise."
    )


def _result(snapshot: Snapshot, folder: Path, column: str) -> dict[str, Any]:
    """The result of this snapshot in FOLDER/results.json: its column, the one on unseen people, or the only one."""
    path = folder / "results.json"
    results = read_json(path)
    if not isinstance(results, dict) or not all(isinstance(r, dict) and "metrics" in r for r in results.values()):
        raise UserError(f"{path}: not the results of an evaluation; write them with vultus evaluate --out")
    names = [name for name in (column, f"{column} (test)") if name in results]
    names = names or [name for name in results if len(results) == 1]
    if not names:
        raise UserError(f"{path}: has no column {column}, only {', '.join(results)}; evaluate this snapshot")
    found = result_in(results[names[0]])
    seen, mine = (found or {}).get("context", {}).get("cur_nimg"), snapshot.metadata.get("cur_nimg")
    if found is None or (seen is not None and mine is not None and seen != mine):
        raise UserError(f"{path}: measured at {seen} images, the snapshot is of {mine}; evaluate it again")
    return found


# --- the upload -------------------------------------------------------------------------------------------------------


def check_token() -> None:
    """Raise UserError if there is no token to publish with."""
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise UserError(
            "no Hugging Face token here; make one that may write (https://huggingface.co/settings/tokens), give it to "
            "`hf auth login` or as HF_TOKEN, then run the same command again (--dry-run needs none)"
        )


def upload(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Put a published folder onto the hub as one commit, all or nothing; return the address of the model.

    The model is made if it is not there. Files of an earlier upload that the folder has no more are deleted, others
    that are there are left. Raises UserError in one line: no token, no right, no network, or a model that is public
    already where a private one was asked for.
    """
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    folder = Path(folder)
    check_repo(repo, f"--repo {repo}")
    check_token()
    if not is_published(folder) or not (folder / CARD).is_file():
        raise UserError(f"{folder}: lacks {CARD}, {CONFIG} or {MODEL}; write it with --dry-run first")
    api = huggingface_hub.HfApi()
    with _quiet():
        try:
            made = api.create_repo(repo, private=private or None, exist_ok=True)
            info = api.model_info(repo)
            if private and not info.private:
                raise UserError(f"{repo}: is public already; make it private in its settings, or leave --private out")
            here = [name for name in FILES if (folder / name).is_file()]
            there = {sibling.rfilename for sibling in info.siblings or []}
            operations: list[Any] = [CommitOperationAdd(name, folder / name) for name in here]
            operations += [CommitOperationDelete(name) for name in FILES if name in there and name not in here]
            message = f"Published with vultus {importlib.metadata.version('vultus')}"
            api.create_commit(repo, operations, commit_message=message)
        except UserError:
            raise
        except Exception as error:  # each layer has classes of its own
            raise UserError(f"{repo}: {problem(error)}; the folder {folder} is ready") from None
    return str(made)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The hub's retries and remarks stay unsaid: an error comes as one line."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
