"""Every command of README.md and docs/ is run, on small data and with small settings; a page that lies fails.

The pages' commands run in one folder that holds what the pages speak of: `photos/` of people who do not exist, the same
as Parquet in `celeba/`, `me.jpg`, `vectors.npy`, `settings.yaml` (as docs/training.md shows it), `arcface.onnx`,
`weights/`, and the data sets and runs that an earlier page would have made.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet
import pytest
import uvicorn
from onnx import TensorProto, helper

from conftest import SHARED
from vultus.cli import main as cli
from vultus.data.prepare import in_test
from vultus.data.shards import PreparedFolder
from vultus.images import align as faces
from vultus.images.io import encode_jpeg, to_pil
from vultus.models.snapshot import default_snapshot, load_snapshot
from vultus.sampling.generate import render
from vultus.sampling.population import noise, sample_identities
from vultus.serving.app import create_app
from vultus.serving.engine import open_engine

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FACENET = (SHARED / "weights").is_dir()
PHOTOS = 3  # of each person
NOWHERE = "http://127.0.0.1:9"  # nothing listens there: what is not at hand must not be fetched

# Commands that are not run, by how they begin (or, with $, in full), and why. Their options are checked all the same.
NOT_RUN = {
    "pip install": "changes the environment; the extras that it names are looked up in pyproject.toml",
    "python -m pytest": "is what runs this",
    "vultus demo": "takes a minute; run by test_demo.py",
    "vultus prepare flwrlabs/celeba": "streams from the hub; run by test_sources.py on a stand-in",
    "python scripts/calibrate.py": "takes an hour",
    "python scripts/watermark.py": "takes half an hour",
    "python scripts/ablation.py": "trains for hours",
    "vultus generate default --random 2 --out signed/": "needs a certificate; run by test_marks.py with one of its own",
    "vultus publish runs/mine --repo user/name$": "uploads; run by test_publish.py to a stand-in for the hub",
    "vultus publish runs/mine/publish": "uploads; run by test_publish.py to a stand-in for the hub",
    "vultus report runs/mine --wandb": "W&B's library warns when it is imported; run by test_report.py",
    "python benchmarks/serve.py": "takes ten minutes",
    "python benchmarks/train_step.py": "a minute of timing, which tells nothing beside other tests",
    "python benchmarks/page.py": "needs a server and takes a minute; test_page.py drives the page",
    "python scripts/groups.py": "needs the photos that its groups name",
    "bash runs/vultus-cpu.sh": "trains for two hours",
    "vultus serve": "stays; run by test_serve.py, and served here to what follows it on the page",
    "vultus generate hf://": "reads from the hub; run by test_publish.py on a stand-in",
    "vultus export default --onnx --precision": "takes half a minute; run by test_export.py on tiny networks",
    "python scripts/build_web.py": "fetches from npm; run by test_web.py",
    "python -m http.server": "serves until it is stopped",
    "python benchmarks/generate.py": "takes minutes",
    "jupyter": "needs Jupyter; test_notebooks.py runs the notebooks",
    "jupytext --sync": "writes into the checkout; test_notebooks.py checks that the pairs are in sync",
}

# What is changed to make a command small: options taken out (with their values), options put in.
NARROW = [
    f"--{network}.{width}" for network in ("generator", "discriminator") for width in ("base_width=4", "max_width=16")
]
SMALL: dict[str, tuple[set[str], list[str]]] = {
    "train": ({"--hours", "--images", "--epochs", "--optim.batch"}, ["--images=16", "--optim.batch=8", *NARROW]),
    "evaluate": ({"--limit"}, ["--limit=4"]),
}
LEFT_OUT = {"--fetch": "downloads 340 MB"}

Words = list[str]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    kind: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def commands(self) -> list[Words]:
        found: list[Words] = []
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                found.append(words[:end])
                words = words[end + 1 :]
        return found


def blocks(kind: str) -> list[Block]:
    found = []
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines()
        inside: tuple[int, str] | None = None
        for number, line in enumerate(lines, 1):
            if line.strip().startswith("```"):
                if inside is not None and inside[1] == kind:
                    text = "\n".join(lines[inside[0] : number - 1])
                    found.append(Block(page, inside[0], kind, text))
                inside = (number, line.strip()[3:]) if inside is None else None
    return found


BASH = blocks("bash")
COMMANDS = [(block.name, words) for block in BASH for words in block.commands]


def not_run(words: Words) -> str | None:
    return next((reason for start, reason in NOT_RUN.items() if begins(" ".join(words), start)), None)


def begins(command: str, start: str) -> bool:
    return command == start[:-1] if start.endswith("$") else command.startswith(start)


def option(words: Words, name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


def small(words: Words) -> Words:
    """The command with the settings of SMALL."""
    gone, added = SMALL.get(words[1], (set(), []))
    kept = [word for word in words if word not in LEFT_OUT]
    for name in gone & set(kept):
        place = kept.index(name)
        del kept[place : place + 2]
    if words[1] == "train" and not FACENET:
        added = [*added, "--loss.identity_weight=0"]
    return kept if "--help" in words else kept + added


def needs_facenet(words: Words) -> bool:
    return words[1] in ("prepare", "evaluate") or "--photos" in words


# --- what the pages speak of ------------------------------------------------------------------------------------------


@dataclass
class World:
    """The folder in which commands run. What a page asks for that was just done for another page is not done twice."""

    folder: Path
    made: dict[str, tuple[str, str]] = field(default_factory=dict)  # data set or run: page, command that made it
    done: set[str] = field(default_factory=set)

    def run(self, words: Words, page: str) -> None:
        """One command. A data set or run that another page, or the fixture, left under its name goes first."""
        text = shlex.join(words)
        out = option(words, "--out") if words[1] in ("prepare", "train") else None
        if out is None and text in self.done:
            return
        if out is not None:
            before, self.made[out] = self.made.get(out, ("", "")), (page, text)
            if before[1] == text:
                return
            if before[0] != page:
                shutil.rmtree(out, ignore_errors=True)
        assert exit_code(lambda: cli.main(words[1:])) == 0, f"{page}: {text}"
        self.done.add(text)

    def export(self, words: Words, page: str) -> None:
        """What makes vultus.onnx, before the first who needs it."""
        if "vultus.onnx" in words and "export" not in words:
            self.run(shlex.split("vultus export default --onnx --out vultus.onnx"), page)


def names(count: int, *, test: bool) -> list[str]:
    """Names of people whom `vultus prepare` puts into the test split, or whom it does not."""
    return [name for name in (f"person-{number}" for number in range(999)) if in_test(name, 0.1) == test][:count]


def write_onnx(path: Path) -> None:
    """A face encoder of sorts: means over squares of 8x8 pixels."""
    nodes = [
        helper.make_node("AveragePool", ["x"], ["p"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Reshape", ["p", "to"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 112, 112])]
    ends.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    shape = helper.make_tensor("to", TensorProto.INT64, [2], [0, 3 * 14 * 14])
    graph = helper.make_graph(nodes, "tiny", ends[:1], ends[1:], [shape])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def write_data(folder: Path, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """A prepared data set without FaceNet: the embeddings are those that the faces were made of."""
    folder.mkdir(parents=True)
    prepared = PreparedFolder(folder)
    prepared.begin({})
    head = {"schema": 1, "source": "made", "licence": None, "resolution": 128, "crop": about["crop"]}
    entry = prepared.write(0, rows, 512, [])
    prepared.finish([entry], head | {"encoder": about["encoder"] | {"dtype": "float32"}}, {})


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("docs")
    snapshot = load_snapshot(default_snapshot())
    people = names(6, test=False) + names(3, test=True)
    c = sample_identities(snapshot.population, len(people), seed=11).repeat_interleave(PHOTOS, 0)
    images = render(snapshot.network, noise(11, 0, len(c), snapshot.network.z_dim), c)
    parquet: dict[str, list[Any]] = {"train": [], "test": []}
    rows = []
    for number, image in enumerate(images):
        person, photo = people[number // PHOTOS], number % PHOTOS
        split = "test" if in_test(person, 0.1) else "train"
        data = encode_jpeg(to_pil(image))
        path = folder / "photos" / person / f"{photo}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        parquet[split].append(({"bytes": data, "path": f"{number:06d}.jpg"}, number // PHOTOS))
        row = {"image": data, "embedding": c[number].numpy(), "identity": person, "key": f"{person}/{photo}.jpg"}
        rows.append(row | {"split": split})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (folder / "celeba").mkdir()
    for split, found in parquet.items():
        columns = {"image": pa.array([image for image, _ in found], kind), "celeb_id": [one for _, one in found]}
        pyarrow.parquet.write_table(pa.table(columns), folder / "celeba" / f"{split}-00000-of-00001.parquet")
    seen = (image for image in images if not faces.available() or faces.align(to_pil(image)) is not None)
    to_pil(next(seen)).save(folder / "me.jpg", quality=95)
    np.save(folder / "vectors.npy", c[:3].numpy())
    write_onnx(folder / "arcface.onnx")
    (folder / "settings.yaml").write_text(settings())
    (folder / "weights").symlink_to(SHARED / "weights")
    with pytest.MonkeyPatch.context() as patch:
        surroundings(patch, folder)
        for name in ("data/mine", "data/celeba"):
            if FACENET:
                assert cli.main(["prepare", "photos" if name == "data/mine" else "celeba", "--out", name]) == 0
            else:
                write_data(folder / name, rows, snapshot.metadata)
        assert cli.main(small(["vultus", "train", "--data", "data/mine", "--out", "runs/mine"])[1:]) == 0
        for name in {run for _, words in COMMANDS for run in words if re.fullmatch(r"runs/[\w-]+", run)} - {
            "runs/mine"
        }:
            shutil.copytree(folder / "runs/mine", folder / name)
    return World(folder)


def settings() -> str:
    return next(block.text for block in blocks("yaml") if block.page.name == "training.md")


def surroundings(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.chdir(folder)
    patch.setenv("VULTUS_WEIGHTS", str(SHARED / "weights") if FACENET else "")
    patch.setenv("VULTUS_CACHE", str(folder / "cache"))
    for name in ("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        patch.setenv(name, NOWHERE)


SERVED = "http://127.0.0.1:8000"  # on the pages


@pytest.fixture(scope="session")
def served(world: World) -> Iterator[str]:
    """The address of a server in a thread, for what a page asks of one."""
    with pytest.MonkeyPatch.context() as patch:
        surroundings(patch, world.folder)
        engine = open_engine(load_snapshot(default_snapshot()))
    server = uvicorn.Server(uvicorn.Config(create_app(engine), log_level="warning", port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
    engine.close()


def curl(words: Words, address: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    words = [
        words[0],
        "--fail",
        "--silent",
        "--show-error",
        "--noproxy",
        "*",
        *(word.replace(SERVED, address) for word in words[1:]),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, shlex.join(words) + done.stderr
    assert Path(words[words.index("-o") + 1]).stat().st_size > 1000


# --- every command ----------------------------------------------------------------------------------------------------


def test_there_are_commands() -> None:
    verbs = {words[1] for _, words in COMMANDS if words[0] == "vultus"}
    assert verbs >= {"demo", "prepare", "train", "generate", "evaluate"}
    for start in NOT_RUN:
        assert any(begins(" ".join(words), start) for _, words in COMMANDS), f"{start!r}: no page has such a command"


@pytest.mark.parametrize(
    "block", [block for block in BASH if not all(map(not_run, block.commands))], ids=lambda block: block.name
)
def test_commands_run(
    block: Block, world: World, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    surroundings(monkeypatch, world.folder)
    lacking = []
    for words in block.commands:
        if not_run(words):
            continue
        if words[0] == "export":
            for name, _, value in (word.partition("=") for word in words[1:]):
                monkeypatch.setenv(name, value)
            continue
        if words[0] == "curl":
            if FACENET or "image/" not in " ".join(words):
                curl(words, request.getfixturevalue("served"))
            else:
                lacking.append("curl with a photo")
            continue
        assert words[0] == "vultus", f"{' '.join(words)}: no way to run it here; NOT_RUN takes a reason"
        if needs_facenet(words) and not FACENET:
            lacking.append(words[1])
            continue
        world.export(words, block.page.name)
        world.run(small(words), block.page.name)
    if lacking:
        pytest.skip(f"FaceNet's weights are not here; not run: {', '.join(lacking)}")


def exit_code(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except SystemExit as done:  # --help
        return done.code


class Parsed(Exception):
    """Options were understood; nothing more is to be done."""


@pytest.mark.parametrize(
    "words", [pytest.param(words, id=f"{name} {words[1]}") for name, words in COMMANDS if words[0] == "vultus"]
)
def test_options_are_understood(words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand on the page, also of commands that are not run."""
    monkeypatch.chdir(tmp_path)
    Path("settings.yaml").write_text(settings())
    real = jsonargparse.ArgumentParser.parse_args

    def parse(parser: Any, arguments: Any) -> None:
        real(parser, arguments)
        raise Parsed

    monkeypatch.setattr(jsonargparse.ArgumentParser, "parse_args", parse)
    if "--help" in words:
        assert exit_code(lambda: cli.main(words[1:])) == 0
    else:
        with pytest.raises(Parsed):
            cli.main(words[1:])


SCRIPTS = [(name, words) for name, words in COMMANDS if words[0] == "python" and words[1] != "-m"]


@pytest.mark.parametrize("words", [pytest.param(words, id=name) for name, words in SCRIPTS])
def test_options_of_scripts_are_understood(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    real = argparse.ArgumentParser.parse_args

    def parse(parser: Any, *_: Any) -> None:
        real(parser, words[2:])
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "path", [str((ROOT / words[1]).parent), *sys.path])
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.name)
def test_python_runs(
    block: Block, world: World, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    surroundings(monkeypatch, world.folder)
    text = block.text
    if "user/name" in text:  # a published folder stands for the same on the hub
        world.run(
            ["vultus", "publish", "runs/mine", "--repo", "a/b", "--dry-run", "--out", "published"], block.page.name
        )
        text = text.replace('"hf://user/name"', '"published"').replace('"user/name"', '"published"')
    if SERVED in text:
        text = text.replace(SERVED, request.getfixturevalue("served"))
        for name in ("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
            monkeypatch.delenv(name)
    world.export(re.findall(r"[\w.]+", text), block.page.name)
    exec(compile(text, block.name, "exec"), {})


# --- what the pages name ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s#]+)", text) if "://" not in link]
    files = [ROOT / name for name in re.findall(r"\b(?:(?:scripts|benchmarks|notebooks)/\w+\.(?:py|ipynb))\b", text)]
    missing = [str(path) for path in [*(page.parent / link for link in links), *files] if not path.exists()]
    assert not missing
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name for found in re.findall(r"(?:\.|vultus)\[([\w,]+)\]", text) for name in found.split(",")}
    assert extras <= project["optional-dependencies"].keys()


def test_pages_are_listed_in_order() -> None:
    """docs/README.md leads a newcomer: its links, in order, and no page twice."""
    listed = re.findall(
        r"^\d+\. \[[^]]+\]\((\w+\.md)\)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8"), re.M
    )
    assert len(listed) == len(set(listed))
    known = [name for name in listed if name in ("quickstart.md", "data.md", "training.md", "evaluation.md")]
    assert known == ["quickstart.md", "data.md", "training.md", "evaluation.md"]
    assert "docs/README.md" in (ROOT / "README.md").read_text(encoding="utf-8")
