"""Method cvae-gan: its networks, where the gradients of its losses go, and runs that are resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from test_train import assert_same, losses, state
from vultus.cli.main import main
from vultus.config import CVAEGANConfig, OptimConfig, check_config
from vultus.errors import UserError
from vultus.models.alexnet import stlpips_path
from vultus.models.auxiliary import FeatureDiscriminator, PosteriorEncoder
from vultus.models.facenet import FaceFeatures, FaceNet, InceptionResnetV1
from vultus.models.snapshot import load_snapshot
from vultus.presets import fitted, get_preset
from vultus.training.cvae_gan import CVAEGAN
from vultus.training.losses import identity_weight, mse_weight
from vultus.training.parts import evenly_spread, evenly_spread_count, prior_first
from vultus.training.trainer import Budget, train

PRESET = get_preset("vultus-cpu")
assert isinstance(PRESET, CVAEGANConfig)
SMALL = fitted(PRESET, 32)
assert isinstance(SMALL, CVAEGANConfig)
SMALL = replace(
    SMALL,
    generator=replace(SMALL.generator, base_width=8, max_width=16, projection=32),
    discriminator=replace(SMALL.discriminator, base_width=8, max_width=16, projection=32),
    # Two images through FaceNet: with more, the last bits of its gradient may differ from run to run.
    loss=replace(
        SMALL.loss,
        identity_size=75,
        identity_sizes=1,
        feature_fraction=0.5,
        identity_fraction=0.5,
        second_weight=0.0,
        augment_until=1.0,  # tests change the budget of a run halfway
    ),
    optim=replace(SMALL.optim, batch=4),
    dtype="float32",
    log_every_nimg=4,
    sample_every_nimg=8,
    checkpoint_every_nimg=8,
)
WITHOUT_FACENET = replace(
    SMALL,
    loss=replace(
        SMALL.loss,
        identity_weight=0.0,
        identity_start=0.0,
        perceptual_weight=0.0,
        feature_weight=0.0,
        feature_match=0.0,
        augment=0.0,
    ),
)


@pytest.fixture(scope="module")
def random_facenet() -> FaceNet:
    """FaceNet with random weights, for tests of the flow of values and gradients."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FaceNet(InceptionResnetV1(), dtype=torch.float32)


def model(config: CVAEGANConfig, encoder: FaceNet | None = None) -> CVAEGAN:
    return CVAEGAN(config, device="cpu", dtype=torch.float32, encoder=encoder)


def photos(count: int = 4, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=random)
    return images, F.normalize(torch.randn(count, 512, generator=random))


# --- parts ------------------------------------------------------------------------------------------------------------


def test_shapes() -> None:
    x, _ = photos(2, 64)
    mean, log_variance = PosteriorEncoder(100)(x / 127.5 - 1)
    assert mean.shape == log_variance.shape == (2, 100)
    discriminator = FeatureDiscriminator()
    features = (torch.randn(2, 192, 16, 16), torch.randn(2, 256, 7, 7))
    assert [tuple(v.shape) for v in discriminator(features)] == [(2, 1, 8, 8), (2, 1, 7, 7)]
    c = photos(2)[1]
    assert discriminator.match(features[1], c).shape == (2,)
    assert not torch.equal(discriminator.match(features[1], c), discriminator.match(features[1], c.flip(0)))
    discriminator.calibrate((3 * features[0], features[1] / 5))
    scaled = discriminator.scaled((3 * features[0], features[1] / 5))
    assert all(torch.isclose(f.square().mean(), torch.tensor(1.0), atol=1e-4) for f in scaled)


def test_facenet_cut_in_two_gives_the_same_embedding(random_facenet: FaceNet) -> None:
    before = {key: value.clone() for key, value in random_facenet.state_dict().items()}
    face = FaceFeatures(random_facenet).train()
    assert not any(module.training for module in face.modules())
    x = (photos(2, 64)[0] / 127.5 - 1).requires_grad_()
    whole, cut = random_facenet.embed(x, 96), face.rest(face.shallow(x, 96)[1])
    assert torch.allclose(whole, cut, atol=1e-4)
    cut[:, 0].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in face.parameters())
    after = random_facenet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_cut_facenet_with_real_weights(facenet: FaceNet) -> None:
    x = photos(2, 128)[0] / 127.5 - 1
    face = FaceFeatures(facenet)
    assert torch.allclose(facenet.embed(x, 88), face.rest(face.shallow(x, 88)[1]), atol=1e-5)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.375, 0.5, 1.0])
def test_every_first_part_of_a_batch_has_its_share(fraction: float) -> None:
    indices = evenly_spread(16, fraction).tolist()
    assert len(set(indices)) == len(indices) == 16 * fraction
    for part in range(17):
        assert sum(index < part for index in indices) == evenly_spread_count(part, fraction)


def test_prior_latents_come_first() -> None:
    coded = evenly_spread(8, 0.5)
    assert coded.tolist() == [0, 2, 4, 6]
    assert prior_first(8, coded).tolist() == [1, 3, 5, 7, 0, 2, 4, 6]
    assert prior_first(5, coded).tolist() == [1, 3, 0, 2, 4]
    assert prior_first(3, evenly_spread(8, 0.0)).tolist() == prior_first(3, evenly_spread(8, 1.0)).tolist() == [0, 1, 2]


def test_schedules() -> None:
    loss = PRESET.loss
    assert [identity_weight(loss, n) for n in (0, 5_000, 10_000, 80_000)] == [1.0, 2.5, 4.0, 4.0]
    assert identity_weight(get_preset("dcgan-identity").loss, 0) == 0.5
    falling = replace(get_preset("tiny").loss, mse_weight=10.0, mse_nimg=100)
    assert [mse_weight(falling, n) for n in (0, 50, 100, 200)] == pytest.approx([10.0, 5.5, 1.0, 1.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"discriminator": replace(PRESET.discriminator, kind="dcgan")}, r"discriminator\.kind projection"),
        ({"generator": replace(PRESET.generator, projection=0)}, r"generator\.projection is 0"),
        ({"loss": replace(PRESET.loss, mismatch=1.5)}, r"loss\.mismatch must be a number from 0 to 1, not 1\.5"),
    ],
)
def test_settings_that_do_not_go_together_are_named(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_config(replace(PRESET, **change))


# --- the step ---------------------------------------------------------------------------------------------------------


def test_every_part_learns_and_facenet_does_not(random_facenet: FaceNet) -> None:
    gan = model(replace(SMALL, loss=replace(SMALL.loss, feature_match=1.0)), random_facenet)
    images, c = photos()
    gan.calibrate(images)
    assert (gan.F.scale != 1).all()
    before = {
        name: {key: value.clone() for key, value in network.named_parameters()}
        for name, network in gan.networks().items()
    }
    for nimg in (0, 4):
        named = gan.step(images, c, nimg)
    assert set(named) == {
        "G_kl", "G_mse", "G_perceptual", "G_identity", "G_adversarial", "G_patch", "G_features", "G_total",
        "D_adversarial", "D_real_logits", "D_fake_logits", "D_wrong_logits", "F_adversarial",
        "G_match", "F_match", "F_real_match", "F_wrong_match", "F_fake_match", "G_grad_norm", "D_grad_norm",
    }  # fmt: skip
    assert all(torch.isfinite(value) and not value.requires_grad for value in named.values())
    assert named["G_kl"] > 0
    for name, network in gan.networks().items():
        for key, value in network.named_parameters():
            # The gradient of a logit's bias is 0 while photos and generated images have the same weight.
            assert key.endswith("bias") or not torch.equal(value, before[name][key]), f"{name}.{key}"
    assert all(parameter.grad is None for parameter in (*gan.face.parameters(), *random_facenet.parameters()))


def test_posterior_latents_depend_on_the_photo_and_the_others_do_not() -> None:
    """Other photos change the latents of the coded images only."""
    gan = model(WITHOUT_FACENET)
    images, c = photos(8)
    gan.G.eval()  # in training, batch normalisation would mix the images
    latents: list[torch.Tensor] = []
    gan.G.register_forward_pre_hook(lambda _, given: latents.append(given[0].detach().clone()))
    gan.step(images, c, 0)
    again = model(WITHOUT_FACENET)
    again.G.eval()
    again.G.register_forward_pre_hook(lambda _, given: latents.append(given[0].detach().clone()))
    again.step(255 - images, c, 0)
    changed = (latents[0] != latents[1]).any(1)
    assert changed.tolist() == [True, False] * 4


def test_reconstruction_learns_to_use_the_posterior() -> None:
    """Two photos of one embedding differ in their latents only."""
    loss = replace(WITHOUT_FACENET.loss, coded_fraction=1.0, adversarial_weight=0.0, kl_weight=1e-4, mse_size=8)
    config = replace(WITHOUT_FACENET, loss=loss, optim=OptimConfig(lr=2e-3, batch=4), loader=replace(
        WITHOUT_FACENET.loader, mirror=False))  # fmt: skip
    gan = model(config)
    images = torch.tensor([40, 220, 40, 220], dtype=torch.uint8)[:, None, None, None].expand(4, 3, 32, 32)
    c = photos(1)[1].expand(4, -1)
    errors = [float(gan.step(images, c, 4 * step)["G_mse"]) for step in range(40)]
    assert errors[-1] < 0.2  # the mean of both photos has 0.5


@pytest.mark.slow
def test_mismatch_pushes_wrong_pairs_down() -> None:
    loss = replace(WITHOUT_FACENET.loss, mismatch=0.5, patch_weight=0.0)
    config = replace(WITHOUT_FACENET, loss=loss, loader=replace(WITHOUT_FACENET.loader, mirror=False))
    gan = model(config)
    images, c = photos(8)
    named = [gan.step(images, c, 8 * step) for step in range(60)]
    assert named[-1]["D_wrong_logits"] < named[-1]["D_real_logits"] - 0.5
    without = model(replace(config, loss=replace(loss, mismatch=0.0)))
    assert "D_wrong_logits" not in without.step(images, c, 0)


def test_average_contains_the_statistics_of_batch_normalisation() -> None:
    gan = model(WITHOUT_FACENET)
    images, c = photos()
    for nimg in range(0, 400, 40):
        gan.step(images, c, nimg)
    average, current = gan.G_ema.norm.norm, gan.G.norm.norm
    assert not gan.G_ema.training
    assert (average.running_mean - current.running_mean).abs().max() < current.running_mean.abs().max()
    assert average.num_batches_tracked == current.num_batches_tracked == 10


def test_bfloat16_step_is_near() -> None:
    images, c = photos(8)
    gans = [
        CVAEGAN(WITHOUT_FACENET, device="cpu", dtype=dtype, encoder=None) for dtype in (torch.float32, torch.bfloat16)
    ]
    full, half = (gan.step(images, c, 0) for gan in gans)
    assert all(abs(full[name] - half[name]) < 0.05 * max(1.0, abs(full[name])) for name in full)
    assert all(
        value.dtype == torch.float32
        for gan in gans
        for value in gan.G.state_dict().values()
        if value.is_floating_point()
    )


def test_another_encoder_is_refused(random_facenet: FaceNet) -> None:
    with pytest.raises(ValueError, match="need an encoder"):
        model(SMALL)
    with pytest.raises(ValueError, match="no other encoder"):
        model(SMALL, object())  # type: ignore[arg-type]


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_four_steps_are_two_and_two(random_facenet: FaceNet, tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    data = tiny_dataset(encoder=FaceNet.id)
    train(SMALL, data=data, out=tmp_path / "whole", budget=Budget(total_nimg=16), encoder=random_facenet)
    for total in (8, 16):
        train(SMALL, data=data, out=tmp_path / "parts", budget=Budget(total_nimg=total), encoder=random_facenet)
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole["cur_nimg"] == 16
    assert set(whole["gan"]) == {"G", "E", "D", "F", "G_ema", "G_optim", "D_optim"}
    assert (whole["gan"]["F"]["scale"] != 1).all()
    assert_same(whole["gan"], parts["gan"])
    assert [line for line in losses(tmp_path / "whole") if "evaluator" not in line] == losses(tmp_path / "parts")
    snapshot = load_snapshot(tmp_path / "parts")
    assert snapshot.metadata["generator"]["kind"] == "conditional-norm"
    z, c = torch.randn(3, 100), photos(3)[1]
    assert torch.allclose(snapshot.network(z, c)[:1], snapshot.network(z[:1], c[:1]), atol=1e-5)


def test_a_diverged_run_is_named(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    wild = replace(WITHOUT_FACENET, optim=replace(SMALL.optim, lr=0.5))
    with pytest.raises(UserError, match=r"not finite.*lower --optim\.lr"):
        train(wild, data=tiny_dataset(), out=tmp_path / "run", budget=Budget(total_nimg=400))


@pytest.mark.slow
def test_preset_on_the_command_line(
    shared: Path,
    tiny_dataset: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """vultus-cpu with the real FaceNet, then faces of its snapshot."""
    monkeypatch.setenv("VULTUS_WEIGHTS", str(shared / "weights"))
    small = ["--generator.base_width", "8", "--generator.max_width", "16", "--discriminator.base_width", "8",
             "--discriminator.max_width", "16", "--optim.batch", "4", "--log_every_nimg", "4",
             "--device", "cpu"]  # fmt: skip
    run = ["train", "--preset", "vultus-cpu", "--data", str(tiny_dataset(encoder=FaceNet.id))]
    run += ["--out", str(tmp_path / "run")]
    assert main([*run, "--images", "8", *small]) == 0
    lines = [line for line in losses(tmp_path / "run") if "evaluator" not in line]
    assert all({"G_identity", "G_perceptual", "F_adversarial"} <= line.keys() for line in lines)
    capsys.readouterr()
    for option, reason in (
        ("--loss.gamma", "--loss.gamma: this version no longer has it; leave it out"),
        ("--loss.label_smoothing", "--loss.label_smoothing is not a setting of method cvae-gan; leave it out"),
    ):
        assert main([*run, "--images", "8", *small, option, "1"]) == 2
        assert reason in capsys.readouterr().err


# --- settings that the presets do not use yet -------------------------------------------------------------------------


@pytest.mark.skipif(stlpips_path() is None, reason="needs the extra: pip install 'vultus[eval]'")
def test_texture_discriminator_tells_photos_and_generated_images_apart() -> None:
    """T learns on images whose textures differ, its loss reaches G, and a run without it has no T."""
    loss = replace(WITHOUT_FACENET.loss, texture_weight=1.0, texture_fraction=0.5)
    gan = model(replace(WITHOUT_FACENET, loss=loss))
    images, c = photos()
    gan.calibrate(images)
    with torch.no_grad():
        scaled = [f * s for f, s in zip(gan._textures(images / 127.5 - 1), gan.T.scale, strict=True)]
    assert all(torch.isclose(f.square().mean(), torch.tensor(1.0), atol=1e-3) for f in scaled)
    before = [float(gan.step(images, c, 4 * number)["T_adversarial"]) for number in range(12)]
    assert before[-1] < before[0]
    part = gan.part(4)
    x_real, c, z = gan._begin(part, images, c, 0)
    step = gan._generate(part, x_real, c, c, z, 0)
    step.x = step.x.detach().requires_grad_()
    {name: value for name, _, value in gan._generator_terms(step)}["G_texture"].backward()
    assert step.x.grad is not None
    assert (step.x.grad.abs().amax((1, 2, 3)) > 0).tolist() == [True, True, False, False]
    assert "T" in gan.networks()
    assert "T" not in model(WITHOUT_FACENET).networks()


def test_maps_of_the_noise_change_the_image_where_they_lie() -> None:
    generator = replace(WITHOUT_FACENET.generator, resolution=64, z_dim=20 + 64, noise_maps=1)
    discriminator = replace(WITHOUT_FACENET.discriminator, resolution=64)
    gan = model(replace(WITHOUT_FACENET, generator=generator, discriminator=discriminator))
    torch.manual_seed(0)
    z, c = torch.randn(1, 84), photos(1)[1]
    other = z.clone()
    other[0, 20 + 8 * 7 : 20 + 8 * 7 + 2] += 3.0  # the lower left corner of the map
    with torch.no_grad():
        network = gan.G.eval()
        change = (network(z, c) - network(other, c)).abs().mean(1)[0]
    assert change[40:, :24].mean() > 5 * change[:24, 40:].mean()
    mean, log_variance = gan.E(torch.rand(2, 3, 64, 64) * 2 - 1)
    assert mean.shape == log_variance.shape == (2, 84)
    losses = gan.step(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8), photos()[1], 0)
    assert all(bool(torch.isfinite(value)) for value in losses.values())


@pytest.mark.parametrize("size", [32, 64])
def test_posterior_encoder_reads_the_photo_at_its_size(size: int) -> None:
    encoder = PosteriorEncoder(10, size)
    rough = torch.rand(1, 3, size // 2, size // 2)
    fine = rough.repeat_interleave(4, 2).repeat_interleave(4, 3)  # 2 * size pixels: nothing finer than size / 2
    detail = (torch.rand(1, 3, 2 * size, 2 * size) - 0.5).repeat(1, 1, 1, 1)
    detail = detail - F.avg_pool2d(detail, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)  # finer than size
    assert torch.allclose(encoder(fine)[0], encoder(fine + detail)[0], atol=1e-5)
    assert not torch.allclose(encoder(fine)[0], encoder(fine.flip(3))[0], atol=1e-3)


def convolved_sides(network: torch.nn.Module, *inputs: torch.Tensor) -> list[int]:
    """The sides of the outputs of all convolutions without a stride."""
    sides: list[int] = []
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d) and layer.stride == (1, 1):
            layer.register_forward_hook(lambda _layer, _inputs, output: sides.append(output.shape[-1]))
    network(*inputs)
    return sides


@pytest.mark.parametrize("fine_width", [0, 4])
def test_stage_at_the_full_resolution(fine_width: int) -> None:
    """With it, G and D have a convolution that runs at R x R."""
    config = replace(
        WITHOUT_FACENET,
        generator=replace(WITHOUT_FACENET.generator, fine_width=fine_width),
        discriminator=replace(WITHOUT_FACENET.discriminator, fine_width=fine_width),
    )
    gan = model(config)
    assert gan.G.settings().get("fine_width", 0) == fine_width
    losses = gan.step(*photos(), 0)
    assert all(bool(torch.isfinite(value)) for value in losses.values())
    for network, x in ((gan.G, torch.randn(2, gan.G.z_dim)), (gan.D, torch.randn(2, 3, 32, 32))):
        assert max(convolved_sides(network, x, photos(2)[1])) == (32 if fine_width else 16)
    assert gan.G(torch.randn(2, gan.G.z_dim), photos(2)[1]).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("part", "setting", "message"),
    [
        ("generator", {"kind": "dcgan", "fine_width": 4}, "--generator.fine_width is 4; kind dcgan has none"),
        ("generator", {"kind": "dcgan", "noise_maps": 1}, "--generator.noise_maps is 1; kind dcgan has none"),
        ("generator", {"z_dim": 128, "noise_maps": 2}, "--generator.z_dim is 128; with --generator.noise_maps 2"),
    ],
)
def test_settings_of_other_networks_are_named(part: str, setting: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_config(replace(SMALL, **{part: replace(getattr(SMALL, part), **setting)}))
