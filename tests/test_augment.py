"""Augmentation: each change alone, its probability, its gradient, and which network sees it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from test_cvae_gan import WITHOUT_FACENET, model, photos
from vultus.config import check_config
from vultus.errors import UserError
from vultus.training import augment as augmentation
from vultus.training.augment import augment


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(64, 3, 16, 16, generator=rng()) * 2 - 1


def test_probability_and_repetition(x: Tensor) -> None:
    torch.testing.assert_close(augment(x, 0.0, rng()), x, atol=1e-5, rtol=0)
    assert torch.equal(augment(x, 0.6, rng(1)), augment(x, 0.6, rng(1)))
    assert not torch.equal(augment(x, 0.6, rng(1)), augment(x, 0.6, rng(2)))
    errors = [(augment(x, probability, rng(3)) - x).abs().amax((1, 2, 3)) for probability in (0.1, 0.5, 0.9)]
    kept = [float((error < 1e-5).float().mean()) for error in errors]
    assert kept[0] > 0.7 > 0.4 > kept[1] > 0.1 > kept[2]  # (1 - probability)^2 of them


def test_shifts_are_whole_pixels_with_grey_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augmentation, "CUTOUT", 0.0)
    places = torch.arange(1, 257.0).reshape(1, 1, 16, 16).expand(64, 3, -1, -1)
    shown = augment(places, 1.0, rng())
    offsets = set()
    for one in shown[:, 0]:
        down, right = (torch.arange(16)[(one > 0.5).any(axis)] for axis in (1, 0))
        inside = one[down[0] : down[-1] + 1, right[0] : right[-1] + 1]
        top, left = divmod(round(float(inside[0, 0])) - 1, 16)
        torch.testing.assert_close(inside, places[0, 0, top : top + len(down), left : left + len(right)])
        offsets.add((top - int(down[0]), left - int(right[0])))
        assert len(down) == 16 - abs(top - int(down[0]))
    # The largest shift is an eighth of the side, two pixels.
    assert {row for row, _ in offsets} == {column for _, column in offsets} == {-2, -1, 0, 1, 2}


def test_the_cut_out_square(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augmentation, "MAX_SHIFT", 0.0)
    shown = augment(torch.full_like(x, 0.75), 1.0, rng())
    holes = (shown == 0).all(1).flatten(1).float().mean(1)
    assert holes.max() <= 0.25
    assert 0.15 < holes.mean() < 0.23  # half of the side, partly outside the image: 0.19 expected


def test_gradient_passes_through() -> None:
    x = (torch.rand(3, 3, 8, 8, generator=rng(), dtype=torch.float64) * 2 - 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment(x, 0.8, rng(1)), x)


def test_only_the_discriminator_sees_it_and_each_use_differs() -> None:
    gan = model(replace(WITHOUT_FACENET, loss=replace(WITHOUT_FACENET.loss, augment=1.0)))
    plain = model(WITHOUT_FACENET)
    images, c = photos(8)
    shown: list[Tensor] = []
    read = gan.D.read
    gan.D.read = lambda x: shown.append(x.detach().clone()) or read(x)  # type: ignore[method-assign,func-returns-value]
    named, other = gan.step(images, c, 0), plain.step(images, c, 0)
    assert named["G_mse"] == other["G_mse"]
    assert named["D_adversarial"] != other["D_adversarial"]
    both, again = shown
    assert (len(both), len(again)) == (16, 8)
    assert F.mse_loss(both[8:], again) > 0.02
    twin = model(replace(WITHOUT_FACENET, loss=replace(WITHOUT_FACENET.loss, augment=1.0)))
    assert all(torch.equal(value, named[key]) for key, value in twin.step(images, c, 0).items())


def test_no_augmentation_at_the_end_of_a_run() -> None:
    until = model(replace(WITHOUT_FACENET, loss=replace(WITHOUT_FACENET.loss, augment=1.0, augment_until=0.5)))
    plain = model(WITHOUT_FACENET)
    images, c = photos(8)
    x = torch.rand(8, 3, 32, 32)
    until.budget_used = 0.49
    assert not torch.equal(until._augmented(x, 0, 0), x)
    until.budget_used = 0.5
    named, expected = until.step(images, c, 0), plain.step(images, c, 0)
    assert all(torch.equal(value, named[key]) for key, value in expected.items())


def test_values_out_of_range() -> None:
    with pytest.raises(UserError, match=r"loss\.augment_until must be a number from 0 to 1, not -0\.1"):
        check_config(replace(WITHOUT_FACENET, loss=replace(WITHOUT_FACENET.loss, augment_until=-0.1)))
    with pytest.raises(UserError, match=r"loss\.augment must be a number from 0 to 1, not 1\.2"):
        check_config(replace(WITHOUT_FACENET, loss=replace(WITHOUT_FACENET.loss, augment=1.2)))
