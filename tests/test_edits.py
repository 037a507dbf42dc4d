"""What an edit is measured to change, and what identity it costs, where both are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tiny_parts import DIM, Memory, TinyJudge, audited, snapshot
from vultus.audit.attributes import ATTRIBUTES
from vultus.audit.edits import measure_edits
from vultus.audit.probes import Probe
from vultus.data.dataset import PreparedDataset
from vultus.images.io import to_x

STD = 0.25


@pytest.fixture(scope="module")
def dataset(built_once: Callable[..., Path]) -> PreparedDataset:
    return audited(built_once)


def brightness(x: Tensor) -> Tensor:
    """[N, 11]: the mean of each image, for every attribute."""
    return x.mean((1, 2, 3))[:, None].expand(-1, len(ATTRIBUTES))


def test_change_and_cost_of_edits(dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator returns the photo of the nearest embedding, and a face of a direction becomes the one it names."""
    monkeypatch.setattr("vultus.audit.attributes.attributes", brightness)
    photos = dataset.batch(range(len(dataset)))
    c, bright = photos.c, to_x(photos.images).mean((1, 2, 3)).double()
    target = int(bright.argmax())
    opposite = int((c @ c[target]).argmin())
    zeros = torch.zeros(DIM)
    probes = {
        "brightness": Probe(zeros, zeros.double(), 0.0, STD, 1.0, 1e6 * c[target]),
        "smile": Probe(zeros, zeros.double(), 0.0, STD, 1.0, zeros),
    }
    found = measure_edits(
        probes, snapshot(Memory(dataset), dataset), dataset, np.arange(len(dataset)),
        judges=[TinyJudge()], seed=0, batch=32, device="cpu", cache=tmp_path,
    )  # fmt: skip
    assert {name: set(edits) for name, edits in found.items()} == {name: {"-1.5", "+1.5"} for name in probes}
    people = np.array(dataset.identities)
    for strength, face, cosine in (("+1.5", target, 1.0), ("-1.5", opposite, -1.0)):
        edit = found["brightness"][strength]
        assert edit["change"]["value"] == pytest.approx(float((bright[face] - bright).mean()) / STD, abs=0.05)
        assert edit["change"]["low"] <= edit["change"]["value"] <= edit["change"]["high"]
        assert edit["cosine"]["value"] == pytest.approx(cosine * float((c @ c[target]).mean()), abs=1e-4)
        accepted = edit["accepted"]["umpire"]
        assert accepted["before"]["value"] == 1  # of a photo against itself
        # Besides the person whose face it became, about one impostor in a thousand is accepted.
        assert accepted["after"]["value"] == pytest.approx((people == people[face]).mean(), abs=0.05)
        nothing = found["smile"][strength]
        assert nothing["change"]["value"] == 0
        assert nothing["cosine"]["value"] == pytest.approx(1, abs=1e-6)
        assert nothing["accepted"]["umpire"]["before"] == nothing["accepted"]["umpire"]["after"]
