"""Second encoders in the loss: MobileFaceNet's weights, crops at a fixed place, targets, and the loss term."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from test_cvae_gan import WITHOUT_FACENET, model, photos
from test_facenet import celeba
from vultus._download import WeightFile
from vultus.cli.main import main
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.evaluation.backbones.face_recognition import judge_available, load_judge
from vultus.evaluation.headlines import headlines_of, loss_encoders
from vultus.evaluation.tables import build_table
from vultus.images.io import box_x, centre_crop, decode_image, from_pil, to_x
from vultus.models import mobilefacenet
from vultus.models.dlib_resnet import DlibResNet
from vultus.models.mobilefacenet import MobileFaceNet, MobileFaceNetNetwork, fold_norms, load_mobilefacenet
from vultus.models.second_encoder import DlibEncoder, load_second_encoder
from vultus.presets import get_preset
from vultus.training.launch import _second_encoder
from vultus.training.second_targets import person_targets, second_targets


def accepted(embeddings: Tensor, people: Tensor, far: float) -> float:
    """The share of pairs of one person that are accepted at this false accept rate."""
    scores = embeddings @ embeddings.T
    rows, columns = torch.triu_indices(len(people), len(people), 1)
    same = people[rows] == people[columns]
    scores = scores[rows, columns]
    return float((scores[same] > torch.quantile(scores[~same], 1 - far)).float().mean())


def random_network() -> MobileFaceNetNetwork:
    """Random weights and running statistics."""
    torch.manual_seed(0)
    network = MobileFaceNetNetwork().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_(0, 0.3)
    return network


def test_folded_norms_compute_the_same() -> None:
    network = random_network()
    x = torch.randn(2, 3, 112, 112)
    with torch.inference_mode():
        expected = network(x)
        fold_norms(network)
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
        assert torch.allclose(network(x), expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.slow
def test_mobilefacenet_verifies_real_people(shared: Path) -> None:
    """Published: 99.48 % on LFW. Here 200 photos of 40 test people, in frames as `vultus prepare` cuts them."""
    encoded, people = celeba(shared, people=40, photos=5)
    x = to_x(from_pil([centre_crop(decode_image(photo), 128) for photo in encoded]))
    judge = load_judge("mobilefacenet")
    embeddings = judge.embed(x)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(len(x)))
    assert accepted(embeddings, people, 1e-2) > 0.8
    assert accepted(embeddings.roll(1, 0), people, 1e-2) < accepted(embeddings, people, 1e-2)


@pytest.mark.weights
def test_the_official_file_loads_through_the_same_code(
    shared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A plain state dict in a `.pt` file, with the counters of the batch-norms, as its author publishes it."""
    expected = load_mobilefacenet()
    network, _ = mobilefacenet._load_network()
    path = tmp_path / "mobilefacenet.pt"
    torch.save(network.state_dict(), path)
    assert any(key.endswith("num_batches_tracked") for key in network.state_dict())
    monkeypatch.setenv("VULTUS_WEIGHTS", str(tmp_path))
    own(monkeypatch, path)
    x = torch.rand(2, 3, 128, 128) * 2 - 1
    assert torch.equal(load_mobilefacenet().embed(x), expected.embed(x))


def own(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Make `path` the only MobileFaceNet weights."""
    from vultus._files import sha256_file

    monkeypatch.setattr(mobilefacenet, "MOBILEFACENET_WEIGHTS", (WeightFile(path.name, sha256_file(path)),))
    monkeypatch.setattr(mobilefacenet, "_load_network", mobilefacenet._load_network.__wrapped__)


def test_weights_of_another_network_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "mobilefacenet.pt"
    torch.save({"conv.weight": torch.zeros(2)}, path)
    monkeypatch.setenv("VULTUS_WEIGHTS", str(tmp_path))
    own(monkeypatch, path)
    with pytest.raises(UserError, match=f"{path}: not the keys of MobileFaceNet") as caught:
        load_mobilefacenet()
    assert "\n" not in str(caught.value)


def test_a_training_without_its_weights_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "mobilefacenet.pt"
    torch.save({"conv.weight": torch.zeros(2)}, path)
    monkeypatch.setenv("VULTUS_WEIGHTS", str(tmp_path))
    own(monkeypatch, path)
    with pytest.raises(UserError, match=f"{path}: .*; or train without it: --loss.second_encoder none"):
        _second_encoder(get_preset("vultus-cpu"), "cpu")


def test_box_is_in_parts_of_the_image() -> None:
    x = torch.arange(128.0).expand(1, 3, 128, 128)
    crop = box_x(x, (0.25, 0.0, 0.5), (0.0, 0.0, 0.0), 64)
    assert torch.equal(crop[0, 0, 0], torch.arange(32.0, 96.0))
    moved = box_x(x, (0.25, 0.0, 0.5), (2 / 128, 0.0, 0.0), 64)
    assert torch.equal(moved[0, 0, 0], torch.arange(34.0, 98.0))


@pytest.mark.parametrize("kind", ["mobilefacenet", "dlib"])
def test_gradient_reaches_the_image_alone(kind: str) -> None:
    encoder: MobileFaceNet | DlibEncoder
    encoder = MobileFaceNet(random_network()) if kind == "mobilefacenet" else DlibEncoder(DlibResNet())
    encoder.train()
    x = (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    embedding = encoder.embed(x)
    assert embedding.dtype == torch.float32
    assert torch.allclose(embedding.norm(dim=1), torch.ones(2), atol=1e-3)
    embedding[:, 0].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert not any(module.training for module in encoder.modules())


@pytest.mark.skipif(not judge_available(), reason="dlib and its models are not installed")
def test_dlib_at_a_fixed_place_verifies_real_people(shared: Path) -> None:
    encoded, people = celeba(shared, people=40, photos=5)
    x = to_x(from_pil([centre_crop(decode_image(photo), 128) for photo in encoded]))
    encoder = load_second_encoder("dlib")
    assert encoder is not None
    with torch.inference_mode():
        assert accepted(encoder.embed(x), people, 1e-2) > 0.8


# --- targets ----------------------------------------------------------------------------------------------------------


def test_target_is_halfway_to_the_persons_other_photos() -> None:
    e = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
    targets = person_targets(e, ["a", "b", "a", "a", "c"])
    assert torch.allclose(targets.norm(dim=1), torch.ones(5))
    assert torch.allclose(targets[0], F.normalize(e[0] + F.normalize(e[2] + e[3], dim=0), dim=0), atol=1e-6)
    assert torch.allclose(targets[[1, 4]], e[[1, 4]], atol=1e-6)  # people with one photo


class Means:
    """An encoder that counts what it reads."""

    id, dim, weights_sha256 = "means", 3, "0"

    def __init__(self) -> None:
        self.count = 0

    def embed(self, x: Tensor, jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Tensor:
        self.count += len(x)
        return F.normalize(x.mean((2, 3)) + 2)


def test_targets_are_computed_once(tiny_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VULTUS_CACHE", str(tmp_path))
    encoder = Means()
    dataset = PreparedDataset(tiny_data, "train")
    targets = second_targets(dataset, encoder)
    assert targets.shape == (len(dataset), 3)
    assert encoder.count == len(dataset)
    assert torch.equal(second_targets(dataset, encoder), targets)
    assert encoder.count == len(dataset)
    part = dataset.with_split("train", max_images=len(dataset) - 1)
    assert len(second_targets(part, encoder)) == len(dataset) - 1
    assert encoder.count == 2 * len(dataset) - 1


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_loss_is_computed_on_images_of_sampled_noise() -> None:
    """Only they get a gradient from it, and the image comes nearer to the target."""
    loss = replace(WITHOUT_FACENET.loss, second_encoder="mobilefacenet", second_weight=5.0, second_fraction=0.5)
    gan = model(replace(WITHOUT_FACENET, loss=loss))
    gan.second = MobileFaceNet(random_network())
    images, c = photos()
    target = F.normalize(torch.randn(4, 128, generator=torch.Generator().manual_seed(0)))
    part = gan.part(4)
    x_real, c, z = gan._begin(part, images, c, 0)
    step = gan._generate(part, x_real, c, c, z, 0)
    step.x = step.x.detach().requires_grad_()
    step.second = target
    value = gan._second_loss(step, gan.second)
    value.backward()
    moved = step.x.grad.abs().amax((1, 2, 3)) > 0
    coded = torch.zeros(4, dtype=torch.bool).index_fill(0, step.coded, True)
    assert 0 < int(coded.sum()) < 4
    assert torch.equal(moved, ~coded)
    log = gan.step(images, c, 0, target)
    assert log["G_second"].item() == pytest.approx(value.item(), abs=1e-4)
    # A stream has no targets of the whole data set: an image's target is the embedding of its own photo.
    own = gan.second.embed(step.x_real)
    values = [gan._second_loss(replace(step, second=targets), gan.second).item() for targets in (None, own)]
    assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_setting_of_another_encoder_names_the_known_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["train", "--data", str(tmp_path), "--out", str(tmp_path / "r"), "--loss.second_encoder", "arcface"]
    assert main(command) == 2
    assert "mobilefacenet" in capsys.readouterr().err


# --- what a loss contains judges nothing ------------------------------------------------------------------------------


def test_encoders_in_the_losses_are_recorded_and_marked() -> None:
    loss = replace(WITHOUT_FACENET.loss, second_encoder="mobilefacenet", second_weight=1.0, identity_weight=1.0)
    assert loss.encoders() == ["facenet", "mobilefacenet"]
    assert replace(loss, second_weight=0.0).encoders() == ["facenet"]
    assert WITHOUT_FACENET.loss.encoders() == []
    row = {"value": 0.5, "low": 0.4, "high": 0.6}
    names = [f"type1_{encoder}_far1e-3" for encoder in ("facenet", "dlib", "mobilefacenet")]
    result = {
        "metrics": {"identity_mobilefacenet": row} | dict.fromkeys(names, row),
        "context": {"loss_encoders": ["facenet", "mobilefacenet"]},
    }
    other = {**result, "context": {"loss_encoders": []}}
    table = {row.name: [cell.text for cell in row.cells] for row in build_table({"ours": result, "theirs": other}).rows}
    assert table["type1_dlib_far1e-3"] == ["0.500", "0.500"]
    assert table["type1_mobilefacenet_far1e-3"] == ["0.500 (in the loss)", "0.500"]
    assert table["identity_mobilefacenet"] == ["0.500 (in the loss)", "0.500"]
    assert [metric.name for metric in headlines_of(result)] == ["identity_mobilefacenet", "type1_dlib_far1e-3"]
    assert {metric.name for metric in headlines_of(other)} == {"identity_mobilefacenet", *names}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"loss_encoders": ["facenet", "dlib"]}, ["facenet", "dlib"]),
        ({"loss_encoders": [], "preset": "vultus-cpu"}, []),
        ({"preset": "vultus-cpu"}, ["facenet"]),
        ({"preset": "reference-dcgan"}, []),
        ({}, ["facenet"]),
    ],
)
def test_snapshots_of_earlier_versions_tell_by_their_preset(metadata: dict[str, Any], expected: list[str]) -> None:
    assert loss_encoders(metadata) == expected
