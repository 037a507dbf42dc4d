from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vultus.config import to_dict
from vultus.models.discriminators import ProjectionDiscriminator, build_discriminator
from vultus.models.generators import build_generator
from vultus.models.layers import stage_sides, widths
from vultus.presets import PRESETS
from vultus.training import losses

KINDS = PRESETS
SMALL = {"resolution": 32, "base_width": 8, "max_width": 16}


def networks(preset: str, **changes: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    config = KINDS[preset]
    generator = replace(config.generator, **changes)
    discriminator = replace(config.discriminator, **changes)
    return build_generator(**to_dict(generator)), build_discriminator(**to_dict(discriminator))


def inputs(count: int, resolution: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    c = F.normalize(torch.randn(count, 512))
    return torch.randn(count, 100), c, torch.rand(count, 3, resolution, resolution) * 2 - 1


@pytest.mark.parametrize("preset", sorted(KINDS))
@pytest.mark.parametrize("resolution", [32, 64, 128])
def test_shapes(preset: str, resolution: int) -> None:
    G, D = networks(preset, resolution=resolution, base_width=8, max_width=16)
    z, c, x = inputs(2, resolution)
    out = G(z, c)
    assert out.shape == (2, 3, resolution, resolution)
    assert out.dtype == torch.float32
    assert D(x, c).shape == (2,)


@pytest.mark.parametrize("preset", sorted(KINDS))
def test_full_size_starts_sound(preset: str) -> None:
    """Untrained images are neither flat nor saturated, and the discriminator is undecided."""
    G, D = networks(preset)
    resolution = KINDS[preset].generator.resolution
    z, c, x = inputs(4, resolution)
    out = G(z, c)
    assert 0.005 < out.std() < 0.7
    assert out.abs().max() < 3
    assert D(x, c).abs().max() < 3


@pytest.mark.parametrize("preset", sorted(KINDS))
def test_both_inputs_matter(preset: str) -> None:
    """A change of the embedding changes the untrained image about as much as a change of the noise."""
    G, _ = networks(preset)
    G.eval()
    z, c, _ = inputs(8)
    base = G(z, c)
    by_noise = (G(z.roll(1, 0), c) - base).square().mean()
    by_embedding = (G(z, c.roll(1, 0)) - base).square().mean()
    assert 0.2 < by_embedding / by_noise < 12


@pytest.mark.parametrize("preset", sorted(KINDS))
def test_every_parameter_learns(preset: str) -> None:
    G, D = networks(preset, **SMALL)
    z, c, x = inputs(4)
    for _ in range(3):  # gradients reach zero-initialized layers one step after another
        error = D(x, c).sub(1).square().mean()
        if isinstance(D, ProjectionDiscriminator):
            error = error + D.read(x)[2].sub(1).square().mean()
        for network, out in ((G, (G(z, c) - x).square().mean()), (D, error)):
            network.zero_grad()
            out.backward()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter -= 0.05 * parameter.grad
    for network in (G, D):
        for name, parameter in network.named_parameters():
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("preset", sorted(KINDS))
def test_bfloat16_stays_close(preset: str) -> None:
    G, D = networks(preset, **SMALL)
    z, c, x = inputs(8)
    full, half = G(z, c), G(z.bfloat16(), c)
    assert half.dtype == torch.float32
    assert (full - half).square().mean() < 0.02 * full.var()
    assert (D(x, c) - D(x.bfloat16(), c)).abs().max() < 0.1
    assert all(parameter.dtype == torch.float32 for parameter in G.parameters())


def test_discriminator_uses_the_embedding() -> None:
    """It learns to separate right from wrong embeddings of the same images."""
    for preset in ("reference-mse", "vultus-cpu"):
        _, D = networks(preset, **SMALL)
        _, c, x = inputs(16)
        optim = torch.optim.Adam(D.parameters(), lr=2e-3)
        for _ in range(60):
            loss = losses.bce_discriminator(D(x, c), D(x, c.roll(1, 0)))
            optim.zero_grad()
            loss.backward()
            optim.step()
        assert (D(x, c) > D(x, c.roll(1, 0))).float().mean() > 0.9


@pytest.mark.parametrize("resolution", [32, 64, 128, 256])
def test_projection_discriminator_outputs(resolution: int) -> None:
    G, D = networks("vultus-cpu", resolution=resolution, base_width=8, max_width=16, projection=16)
    z, c, _ = inputs(2)
    x = G(z, c)
    assert x.shape == (2, 3, resolution, resolution)
    logits, features, patches = D.read(x)
    assert (logits.shape, features.shape, patches.shape) == ((2,), (2, 16), (2, 8, 8))
    assert torch.allclose(D.eval()(x, c), D.read(x)[0] + D.match(D.read(x)[1], c))


def test_conditional_norm_generator_as_published() -> None:
    """Names and shapes in a snapshot of the preset at 128x128."""
    state = networks("vultus-cpu")[0].state_dict()
    assert sum(value.numel() for value in state.values() if value.is_floating_point()) == 5_363_491
    assert state["stem.weight"].shape == (256 * 16, 384)
    assert state["blocks.3.norm1.affine.weight"].shape == (128, 256)
    assert state["blocks.4.skip.weight"].shape == (32, 64, 1, 1)
    assert "blocks.4.conv1.weight" not in state
    with pytest.raises(ValueError, match="projection of 2 or more"):
        networks("vultus-cpu", projection=0)


def test_widths_and_sides() -> None:
    assert stage_sides(128, 64) == [4, 8, 16, 32, 64]
    assert widths([4, 8, 16, 32, 64], 32, 256) == [256, 256, 128, 64, 32]
    with pytest.raises(ValueError, match="power of two"):
        stage_sides(100, 50)


def test_reconstruction_at_low_size_ignores_fine_detail() -> None:
    x = torch.zeros(1, 3, 8, 8)
    checker = x.clone()
    checker[..., ::2, ::2] = checker[..., 1::2, 1::2] = 1
    checker[..., ::2, 1::2] = checker[..., 1::2, ::2] = -1
    assert losses.reconstruction(x, checker) == 1
    assert losses.reconstruction(x, checker, 4) == 0


def test_presets_name_themselves() -> None:
    assert all(config.preset == name for name, config in PRESETS.items())
