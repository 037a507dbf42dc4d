"""What README.md, CONTRIBUTING.md and docs/ say is true: their commands parse and run, their Python blocks run.

Every `vultus` command is parsed by the command itself. Then each kind of command is run once, on small data and with
small settings, in a fresh copy of one workspace: `photos/` of generated faces in one folder per person, the same as
Parquet in `celeba/`, `me.jpg`, `vectors.npy`, `settings.yaml` (as docs/training.md shows it), `arcface.onnx`,
`weights/`, and the data sets and runs that the pages name. What an earlier command of the pages writes is there too.

A block after the line `<!-- not run: REASON -->` is not run. docs/log/ reports past experiments: nothing of it is run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import FACENET, NO_SHARED, SHARED
from vultus.cli import main as cli
from vultus.cli.options import ArgumentParser

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *(path for name in ("README.md", "CONTRIBUTING.md") if (path := ROOT / name).is_file()),
    *(path for path in sorted(DOCS.rglob("*.md")) if "log" not in path.relative_to(DOCS).parts[:-1]),
]
PHOTOS = 3  # of each person
NOWHERE = "http://127.0.0.1:9"  # nothing listens there: nothing can be fetched
SERVED = "http://127.0.0.1:8000"  # the server's address on the pages
WEIGHTS_FILE = "20180402-114759-vggface2"  # the name of FaceNet's file, in the error where it is missing

Words = list[str]


# --- what the pages say -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    kind: str
    text: str
    runs: bool

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command of a page, with the environment variables that its block sets before."""

    block: Block
    words: Words
    environment: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.block.name} {' '.join(self.words[:2])}"


def blocks(*kinds: str) -> list[Block]:
    found = []
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines()
        inside: tuple[int, str, bool] | None = None
        for number, line in enumerate(lines, 1):
            if not line.strip().startswith("```"):
                continue
            if inside is None:
                language = line.strip().strip("`").split()
                above = next((text for text in reversed(lines[: number - 1]) if text.strip()), "")
                inside = number, language[0] if language else "", "<!-- not run" not in above
            else:
                begin, kind, runs = inside
                if kind in kinds:
                    text = textwrap.dedent("\n".join(lines[begin : number - 1]))
                    found.append(Block(page, begin, kind, text, runs))
                inside = None
    return found


def commands_of(block: Block) -> list[Command]:
    lines = block.text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    found: list[Command] = []
    environment: dict[str, str] = {}
    for line in lines:
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            exported = command[0] == "export"
            own = dict(environment)
            command = command[1:] if exported else command
            while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                key, _, own[key] = command.pop(0).partition("=")
            if exported:
                environment = own
            else:
                found.append(Command(block, command, own))
    return found


COMMANDS = [command for block in blocks("bash", "sh", "console", "shell") for command in commands_of(block)]
VULTUS = [command for command in COMMANDS if command.words[0] == "vultus"]


def option(words: Words, name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


def not_run(command: Command) -> str | None:
    """Why a command of vultus is only parsed, or None."""
    words = command.words
    if "--help" in words or len(words) < 2:
        return None
    hub = words[1] == "prepare" and re.match(r"[\w-]+/[\w-]+", words[2])
    reasons = {
        "demo": "takes half a minute: test_demo.py",
        "serve": "does not end; test_serve.py",
        "publish": None if "--dry-run" in words else "uploads: test_publish.py",
        "export": "takes half a minute: test_export.py" if "--precision" in words else None,
        "report": "imports wandb, which warns: test_report.py" if "--wandb" in words else None,
        "train": "imports every tracker: test_run_log.py" if "--track" in words else None,
        "generate": "needs a certificate: test_xmp.py" if "--c2pa-cert" in words else None,
        "prepare": "streams from the hub: test_sources.py" if hub else None,
    }
    if any(word.startswith("hf://") for word in words):
        return "reads from the hub: test_publish.py"
    if not command.block.runs:
        return "the page says so"
    return reasons.get(words[1])


def kind_of(command: Command) -> str:
    """Commands of one kind differ only in numbers and in the names of folders: one of them is run."""
    words = list(command.words)
    if "--out" in words:
        place = words.index("--out")
        del words[place : place + 2]
    if "train" in words:
        words = small(words)
        preset = option(words, "--preset")
        if preset == "vultus-cpu":
            words = [word for word in words if word not in ("--preset", preset)]
    words = [re.sub(r"^(runs|data)/[^/]+", r"\1/*", re.sub(r"^[\d.]+$", "0", word)) for word in words]
    return " ".join([words[0], *sorted(words[1:])])


# What makes a command small: options that are taken out (with their values), and options that are added.
NARROW = [
    f"--{network}.{width}" for network in ("generator", "discriminator") for width in ("base_width=4", "max_width=16")
]
SMALL: dict[str, tuple[set[str], list[str]]] = {
    "train": ({"--hours", "--images", "--epochs", "--optim.batch"}, ["--images=8", "--optim.batch=4", *NARROW]),
    "evaluate": ({"--limit"}, ["--limit=3", "--noises=1"]),
    "synthesize": (
        {"--people", "--per-person", "--workers", "--engine", "--judge"},
        ["--people=8", "--per-person=2", "--judge=none"],
    ),
}


def small(words: Words) -> Words:
    removed, added = SMALL.get(words[1], (set(), []))
    kept = [word for word in words if word != "--fetch"]  # it downloads 340 MB
    for name in removed & set(kept):
        place = kept.index(name)
        del kept[place : place + 2]
    return kept if "--help" in words else kept + added


def written(command: Command) -> str | None:
    """The file or folder that a command of vultus writes, as the pages name it."""
    words = command.words
    if words[1] == "publish":
        return option(words, "--out") or f"{words[2].rstrip('/')}/publish"
    out = option(words, "--out")
    return out and out.rstrip("/")


RUN = list({kind_of(command): command for command in reversed(VULTUS) if not not_run(command)}.values())[::-1]


# --- the workspace ----------------------------------------------------------------------------------------------------


@dataclass
class Workspace:
    """The folder that holds what the pages speak of. Tests run in copies of it."""

    folder: Path
    written: set[str] = field(default_factory=set)

    def write(self, command: Command) -> None:
        """Run a command here, once."""
        text = shlex.join(command.words)
        if text not in self.written:
            self.written.add(text)
            self.prepare(command)
            with pytest.MonkeyPatch.context() as patch:
                surroundings(patch, self.folder, command.environment)
                run(small(command.words))

    def provide(self, path: str, page: Path) -> None:
        """Write `path`, or a folder around it, by the command of the pages that does so; this page's comes first."""
        path = path.partition("#")[0].rstrip("/")
        writers = [one for one in VULTUS if not not_run(one) and covers(written(one), path)]
        writers.sort(key=lambda one: one.block.page != page)
        if writers and not (self.folder / path).exists():
            self.write(writers[0])

    def prepare(self, command: Command) -> None:
        """Provide all that a command reads."""
        out = option(command.words, "--out")
        for word in command.words[2:]:
            if word != out and not word.startswith("-"):
                self.provide(word, command.block.page)

    def copy(self, to: Path) -> Path:
        return Path(shutil.copytree(self.folder, to / "workspace", symlinks=True))


def covers(out: str | None, path: str) -> bool:
    return out is not None and (path == out or path.startswith(f"{out}/"))


def run(words: Words) -> None:
    """One command, in this process. Skips the test if it needs FaceNet, which is absent."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = exit_code(lambda: cli.main(words[1:]))
    if code == 2 and not FACENET and WEIGHTS_FILE in errors.getvalue():
        pytest.skip(f"needs FaceNet: {NO_SHARED}")
    assert code == 0, f"{shlex.join(words)}\n{errors.getvalue()[-2000:]}"


def exit_code(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except SystemExit as done:  # --help
        return done.code


def surroundings(patch: pytest.MonkeyPatch, folder: Path, environment: dict[str, str]) -> None:
    patch.chdir(folder)
    patch.setenv("VULTUS_WEIGHTS", str(SHARED / "weights") if FACENET else "")
    patch.setenv("VULTUS_CACHE", str(folder / "cache"))
    for name in ("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        patch.setenv(name, NOWHERE)
    for name in ("no_proxy", "NO_PROXY"):
        patch.setenv(name, "127.0.0.1")
    for name, value in environment.items():
        patch.setenv(name, value)


def settings() -> str:
    return next(block.text for block in blocks("yaml") if block.page.name == "training.md")


def names(count: int, *, test: bool) -> list[str]:
    """Names of people whom `vultus prepare` puts into the test split, or whom it does not."""
    from vultus.data.crops import in_test

    return [name for name in (f"person-{number}" for number in range(999)) if in_test(name, 0.1) == test][:count]


def write_onnx(path: Path) -> None:
    """A face encoder of sorts: means over squares of 8x8 pixels."""
    import onnx
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("AveragePool", ["x"], ["p"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Reshape", ["p", "to"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 112, 112])]
    ends.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    shape = helper.make_tensor("to", TensorProto.INT64, [2], [0, 3 * 14 * 14])
    graph = helper.make_graph(nodes, "tiny", ends[:1], ends[1:], [shape])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def write_data(folder: Path, rows: list[dict[str, Any]], metadata: dict[str, Any]) -> None:
    """A prepared data set without FaceNet: the embeddings are those that the faces were generated from."""
    from vultus.data.shards import PreparedFolder

    folder.mkdir(parents=True)
    prepared = PreparedFolder(folder)
    prepared.begin({})
    head = {"schema": 1, "source": "generated", "licence": None, "resolution": 128, "crop": metadata["crop"]}
    entry = prepared.write(0, rows, {"embedding": 512}) | {"skipped": []}
    prepared.finish([entry], head | {"encoder": metadata["encoder"] | {"dtype": "float32"}}, {})


def write_parquet(folder: Path, images: dict[str, list[tuple[bytes, int]]]) -> None:
    """Files in the schema of flwrlabs/celeba: by split, (JPEG, number of the person)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    folder.mkdir()
    for split, rows in images.items():
        cells = [{"bytes": data, "path": f"{number:06d}.jpg"} for number, (data, _) in enumerate(rows)]
        table = pa.table({"image": pa.array(cells, kind), "celeb_id": [person for _, person in rows]})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    from vultus.data.crops import in_test
    from vultus.images import align
    from vultus.images.io import encode_jpeg, to_pil
    from vultus.models.snapshot import default_snapshot, load_snapshot
    from vultus.sampling.generate import render
    from vultus.sampling.latents import noise, sample_identities

    folder = tmp_path_factory.mktemp("docs")
    (folder / "cache").symlink_to(tmp_path_factory.mktemp("cache"))  # one for all copies: photos are measured once
    snapshot = load_snapshot(default_snapshot())
    people = names(6, test=False) + names(3, test=True)
    c = sample_identities(snapshot.population, len(people), seed=11).repeat_interleave(PHOTOS, 0)
    images = render(snapshot.network, noise(11, 0, len(c), snapshot.network.z_dim), c)
    rows = []
    parquet: dict[str, list[tuple[bytes, int]]] = {"train": [], "test": []}
    for number, image in enumerate(images):
        person, photo = people[number // PHOTOS], number % PHOTOS
        split = "test" if in_test(person, 0.1) else "train"
        data = encode_jpeg(to_pil(image))
        path = folder / "photos" / person / f"{photo}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        parquet[split].append((data, number // PHOTOS))
        row = {"image": data, "embedding": c[number].numpy(), "identity": person, "key": f"{person}/{photo}.jpg"}
        rows.append(row | {"split": split})
    write_parquet(folder / "celeba", parquet)
    detected = (image for image in images if not align.available() or align.align(to_pil(image)) is not None)
    to_pil(next(detected)).save(folder / "me.jpg", quality=95)
    np.save(folder / "vectors.npy", c[:3].numpy())
    write_onnx(folder / "arcface.onnx")
    (folder / "settings.yaml").write_text(settings())
    if FACENET:
        (folder / "weights").symlink_to(SHARED / "weights")
    else:
        (folder / "weights").mkdir()
    write_data(folder / "data/mine", rows, snapshot.metadata)
    with pytest.MonkeyPatch.context() as patch:
        surroundings(patch, folder, {"VULTUS_WEIGHTS": ""})  # the preset needs no FaceNet, its validation would
        run(small(["vultus", "train", "--preset", "reference-mse", "--data", "data/mine", "--out", "runs/mine"]))
    named = {
        match for command in VULTUS for word in command.words for match in re.findall(r"^(?:runs|data)/\w[^/]*", word)
    }
    for name in named - {"runs/mine", "data/mine"}:
        shutil.copytree(folder / name.partition("/")[0] / "mine", folder / name)
    return Workspace(folder)


@pytest.fixture(scope="session")
def served(workspace: Workspace) -> Iterator[str]:
    """The address of a server in a thread, for what a page requests of one."""
    import uvicorn

    from vultus.models.snapshot import default_snapshot, load_snapshot
    from vultus.serving.app import create_app
    from vultus.serving.engine import open_engine

    with pytest.MonkeyPatch.context() as patch:
        surroundings(patch, workspace.folder, {})
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


# --- commands ---------------------------------------------------------------------------------------------------------


def test_every_command_is_documented() -> None:
    documented = {command.words[1] for command in VULTUS if len(command.words) > 1}
    usage = subprocess.run([sys.executable, "-m", "vultus", "--help"], capture_output=True, text=True, check=True)
    listed = set(re.findall(r"^  ([a-z]+)  ", usage.stdout, re.M))
    assert len(listed) >= 10
    assert listed <= documented


class Parsed(Exception):
    """The options were understood; nothing more is to be done."""


@pytest.mark.parametrize(
    "command", [pytest.param(one, id=one.name) for one in {shlex.join(one.words): one for one in VULTUS}.values()]
)
def test_options_are_understood(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand on the page, also of commands that are not run."""
    monkeypatch.chdir(tmp_path)
    Path("settings.yaml").write_text(settings())
    real = ArgumentParser.parse_args

    def parse(parser: Any, arguments: Any) -> None:
        real(parser, arguments)
        raise Parsed

    if {"--help", "--version"} & set(command.words):
        assert exit_code(lambda: cli.main(command.words[1:])) == 0
    else:
        monkeypatch.setattr(ArgumentParser, "parse_args", parse)
        with pytest.raises(Parsed):
            cli.main(command.words[1:])


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(one, id=one.name, marks=[pytest.mark.slow] * (one.words[1] in ("evaluate", "export")))
        for one in RUN
    ],
)
def test_command_runs(command: Command, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = option(command.words, "--out")
    if command.words[1] == "export":  # other commands need what it writes: no second time
        workspace.write(command)
        assert out is not None
        assert (workspace.folder / out).exists()
        return
    workspace.prepare(command)
    folder = workspace.copy(tmp_path)
    surroundings(monkeypatch, folder, command.environment)
    if command.words[1] in ("prepare", "train") and out is not None:
        shutil.rmtree(folder / out, ignore_errors=True)  # the first run, not a resumed one
    run(small(command.words))
    if out is not None:
        says_only = command.words[1] == "train" and "--dry-run" in command.words
        assert (folder / out).exists() != says_only


@pytest.mark.parametrize(
    "command",
    [pytest.param(one, id=one.block.name + str(n)) for n, one in enumerate(COMMANDS) if one.words[0] == "curl"],
)
def test_curl_gets_an_answer(
    command: Command, workspace: Workspace, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    if any(part in " ".join(command.words) for part in ("image/", "@me.jpg")) and not FACENET:
        pytest.skip(f"needs FaceNet: {NO_SHARED}")
    address = request.getfixturevalue("served")
    monkeypatch.chdir(workspace.folder)
    words = ["curl", "--fail", "--silent", "--show-error", "--noproxy", "*"]
    words += [word.replace(SERVED, address) for word in command.words[1:]]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, shlex.join(words) + done.stderr
    assert Path(words[words.index("-o") + 1]).stat().st_size > 1000


SCRIPTS = [one for one in COMMANDS if one.words[0] == "python" and one.words[1].endswith(".py")]


@pytest.mark.parametrize("command", [pytest.param(one, id=one.name) for one in SCRIPTS])
def test_options_of_scripts_are_understood(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    script = ROOT / command.words[1]
    if "argparse" not in script.read_text(encoding="utf-8"):
        assert len(command.words) == 2, f"{script.name} has no options"
        return
    real = argparse.ArgumentParser.parse_args

    def parse(parser: Any, *_: Any) -> None:
        real(parser, command.words[2:])
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


# --- Python -----------------------------------------------------------------------------------------------------------


def small_python(text: str) -> str:
    """A published folder stands for one on the hub; budgets of trainings are a few images."""
    text = re.sub(r'"(hf://)?user/name"', '"published"', text)
    text = re.sub(r"\b(images|limit)=[\d_]+", r"\1=8", text)
    return re.sub(r"\b(hours|epochs)=[\d._]+", "images=8", text)


PYTHON = [block for block in blocks("python", "py") if block.runs]


@pytest.mark.parametrize("page", sorted({block.page for block in PYTHON}), ids=lambda page: page.name)
def test_python_runs(
    page: Path, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The blocks of a page, one after the other."""
    from vultus.errors import UserError

    texts = {block.name: small_python(block.text) for block in PYTHON if block.page == page}
    for path in re.findall(r"[\"']([\w./-]+\.\w+)[\"']", "\n".join(texts.values())):
        workspace.provide(path, page)
    if any('"published"' in text for text in texts.values()) and not (workspace.folder / "published").exists():
        with pytest.MonkeyPatch.context() as patch:
            surroundings(patch, workspace.folder, {})
            run(["vultus", "publish", "runs/mine", "--repo", "a/b", "--dry-run", "--out", "published"])
    folder = workspace.copy(tmp_path)
    surroundings(monkeypatch, folder, {})
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for name, text in texts.items():
        if SERVED in text:
            text = text.replace(SERVED, request.getfixturevalue("served"))
        try:
            exec(compile(text, name, "exec"), namespace)
        except UserError as error:
            if FACENET or WEIGHTS_FILE not in str(error):
                raise
            pytest.skip(f"needs FaceNet: {NO_SHARED}")


# --- what the pages name ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [
        link for link in re.findall(r"\]\(([^)\s#]+)", text) if "://" not in link and not link.startswith("mailto:")
    ]
    folders = "scripts|benchmarks|notebooks|examples|tests"
    files = [ROOT / name for name in re.findall(rf"(?<![\w/])(?:(?:{folders})/\w+\.(?:py|ipynb))\b", text)]
    missing = [str(path) for path in [*(page.parent / link for link in links), *files] if not path.exists()]
    assert not missing
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name for found in re.findall(r"(?:\.|vultus)\[([\w,]+)\]", text) for name in found.split(",")}
    assert extras <= project["optional-dependencies"].keys()


def test_every_page_is_in_the_navigation() -> None:
    navigation = ROOT / "mkdocs.yml" if (ROOT / "mkdocs.yml").is_file() else DOCS / "README.md"
    text = navigation.read_text(encoding="utf-8")
    missing = [str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS) and page.name != "README.md"]
    missing = [name for name in missing if name not in text]
    assert not missing


# --- what the pages say in numbers and names --------------------------------------------------------------------------


def quoted() -> list[tuple[str, str]]:
    """(page, words of it), the words built from the constants that the code works with."""
    from vultus.evaluation import evaluate, registry, scores
    from vultus.evaluation.bootstrap import REPLICATES
    from vultus.evaluation.evaluate import EvaluationSettings
    from vultus.evaluation.stored import ASIDE, FOLDER
    from vultus.export import onnx_export, publish
    from vultus.images import watermark
    from vultus.presets import PRESETS
    from vultus.reporting import html
    from vultus.serving.settings import ServerSettings
    from vultus.training import run_log, sample_grid, trainer, validation

    usual = EvaluationSettings()
    batches = [str(batch) for batch in onnx_export.BATCHES]
    return [
        ("export.md", f"on batches of {', '.join(batches[:-1])} and {batches[-1]} faces"),
        ("export.md", f"if no value differs by more than {onnx_export.LIMIT:g}".replace("0.001", "1e-3")),
        ("export.md", f"against PyTorch is at least {onnx_export.LEAST:.0f} dB"),
        ("export.md", f"calibrated on {onnx_export.CALIBRATION} random identities"),
        ("metrics.md", f"drawn with replacement {REPLICATES:,} times"),
        ("metrics.md", f"standard deviations of {scores.FD_REPLICATES} draws"),
        ("metrics.md", f"the same of {scores.KD_REPLICATES}."),
        ("metrics.md", f"computed on at most {scores.MAX_PAIRED:,} photos"),
        ("metrics.md", f"network, from {registry.MIN_PHOTOS} photos on"),
        ("metrics.md", f"`_best{usual.best_of}`: the best of {usual.best_of} noise vectors by that measure, on"),
        ("metrics.md", f"on {evaluate.MAX_BEST} photos"),
        ("metrics.md", f"at most {evaluate.MAX_OTHER} pairs of photos"),
        ("metrics.md", f"faces of each ({usual.noises} by default)"),
        ("metrics.md", f"`pairs_above_{scores.COLLAPSE}`"),
        ("evaluation.md", f"`{FOLDER}/HASH-test`"),
        ("evaluation.md", f"`{ASIDE}-1`"),
        ("reports.md", f"larger than {html.MAX_BYTES // 1_000_000} MB, down to {html.SIZES[-1]} pixels"),
        ("hub.md", f"below {publish.FEW:,} photos"),
        ("marks.md", f"Images below {watermark.LEAST}×{watermark.LEAST} carry no watermark"),
        (
            "serve.md",
            f"A photo of more than {ServerSettings().max_megapixels:g} megapixels (`--megapixels`) is refused",
        ),
        ("serve.md", f"a photo of more than {ServerSettings().max_megapixels:g} megapixels is refused"),
        ("training.md", f"Below {validation.CHANCE:g} the faces are not shown to follow their embeddings"),
        ("training.md", f"fewer than {validation.FEWEST} photos, which cannot show it"),
        ("training.md", f"{trainer.FAILED} validations one after the other and at least {trainer.SETTLED:,} images"),
        ("tracking.md", f"at most {sample_grid.ROWS - 1} of them"),
        ("tracking.md", {60.0: "trackers have a minute to finish"}[run_log.CLOSING]),
        *(("training.md", f"| `{name}`") for name in PRESETS),
    ]


@pytest.mark.parametrize(("page", "words"), [pytest.param(*one, id=f"{one[0]}: {one[1][:60]}") for one in quoted()])
def test_limits_on_a_page_are_those_of_the_code(page: str, words: str) -> None:
    text = " ".join((DOCS / page).read_text(encoding="utf-8").split())
    assert words in text


def options_of_commands() -> set[str]:
    found = set()
    for command in cli.COMMANDS:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            assert exit_code(lambda name=command: cli.main([name, "--help"])) == 0
        found |= set(re.findall(r"--[a-zA-Z][\w.-]*", output.getvalue()))
    return found | {"--version"}


def test_options_that_a_page_mentions_exist() -> None:
    """In the text, as `--option`; blocks of commands are parsed by the commands themselves."""
    known = options_of_commands() | set(
        re.findall(
            r"--[a-z][\w-]*",
            "".join(
                path.read_text(encoding="utf-8")
                for folder in ("scripts", "benchmarks")
                for path in (ROOT / folder).glob("*.py")
            ),
        )
    )
    wrong = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for span in re.findall(r"`([^`\n]+)`", text):
            if span.startswith(("--", "vultus ")):
                wrong += [
                    f"{page.name}: {name}" for name in re.findall(r"--[a-zA-Z][\w.-]*", span) if name not in known
                ]
    assert not wrong


def table_of(page: str, heading: str) -> list[str]:
    """The names in the first column of the first table below a heading: `one`, `two`, ..."""
    text = (DOCS / page).read_text(encoding="utf-8")
    section = text[re.search(rf"^##+ {re.escape(heading)}$", text, re.M).end() :]  # type: ignore[union-attr]
    table = re.search(r"(?:^\|.*\n)+", section, re.M)
    assert table is not None
    return [name for line in table[0].splitlines()[2:] for name in re.findall(r"`([^`]+)`", line.split("|")[1])]


@pytest.mark.parametrize(
    ("page", "heading"), [("data.md", "Files"), ("training.md", "Run folder"), ("hub.md", "Model folder")]
)
def test_files_in_a_table_are_written(page: str, heading: str, workspace: Workspace, tmp_path: Path) -> None:
    folder = {"data.md": "data/mine", "training.md": "runs/mine", "hub.md": "published"}[page]
    names = table_of(page, heading)
    assert len(names) >= 3
    place = workspace.folder / folder
    if page == "hub.md":
        place = tmp_path / folder
        run(
            [
                "vultus",
                "publish",
                str(workspace.folder / "runs/mine"),
                "--repo",
                "a/b",
                "--dry-run",
                "--out",
                str(place),
            ]
        )
    optional = {"skipped.jsonl"}  # only where a photo was skipped
    assert [name for name in names if not list(place.glob(name)) and name not in optional] == []
    if page == "hub.md":
        assert {path.name for path in place.iterdir() if path.name != ".lock"} == set(names)


def test_files_of_an_evaluation_are_those_of_its_table() -> None:
    from vultus.evaluation import artifacts

    names = table_of("evaluation.md", "Files")
    listed = re.findall(r"^OUT/(\S+)", artifacts.__doc__ or "", re.M)
    assert {name.replace("*", "NAME") for name in names} == set(listed)


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_references_to_sections_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]*)#([^)\s]+)\)", page.read_text(encoding="utf-8"))
    missing = [
        f"{name}#{anchor}"
        for name, anchor in links
        if "://" not in name and anchor not in anchors(page.parent / name if name else page)
    ]
    assert not missing


def test_pages_and_variables_that_the_code_names_exist() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    pages = {name for name in re.findall(r"\bdocs/[\w/.-]+\.md\b", source) if not (ROOT / name).is_file()}
    assert not pages
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assets = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "notebooks").glob("*.py"))
    variables = {name for name in re.findall(r"\bVULTUS_[A-Z_0-9]+\b", text) if name not in source + assets}
    assert not variables


def test_endpoints_in_the_table_are_those_of_the_server() -> None:
    from vultus.models.snapshot import default_snapshot, load_snapshot
    from vultus.serving.app import create_app
    from vultus.serving.engine import open_engine

    engine = open_engine(load_snapshot(default_snapshot()))
    try:
        app = create_app(engine)
        served = {getattr(route, "path", "") for route in app.routes} | set(app.openapi()["paths"])
    finally:
        engine.close()
    section = (DOCS / "serve.md").read_text(encoding="utf-8").partition("## Endpoints")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(?:GET|POST) (/\S+?)`", section))
    assert len(named) >= 8
    assert named <= served
    assert {path for path in served if path.startswith("/v1/")} <= named
