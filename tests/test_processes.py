"""A training in several processes: what each computes, that they train as one does, and what happens when one ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from forked import Forks
from test_cvae_gan import SMALL, photos
from test_train import TINY, command, losses, state, without_facenet
from vultus.errors import UserError
from vultus.models.facenet import FaceNet, InceptionResnetV1
from vultus.models.sync_norm import synchronised
from vultus.training.cvae_gan import CVAEGAN
from vultus.training.parts import Part, first, prior_first
from vultus.training.processes import ALONE, joined
from vultus.training.sample_files import read_sample
from vultus.training.step import Method
from vultus.training.trainer import Budget, train

DCGAN = replace(TINY, optim=replace(TINY.optim, batch=6))
# All parts of the method; on some of 6 images, which two processes share unevenly.
CVAE = replace(
    SMALL,
    optim=replace(SMALL.optim, batch=6),
    loader=replace(SMALL.loader, mirror=True),
    loss=replace(SMALL.loss, identity_size=80, identity_sizes=1, identity_fraction=0.5, feature_fraction=0.84,
                 feature_weight=1.0, feature_match=1.0, second_encoder="none", augment=0.7, kl_free=0.02),
)  # fmt: skip
PROGRAM = "import sys, test_processes; getattr(test_processes, sys.argv[1])(*sys.argv[2:])"


@pytest.fixture(autouse=True)
def _without_facenet(monkeypatch: pytest.MonkeyPatch) -> None:
    without_facenet(monkeypatch)


# --- what a process computes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_parts_hold_every_image_once_and_their_shares_of_each_subset(processes: int) -> None:
    coded = torch.arange(0, 16, 2)
    subsets = {"coded": coded, "first": first(16, 0.6), "prior": prior_first(16, coded)[:5]}
    parts = [Part(prior_first(16, coded), subsets, number, processes, "cpu") for number in range(processes)]
    values = torch.randn(16, 3)
    assert torch.equal(parts[0].joined(torch.cat([part.of(values) for part in parts])), values)
    for name, indices in subsets.items():
        counts = [len(part[name]) for part in parts]
        assert sum(counts) == len(indices)
        assert max(counts) - min(counts) <= 2  # one for each kind of image: with and without posterior latents
        means = [part[name].share * part.of(values)[part[name].rows].mean(0) for part in parts]
        torch.testing.assert_close(torch.stack(means).mean(0), values[indices].mean(0))
    for part in parts:  # the draws of augmentation, for the first images of both halves
        rows = part.first(10, times=2)
        draws = torch.arange(20)
        own = part.own[part.own < 10]
        assert torch.equal(draws if rows is None else rows.of(draws), torch.cat([own, own + 10]))


def test_a_loss_on_fewer_images_than_processes_is_refused() -> None:
    with pytest.raises(UserError, match=r"--loss.second_fraction takes 3 of 16 images, too few for 4 processes"):
        Part(torch.arange(16), {"second_fraction": torch.arange(3)}, 0, 4, "cpu")


def check_norms() -> None:
    """Batch-norm of 3 and of 5 images in two processes is that of 8 in one, with its gradients."""
    with joined() as processes:
        torch.manual_seed(0)
        x, c = torch.randn(8, 4, 5, 5), torch.randn(8, 4, 5, 5)
        own = slice(0, 3) if processes.main else slice(3, 8)
        for affine in (True, False):
            torch.manual_seed(1)
            whole = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=affine))
            if affine:
                nn.init.normal_(whole[1].weight)
            part = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=affine))
            part.load_state_dict(whole.state_dict())
            synchronised(part)
            assert part.state_dict().keys() == whole.state_dict().keys()
            inputs = x.clone().requires_grad_(), x[own].clone().requires_grad_()
            y, z = whole(inputs[0]), part(inputs[1])
            torch.testing.assert_close(z, y[own])
            (y * c).sum().backward()
            (z * c[own]).sum().backward()
            torch.testing.assert_close(inputs[1].grad, inputs[0].grad[own])
            for one, two in zip(whole.parameters(), part.parameters(), strict=True):
                total = processes.mean(two.grad) * processes.count
                torch.testing.assert_close(total, one.grad, atol=1e-4, rtol=1e-4)
            for one, two in zip(whole.buffers(), part.buffers(), strict=True):
                torch.testing.assert_close(two, one)
            torch.testing.assert_close(part.eval()(x), whole.eval()(x))


@pytest.mark.slow
def test_batch_norm_over_all_processes(forks: Forks) -> None:
    for done in forks.run_together(PROGRAM, "check_norms"):
        assert done.returncode == 0, done.stderr


# --- they train as one -----------------------------------------------------------------------------------------------


def check_steps() -> None:
    """Two steps of method cvae-gan on 6 images, of which each process has 3."""
    with joined() as processes:
        torch.manual_seed(0)
        encoder = FaceNet(InceptionResnetV1(), dtype=torch.float32)
        images, c = photos(6)
        one, two = (
            CVAEGAN(CVAE, device="cpu", dtype=torch.float32, encoder=encoder, processes=each)
            for each in (ALONE, processes)
        )
        two.connect()
        own = two.part(6).own
        for step in range(2):
            found = two.step(images[own], c[own], 6 * step)
            if not processes.main:
                continue
            expected = one.step(images, c, 6 * step)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                # Adam amplifies what differs by rounding, first in the discriminators.
                exact = step == 0 and name[0] in "DF"
                assert float(found[name]) == pytest.approx(float(value), rel=1e-3, abs=2e-5 if exact else 2e-3), name


@pytest.mark.slow
def test_each_loss_of_two_processes_is_that_of_the_whole_batch(forks: Forks) -> None:
    for done in forks.run_together(PROGRAM, "check_steps"):
        assert done.returncode == 0, done.stderr


def run_part(data: str, out: str, images: str, fault: str = "") -> None:
    """Train in this process, alone or one of several; `fault` says in which process and step what happens."""
    if fault:
        _arrange(*fault.split())
    with joined():
        train(DCGAN, data=data, out=out, budget=Budget(total_nimg=int(images)))


def _arrange(number: str, step: str, sent: str) -> None:
    plain = Method.step

    def wrapped(self: Method, images: torch.Tensor, c: torch.Tensor, cur_nimg: int, *more: object) -> dict:
        if self.processes.number == int(number) and cur_nimg == int(step) * self.config.optim.batch:
            os.kill(os.getpid(), int(sent))
        return plain(self, images, c, cur_nimg, *more)

    Method.step = wrapped


@pytest.mark.slow
def test_two_processes_train_as_one_and_runs_go_on_with_another_number(
    tiny_dataset: Callable[..., Path], tmp_path: Path, forks: Forks
) -> None:
    data, sessions = str(tiny_dataset()), ((6, 2), (12, 1), (18, 2))
    one = forks.run(PROGRAM, "run_part", data, str(tmp_path / "one"), "18")
    assert one.returncode == 0, one.stderr
    for images, count in sessions:
        for done in forks.run_together(PROGRAM, "run_part", data, str(tmp_path / "two"), str(images), count=count):
            assert done.returncode == 0, done.stderr
    expected, found = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [line["cur_nimg"] for line in found] == [line["cur_nimg"] for line in expected]
    for a, b in zip(expected, found, strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-4)
    recorded = json.loads((tmp_path / "two" / "run.json").read_text())["sessions"]
    assert [session["processes"] for session in recorded] == [count for _, count in sessions]
    # Faces rather than weights: a bias in front of a batch-norm has no effect, and only rounding errors as gradient.
    faces = [read_sample(tmp_path / run / f"samples/{18:010d}.npz", 32).generated for run in ("one", "two")]
    assert np.abs(faces[0].astype(int) - faces[1]).max() <= 1


@pytest.mark.slow
def test_signal_to_one_process_ends_all_with_a_checkpoint(
    tiny_dataset: Callable[..., Path], tmp_path: Path, forks: Forks
) -> None:
    out = tmp_path / "run"
    arguments = ["run_part", str(tiny_dataset()), str(out), "24", f"1 1 {int(signal.SIGTERM)}"]
    first_one, second = forks.run_together(PROGRAM, *arguments)
    assert "Stopped" in first_one.stderr
    assert "Stopped" in second.stderr
    assert "stopped at 12 images" in first_one.stderr
    assert "stopped at" not in second.stderr
    assert state(out)["cur_nimg"] == 12


def test_refusals_are_said_once(tiny_dataset: Callable[..., Path], tmp_path: Path, forks: Forks) -> None:
    data, out = tiny_dataset(), tmp_path / "run"
    program = (
        "import os, sys; from vultus.cli.main import main; sys.exit(main([*sys.argv[1:], *eval(os.environ['MORE'])]))"
    )
    cases = {
        "[]": r"--optim.batch is 5, which cannot be dealt to 2 processes; give a multiple of 2",
        "['--optim.batch', '4', '--optim.lr', ['1e-4', '2e-4'][int(os.environ['RANK'])]]":
            r"optim.lr is 0.0001 in process 0, but 0.0002 in process 1; start all processes with the same command",
        "['--optim.lr', 'fast']": r"--optim.lr",
    }  # fmt: skip
    for more, expected in cases.items():
        arguments = [*command(data, out, "--images", "8", "--optim.batch", "5")[3:]]
        text = program.replace("os.environ['MORE']", repr(more))
        done = forks.run_together(text, *arguments)
        assert [each.returncode for each in done] == [2, 2], done
        lines = [line for each in done for line in each.stderr.splitlines() if line.startswith("vultus:")]
        assert len(lines) == 1, lines
        assert re.search(expected, lines[0]), lines
    assert not (out / "config.json").exists()


@pytest.mark.slow
def test_torchrun_and_a_process_that_is_killed(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    """With torchrun itself: the others end at once with a message, and the last checkpoint is whole."""
    out = tmp_path / "run"
    program = tmp_path / "killed.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport test_processes\n"
        f"test_processes._arrange('1', '3', '{int(signal.SIGKILL)}')\n"
        "from vultus.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    arguments = [str(program), *command(tiny_dataset(), out, "--images", "400")[3:]]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *arguments],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("vultus: error")]
    assert len(said) == 1, done.stderr
    assert "another process of this training has ended" in said[0]
    assert state(out)["cur_nimg"] == 8  # of 12 images; a checkpoint every 8
