"""Evaluations in run folders: where they are stored, and that each is found by the snapshot that it belongs to."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from permissions import permissions_hold
from tiny_parts import TinyEncoder, TinyFeatures, TinyJudge, TinyPerceptual
from vultus._files import read_json, write_json
from vultus.cli.main import main
from vultus.evaluation import compare as compare_module
from vultus.evaluation.backbones.loading import Backbones
from vultus.models.snapshot import load_snapshot, save_snapshot

Output = pytest.CaptureFixture[str]


class WideEncoder(TinyEncoder):
    """A stand-in for FaceNet with embeddings of 512 numbers."""

    dim = 512

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(3 * 36, self.dim, generator=torch.Generator().manual_seed(1))


@dataclass
class Work:
    """A folder with `runs/mine`, and the commands on it."""

    folder: Path
    data: Path
    output: Output

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "mine"

    def evaluate(self, *arguments: str) -> tuple[str, str]:
        """What `vultus evaluate` prints to stdout and stderr."""
        self.output.readouterr()
        assert main(["evaluate", *arguments, "--data", str(self.data), "--noises", "2", "--device", "cpu"]) == 0
        printed = self.output.readouterr()
        return printed.out, printed.err

    def card(self, snapshot: str, *arguments: str) -> tuple[str, str]:
        """The results in the model card of `vultus publish`, and what it prints to stderr."""
        self.output.readouterr()
        out = str(self.folder / "published")
        assert main(["publish", snapshot, "--repo", "ada/faces", "--dry-run", "--out", out, *arguments]) == 0
        text = (self.folder / "published" / "README.md").read_text(encoding="utf-8")
        return text[text.index("## Results") : text.index("## Limits")], self.output.readouterr().err

    def report(self, run: str) -> tuple[str, str]:
        """The Markdown of `vultus report`, and what it prints to stderr."""
        self.output.readouterr()
        assert main(["report", run, "--out", str(self.folder / "reported")]) == 0
        text = (self.folder / "reported" / "report.md").read_text(encoding="utf-8")
        return text, self.output.readouterr().err

    def train_further(self) -> None:
        """Another snapshot of the same run: other weights, more images seen."""
        snapshot = load_snapshot(self.run)
        with torch.no_grad():
            for parameter in snapshot.network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        metadata = snapshot.metadata | {"cur_nimg": snapshot.metadata["cur_nimg"] + 64}
        path = self.run / "snapshot.safetensors"
        save_snapshot(path, network=snapshot.network, population=snapshot.population, metadata=metadata)


@pytest.fixture
def work(tiny_run: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> Work:
    parts = Backbones(WideEncoder(), (TinyJudge(),), (TinyFeatures(),), (TinyPerceptual(),), {})
    monkeypatch.setattr(compare_module, "load_facenet", lambda **_: parts.encoder)
    monkeypatch.setattr(compare_module, "load_backbones", lambda *_, **__: parts)
    monkeypatch.setenv("VULTUS_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_run, tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    return Work(tmp_path, tiny_data, capsys)


def stored(run: Path) -> list[Path]:
    return sorted((run / "evaluations").iterdir())


def identity(folder: Path) -> str:
    """The value of a metric as the card and the report show it."""
    [result, *_] = read_json(folder / "results.json").values()
    return f"{result['metrics']['identity_umpire']['value']:.2f} ["


def renamed(work: Work) -> str:
    return str(work.run.rename(work.run.with_name("other")))


def copied(work: Work) -> str:
    return str(shutil.copytree(work.run, work.folder / "elsewhere" / "copy"))


def linked(work: Work) -> str:
    (work.folder / "link").symlink_to(work.run)
    return "link"


def from_another_folder(work: Work) -> str:
    (work.folder / "a" / "b").mkdir(parents=True)
    os.chdir(work.folder / "a" / "b")
    return "../../runs/mine"


SPELLED: dict[str, Callable[[Work], str]] = {
    "the same": lambda work: "runs/mine",
    "slash": lambda work: "runs/mine/",
    "dot": lambda work: "./runs/mine",
    "absolute": lambda work: str(work.run),
    "round about": lambda work: "runs/../runs/mine",
    "symlink": linked,
    "another working directory": from_another_folder,
    "renamed": renamed,
    "copied": copied,
}


@pytest.mark.parametrize("spelled", SPELLED.values(), ids=SPELLED)
def test_an_evaluation_is_found_however_the_run_is_named(work: Work, spelled: Callable[[Work], str]) -> None:
    _, errors = work.evaluate("runs/mine")
    [folder] = stored(work.run)
    assert f"runs/mine: stored in runs/mine/evaluations/{folder.name}" in errors
    assert {"results.json", "table.md"} <= {path.name for path in folder.iterdir()}
    value = identity(folder)
    name = spelled(work)
    card, _ = work.card(name)
    assert value in card
    report, errors = work.report(name)
    assert value in report
    assert "not evaluated yet" not in report + errors
    if not name.endswith("/"):
        assert value in work.card(f"{name}/snapshot.safetensors")[0]


def test_it_is_found_though_evaluated_by_another_name(work: Work) -> None:
    work.evaluate(f"{work.run}/../mine/snapshot.safetensors")
    work.evaluate("./runs/mine/")
    [folder] = stored(work.run)  # the same evaluation
    assert list(read_json(folder / "results.json")) == ["mine"]
    assert identity(folder) in work.card("runs/mine")[0]
    lone = shutil.copy(work.run / "snapshot.safetensors", work.folder / "lone.safetensors")
    assert "Not measured" in work.card(str(lone))[0]
    assert identity(folder) in work.card(str(lone), "--evaluation", str(folder))[0]


def test_every_snapshot_of_a_run_has_its_own_evaluation(work: Work) -> None:
    first = (work.run / "snapshot.safetensors").read_bytes()
    work.evaluate("runs/mine")
    [old] = stored(work.run)
    work.train_further()
    report, errors = work.report("runs/mine")
    remark = "mine was evaluated at 64 images; the snapshot is of 128 images"
    assert remark in errors
    assert report.index(remark) < report.index("## How good is it?")
    card, errors = work.card("runs/mine")
    assert "Not measured" in card
    assert f"runs/mine/evaluations/{old.name} is of another snapshot of this run (64 images; this one: 128)" in errors
    arguments = ["publish", "runs/mine", "--repo", "a/b", "--dry-run", "--evaluation", str(old)]
    assert main(arguments) == 2
    assert "measured at 64 images, the snapshot is of 128; evaluate it again" in work.output.readouterr().err

    work.evaluate("runs/mine")
    [new] = set(stored(work.run)) - {old}
    assert identity(new) != identity(old)
    assert identity(new) in work.card("runs/mine")[0]
    report, errors = work.report("runs/mine")
    assert identity(new) in report
    assert identity(old) not in report
    assert "was evaluated at" not in report
    (work.run / "snapshot.safetensors").write_bytes(first)
    assert identity(old) in work.card("runs/mine")[0]
    assert identity(old) in work.report("runs/mine")[0]


def test_a_snapshot_of_as_many_images_is_another_one_too(work: Work) -> None:
    work.evaluate("runs/mine")
    snapshot = load_snapshot(work.run)
    with torch.no_grad():
        next(snapshot.network.parameters()).mul_(1.5)
    save_snapshot(
        work.run / "snapshot.safetensors",
        network=snapshot.network,
        population=snapshot.population,
        metadata=snapshot.metadata,
    )
    assert "mine: the evaluation is of another snapshot of this run" in work.report("runs/mine")[0]
    assert "Not measured" in work.card("runs/mine")[0]


@pytest.mark.slow
def test_other_settings_are_another_evaluation_and_all_photos_are_preferred(work: Work) -> None:
    settings = (("--limit", "8"), ("--noise_strength", "0.5"), ("--seed", "3"), ("--split", "train"), ())
    for given in settings:
        work.evaluate("runs/mine", *given)
        if given == ("--limit", "8"):
            card, _ = work.card("runs/mine")
            assert "Measured on 8 of 16 photos of 4 people" in card
    names = [path.name[13:] for path in stored(work.run)]
    assert names == ["test", "test-limit-8", "test-noise_strength-0.5", "test-seed-3", "train"]
    before = {path: path.read_bytes() for path in work.run.rglob("results.json")}
    work.evaluate("runs/mine", "--limit", "8")
    assert len(stored(work.run)) == len(settings)
    assert {path: path.read_bytes() for path in before if "limit" not in str(path)} == {
        path: value for path, value in before.items() if "limit" not in str(path)
    }
    card, errors = work.card("runs/mine")
    assert "Measured on 16 photos of 4 people" in card
    assert f"the card shows the evaluation in {stored(Path('runs/mine'))[0]}" in errors
    assert identity(stored(work.run)[0]) in work.report("runs/mine")[0]
    work.evaluate("runs/mine", "--split", "both")
    results = read_json(next(path for path in stored(work.run) if path.name.endswith("both")) / "results.json")
    assert list(results) == ["mine (test)", "mine (train)"]


def test_several_runs_are_stored_each_in_its_own_folder(work: Work) -> None:
    shutil.copytree(work.run, work.folder / "runs" / "two")
    work.evaluate("runs/mine", "runs/two")
    assert [list(read_json(stored(work.folder / "runs" / name)[0] / "results.json")) for name in ("mine", "two")] == [
        ["mine"],
        ["two"],
    ]


def test_an_earlier_evaluation_in_out_is_kept(work: Work) -> None:
    out = work.folder / "compared"
    work.evaluate("runs/mine", "--out", str(out))
    assert not (work.run / "evaluations").exists()
    first = (out / "results.json").read_bytes()
    _, errors = work.evaluate("runs/mine", "--out", str(out))
    assert "moved" not in errors
    assert not (out / "earlier-1").exists()
    _, errors = work.evaluate("runs/mine", "--limit", "8", "--out", str(out))
    assert f"an earlier evaluation in this folder was moved to {out}/earlier-1" in errors
    without_time = [json.loads(text) for text in (first, (out / "earlier-1" / "results.json").read_bytes())]
    for results in without_time:
        del results["runs/mine"]["context"]["seconds"]
    assert without_time[0] == without_time[1]
    assert {"table.md", "runs-mine-faces.jpg"} <= {path.name for path in (out / "earlier-1").iterdir()}
    (out / "results.json").write_text("[]")  # of something else
    work.evaluate("runs/mine", "--out", str(out))
    assert (out / "earlier-2" / "results.json").read_text() == "[]"


def test_out_in_the_run_folder_is_found_also_where_it_was_moved_aside(work: Work) -> None:
    """The command of earlier versions' documents."""
    work.evaluate("runs/mine", "--out", "runs/mine/evaluation")
    value = identity(work.run / "evaluation")
    work.evaluate("runs/mine", "--limit", "8", "--out", "runs/mine/evaluation")
    assert "Measured on 16 photos" in work.card("runs/mine/")[0]
    assert value in work.report(renamed(work))[0]


def test_where_nothing_can_be_stored_a_note_says_so_first(work: Work) -> None:
    shutil.copy(work.run / "snapshot.safetensors", work.folder / "lone.safetensors")
    table, errors = work.evaluate("lone.safetensors")
    note = "lone.safetensors: not in a run folder, so its results are printed only; --out FOLDER keeps them"
    assert note in errors
    assert "identity_umpire" in table
    (work.run / "evaluations").write_text("mine")
    table, errors = work.evaluate("runs/mine")
    assert "runs/mine/evaluations: cannot be written (a file stands where a folder is needed), so its" in errors
    assert "--out FOLDER keeps them" in errors
    assert "identity_umpire" in table
    assert (work.run / "evaluations").read_text() == "mine"


def test_a_run_folder_that_is_read_only(work: Work) -> None:
    work.run.chmod(0o555)
    try:
        with permissions_hold():
            table, errors = work.evaluate("runs/mine")
    finally:
        work.run.chmod(0o755)
    assert "runs/mine/evaluations: cannot be written (Permission denied)" in errors
    assert "identity_umpire" in table


def older(results: dict[str, Any]) -> dict[str, Any]:
    """As earlier versions wrote results."""
    new = ("snapshot_sha256", "faces", "n_split", "trained_on_this_data")
    for result in results.values():
        result["context"] = {key: value for key, value in result["context"].items() if key not in new}
    return results


@pytest.mark.parametrize("columns", [["runs/mine"], ["/gone/runs/mine", "default", "runs/other"]])
def test_evaluations_of_earlier_versions_are_found(work: Work, columns: list[str]) -> None:
    work.evaluate("runs/mine")
    [folder] = stored(work.run)
    [result] = older(read_json(folder / "results.json")).values()
    value = identity(folder)
    shutil.rmtree(work.run / "evaluations")
    (work.run / "evaluation").mkdir()
    others = {column: result | {"metrics": {"mse": {"value": 3.0}}} for column in columns[1:]}
    write_json(work.run / "evaluation" / "results.json", {columns[0]: result} | others)
    for name in ("runs/mine", "./runs/mine/", str(work.run)):
        assert value in work.card(name)[0]
        report, _ = work.report(name)
        assert value in report
        assert all(column in report for column in columns[1:])  # baselines are shown too
    work.train_further()
    assert "Not measured" in work.card("runs/mine")[0]
    assert "was evaluated at 64 images" in work.report("runs/mine")[0]


# --- what an evaluation says first, and of what -----------------------------------------------------------------------


def test_alarms_come_before_the_table(work: Work) -> None:
    snapshot = load_snapshot(work.run)
    with torch.no_grad():
        for parameter in snapshot.network.parameters():
            parameter.zero_()  # one face for everybody
    save_snapshot(
        work.run / "snapshot.safetensors",
        network=snapshot.network,
        population=snapshot.population,
        metadata=snapshot.metadata,
    )
    table, _ = work.evaluate("runs/mine")
    assert table.startswith("Alarms:\n\n- runs/mine: collapse: ")
    [folder] = stored(work.run)
    assert (folder / "table.md").read_text(encoding="utf-8").startswith("Alarms:")
    card, _ = work.card("runs/mine")
    assert card.index("**Alarm:** collapse") < card.index("| metric |")
    report, _ = work.report("runs/mine")
    assert report.index("collapse:") < report.index("## How good is it?")


def test_copies_are_not_claimed_of_a_generator_of_other_data(work: Work) -> None:
    snapshot = load_snapshot(work.run)
    path = work.run / "snapshot.safetensors"
    own, _ = work.evaluate("runs/mine")
    assert "(other data)" not in own
    assert "copied" in work.card("runs/mine")[0].partition("<details>")[0]
    assert "NOT" not in read_json(stored(work.run)[0] / "results.json")["mine"]["notes"]
    metadata = snapshot.metadata | {"data": {"content_sha256": "f" * 64, "images": 1000}}
    save_snapshot(path, network=snapshot.network, population=snapshot.population, metadata=metadata)
    table, _ = work.evaluate("runs/mine")
    marked = [line for line in table.splitlines() if "(other data)" in line]
    assert [line.split()[1] for line in marked] == ["nearest_train_tiny", "copied_tiny"]
    assert "not the data set that this snapshot was trained on" in table
    results = {path: read_json(path / "results.json")["mine"] for path in stored(work.run)}
    assert {str(one["context"]["trained_on_this_data"]) for one in results.values()} == {"True", "False"}
    assert not any(text.startswith("copies") for one in results.values() for text in one["alarms"])
    card, _ = work.card("runs/mine")
    shown, _, details = card.partition("<details>")
    assert "copied" not in shown.replace("copy", "")
    assert "say nothing about memorization" in shown
    assert "(other data)" in details
    report, _ = work.report("runs/mine")
    headlines = report[report.index("## How good is it?") : report.index("## How it looks")]
    assert "nearer to a training photo" not in headlines
    assert report.index("says nothing about memorization") < report.index("## How good is it?")
    assert "(other data)" in report


def test_pictures_say_what_their_rows_and_columns_are(work: Work) -> None:
    work.evaluate("runs/mine")
    [folder] = stored(work.run)
    for name, rows, columns in (("faces", 4, 7), ("extremes", 4, 8), ("nearest", 4, 8)):
        with Image.open(folder / f"mine-{name}.jpg") as opened:
            picture = np.asarray(opened.convert("L")).astype(int)
        left = picture.shape[1] - columns * (96 + 2) + 2  # faces of 32 pixels are shown with 96
        assert left > 50, name
        head = picture.shape[0] % rows if name == "faces" else 0
        bands = np.array_split(picture[head:, : left - 4], rows)
        assert all((band < 100).mean() > 0.005 and (band > 220).mean() > 0.5 for band in bands), name
