"""The registry of metrics, and what reads it: tables, headlines, results of older versions."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny_parts import DIM, SIDE, TinyEncoder, TinyFeatures, TinyGenerator, TinyJudge, TinyPerceptual, snapshot
from vultus._files import write_json
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.evaluation import registry
from vultus.evaluation.backbones.loading import Backbones, load_backbones
from vultus.evaluation.evaluate import EvaluationSettings, evaluate
from vultus.evaluation.results import read_results
from vultus.evaluation.tables import build_table

NAMES = (
    *("identity_facenet", "type1_facenet_far1e-3", "rank1_facenet"),
    *("identity_dlib", "type1_dlib_far1e-2", "type1_dlib_far1e-3", "type2_dlib_far1e-3", "rank1_dlib", "rank5_dlib"),
    *("fid_2527_test", "kid_2527_test", "fd_effnet_2527_test", "kd_effnet_2527_train", "fd_effnet_200_all"),
    *("precision_inception", "recall_effnet", "density_effnet", "coverage_effnet"),
    *("mse", "mse_best8", "psnr", "psnr_best8", "ms_ssim", "ms_ssim_4", "ms_ssim_best8", "ms_ssim_4_best8"),
    *("lpips", "lpips_best8", "stlpips", "stlpips_best8"),
    *("diversity_identity", "pairs_above_0.9", "diversity_noise_rms", "diversity_noise_stlpips"),
    *("diversity_noise_stlpips_held", "nearest_train_facenet", "copied_facenet"),
    *("identity_my_arcface_r50", "type2_far_judge_far1e-2", "rank5_held"),  # names that an ONNX file may give
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_belongs_to_one_family(name: str) -> None:
    assert len([family for family in registry.METRICS if family.pattern.fullmatch(name)]) == 1
    metric = registry.find(name)
    assert metric is not None
    assert metric.family.group in registry.GROUPS
    assert "{" not in metric.label


@pytest.mark.parametrize("name", ["cur_nimg", "mse_real", "identity", "fd_effnet", "fid_test", "mse_best", ""])
def test_other_names_are_unknown(name: str) -> None:
    assert registry.find(name) is None


def test_every_metric_of_an_evaluation_is_registered(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    encoder = TinyEncoder()
    folder = tiny_dataset(resolution=SIDE, people={"train": 24, "test": 24}, photos=5, dim=DIM, embed=encoder.embed)
    test, train = PreparedDataset(folder, "test"), PreparedDataset(folder, "train")
    parts = Backbones(encoder, (TinyJudge(),), (TinyFeatures(),), (TinyPerceptual(),))
    settings = EvaluationSettings(best_of=2, cache=tmp_path / "cache")
    result = evaluate(snapshot(TinyGenerator(), test), test, backbones=parts, other=train, settings=settings)
    for name in result["metrics"]:
        assert len([family for family in registry.METRICS if family.pattern.fullmatch(name)]) == 1, name
    written = {registry.find(name).family.group for name in result["metrics"]}  # type: ignore[union-attr]
    assert written == set(registry.GROUPS)


def test_metrics_that_are_missing_are_registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The lists of metrics that a missing network would give begin names of the registry."""
    monkeypatch.setenv("VULTUS_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("VULTUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("vultus.evaluation.backbones.efficientnet.PACKAGE", "no_such_package")
    monkeypatch.setattr("vultus.models.alexnet.PACKAGE", "no_such_package")
    missing = load_backbones(TinyEncoder(), judges=()).missing
    stems = [stem for names in missing for stem in names.split(", ")]
    assert {"fid", "fd_effnet", "lpips", "stlpips"} <= set(stems)
    for stem in stems:
        ends = ("", "_far1e-3", "_100_test")
        assert any(registry.find(stem + end) for end in ends), stem


def test_labels_and_values() -> None:
    def metric(name: str) -> registry.NamedMetric:
        found = registry.find(name)
        assert found is not None
        return found

    assert "by dlib" in metric("type1_dlib_far1e-3").label
    assert "0.1 %" in metric("type1_dlib_far1e-3").label
    assert "EfficientNet-lite0 on 2527 images" in metric("fd_effnet_2527_test").label
    assert metric("mse_best8").label.endswith("best of 8 noises")
    arrows = [metric(name).arrow for name in ("identity_dlib", "mse", "diversity_noise_rms")]
    assert arrows == ["↑", "↓", "="]
    assert metric("type1_dlib_far1e-3").text(0.8325) == "83.2 %"
    assert metric("kd_effnet_100_test").text(0.0123456) == "0.01235"
    assert metric("mse").text(0.25) == "0.250"
    assert metric("fd_effnet_100_test").text(80.957) == "80.96"
    assert metric("fd_effnet_100_test").text(80.957, 0) == "81"


def test_headlines_in_the_order_of_a_table() -> None:
    names = [metric.name for metric in registry.headlines(reversed(NAMES))]
    assert names == sorted(names, key=registry.order)
    assert {"identity_facenet", "identity_dlib", "type1_dlib_far1e-3", "rank1_dlib", "fid_2527_test"} <= set(names)
    assert not [name for name in names if re.search(r"_best|_held|far1e-2|rank5|^type1_facenet|^rank1_facenet", name)]
    # Without a judge, acceptance by the encoder of the condition is better than none.
    alone = registry.headlines(["type1_facenet_far1e-3", "unknown", "type1_facenet_far1e-2"])
    assert [metric.name for metric in alone] == ["type1_facenet_far1e-3"]


# --- tables -----------------------------------------------------------------------------------------------------------


def result(**metrics: dict[str, float]) -> dict[str, Any]:
    return {"context": {"seed": 3}, "metrics": metrics, "missing": {}, "alarms": [], "notes": []}


def test_a_table_keeps_values() -> None:
    first = result(copied_facenet={"value": 0.0051}, mse={"value": 0.5, "low": 0.25, "high": 0.75, "real": 0.4})
    table = build_table(
        {"a": first, "b": result(mse={"value": 12.3456, "low": 12.0, "high": 13.0}, odd={"value": 1.0})}
    )
    assert table.columns == ["a", "b"]
    kinds = [(row.kind, row.name) for row in table.rows if row.kind != "context"]
    assert kinds == [
        *[("group", "reconstruction"), ("metric", "mse"), ("group", "memorization"), ("metric", "copied_facenet")],
        *[("group", "other"), ("metric", "odd"), ("group", "circumstances")],
    ]
    rows = {row.name: row for row in table.rows}
    assert (rows["mse"].arrow, rows["mse"].real) == ("↓", "0.40")
    mine, theirs = rows["mse"].cells
    assert (mine.value, mine.low, mine.high) == (0.5, 0.25, 0.75)
    assert (mine.text, mine.interval) == ("0.50", "[0.25, 0.75]")
    assert (theirs.value, theirs.text) == (12.3456, "12.35")
    known, unknown = rows["copied_facenet"].cells
    assert (known.interval, unknown.value, unknown.text) == ("", None, "-")
    assert [cell.value for cell in rows["seed"].cells] == [3, 3]
    assert "seed" not in {row.name for row in build_table({"a": first}, circumstances=False).rows}


# --- results of other versions ----------------------------------------------------------------------------------------


def test_results_of_this_version_are_read(tmp_path: Path) -> None:
    results = {"a": {"format": 2} | result(mse={"value": 0.5, "low": 0.25, "high": 0.75})}
    write_json(tmp_path / "results.json", results)
    for path in (tmp_path, tmp_path / "results.json", str(tmp_path)):
        [(name, read)] = read_results(path).items()
        assert name == "a"
        assert read == results["a"] | {"distributions": {}, "people": {}}


def test_results_of_version_1_are_upgraded(tmp_path: Path) -> None:
    flat = {"cur_nimg": 1000, "split": "test", "n_images": 120, "encoder": "facenet-vggface2", "notes": ["few"]}
    flat |= {"identity_facenet": 0.7, "identity_facenet_std": 0.1, "identity_facenet_real": 0.9, "mse": 0.25}
    folder = tmp_path / "run"
    folder.mkdir()
    write_json(folder / "results.json", flat)
    [(name, read)] = read_results(folder).items()
    assert name == "run"
    assert read["metrics"] == {"identity_facenet": {"value": 0.7, "std": 0.1, "real": 0.9}, "mse": {"value": 0.25}}
    assert read["context"] == {"cur_nimg": 1000, "split": "test", "n_images": 120}
    assert (read["format"], read["notes"]) == (2, ["few"])
    assert build_table({name: read}).rows[1].cells[0].text == "0.700"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": 1}, "not the results of vultus evaluate; run it again"),
        ({}, "not the results"),
        ([], "not the results"),
        ({"a": {"metrics": {"mse": 0.5}}}, "not the results"),
        ({"a": {"metrics": {"mse": {"value": 0.5}}, "alarms": {}}}, "not the results"),
        ({"a": {"format": 99, "metrics": {"mse": {"value": 0.5}}}}, "evaluation of version 99.*install a newer vultus"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    write_json(tmp_path / "results.json", content)
    with pytest.raises(UserError, match=rf"results\.json: {words}"):
        read_results(tmp_path)


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: no results.json here"):
        read_results(tmp_path)
