"""The audit of leaked templates: protections, the attack on them, and the protocol."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from conftest import write_dataset
from tiny_parts import DIM, Memory, TinyEncoder, TinyJudge, snapshot
from vultus.audit.protections import Plain, load_protection
from vultus.audit.protocol import attack, audit_people
from vultus.audit.tables import main_cells
from vultus.cli.main import main
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError

NAMES = ("plain", "8bit", "rotation", "rotation-pairs", "biohash-known", "biohash-unknown", "noise-2", "pca-2")


@pytest.fixture(scope="module")
def dataset(built_once: Callable[..., Path]) -> PreparedDataset:
    people = {"train": 60, "test": 15}
    options: dict[str, Any] = {"people": people, "photos": 4, "dim": DIM, "embed": TinyEncoder().embed}
    return PreparedDataset(built_once("audited", lambda folder: write_dataset(folder, **options)), "test")


@pytest.fixture(scope="module")
def result(dataset: PreparedDataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    training = dataset.with_split("train")
    return audit_people(
        {name: attack(name, load_protection(name), training, seed=0) for name in NAMES},
        snapshot(Memory(dataset), dataset),
        dataset,
        encoder=TinyEncoder(),
        judges=[TinyJudge()],
        limit=None,
        seed=0,
        batch=32,
        device="cpu",
        cache=tmp_path_factory.mktemp("cache"),
    )


def test_a_perfect_inversion_always_succeeds_and_protections_are_ordered(result: dict[str, Any]) -> None:
    success = {name: row["success"]["tiny"]["type1@0.01"]["value"] for name, row in result["protections"].items()}
    assert success["plain"] == 1
    assert success["8bit"] > 0.8  # the generator returns the photo of the nearest embedding
    assert success["rotation-pairs"] > 0.8 > 0.3 > success["rotation"]
    assert success["biohash-known"] > success["biohash-unknown"]
    assert success["plain"] > success["noise-2"]
    assert success["plain"] > success["pca-2"]
    assert result["protections"]["plain"]["success"]["umpire"]["type1@0.01"]["value"] == 1


def test_what_is_left_for_the_honest_use(result: dict[str, Any]) -> None:
    tar = {name: row["tar"]["value"] for name, row in result["protections"].items()}
    assert tar["rotation"] == pytest.approx(tar["plain"])
    assert tar["noise-2"] < tar["plain"]
    assert tar["biohash-unknown"] >= tar["biohash-known"]
    assert [row[0] for row in main_cells(result)[1:]] == list(NAMES)


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
    with pytest.raises(UserError, match="--protect pca-17: the embeddings have 16 components at most"):
        attack("pca-17", load_protection("pca-17"), dataset.with_split("train"), seed=0)
    assert main(["audit", "--data", str(tmp_path), "--protect", "best"]) == 2
    assert "--protect best: no such protection; there are plain, 8bit" in capsys.readouterr().err
