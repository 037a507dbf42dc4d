"""`vultus report`: pages of small real runs, parsed and opened in a browser; W&B's report read back by its library."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import write_dataset
from tiny_parts import DIM, SIDE, TinyEncoder, TinyFeatures, TinyGenerator, TinyJudge, TinyPerceptual, snapshot
from vultus._files import folder_lock
from vultus.cli.main import main
from vultus.config import LoaderConfig, OptimConfig
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.evaluation.backbones.loading import Backbones
from vultus.evaluation.compare import compare
from vultus.presets import get_preset
from vultus.reporting import html as report_module
from vultus.reporting.content import build_content
from vultus.reporting.run_folder import read_evaluations, read_run, read_runs
from vultus.reporting.wandb_report import FILE, write_wandb_report
from vultus.training.trainer import Budget, train
from vultus.training.validation import unseen_validation

TINY = get_preset("tiny")
TINY = replace(
    TINY,
    generator=replace(TINY.generator, base_width=8, max_width=16),
    discriminator=replace(TINY.discriminator, base_width=8, max_width=16),
    optim=OptimConfig(batch=4, ema_nimg=50, lr=3e-4),
    loader=LoaderConfig(mirror=True),
    dtype="float32",
    log_every_nimg=4,
    sample_every_nimg=8,
    checkpoint_every_nimg=8,
)
PHOTO = (250, 30, 220)  # the colour of every photo of these runs, and of no generated face


@pytest.fixture(autouse=True)
def _no_user_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No API key, no settings and no home of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "NETRC"))]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def trained(built_once: Callable[..., Path]) -> Path:
    """A folder of two real runs, `one` and `two`, and of their `data`; the first run is evaluated. Read-only."""
    return built_once("trained", _train)


def _train(root: Path) -> None:
    images = torch.tensor(PHOTO, dtype=torch.uint8).view(1, 3, 1, 1).expand(24, 3, 32, 32).contiguous()
    (root / "data").mkdir()
    data = write_dataset(root / "data", pictures=images)
    for name, nimg in (("one", 24), ("two", 16)):
        validation = unseen_validation(data, None)
        assert validation is not None
        budget = Budget(total_nimg=nimg)
        train(TINY, data=data, out=root / name, budget=budget, evaluators=[("unseen", validation, 8)])
    encoder = TinyEncoder()
    parts = Backbones(encoder, (TinyJudge(),), (TinyFeatures(),), (TinyPerceptual(),), {"fid, kid": "no weights"})
    (root / "judged").mkdir()
    people = {"train": 12, "test": 12}
    judged = write_dataset(root / "judged", resolution=SIDE, people=people, photos=4, dim=DIM, embed=encoder.embed)
    faces = {"runs/one": snapshot(TinyGenerator(), PreparedDataset(judged, "test"), cur_nimg=24)}
    out = root / "one" / "evaluation"
    compare(faces, judged, encoder=encoder, backbones=parts, out=out, cache=root / "cache")


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    for name in ("one", "two"):
        shutil.copytree(trained / name, tmp_path / "runs" / name)
    return tmp_path / "runs"


# --- reading the page -------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects what a page fetches, its images, headings and text; fails for elements that are not closed."""

    VOID = frozenset({"meta", "link", "img", "br", "hr"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.images: list[dict[str, str]] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.fetched += [values[key] for key in ("src", "srcset", "data", "poster", "xlink:href") if key in values]
        if tag in ("link", "a"):
            self.fetched.append(values["href"])
        if tag == "img":
            self.images.append(values)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data.strip())
        if "style" not in self.open:
            self.words.append(data)


def pixels_of(uri: str) -> np.ndarray:
    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as opened:
        return np.asarray(opened.convert("RGB")).astype(int)


def photos_in(pixels: np.ndarray) -> float:
    """The share of pixels with the colour of the photos."""
    return float((np.abs(pixels - np.array(PHOTO)).max(-1) < 60).mean())


def report_files(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, Path]:
    """report.html and report.md of a run."""
    assert main(["report", str(run)]) == 0
    page, text = map(Path, capsys.readouterr().out.splitlines())
    return page, text


def test_the_page_of_one_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(runs / "one")]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert paths == [runs / "one" / "report.html", runs / "one" / "report.md"]
    page = Page(paths[0])
    # Nothing is fetched: all addresses are data in the page or places in it.
    assert page.fetched
    assert all(address.startswith(("data:", "#")) for address in page.fetched)
    assert re.findall(r"url\((?!#)|@import|<script", page.source) == []
    assert len(page.source.encode()) < 5_000_000
    titles = ["How good is it?", "How it looks", "Training curves", "Evaluation", "Is it the person?"]
    titles += ["Best and worst people", "Does it copy training photos?", "Method and data"]
    assert [title for title in page.headings if title in titles] == titles
    results = json.loads((runs / "one" / "evaluation" / "results.json").read_text())["runs/one"]
    row = results["metrics"]["mse"]
    assert f"mse ↓ {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}] {row['real']:.3f}" in page.text
    best, worst = results["people"]["umpire"][0], results["people"]["umpire"][-1]
    for name, score, count in (best, worst):
        assert f"{name} {score:.3f} {count}" in page.text
    assert "12 photos of 4 people" in page.text
    assert "24 (2.0 epochs)" in page.text
    assert "not measured: no weights" in page.text
    assert "--optim.lr 0.0003" in page.text
    svgs = re.findall(r'<svg[^>]*role="img" aria-label="([^"]+)"', page.source)
    assert len(svgs) == len(page.source.split("<svg")) - 1 >= 7
    assert all(shown["alt"] for shown in page.images)


def test_alarms_are_the_first_thing_after_the_title(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs / "one" / "evaluation" / "results.json"
    result = json.loads(path.read_text())["runs/one"]
    baseline = result | {"alarms": ["collapse: all faces are alike"]}
    path.write_text(json.dumps({"default": baseline, "one": result | {"alarms": ["idle noise: <5> faces"]}}))
    page, text = report_files(runs / "one", capsys)
    parsed = Page(page)
    lines = ["one: idle noise: <5> faces", "default: collapse: all faces are alike", "How good is it?", "How it looks"]
    assert sorted(lines, key=parsed.text.index) == lines
    markdown = text.read_text()
    assert (
        markdown.index("# Training report") < markdown.index(r"idle noise: \<5\> faces") < markdown.index("## How good")
    )


def test_photos_are_shown_only_when_asked_for(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Image.open(sorted((runs / "one" / "samples").glob("0*.png"))[-1]) as sheet:
        assert photos_in(np.asarray(sheet.convert("RGB")).astype(int)) > 0.1  # they are in the folder
    assert main(["report", str(runs / "one"), "--with-photos"]) == 0
    page = Page(runs / "one" / "report.html")
    assert max(photos_in(pixels_of(shown["src"])) for shown in page.images) > 0.1
    assert any("nearest to a training photo" in shown["alt"] for shown in page.images)
    files = runs / "one" / "report-files"
    assert {"run-0-extremes.jpg", "run-0-nearest.jpg"} <= {path.name for path in files.iterdir()}
    assert main(["report", str(runs / "one")]) == 0
    page = Page(runs / "one" / "report.html")
    assert len(page.images) >= 4
    assert max(photos_in(pixels_of(shown["src"])) for shown in page.images) == 0
    # The files of the first report beside the Markdown are deleted too.
    for path in files.glob("*.jpg"):
        with Image.open(path) as opened:
            assert photos_in(np.asarray(opened.convert("RGB")).astype(int)) == 0
    assert not (files / "run-0-extremes.jpg").exists()


def test_a_sheet_of_another_layout_is_left_out(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = runs / "one" / "samples"
    for path in samples.glob("*.npz"):
        path.unlink()  # as older versions wrote the folder
    last = sorted(samples.glob("0*.png"))[-1]
    Image.new("RGB", (201, 100), PHOTO).save(last)
    (samples / "0000000004.png").write_bytes(b"not an image")
    assert main(["report", str(runs / "one")]) == 0
    page = Page(runs / "one" / "report.html")
    assert len(page.images) >= 2
    assert max(photos_in(pixels_of(shown["src"])) for shown in page.images) == 0
    remarks = read_run(runs / "one").remarks
    assert len(remarks) == 2
    assert all(any(name in line for line in remarks) for name in (last.name, "0000000004.png"))
    assert all(line in page.text for line in remarks)


def test_without_matplotlib_there_are_no_charts(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page, text = report_files(runs / "one", capsys)
    assert "<svg" not in page.read_text()
    assert "Charts are left out: matplotlib is not installed (pip install 'vultus[plot]')." in Page(page).text
    assert "Training curves" not in Page(page).headings
    assert "matplotlib is not installed" in text.read_text()
    assert ".svg" not in text.read_text()


def test_the_markdown_says_the_same(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(runs / "one")]) == 0
    text = (runs / "one" / "report.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(shown) >= 8
    assert all((runs / "one" / path).is_file() for path in shown)
    assert sorted(path.name for path in (runs / "one" / "report-files").iterdir()) == sorted(
        Path(path).name for path in shown
    )
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) >= 4
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
    assert "type2_umpire_far1e-2" in text
    assert "vultus train --preset tiny --data DATA --out runs/one" in text


def test_the_commands_make_the_same_run_again(trained: Path, tmp_path: Path) -> None:
    command = build_content([read_run(trained / "one")], read_evaluations([])).runs[0].commands.splitlines()[1]
    words = command.replace("DATA", str(trained / "data")).replace("runs/one", str(tmp_path / "again")).split()
    assert main([*words[1:], "--device", "cpu"]) == 0
    again, before = read_run(tmp_path / "again"), read_run(trained / "one")
    assert again.config == before.config
    assert again.series("G_mse") == before.series("G_mse")


def test_runs_side_by_side(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With an evaluation given by name; a page that says what the second run lacks."""
    out = tmp_path / "both"
    evaluation = str(runs / "one" / "evaluation")
    assert main(["report", str(runs / "one"), str(runs / "two"), "--out", str(out), "--evaluation", evaluation]) == 0
    assert "two is not evaluated yet: vultus evaluate" in capsys.readouterr().err
    page = Page(out / "report.html")
    assert "metric one real photos" in page.text
    assert "images seen 24 (2.0 epochs) 16 (1.3 epochs)" in page.text
    curves = re.findall(r'aria-label="(Reconstruction error[^"]+)"', page.source)
    assert len(curves) == 1
    assert all(name in curves[0] for name in ("one, unseen people", "one, in training", "two, unseen people"))
    assert not (runs / "one" / "report.html").exists()
    twins = tmp_path / "twins" / "one"
    shutil.copytree(runs / "one", twins)
    assert [run.name for run in read_runs([runs / "one", twins])] == ["runs/one", "twins/one"]
    with pytest.raises(UserError, match="given twice"):
        read_runs([runs / "one", runs / "two", runs / ".." / "runs" / "one"])


def test_a_command_in_a_report_can_be_copied(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = (runs / "two").rename(runs / "my two")
    assert main(["report", str(folder)]) == 0
    assert f"my two is not evaluated yet: vultus evaluate '{folder}' --data DATA" in capsys.readouterr().err


def test_the_two_columns_of_an_evaluation_of_both_splits_may_be_compared(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs / "one" / "evaluation" / "results.json"
    result = json.loads(path.read_text())["runs/one"]
    sides = {side: result | {"context": result["context"] | {"split": side}} for side in ("test", "train")}
    for columns, different in (
        ({f"x/one ({side})": each for side, each in sides.items()}, False),
        ({"x/one": sides["test"], "default": sides["train"]}, True),
    ):
        path.write_text(json.dumps(columns))
        assert main(["report", str(runs / "one"), "--evaluation", str(path.parent)]) == 0
        shown = capsys.readouterr().err
        assert ("columns were measured on different splits" in shown) is different, shown


def test_columns_of_both_splits_and_of_baselines(runs: Path) -> None:
    path = runs / "one" / "evaluation" / "results.json"
    result = json.loads(path.read_text())["runs/one"]
    columns = {"x/one (test)": result, "x/one (train)": result, "default": result}
    path.write_text(json.dumps(columns))
    found = read_evaluations([read_run(runs / "one")])
    assert list(found.columns) == ["one (test)", "one (train)", "default"]
    assert found.of_run == {"one": "one (test)"}
    assert found.sources["one (train)"] == (path.parent, "x/one (train)")
    # Evaluated earlier, and on other data.
    result["context"] |= {"cur_nimg": 8, "data_sha256": "f" * 64}
    path.write_text(json.dumps({"somewhere/snapshot.safetensors": result}))
    content = build_content([run := read_run(runs / "one")], read_evaluations([run]))
    assert content.remarks[0] == "one was evaluated at 8 images; the snapshot is of 24 images"
    assert content.remarks[1].startswith("one was evaluated on other data (ffffffffffff)")


def test_damaged_and_missing_parts(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = runs / "one"
    stats = one / "stats.jsonl"
    lines = stats.read_text().splitlines()
    junk = ['{"cur_nimg": 4, "G_m', "[1, 2]", "\x00\xff", '{"seconds": 3}']
    values = '{"cur_nimg": 20, "G_mse": NaN, "G_adversarial": "high", "seconds": null}'
    stats.write_text("\n".join([*lines, values, *junk]), encoding="latin-1")
    (one / "snapshot.safetensors").write_bytes(b"cut")
    (one / "run.json").write_text("{")
    shutil.rmtree(one / "evaluation")
    assert main(["report", str(one)]) == 0
    page = Page(one / "report.html")
    for expected in (
        "stats.jsonl: 4 damaged lines left out",
        "snapshot.safetensors cannot be read",
        "run.json cannot be read and is left out",
        "no snapshot yet",
        "Not measured yet. vultus evaluate RUN --data DATA measures it",
        "mean squared error against the source photo, values in [-1, 1]; last value of the validation in training",
    ):
        assert expected.lower() in page.text.lower()
    source = re.sub(r"base64,[\w+/=]+", "", page.source.lower())
    assert "nan" not in source.replace("nano", "")
    for path in (stats, one / "snapshot.safetensors", one / "run.json"):
        path.unlink()
    shutil.rmtree(one / "samples")
    assert main(["report", str(one)]) == 0
    page = Page(one / "report.html")
    assert "no stats.jsonl, so no curves" in page.text
    assert "Training curves" not in page.headings


def test_runs_of_older_versions(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs / "one" / "config.json"
    record = json.loads(path.read_text())
    config = record["config"]
    config["method"] = "coded"
    config["loss"] |= {"adversarial": "hinge", "gamma": 0.0, "kl_weight": 0.01}
    path.write_text(json.dumps({"config": config, "data": record["data"]}))
    facts = dict(build_content([read_run(runs / "one")], read_evaluations([])).runs[0].facts)
    assert facts["method"] == "cvae-gan"
    assert facts["loss"] == "hinge + 10·MSE + 0.01·KL"
    # A setting that no longer exists is shown as it was.
    config["loss"]["gamma"] = 2.0
    path.write_text(json.dumps({"config": config, "data": record["data"]}))
    page, _ = report_files(runs / "one", capsys)
    assert "R1 + R2 with γ = 2" in Page(page).text
    assert "loss.gamma is 2.0" in Page(page).text


def test_a_run_in_progress_says_so(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with folder_lock(runs / "one", "train"):
        assert main(["report", str(runs / "one")]) == 0
    assert "In progress: statistics up to 24 images." in Page(runs / "one" / "report.html").text
    assert not read_run(runs / "one").running


@pytest.mark.parametrize(
    ("break_it", "arguments", "expected"),
    [
        (lambda one: (one / "config.json").write_text("{"), [], "config.json: not valid JSON"),
        (lambda one: (one / "config.json").write_text("[]"), [], "config.json: not the config of a run"),
        (lambda one: (one / "evaluation" / "results.json").write_text('{"a": 1}'), [], "not the results of vultus"),
        (lambda one: None, ["--evaluation", "nowhere"], "nowhere: no results.json in it"),
    ],
)
def test_bad_input_is_one_line(
    break_it: Callable[[Path], Any],
    arguments: list[str],
    expected: str,
    runs: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_it(runs / "one")
    assert main(["report", str(runs / "one"), *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert expected in lines[0]


def test_names_that_would_break_a_page(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = runs / "a <b>&|`*_"
    (runs / "one").rename(odd)
    assert main(["report", str(odd)]) == 0
    assert "a <b>&|`*_" in Page(odd / "report.html").text
    assert r"a \<b\>&\|\`\*\_" in (odd / "report.md").read_text(encoding="utf-8")


def test_a_page_that_grows_too_large_shows_smaller_faces(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(runs / "one")]) == 0
    large = Page(runs / "one" / "report.html")
    monkeypatch.setattr(report_module, "MAX_BYTES", len(large.source.encode()) - 1000)
    assert main(["report", str(runs / "one")]) == 0
    small = Page(runs / "one" / "report.html")
    assert small.images[0]["width"] < large.images[0]["width"]
    assert len(small.source) < len(large.source)


# --- in a browser -----------------------------------------------------------------------------------------------------

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.mark.parametrize("count", [1, 2])
def test_the_page_in_a_browser(
    browser: Any, runs: Path, tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(runs / name) for name in ("one", "two")[:count]]
    assert main(["report", *folders, "--out", str(tmp_path / "out")]) == 0
    for width in (390, 1280):
        for scheme in ("light", "dark"):
            check_page(browser, tmp_path / "out" / "report.html", width, scheme)


def check_page(browser: Any, path: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    printed: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: printed.append(message.text))
    page.on("pageerror", lambda error: printed.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    assert printed == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.evaluate("[...document.images].map(one => one.complete && one.naturalWidth * one.clientWidth)")
    assert sizes
    assert all(sizes)
    charts = page.evaluate("[...document.querySelectorAll('svg.chart')].map(one => one.getBoundingClientRect().width)")
    assert charts
    assert all(200 < chart <= width for chart in charts)
    # Text has the contrast that WCAG AA requires, in the charts too.
    for selector in ("h1", ".soft", "figcaption", "svg.chart text", "tbody th", ".alarm h2", ".alarm li", "pre"):
        assert contrast(page, selector) >= 4.5, (selector, scheme)
    context.close()


def contrast(page: Any, selector: str) -> float:
    """Of the first such element's text to what is behind it."""
    colours = page.evaluate(
        """selector => {
            const one = document.querySelector(selector);
            const style = getComputedStyle(one);
            let behind = one, ground = 'rgba(0, 0, 0, 0)';
            while (behind && ground === 'rgba(0, 0, 0, 0)') {
                ground = getComputedStyle(behind).backgroundColor;
                behind = behind.parentElement;
            }
            return [one instanceof SVGElement ? style.fill : style.color, ground];
        }""",
        selector,
    )

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    high, low = sorted(map(luminance, colours), reverse=True)
    return (high + 0.05) / (low + 0.05)


# --- Weights & Biases -------------------------------------------------------------------------------------------------


class StandIn:
    """A server that has some runs, and records what is saved."""

    def __init__(self, known: tuple[str, ...] = (), shares: bool = True) -> None:
        self.known, self.shares = known, shares
        self.saved: list[Any] = []

    def entity(self) -> str:
        return "team"

    def has(self, project: str, id: str) -> bool:
        return f"{project}/{id}" in self.known

    def save(self, report: Any) -> str:
        self.saved.append((report.id, report))
        report.id = "abc123"
        return "https://wandb.example/team/faces/reports/x--abc123"

    def share(self, report: Any) -> str:
        if not self.shares:
            raise RuntimeError("permission denied")
        return "https://wandb.example/team/faces/reports/x--abc123?accessToken=t"


def track_offline(folder: Path, id: str) -> None:
    """The files of a training that was tracked by W&B offline."""
    (folder / "tracking.json").write_text(json.dumps({"wandb": {"project": "faces", "id": id, "sent": {}}}))
    (folder / "wandb" / f"offline-run-20260101_000000-{id}").mkdir(parents=True)


@pytest.fixture
def library() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, while it is imported
        pytest.importorskip("wandb_workspaces.reports.v2")
        from wandb_workspaces.reports.v2 import internal
        from wandb_workspaces.reports.v2.interface import Report
    return lambda path: Report._from_model(internal.ReportViewspec.model_validate_json(path.read_text("utf-8")))


def blocks(report: Any, kind: str) -> list[Any]:
    return [block for block in report.blocks if type(block).__name__ == kind]


def test_alarms_are_the_first_block_on_wandb(runs: Path, library: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs / "one" / "evaluation" / "results.json"
    result = json.loads(path.read_text())["runs/one"]
    path.write_text(json.dumps({"one": result | {"alarms": ["collapse: all faces are alike"]}}))
    assert main(["report", str(runs / "one"), "--wandb"]) == 0
    first = library(runs / "one" / FILE).blocks[0]
    assert first.text == "**Alarm: one**: collapse: all faces are alike"


def test_wandb_offline(runs: Path, library: Any, capsys: pytest.CaptureFixture[str]) -> None:
    track_offline(runs / "one", "id1")
    assert main(["report", str(runs / "one"), "--wandb"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(runs / "one" / FILE)
    assert lines[1].startswith("not published: no W&B API key")
    assert "Training report: one" in lines[1]
    assert "in project faces" in lines[1]
    sync = f"one is not on W&B yet: wandb sync {runs / 'one'}/wandb/offline-run-*-id1"
    assert lines[2:] == [sync, "to publish it: wandb login, then run the same command again"]
    report = library(runs / "one" / FILE)
    titles = [block.text for block in blocks(report, "H2")]
    assert titles[:4] == ["How good is it?", "How it looks", "Training curves", "Evaluation"]
    assert titles[4:] == ["Method and data", "Machine and time", "Commands to repeat it"]
    grids = blocks(report, "PanelGrid")
    panels = [panel for grid in grids for panel in grid.panels]
    names = {metric.name for panel in panels if type(panel).__name__ == "LinePlot" for metric in panel.y}
    logged = {f"train/{key}" for line in read_run(runs / "one").steps for key in line} | {"unseen/mse"}
    assert {"train/G_mse", "unseen/mse", "train/D_adversarial", "train/images_per_s"} <= names <= logged
    media = [panel.media_keys for panel in panels if type(panel).__name__ == "MediaBrowser"]
    assert media == [["samples"], ["progress"]]
    assert [type(panel).__name__ for panel in panels].count("RunComparer") == 1
    assert {grid.runsets[0].filters for grid in grids} == {"""Metric("ID") in ['id1']"""}
    table = next(block.text for block in blocks(report, "MarkdownBlock") if "type2_umpire" in block.text)
    row = json.loads((runs / "one" / "evaluation" / "results.json").read_text())["runs/one"]["metrics"]["mse"]
    assert f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in table
    assert blocks(report, "CodeBlock")[0].code.startswith("# DATA")
    (runs / "one" / "wandb" / "offline-run-20260101_000000-id1" / "run-id1.wandb.synced").touch()
    assert main(["report", str(runs / "one"), "--wandb", "--public"]) == 0
    out = capsys.readouterr().out
    assert "wandb sync" not in out
    assert "with a public link" in out
    assert "sample browser is left out" in out
    public = library(runs / "one" / FILE)
    assert "MediaBrowser" not in [type(panel).__name__ for grid in blocks(public, "PanelGrid") for panel in grid.panels]
    assert main(["report", str(runs / "two"), "--wandb"]) == 0
    assert "two: this run is not tracked by W&B; resume it with --track wandb" in capsys.readouterr().out


def test_wandb_publishes_and_replaces(
    runs: Path, tmp_path: Path, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    track_offline(runs / "one", "id1")
    track_offline(runs / "two", "id2")
    content = build_content(found := read_runs([runs / "one", runs / "two"]), read_evaluations(found))
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"two: not on W&B yet; run wandb sync .*/two/wandb/offline-run-\*-id2"):
        write_wandb_report(content, out, server=StandIn(("faces/id1",)))
    # With an entity the library looks up the project on the server, which is not tested here.
    from wandb_workspaces.reports.v2 import interface

    answer = {"project": {"internalId": "1"}}
    monkeypatch.setattr(interface, "execute_graphql", lambda *_: answer)
    monkeypatch.setattr(interface, "_get_api", lambda: None)
    server = StandIn(("faces/id1", "faces/id2"))
    lines = write_wandb_report(content, out, server=server)
    assert lines[1].startswith("https://wandb.example/")
    assert "--public creates a public link" in lines[2]
    assert [(id, report.entity, report.project) for id, report in server.saved] == [("", "team", "faces")]
    assert server.saved[0][1].blocks[-3].__class__.__name__ == "H2"
    assert library(out / FILE).id == "abc123"
    lines = write_wandb_report(content, out, server=server, public=True)
    assert lines[-1] == "public link: https://wandb.example/team/faces/reports/x--abc123?accessToken=t"
    assert server.saved[1][0] == "abc123"  # the same report, not a second one
    lines = write_wandb_report(content, out, server=StandIn(server.known, shares=False), public=True)
    assert "team/faces is private or your team forbids links" in lines[-1]
    assert "choose Public" in lines[-1]
    assert "Anyone with the link can view" in lines[-1]


def test_wandb_that_cannot_be_reached(
    runs: Path, library: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    track_offline(runs / "one", "id1")

    class Gone(StandIn):
        def entity(self) -> str:
            raise ConnectionError("no route\nto host")

    monkeypatch.setattr("vultus.reporting.wandb_report._WandB", Gone)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert main(["report", str(runs / "one"), "--wandb"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("vultus: error: W&B cannot be reached or refuses the API key (no route to host)")
    assert library(runs / "one" / FILE).title == "Training report: one"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(["report", str(runs / "one"), "--wandb"]) == 0
