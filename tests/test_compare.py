"""Several snapshots side by side: the table, the folder, the gap."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from conftest import write_dataset
from tiny_parts import (
    DIM,
    SIDE,
    Memory,
    TinyEncoder,
    TinyFeatures,
    TinyGenerator,
    TinyJudge,
    TinyPerceptual,
    snapshot,
)
from vultus.cli.main import main
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.evaluation.backbones.loading import Backbones
from vultus.evaluation.compare import compare, evaluate_snapshots
from vultus.evaluation.tables import CONTEXT, format_gap, format_table, group_of
from vultus.models.facenet import FaceNet
from vultus.models.snapshot import default_snapshot, load_snapshot

Write = Callable[..., Path]


@pytest.fixture
def parts() -> Backbones:
    return Backbones(TinyEncoder(), (TinyJudge(),), (TinyFeatures(),), (TinyPerceptual(),), {"fid, kid": "not here"})


@pytest.fixture(scope="session")
def folder(built_once: Callable[[str, Any], Path]) -> Path:
    options: dict[str, Any] = {"resolution": SIDE, "people": {"train": 30, "test": 24}, "photos": 5, "dim": DIM}
    return built_once("compared", lambda folder: write_dataset(folder, **options, embed=TinyEncoder().embed))


@pytest.fixture
def run(folder: Path, parts: Backbones, tmp_path: Path) -> Callable[..., Any]:
    def call(**keywords: Any) -> Any:
        data = PreparedDataset(folder, "test")
        snapshots = {
            "runs/one": snapshot(TinyGenerator(), data),
            "two": snapshot(Memory(data), data),
            "three": snapshot(TinyGenerator(condition=0), data),
        }
        given = {"encoder": parts.encoder, "backbones": parts, "cache": tmp_path / "cache"} | keywords
        return compare(given.pop("snapshots", snapshots), given.pop("data", folder), **given)

    return call


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_one_table_for_three_snapshots(run: Callable[..., Any]) -> None:
    text, results = run()
    table = cells(text)
    assert {len(row) for row in table} == {6}
    assert table[0] == ["", "", "real photos", "runs/one", "two", "three"]
    rows = {row[0]: row[1:] for row in table}
    for name, arrow in (("type2_umpire_far1e-3", "↑"), ("fd_pool_120_test", "↓"), ("diversity_noise_rms", "=")):
        found = results["runs/one"]["metrics"][name]
        shown = rows[name]
        assert shown[0] == arrow
        assert float(shown[1]) == pytest.approx(found["real"], rel=0.02, abs=0.006)
        value, low, high = (float(part) for part in shown[2].replace("[", "").replace("]", "").replace(",", "").split())
        assert (value, low, high) == pytest.approx((found["value"], found["low"], found["high"]), rel=0.02, abs=0.006)
    assert rows["n_images"][2:] == ["120", "120", "120"]
    order = [row[0] for row in table if row[0].startswith("**")]
    groups = ["identity", "realism", "reconstruction", "diversity", "memorization", "circumstances"]
    assert order == [f"**{group}**" for group in groups]
    assert "three: collapse: " in text.split("Alarms:")[1]
    assert "- fid, kid: not here" in text.split("Not measured:")[1]
    assert all(group_of(name)[0] != "other" for result in results.values() for name in result["metrics"])


def test_rows_of_other_sizes_are_never_one_row(run: Callable[..., Any]) -> None:
    _, whole = run()
    _, part = run(limit=110, noises=1)
    text = format_table({"a": whole["two"], "b": part["two"]}, intervals=False)
    rows = {row[0]: row[1:] for row in cells(text)}
    assert [cell == "-" for cell in rows["fd_pool_120_test"][2:]] == [False, True]
    assert [cell == "-" for cell in rows["fd_pool_110_test"][2:]] == [True, False]
    assert rows["diversity_noise_rms"][3] == "-"
    assert "[" not in rows["mse"][2]
    assert [rows[key][2:] for key in CONTEXT if key == "noises"] == [["2", "1"]]


@pytest.mark.slow
def test_noise_strength_is_a_row_where_it_is_not_1(run: Callable[..., Any], tmp_path: Path) -> None:
    usual, whole = run()
    text, less = run(noise_strength=0.5, out=tmp_path / "less")
    assert not [row for row in cells(usual) if row[0] == "noise_strength"]
    assert [row[3:] for row in cells(text) if row[0] == "noise_strength"] == [["0.5", "0.5", "0.5"]]
    older = whole["two"] | {"context": {k: v for k, v in whole["two"]["context"].items() if k != "noise_strength"}}
    mixed = cells(format_table({"a": older, "b": less["two"]}))
    assert [row[3:] for row in mixed if row[0] == "noise_strength"] == [["1.0", "0.5"]]
    run(out=tmp_path / "usual")
    sheets = [(tmp_path / folder / "runs-one-faces.jpg").read_bytes() for folder in ("usual", "less")]
    assert sheets[0] != sheets[1]


def test_the_folder_holds_table_plots_and_grids(run: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out" / "deep"
    text, results = run(out=out)
    assert (out / "table.md").read_text(encoding="utf-8").strip() == text.strip()
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == results
    names = {path.name for path in out.iterdir()}
    sheets = {
        f"{name}-{kind}.jpg" for name in ("runs-one", "two", "three") for kind in ("faces", "extremes", "nearest")
    }
    assert names == sheets | {"table.md", "results.json", "identity.png", "nearest.png"}
    with Image.open(out / "two-faces.jpg") as faces:
        assert faces.width > 7 * (96 + 2) + 40  # images of 32 pixels are enlarged; the names of people are at the left
    for name in ("identity.png", "nearest.png"):
        with Image.open(out / name) as picture:
            colours = picture.convert("RGB").getcolors(1 << 20)
            assert picture.width > picture.height / 2
            assert len(colours) > 20  # not an empty image


def test_finished_results_survive_an_interruption(run: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    data = PreparedDataset(folder, "test")
    broken = TinyGenerator()
    broken.from_c.data[:] = float("nan")
    two = {"good": snapshot(TinyGenerator(), data), "bad": snapshot(broken, data)}
    with pytest.raises(UserError, match="not finite"):
        run(snapshots=two, out=tmp_path / "out")
    assert list(json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))) == ["good"]


def test_both_splits_and_the_gap(run: Callable[..., Any], folder: Path) -> None:
    train = PreparedDataset(folder, "train")
    text, results = run(snapshots={"m": snapshot(Memory(train), train)}, split="both")
    assert list(results) == ["m (test)", "m (train)"]
    assert results["m (train)"]["context"]["n_images"] == 120  # as many as there are unseen ones
    gap = {row[0]: row[1] for row in cells(text[text.index("train - test") - 10 :])}
    difference = (
        results["m (train)"]["metrics"]["identity_tiny"]["value"]
        - results["m (test)"]["metrics"]["identity_tiny"]["value"]
    )
    assert float(gap["identity_tiny"].split()[0]) == pytest.approx(difference, abs=0.001)
    assert difference > 0.05
    _, alone = run(snapshots={"m": snapshot(Memory(train), train)}, split="train")
    assert alone["m"]["context"] | {"split": "train", "n_images": 150} == alone["m"]["context"]


def test_a_split_that_is_not_there(run: Callable[..., Any], tiny_dataset: Write, parts: Backbones) -> None:
    data = tiny_dataset("only", people={"test": 24}, photos=5, dim=DIM, embed=parts.encoder.embed)
    dataset = PreparedDataset(data, "test")
    _, results = run(data=data, snapshots={"a": snapshot(TinyGenerator(), dataset)})
    assert "real" not in results["a"]["metrics"]["fd_pool_120_test"]  # no other real photos to compare with
    with pytest.raises(UserError, match="the train split holds no image; prepare more people"):
        run(data=data, snapshots={"a": snapshot(TinyGenerator(), dataset)}, split="both")


def test_every_snapshot_is_checked_before_any_is_measured(
    run: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    data = PreparedDataset(folder, "test")
    wrong = snapshot(TinyGenerator(), data, encoder=data.manifest["encoder"] | {"id": "other"})
    with pytest.raises(UserError, match="has encoder other"):
        run(snapshots={"good": snapshot(TinyGenerator(), data), "wrong": wrong}, cache=tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_two_networks_of_one_name_are_refused() -> None:
    class Namesake(TinyJudge):
        short = "tiny"

    with pytest.raises(UserError, match="two networks are called tiny; rename the file of the judge"):
        Backbones(TinyEncoder(), (Namesake(),))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"split": "all"}, "--split all: must be one of test, train, both"),
        ({"device": "abacus"}, "--device abacus: not available on this machine; use auto or one of: .*cpu"),
        ({"data": "nowhere"}, "nowhere: not a prepared data set"),
        ({"snapshots": []}, "no snapshot to evaluate"),
        ({"snapshots": "nowhere.safetensors"}, "nowhere.safetensors: no such snapshot"),
    ],
)
def test_arguments_are_checked_before_anything_is_loaded(folder: Path, arguments: dict[str, Any], words: str) -> None:
    given = {"snapshots": "default", "data": folder} | arguments
    with pytest.raises(UserError, match=words):
        evaluate_snapshots(given.pop("snapshots"), **given)


def test_two_snapshots_of_one_name_are_refused(folder: Path) -> None:
    data = PreparedDataset(folder, "test")
    with pytest.raises(UserError, match="two snapshots are called snapshot; give them as a dictionary"):
        evaluate_snapshots([snapshot(TinyGenerator(), data), snapshot(TinyGenerator(), data)], data=folder)


@pytest.mark.slow
def test_python_and_the_command_give_the_same_results(
    facenet: FaceNet,
    tiny_dataset: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VULTUS_CACHE", str(tmp_path / "cache"))
    # The dtype is not the one that is faster here: that is measured, and differs between runs.
    monkeypatch.setattr("vultus.models.facenet.fastest_dtype", lambda device: torch.bfloat16)
    source = load_snapshot(default_snapshot())
    entries = {"encoder": source.metadata["encoder"], "crop": source.metadata["crop"]}
    data = tiny_dataset("faces", resolution=128, people={"test": 2}, photos=2, manifest=entries)
    results = evaluate_snapshots(source, data=data, limit=3, noises=1, device="cpu")
    command = ["evaluate", "default", "--data", str(data), "--limit", "3", "--noises", "1", "--device", "cpu", "--json"]
    assert main(command) == 0
    [printed] = json.loads(capsys.readouterr().out).values()
    [returned] = results.values()
    for result in (printed, returned):
        del result["context"]["seconds"]
    assert json.dumps(printed) == json.dumps(returned)  # some intervals of so few people are NaN
    assert printed["context"]["n_images"] == 3
    assert printed["context"]["networks"][facenet.id] == "float32"


def test_gap_table() -> None:
    row = {"value": 0.25, "low": 0.125, "high": 0.5}
    text = format_gap({"a": {"mse": row, "only": row}, "b": {"mse": row}})
    assert cells(text) == [
        ["train - test", "a", "b"],
        ["-" * 12, "-" * 20, "-" * 20],
        ["mse"] + ["0.250 [0.125, 0.500]"] * 2,
    ]
