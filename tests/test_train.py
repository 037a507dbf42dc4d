"""The training loop with real processes: killed, stopped, run twice, without space on the disk."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vultus.cli.main import main
from vultus.config import LoaderConfig, OptimConfig, TrainConfig, to_dict
from vultus.data.dataset import Batch, PreparedDataset, batches
from vultus.errors import Stopped, UserError
from vultus.models import facenet as facenet_module
from vultus.models.facenet import FaceNet
from vultus.models.snapshot import load_snapshot
from vultus.presets import get_preset
from vultus.training import trainer
from vultus.training.checkpoint import load_checkpoint
from vultus.training.gan import GAN
from vultus.training.trainer import Budget, train
from vultus.training.validation import above_chance, unseen_validation

TINY = get_preset("tiny")
TINY = replace(
    TINY,
    generator=replace(TINY.generator, base_width=8, max_width=16),
    discriminator=replace(TINY.discriminator, base_width=8, max_width=16),
    optim=OptimConfig(batch=4, ema_nimg=50),
    loader=LoaderConfig(mirror=True),
    dtype="float32",
    log_every_nimg=4,
    sample_every_nimg=8,
    checkpoint_every_nimg=8,
)
OTHER_NETWORKS = replace(
    TINY,
    generator=replace(TINY.generator, kind="conditional-norm"),
    discriminator=replace(TINY.discriminator, kind="projection"),
    loss=replace(TINY.loss, mse_size=16, mse_nimg=40),
)


def state(folder: Path) -> dict:
    checkpoint = load_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint[0]


def assert_same(a: object, b: object, at: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), at
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list | tuple):
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{at}[{index}]")
    else:
        assert a == b, at


def losses(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    machine = ("seconds", "images_per_s", "data_wait", "peak_memory_mib")
    return [{k: v for k, v in line.items() if k not in machine} for line in lines]


@pytest.mark.parametrize("config", [TINY, OTHER_NETWORKS], ids=["dcgan", "conditional-norm"])
def test_four_steps_are_two_and_two(config: TrainConfig, tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    data = tiny_dataset()
    train(config, data=data, out=tmp_path / "whole", budget=Budget(total_nimg=16))
    train(config, data=data, out=tmp_path / "parts", budget=Budget(total_nimg=8))
    train(config, data=data, out=tmp_path / "parts", budget=Budget(total_nimg=16))
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole["cur_nimg"] == 16
    assert_same(whole["gan"], parts["gan"])
    assert [line for line in losses(tmp_path / "whole") if "evaluator" not in line] == losses(tmp_path / "parts")


def command(data: Path, out: Path, *more: str) -> list[str]:
    settings = ["--generator.base_width", "8", "--generator.max_width", "16", "--discriminator.base_width", "8",
                "--discriminator.max_width", "16", "--optim.batch", "4", "--dtype", "float32", "--device", "cpu",
                "--log_every_nimg", "4", "--sample_every_nimg", "800", "--checkpoint_every_nimg", "8"]  # fmt: skip
    return [sys.executable, "-m", "vultus", "train", "--preset", "tiny", "--data", str(data), "--out", str(out),
            *settings, *more]  # fmt: skip


def without_facenet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands, in this process or another, find no FaceNet and download none."""
    facenet_module._load_network.cache_clear()
    monkeypatch.setenv("VULTUS_WEIGHTS", "")
    monkeypatch.setenv("VULTUS_CACHE", "/nonexistent")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


@pytest.fixture(autouse=True)
def _without_facenet(monkeypatch: pytest.MonkeyPatch) -> None:
    without_facenet(monkeypatch)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read() if process.stderr else "ended early"
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_kill_9_and_the_same_command_resumes(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    data = tiny_dataset()
    assert main(command(data, tmp_path / "whole", "--images", "120")[3:]) == 0
    killed = subprocess.Popen(command(data, tmp_path / "killed", "--images", "4000000"), stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list((tmp_path / "killed").glob("checkpoint-*.pt"))) == 2, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    reached = state(tmp_path / "killed")["cur_nimg"]
    if reached >= 120:
        pytest.skip(f"the training was at {reached} images before it could be killed")
    assert main(command(data, tmp_path / "killed", "--images", "120")[3:]) == 0
    assert_same(state(tmp_path / "whole")["gan"], state(tmp_path / "killed")["gan"])
    seen = [line["cur_nimg"] for line in losses(tmp_path / "killed") if "evaluator" not in line]
    assert seen == list(range(4, 121, 4))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_signals_write_a_checkpoint(
    number: int, tiny_dataset: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And until then a second training in the same folder is refused."""
    out = tmp_path / "run"
    run = command(tiny_dataset(), out, "--images", "4000000", "--checkpoint_every_nimg", "4000000")
    process = subprocess.Popen(run, stderr=subprocess.PIPE, text=True)
    wait_for(
        lambda: (out / "stats.jsonl").exists() and len((out / "stats.jsonl").read_text().splitlines()) > 3, process
    )
    assert main(run[3:]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"vultus: error: {out}: another process")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "the same command resumes" in stderr
    assert "Traceback" not in stderr
    assert state(out)["cur_nimg"] == losses(out)[-1]["cur_nimg"]
    assert load_snapshot(out).metadata["cur_nimg"] == state(out)["cur_nimg"]


def test_other_settings_and_other_data_are_refused(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(TINY, data=tiny_dataset("one"), out=out, budget=Budget(total_nimg=8))
    changed = replace(TINY, optim=replace(TINY.optim, lr=1e-3))
    with pytest.raises(UserError, match=r"optim\.lr was 0\.0002, now 0\.001"):
        train(changed, data=tmp_path / "one", out=out, budget=Budget(total_nimg=16))
    with pytest.raises(UserError, match="begun on other data"):
        train(TINY, data=tiny_dataset("two", seed=1), out=out, budget=Budget(total_nimg=16))
    (out / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        train(TINY, data=tmp_path / "one", out=out, budget=Budget(total_nimg=16))


def test_checkpoint_of_other_networks_is_refused(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    data = tiny_dataset()
    train(TINY, data=data, out=tmp_path / "a", budget=Budget(total_nimg=8))
    train(OTHER_NETWORKS, data=data, out=tmp_path / "b", budget=Budget(total_nimg=8))
    name = "checkpoint-0000000008.pt"
    (tmp_path / "b" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    with pytest.raises(UserError, match="belongs to other networks"):
        train(OTHER_NETWORKS, data=data, out=tmp_path / "b", budget=Budget(total_nimg=16))


def test_divergence_names_step_and_keys_and_keeps_the_checkpoint(
    tiny_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    wild = replace(TINY, loss=replace(TINY.loss, mse_weight=1e9))
    with pytest.raises(UserError, match=r"not finite") as caught:
        train(wild, data=tiny_dataset(), out=tmp_path / "run", budget=Budget(total_nimg=400))
    assert "\n" not in str(caught.value)
    assert "train-" in str(caught.value) or "weights" in str(caught.value)
    for path in (tmp_path / "run").glob("checkpoint-*.pt"):
        gan = torch.load(path, weights_only=True)["gan"]
        assert all(torch.isfinite(value).all() for value in gan["G"].values())


def test_divergence_by_data(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    embeddings = torch.nn.functional.normalize(torch.randn(24, 512), dim=1)
    embeddings[2] = float("nan")
    data = tiny_dataset(embeddings=embeddings)
    with pytest.raises(
        UserError, match=r"not finite or beyond 1e8 at step \d+ \(\d+ images\), batch keys .*last good checkpoint"
    ):
        train(TINY, data=data, out=tmp_path / "run", budget=Budget(total_nimg=40))
    report = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert "train-0/2.jpg" in report["keys"]


def test_run_folder(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    measured: list[int] = []

    def count(generator: torch.nn.Module) -> dict[str, float]:
        assert not generator.training
        measured.append(1)
        return {"figure": 1.0}

    out = tmp_path / "run"
    budget = Budget(total_nimg=16)
    path = train(TINY, data=tiny_dataset(), out=out, budget=budget, evaluators=[("probe", count, 8)])
    names = {entry.name for entry in out.iterdir()}
    assert names == {".lock", "config.json", "run.json", "stats.jsonl", "samples", "snapshot.safetensors",
                     "checkpoint-0000000008.pt", "checkpoint-0000000016.pt"}  # fmt: skip
    assert {entry.name for entry in (out / "samples").iterdir()} == {
        "progress.png", *(f"{n:010d}.{kind}" for n in (0, 8, 16) for kind in ("png", "npz"))}  # fmt: skip
    assert len(measured) == 3
    metadata = load_snapshot(path).metadata
    assert metadata["encoder"]["id"] == "tiny-test"
    assert to_dict(TINY)["generator"] == {"noise_maps": 0, "fine_width": 0} | metadata["generator"]
    lines = losses(out)
    assert [line["cur_nimg"] for line in lines if line.get("evaluator") == "probe"] == [0, 8, 16]
    assert all({"D_adversarial", "G_adversarial", "G_mse"} <= line.keys() for line in lines if "evaluator" not in line)


def test_budget_in_hours_counts_all_sessions(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    data, out = tiny_dataset(), tmp_path / "run"
    train(TINY, data=data, out=out, budget=Budget(hours=0.2 / 3600))
    first = state(out)
    assert first["seconds"] >= 0.2
    train(TINY, data=data, out=out, budget=Budget(hours=0.2 / 3600))
    assert state(out)["cur_nimg"] == first["cur_nimg"]


def test_full_disk_stops_in_one_line_and_resumes(
    tiny_dataset: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", str(mount)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting a small tmpfs needs root")
    try:
        run = command(tiny_dataset(), mount / "run", "--images", "80")[3:]
        assert main(run) == 2
        assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
        subprocess.run(["mount", "-o", "remount,size=200M", str(mount)], check=True)
        assert main(run) == 0
        assert state(mount / "run")["cur_nimg"] == 80
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_identity_loss_leaves_facenet_untouched(facenet: FaceNet) -> None:
    """Every weight and every statistic of batch normalisation is bit-identical after steps through the encoder."""
    before = {key: value.clone() for key, value in facenet.state_dict().items()}
    config = replace(OTHER_NETWORKS, loss=replace(OTHER_NETWORKS.loss, identity_weight=5.0))
    gan = GAN(config, device="cpu", dtype=torch.float32, encoder=facenet)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    c = torch.nn.functional.normalize(torch.randn(4, 512))
    weights = gan.G.blocks[0].conv1.weight.clone()
    named = [gan.step(images, c, nimg) for nimg in (0, 4, 8)]
    assert all(torch.isfinite(value) for value in named[-1].values())
    assert "G_identity" in named[-1]
    assert not torch.equal(weights, gan.G.blocks[0].conv1.weight)
    after = facenet.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(parameter.grad is None for parameter in facenet.parameters())
    assert not any(module.training for module in facenet.modules())


def test_average_follows_the_half_life() -> None:
    gan = GAN(TINY, device="cpu", dtype=torch.float32, encoder=None)
    with torch.no_grad():
        gan.G.to_rgb.bias.fill_(1.0)
        gan.G_ema.to_rgb.bias.fill_(0.0)
    gan._average(10_000)  # half-life 50 images, a step of 4
    assert torch.allclose(gan.G_ema.to_rgb.bias, torch.full((3,), 1 - 0.5 ** (4 / 50)))


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"alike": 0.95, "identity_facenet": 0.1}, "faces of different people are alike (cosine 0.95): mode collapse"),
        (
            {"alike": 0.7, "identity_facenet": 0.04, "identity_chance": 0.03, "identity_above_chance": 0.9},
            "faces are unrelated to their embeddings (cosine 0.040, to those of others 0.030",
        ),
        ({"alike": 0.7, "identity_facenet": 0.04, "identity_chance": 0.0, "identity_above_chance": 3.6}, ""),
        ({"n_images": 10, "alike": 0.7, "identity_facenet": 0.04, "identity_above_chance": 1.2}, ""),
        ({"alike": 0.5, "identity_facenet": 0.1}, ""),
        ({"mse": 0.5}, ""),
    ],
)
def test_a_failed_run_is_named(
    metrics: dict[str, float],
    reason: str,
    tiny_dataset: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vultus.training.trainer.SETTLED", 24)
    out = tmp_path / "run"
    evaluators = [("unseen", lambda generator: metrics, 8)]
    train(TINY, data=tiny_dataset(), out=out, budget=Budget(total_nimg=32), evaluators=evaluators)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == (1 if reason else 0)  # at 24 images, not again at 32
    assert all("after 24 images" in line for line in warnings)
    assert all(reason in line and "lower --optim.lr" in line for line in warnings)


def test_a_bad_learning_rate_is_named_once(
    tiny_dataset: Callable[..., Path],
    random_facenet: FaceNet,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vultus.training.trainer.SETTLED", 24)
    config = replace(TINY, optim=replace(TINY.optim, lr=0.5))
    data = tiny_dataset()
    validate = unseen_validation(data, random_facenet, images=8)
    assert validate is not None
    train(config, data=data, out=tmp_path / "run", budget=Budget(total_nimg=40), evaluators=[("unseen", validate, 8)])
    assert capsys.readouterr().err.count("lower --optim.lr") == 1


def test_the_chance_level_is_measured() -> None:
    """Faces that do not depend on their embeddings stay near chance, whatever they have in common with all of them."""
    random = torch.Generator().manual_seed(0)
    common = torch.randn(1, 64, generator=random)
    c, e = (torch.nn.functional.normalize(torch.randn(60, 64, generator=random) + common) for _ in range(2))
    follows = torch.nn.functional.normalize(e + 0.3 * c)
    chance, above = above_chance(e, c)
    assert chance == pytest.approx(0.5, abs=0.05)
    assert abs(above) < 2.5
    assert above_chance(follows, c)[1] > 4
    assert above_chance(e[:1].expand(60, -1), c)[1] == 0
    permuted = torch.tensor([above_chance(e, c[torch.randperm(60, generator=random)])[1] for _ in range(400)])
    assert permuted.std() == pytest.approx(1, abs=0.1)
    assert permuted.mean() == pytest.approx(0, abs=0.15)


def test_validation_distinguishes_one_face_from_many(tiny_dataset: Callable[..., Path]) -> None:
    class Patterns(torch.nn.Module):
        """Generates the embedding itself as pixels, or one image for all."""

        z_dim = 4

        def __init__(self, one: bool) -> None:
            super().__init__()
            self.one = torch.nn.Parameter(torch.tensor(float(one)))

        def forward(self, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            x = torch.nn.functional.pad(5 * c * (1 - self.one) + self.one / 5, (0, 3 * 32 * 32 - 512))
            return x.unflatten(1, (3, 32, 32))

    class Reader:
        def embed(self, x: torch.Tensor, size: int | None = None) -> torch.Tensor:
            return torch.nn.functional.normalize(x.flatten(1)[:, :512], dim=1)

    validate = unseen_validation(tiny_dataset(), Reader())  # type: ignore[arg-type]
    assert validate is not None
    many, one = validate(Patterns(False)), validate(Patterns(True))  # type: ignore[arg-type]
    assert many["identity_facenet"] > 0.99
    assert one["alike"] == pytest.approx(1.0, abs=1e-4)
    assert many["alike"] < 0.9


def test_stopped_while_it_waits_for_data(
    tiny_dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the network of a stream stalls: the steps before are in a checkpoint."""
    release = threading.Event()

    def stalls(dataset: PreparedDataset, **options: Any) -> Generator[tuple[int, Batch], None, None]:
        source = batches(dataset, **options)
        yield from (next(source) for _ in range(3))
        os.kill(os.getpid(), signal.SIGTERM)
        release.wait(10)

    monkeypatch.setattr(trainer, "batches", stalls)
    timer = threading.Timer(0.5, release.set)
    timer.start()
    with pytest.raises(Stopped):
        train(TINY, data=tiny_dataset(), out=tmp_path / "run", budget=Budget(total_nimg=400))
    timer.join()
    assert state(tmp_path / "run")["cur_nimg"] in (4, 8, 12)
    assert (tmp_path / "run" / "snapshot.safetensors").exists()
