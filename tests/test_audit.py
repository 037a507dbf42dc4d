"""The audit of leaked templates: protections, the attack on them, and the protocol."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tiny_parts import Memory, TinyEncoder, TinyGenerator, TinyJudge, audited, snapshot
from vultus.audit import published
from vultus.audit.audit import audit
from vultus.audit.groups import Groups, group_rows, read_groups
from vultus.audit.honest import stolen_key_scores
from vultus.audit.plot import place_labels, trade_off
from vultus.audit.protections import Plain, load_protection
from vultus.audit.protocol import attack, audit_people
from vultus.audit.stored import read_audit
from vultus.audit.tables import CASES, group_cells, key_cells, main_cells, markdown
from vultus.audit.words import NO_GROUPS
from vultus.cli.main import main
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.evaluation.verification import pair_scores
from vultus.images.xmp import read_marks
from vultus.models.snapshot import Snapshot
from vultus.sampling.population import fit_population

NAMES = ("plain", "8bit", "rotation", "rotation-pairs", "biohash-known", "biohash-unknown", "noise-2", "pca-2")


@pytest.fixture(scope="module")
def dataset(built_once: Callable[..., Path]) -> PreparedDataset:
    return audited(built_once)


def measured(dataset: PreparedDataset, cache: Path, names: Sequence[str], groups: Groups | None) -> dict[str, Any]:
    training = dataset.with_split("train")
    return audit_people(
        {name: attack(name, load_protection(name), training, seed=0) for name in names},
        snapshot(Memory(dataset), dataset),
        dataset,
        encoder=TinyEncoder(),
        judges=[TinyJudge()],
        limit=None,
        seed=0,
        batch=32,
        device="cpu",
        groups=groups,
        cache=cache,
    )


@pytest.fixture(scope="module")
def result(dataset: PreparedDataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measured(dataset, tmp_path_factory.mktemp("cache"), NAMES, None)


def test_a_perfect_inversion_always_succeeds_and_protections_are_ordered(result: dict[str, Any]) -> None:
    success = {name: row["success"]["tiny"]["type1@0.01"]["value"] for name, row in result["protections"].items()}
    assert success["plain"] == 1
    assert success["8bit"] > 0.8  # the generator returns the photo of the nearest embedding
    assert success["rotation-pairs"] > 0.8 > 0.3 > success["rotation"]
    assert success["biohash-known"] > success["biohash-unknown"]
    assert success["plain"] > success["noise-2"]
    assert success["plain"] > success["pca-2"]
    assert result["protections"]["plain"]["success"]["umpire"]["type1@0.01"]["value"] == 1
    real = result["real"]["umpire"]["type2@0.01"]  # the generator returns the photos themselves
    assert result["protections"]["plain"]["success"]["umpire"]["type2@0.01"] == real


def test_what_is_left_for_the_honest_use(result: dict[str, Any]) -> None:
    tar = {name: row["tar"]["value"] for name, row in result["protections"].items()}
    assert tar["rotation"] == pytest.approx(tar["plain"])
    assert tar["noise-2"] < tar["plain"]
    assert tar["biohash-unknown"] >= tar["biohash-known"]
    assert [row[0] for row in main_cells(result)[1:]] == ["real photos, no attack", *NAMES]


def test_with_keys_for_each_person_both_cases_are_stated(result: dict[str, Any]) -> None:
    rows = result["protections"]
    assert {name for name, row in rows.items() if "tar_cases" in row} == {"biohash-known", "biohash-unknown"}
    known, unknown = rows["biohash-known"], rows["biohash-unknown"]
    assert known["tar_cases"] == unknown["tar_cases"]  # the templates are the same, the attacker is not
    assert known["tar_cases"]["stolen_key"]["value"] <= known["tar_cases"]["own_keys"]["value"]
    assert known["tar"] == known["tar_cases"]["stolen_key"]
    assert unknown["tar"] == unknown["tar_cases"]["own_keys"]
    assert [row[-1] for row in key_cells(result)[1:]] == [CASES["stolen_key"], CASES["own_keys"]]


def test_an_impostor_with_the_stolen_key_protects_with_that_key() -> None:
    c = F.normalize(torch.randn(5, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    keys, people = torch.tensor([7, 7, 8, 9, 9]), ["a", "a", "b", "c", "c"]
    hashing = load_protection("biohash-known")
    hashing.fit(c)
    expected = []
    for row in range(5):
        for other in range(5):
            if people[row] != people[other]:
                a, b = hashing.protect(c[[row, other]], keys[row].expand(2))
                expected.append(F.cosine_similarity(a, b, dim=0))
    found = stolen_key_scores(hashing, c, keys, people)
    torch.testing.assert_close(found.sort().values, torch.stack(expected).sort().values)
    alike = F.normalize(c + c.sum(0), dim=1)  # faces that look alike are told apart by their keys only
    own = pair_scores(hashing.protect(alike, keys), people, "cosine")[1]
    assert stolen_key_scores(hashing, alike, keys, people).mean() > 0.5 > own.mean()


def test_the_attack_sees_no_unseen_person_and_is_repeatable(dataset: PreparedDataset) -> None:
    training = dataset.with_split("train")
    c, people = dataset.embeddings(), dataset.identities
    results = [attack("1bit", load_protection("1bit"), training, seed=3).invert(c, people)[1] for _ in range(2)]
    assert torch.equal(*results)
    assert not torch.equal(results[0], attack("1bit", load_protection("1bit"), training, seed=4).invert(c, people)[1])


def test_templates_of_protections() -> None:
    c, keys = F.normalize(torch.randn(6, 32, generator=torch.Generator().manual_seed(0)), dim=1), torch.arange(6) % 2
    rotated = load_protection("rotation").protect(c, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(rotated @ rotated.T, c @ c.T)
    hashing = load_protection("biohash-known")
    hashing.fit(c)
    hashes = hashing.protect(c, keys)
    assert set(hashes.unique().tolist()) == {-1, 1}
    assert torch.equal(hashes[1], hashing.protect(c[1:2], keys[1:2])[0])


class Constant(Plain):
    def protect(self, c: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(c), 4)


def test_wrong_protections_are_named(
    dataset: PreparedDataset, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--protect x: all templates are equal or not finite, which leaves nothing to"):
        attack("x", Constant(), dataset.with_split("train"), seed=0)
    with pytest.raises(
        UserError, match="--protect noise-1000: templates of one person are no more alike than those of"
    ):
        attack("noise-1000", load_protection("noise-1000"), dataset.with_split("train"), seed=0)
    with pytest.raises(UserError, match="--protect pca-17: the embeddings have 16 components at most"):
        attack("pca-17", load_protection("pca-17"), dataset.with_split("train"), seed=0)
    assert main(["audit", "--data", str(tmp_path), "--protect", "best"]) == 2
    assert "--protect best: no such protection; there are plain, 8bit" in capsys.readouterr().err


# --- groups -----------------------------------------------------------------------------------------------------------


def test_groups_have_values_of_their_own(dataset: PreparedDataset, tmp_path: Path) -> None:
    groups = {
        "whole": sorted(set(dataset.identities)),
        "some": ["test-0", "test-1/2.jpg", "test-2/0"],
        "one": ["test-3"],
    }
    result = measured(dataset, tmp_path, ["1bit"], groups)
    row = result["protections"]["1bit"]
    assert row["groups"]["whole"] == {"n_images": 60, "n_people": 15, "tar": row["tar"], "success": row["success"]}
    some = row["groups"]["some"]
    assert (some["n_images"], some["n_people"]) == (6, 3)
    assert 0 <= some["success"]["umpire"]["type2@0.01"]["value"] <= 1
    assert row["groups"]["one"]["tar"] is None  # one person has no interval
    assert row["groups"]["none of these"]["n_images"] == 0
    assert [line[1] for line in group_cells(result)[1:]] == ["whole", "some", "one", "none of these", "all"]


def test_names_of_groups_are_photos_or_people() -> None:
    keys, people = ["a/1.jpg", "a/2.jpg", "7.jpg", "8.jpg"], ["a", "a", "8", "7"]
    found = group_rows({"x": ["a"], "y": ["7", "8.jpg", "nobody"]}, keys, people)
    assert {name: rows.tolist() for name, rows in found.items()} == {"x": [0, 1], "y": [2, 3], "none of these": []}
    found = group_rows({"x": ["a/1"], "seen": ["a/1", "a/2", "7"]}, keys, people)
    assert {name: rows.tolist() for name, rows in found.items()} == {"x": [0], "none of these": [1, 2]}
    with pytest.raises(UserError, match=r"--groups: none of the 4 photos that are measured is in a group; .* a/1.jpg"):
        group_rows({"x": ["nobody"]}, keys, people)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "groups must be an object"),
        ("{}", "groups must be an object"),
        ('{"seen": ["a"]}', "groups must be an object"),
        ('{"x": [1]}', "groups must be an object .*, the names in quotes"),
        ('{"none of these": ["a"]}', "'none of these' is the name of the photos in no group"),
        ("x", "not valid JSON"),
    ],
)
def test_wrong_files_of_groups_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "groups.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_groups(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


# --- the whole command, with tiny networks ----------------------------------------------------------------------------


@pytest.fixture
def tiny(dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Snapshot:
    """`audit` gets this snapshot and tiny encoders."""
    loaded = snapshot(TinyGenerator(), dataset, model="tiny")
    loaded.population = fit_population(dataset.embeddings())
    loaded.path = tmp_path / "tiny.safetensors"
    monkeypatch.setenv("VULTUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("vultus.audit.audit.load", lambda *_, **__: loaded)
    monkeypatch.setattr("vultus.audit.audit.load_condition_encoder", lambda *_, **__: TinyEncoder())
    monkeypatch.setattr("vultus.audit.audit.load_judge", lambda *_, **__: TinyJudge())
    return loaded


@pytest.mark.usefixtures("tiny")
def test_the_page_and_the_stored_result(dataset: PreparedDataset, tmp_path: Path) -> None:
    (tmp_path / "groups.json").write_text('{"first": ["test-0", "test-1"]}')
    names = ["noise-1", "noise-1.0", "biohash-known", "noise-1"]
    options: dict[str, Any] = {"data": dataset.folder, "protections": names, "judges": ["x", "x"], "device": "cpu"}
    result = audit(**options, groups=tmp_path / "groups.json", out=tmp_path / "out")
    assert list(result["protections"]) == ["noise-1", "biohash-known"]  # what is named twice counts once
    assert result["context"]["judges"] == ["tiny-judge"]
    assert read_audit(tmp_path / "out" / "audit.json") == result
    for name in ("audit.html", "audit.md"):
        page = (tmp_path / "out" / name).read_text(encoding="utf-8")
        for part in ("58.05", "impostors with the stolen key", "first", "none of these", "no proof of security"):
            assert part in page, (name, part)
        assert NO_GROUPS not in page
    faces = read_marks((tmp_path / "out" / "audit.jpg").read_bytes())
    assert faces.synthetic
    with pytest.raises(UserError, match=r"audit\.html: exists already; choose another --out"):
        audit(**options, out=tmp_path / "out")


@pytest.mark.usefixtures("tiny")
def test_without_groups_the_page_says_so(dataset: PreparedDataset, tmp_path: Path) -> None:
    audit(data=dataset.folder, protections=["plain"], device="cpu", out=tmp_path / "out")
    for name in ("audit.html", "audit.md"):
        assert NO_GROUPS in (tmp_path / "out" / name).read_text(encoding="utf-8")


def test_what_cannot_become_a_page_is_refused_before_the_work(
    dataset: PreparedDataset, tiny: Snapshot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr("vultus.audit.audit.attack", work)
    judge = TinyJudge()
    judge.short = "tiny"
    options: dict[str, Any] = {"data": dataset.folder, "protections": ["plain"], "device": "cpu"}
    (tmp_path / "groups.json").write_text('{"x": ["nobody"]}')
    with pytest.raises(UserError, match="--groups: none of the 60 photos that are measured is in a group"):
        audit(**options, judges=[], groups=tmp_path / "groups.json")
    with pytest.raises(UserError, match="--judge: two of the encoders have the name umpire"):
        audit(**options, judges=["a.onnx", "b/a.onnx"])
    monkeypatch.setattr("vultus.audit.audit.load_judge", lambda *_, **__: judge)
    with pytest.raises(UserError, match="--judge tiny: is the attacked encoder"):
        audit(**options)
    tiny.population = {}
    with pytest.raises(UserError, match=r"tiny\.safetensors: holds no population prior"):
        audit(**options, out=tmp_path / "out")


def test_the_documentation_has_the_published_figures_of_the_page() -> None:
    text = (Path(__file__).parents[1] / "docs" / "audit.md").read_text(encoding="utf-8")
    assert markdown(published.cells()) in text


def test_other_files_are_no_stored_results(tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    for value in ("[]", "{}", '{"format": 1, "context": {}}'):
        path.write_text(value)
        with pytest.raises(UserError, match=r"not the audit\.json of `vultus audit`"):
            read_audit(path)


# --- the plot ---------------------------------------------------------------------------------------------------------


def test_labels_of_points_do_not_overlap() -> None:
    points = [(300.0, 250.0)] * 4 + [(304.0, 252.0), (310.0, 240.0), (3.0, 317.0), (3.0, 312.0)]
    labels = ["rotation-pairs", "plain", "8bit", "1bit", "noise-0.5", "pca-64", "biohash-unknown", "rotation"]
    area = (0.0, 0.0, 400.0, 320.0)
    sizes = [(len(label) * 9 * 0.6, 9 * 1.25) for label in labels]
    boxes = [
        (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        for (x, y), (width, height) in zip(place_labels(labels, points, [], area), sizes, strict=True)
    ]
    for one, two in itertools.combinations(boxes, 2):
        assert one[0] >= two[2] or two[0] >= one[2] or one[1] >= two[3] or two[1] >= one[3], (one, two)
    for box in boxes:
        assert box[0] >= 0
        assert box[1] >= 0
        assert box[2] <= 400
        assert box[3] <= 320


def test_the_plot_has_a_panel_for_each_encoder(result: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    drawn = trade_off(result)
    assert drawn.startswith("<svg")
    assert drawn.count("success of the attack, type II") == 2
    for name in NAMES:
        assert drawn.count(f">{name}<") == 2
