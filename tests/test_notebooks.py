"""The notebooks, run from top to bottom by a real kernel, and their pairing."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from vultus.data import prepare as prepare_module
from vultus.data.prepare import prepare
from vultus.models.facenet import FaceNet
from vultus.presets import fitted, get_preset
from vultus.training.trainer import Budget, train
from vultus.training.validation import unseen_validation

FOLDER = Path(__file__).parents[1] / "notebooks"
SRC = Path(prepare_module.__file__).parents[2]
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
DEV = "needs the extra `dev`"
NOWHERE = "http://127.0.0.1:9"  # nothing listens there: what is not at hand must not be fetched
pytestmark = pytest.mark.filterwarnings("ignore:::(jupyter_client|nbclient|nbformat|zmq|jupytext).*")

Execute = Callable[..., "Ran"]


class Ran:
    """What a notebook printed and showed."""

    def __init__(self, notebook: Any) -> None:
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        self.text = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
        shown = [output["data"] for output in outputs if output["output_type"] == "display_data"]
        self.markdown = [data["text/markdown"] for data in shown if "text/markdown" in data]
        found = [data.get("image/png") or data.get("image/jpeg") for data in shown]  # Pillow's pictures come as both
        self.pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in found if data]
        self.left_out = [line for line in self.text.splitlines() if line.startswith("left out")]


@pytest.fixture
def execute(tmp_path: Path) -> Execute:
    """A function that runs a notebook with the given variables, in a folder of its own and without a network."""
    pytest.importorskip("ipykernel", reason=DEV)
    nbclient = pytest.importorskip("nbclient", reason=DEV)
    nbformat = pytest.importorskip("nbformat", reason=DEV)

    def run(name: str, **variables: object) -> Ran:
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        home = {"HOME": str(tmp_path), "IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": str(SRC)}
        offline = {"PYTHONWARNINGS": "ignore", "https_proxy": NOWHERE, "http_proxy": NOWHERE, "no_proxy": ""}
        given = {f"VULTUS_NB_{key}": str(value) for key, value in variables.items() if key.isupper()}
        weights = {"VULTUS_CACHE": str(tmp_path / "cache"), "VULTUS_WEIGHTS": str(variables.get("weights", ""))}
        kept = {key: value for key, value in os.environ.items() if not key.startswith("VULTUS_")}
        folder = {"metadata": {"path": str(tmp_path)}}
        client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder)
        client.execute(env=kept | home | offline | given | weights)
        return Ran(notebook)

    return run


@pytest.fixture
def tiny_run(tiny_dataset: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """(data set of drawn pictures, run folder trained on it for four steps)."""
    data, run = tiny_dataset(photos=4), tmp_path / "run"
    probe = unseen_validation(data, None)
    assert probe is not None
    config = fitted(get_preset("tiny"), 32)
    train(config, data=data, out=run, budget=Budget(total_nimg=64), evaluators=[("unseen", probe, 32)])
    return data, run


@pytest.fixture(scope="module")
def real_faces(shared: Path, facenet: FaceNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of real faces: photos of 4 people to train on and of 4 others, 3 of each."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "celeba").mkdir()
    for split in ("train", "test"):
        table = pq.read_table(min((shared / "celeba").glob(f"{split}-*.parquet")))
        rows: dict[int, list[int]] = {}
        for row, person in enumerate(table.column("celeb_id").to_pylist()):
            rows.setdefault(person, []).append(row)
        chosen = [row for found in [r for r in rows.values() if len(r) >= 3][:4] for row in found[:3]]
        pq.write_table(table.take(chosen), folder / "celeba" / f"{split}-00000-of-00001.parquet")
    prepare(str(folder / "celeba"), folder / "data", encoder=facenet)
    return folder / "data"


def picture_file(data: Path, path: Path) -> Path:
    from vultus.data.dataset import PreparedDataset
    from vultus.images.io import to_pil

    to_pil(PreparedDataset(data, "test").batch([0]).images[0]).resize((256, 256)).save(path)
    return path


# --- the pair ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_pair_is_in_sync_and_holds_no_outputs(name: str) -> None:
    jupytext = pytest.importorskip("jupytext", reason=DEV)
    nbformat = pytest.importorskip("nbformat", reason=DEV)
    script, notebook = jupytext.read(FOLDER / f"{name}.py"), nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [[(cell.cell_type, cell.source) for cell in one.cells] for one in (script, notebook)]
    assert cells[0] == cells[1], "not in sync; run: jupytext --sync notebooks/*.py"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert notebook.metadata.jupytext.formats == "ipynb,py:percent"


def test_both_notebooks_are_there() -> None:
    assert NAMES == ["inference", "results"]
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


# --- run from top to bottom -------------------------------------------------------------------------------------------


def test_inference_with_nothing_but_the_package(execute: Execute) -> None:
    ran = execute("inference", PEOPLE=2, NOISES=3)
    assert [picture.size for picture in ran.pictures] == [
        (3 * 130 - 2, 2 * 130 - 2 + 16),  # people who do not exist
        (7 * 130 - 2, 3 * 130 - 2 + 16),  # one of them under more and more noise
        (9 * 130 - 2, 2 * 130 - 2),  # from one to the next to the next
    ]
    assert len(ran.left_out) == 3
    assert "set PHOTO" in ran.left_out[2]


def test_inference_on_a_tiny_run(execute: Execute, tiny_run: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = tiny_run
    photo = picture_file(data, tmp_path / "photo.png")
    ends = f"random:1 {tmp_path}/none.npy"
    ran = execute("inference", SNAPSHOT=run, DATA=data, PHOTO=photo, PEOPLE=2, NOISES=3, BETWEEN=ends)
    sizes = [picture.size for picture in ran.pictures]
    assert sizes == [(100, 66), (134, 66), (134, 66), (236, 100)]
    assert "people never seen" in ran.text
    assert len(ran.left_out) == 2
    assert "trained on embeddings of tiny-test" in ran.left_out[0]
    assert "none.npy" in ran.left_out[1]


def test_results_on_a_tiny_run(execute: Execute, tiny_run: tuple[Path, Path]) -> None:
    """Without FaceNet: the training's curves, and one line for what could not be measured."""
    data, run = tiny_run
    ran = execute("results", SNAPSHOT=run, DATA=data)
    assert len(ran.pictures) == 1
    assert len(ran.left_out) == 1
    assert "facenet" in ran.left_out[0].lower()


def test_inference_on_real_faces(execute: Execute, real_faces: Path, shared: Path, tmp_path: Path) -> None:
    photo = picture_file(real_faces, tmp_path / "photo.png")
    given = {"DATA": real_faces, "PHOTO": photo, "BETWEEN": f"{photo} random:1", "PEOPLE": 3, "NOISES": 2}
    ran = execute("inference", weights=shared / "weights", **given)
    assert not ran.left_out, ran.text
    assert len(ran.pictures) == 6
    assert ran.pictures[1].size == (3 * 130 - 2, 3 * 130 - 2 + 16)
    cosines = [float(word) for word in ran.text.rpartition("cosine: ")[2].split()]
    assert len(cosines) == 2
    assert min(cosines) > 0.2  # of two people 0.0


def test_results_on_real_faces(execute: Execute, real_faces: Path, shared: Path, tmp_path: Path) -> None:
    ran = execute("results", weights=shared / "weights", DATA=real_faces, LIMIT=6, OUT=tmp_path / "out")
    assert len(ran.left_out) == 1, ran.text  # the embedded snapshot is no run folder
    assert "identity_facenet" in ran.markdown[0]
    assert "train - test" in ran.markdown[0]
    assert len(ran.pictures) == 2 + 5  # plots; sheets: of two splits, and what is nearest to the training in one
    assert {"table.md", "results.json"} < {path.name for path in (tmp_path / "out").iterdir()}
    assert "default (test), dlib: best" in ran.text
