"""The notebooks, run from top to bottom by a real kernel, and their pairs of files."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

import vultus
from vultus.data.prepare import prepare
from vultus.models.facenet import FaceNet

FOLDER = Path(__file__).parents[1] / "notebooks"
SRC = Path(vultus.__file__).parents[1]
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
DEV = "needs the extra `dev`"
NOWHERE = "http://127.0.0.1:9"  # nothing listens there: nothing can be fetched
pytestmark = [
    pytest.mark.docs,
    pytest.mark.filterwarnings("ignore:::(jupyter_client|nbclient|nbformat|zmq|jupytext).*"),
]

Execute = Callable[..., "Ran"]


class Ran:
    """What a notebook printed and displayed."""

    def __init__(self, notebook: Any) -> None:
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        self.text = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
        shown = [output["data"] for output in outputs if output["output_type"] == "display_data"]
        self.markdown = [data["text/markdown"] for data in shown if "text/markdown" in data]
        encoded = [data.get("image/png") or data.get("image/jpeg") for data in shown]  # Pillow's images come as both
        self.images = [Image.open(io.BytesIO(base64.b64decode(data))) for data in encoded if data]
        self.left_out = [line for line in self.text.splitlines() if line.startswith("left out")]


# The first cell of every run: the environment, the folder and an empty session without modules of vultus.
FRESH = """
import os, sys
os.environ.clear()
os.environ.update({environment!r})
os.chdir({folder!r})
for module in [name for name in sys.modules if name.partition(".")[0] == "vultus"]:
    del sys.modules[module]
get_ipython().run_line_magic("reset", "-f")
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of one kernel for all runs: importing torch takes seconds. It starts with the first run."""
    pytest.importorskip("ipykernel", reason=DEV)
    nbclient = pytest.importorskip("nbclient", reason=DEV)
    nbformat = pytest.importorskip("nbformat", reason=DEV)
    folder = {"metadata": {"path": str(tmp_path_factory.mktemp("kernel"))}}
    client = nbclient.NotebookClient(nbformat.v4.new_notebook(), timeout=300, kernel_name="python3", resources=folder)
    yield client
    if client.km is not None:
        client._cleanup_kernel()


@pytest.fixture
def execute(kernel: Any, tmp_path: Path) -> Execute:
    """A function that runs a notebook with the given variables, in a folder of its own and without a network."""
    import nbformat

    def run(name: str, **variables: object) -> Ran:
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        home = {"HOME": str(tmp_path), "IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": str(SRC)}
        offline = {"PYTHONWARNINGS": "ignore", "https_proxy": NOWHERE, "http_proxy": NOWHERE, "no_proxy": ""}
        given = {f"VULTUS_NB_{key}": str(value) for key, value in variables.items() if key.isupper()}
        weights = {"VULTUS_CACHE": str(tmp_path / "cache"), "VULTUS_WEIGHTS": str(variables.get("weights", ""))}
        kept = {key: value for key, value in os.environ.items() if not key.startswith("VULTUS_")}
        environment = kept | home | offline | given | weights
        first = FRESH.format(environment=environment, folder=str(tmp_path))
        notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
        kernel.nb = notebook
        kernel.execute(cleanup_kc=False, env=environment)
        return Ran(notebook)

    return run


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


def photo_file(data: Path, path: Path) -> Path:
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


def grid(rows: int, columns: int, resolution: int) -> tuple[int, int]:
    """The size of a grid of images with two pixels between them."""
    return columns * (resolution + 2) - 2, rows * (resolution + 2) - 2


@pytest.mark.slow
def test_inference_with_nothing_but_the_package(execute: Execute) -> None:
    ran = execute("inference", PEOPLE=2, NOISES=3)
    assert [image.size for image in ran.images] == [
        grid(2, 3, 128),  # people who do not exist
        grid(3, 7, 128),  # one of them with more and more noise
        grid(2, 9, 128),  # interpolations
    ]
    assert len(ran.left_out) == 3
    assert "set PHOTO" in ran.left_out[2]


def test_inference_on_a_tiny_run(execute: Execute, tiny_data: Path, tiny_run: Path, tmp_path: Path) -> None:
    photo = photo_file(tiny_data, tmp_path / "photo.png")
    ends = f"random:1 {tmp_path}/none.npy"
    ran = execute("inference", SNAPSHOT=tiny_run, DATA=tiny_data, PHOTO=photo, PEOPLE=2, NOISES=3, BETWEEN=ends)
    assert [image.size for image in ran.images] == [
        grid(2, 3, 32),
        grid(2, 4, 32),  # people of the training data, beside their photo
        grid(2, 4, 32),  # unseen people
        grid(3, 7, 32),
    ]
    assert len(ran.left_out) == 2
    assert "facenet" in ran.left_out[0].lower() or "vggface2" in ran.left_out[0]
    assert "none.npy" in ran.left_out[1]


def test_results_on_a_tiny_run(execute: Execute, tiny_data: Path, tiny_run: Path) -> None:
    """Without FaceNet: curves of the training, and one line for what could not be measured."""
    ran = execute("results", SNAPSHOT=tiny_run, DATA=tiny_data)
    assert len(ran.images) == 1
    assert len(ran.left_out) == 1
    assert "facenet" in ran.left_out[0].lower() or "vggface2" in ran.left_out[0]


@pytest.mark.slow
def test_inference_on_real_faces(execute: Execute, real_faces: Path, shared: Path, tmp_path: Path) -> None:
    photo = photo_file(real_faces, tmp_path / "photo.png")
    variables = {"DATA": real_faces, "PHOTO": photo, "BETWEEN": f"{photo} random:1", "PEOPLE": 2, "NOISES": 2}
    ran = execute("inference", weights=shared / "weights", **variables)
    assert not ran.left_out, ran.text
    assert [image.size for image in ran.images] == [
        grid(2, 2, 128),
        grid(2, 3, 128),
        grid(2, 3, 128),
        grid(1, 3, 128),  # the photo and its faces
        grid(3, 7, 128),
        grid(1, 9, 128),
    ]
    cosines = [float(word) for word in ran.text.rpartition("cosine: ")[2].splitlines()[0].split()]
    assert len(cosines) == 2
    assert min(cosines) > 0.2  # of two people 0.0


@pytest.mark.slow
def test_results_on_real_faces(execute: Execute, real_faces: Path, shared: Path, tmp_path: Path) -> None:
    variables = {"DATA": real_faces, "LIMIT": 4, "NOISES": 1, "OUT": tmp_path / "out"}
    ran = execute("results", weights=shared / "weights", **variables)
    assert len(ran.left_out) == 1, ran.text  # the embedded snapshot is no run folder
    assert "identity_facenet" in ran.markdown[0]
    assert "train - test" in ran.markdown[0]
    files = list((tmp_path / "out").iterdir())
    assert {"table.md", "results.json"} < {path.name for path in files}
    assert len(ran.images) == sum(path.suffix in (".png", ".jpg") for path in files) > 2
    assert "default (test), dlib: best" in ran.text
