"""Two processes against one: the same losses, and the rate, measured in one run.

    python benchmarks/processes.py --data data/celeba [--preset vultus-cpu] [--batch 16] [--steps 50] [--rounds 3]

All networks, FaceNet too, compute in float32, each process with one thread. The losses of two processes differ from
those of one by rounding, and a GAN amplifies what differs. Therefore a third run, of one process, begins with weights
that were changed by 1e-7 of their value, which is a rounding error of float32. Differences are given relative to the
root mean square of each loss, the largest of all losses, over the first 5 steps, 10 steps and so on.

The rate of two processes is also compared with the sum of the rates of two trainings that run at the same time and have
nothing to do with each other: what two cores that share a memory reach.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from vultus.data.dataset import PreparedDataset
from vultus.models.facenet import load_facenet
from vultus.models.second_encoder import load_second_encoder
from vultus.presets import fitted, get_preset
from vultus.training.processes import joined
from vultus.training.step import Method
from vultus.training.trainer import Budget, train

SKIPPED = 3  # steps at the beginning that the rate leaves out
WINDOWS = (5, 10, 20, 50)


def work(arguments: argparse.Namespace) -> None:
    """One training, in this process or as one of several."""
    with joined():
        dataset = PreparedDataset(arguments.data, None)
        config = fitted(get_preset(arguments.preset), dataset.resolution, None)
        batch, far = arguments.batch or config.optim.batch, 1_000_000_000
        config = replace(config, optim=replace(config.optim, batch=batch))
        config = replace(
            config, dtype="float32", log_every_nimg=batch, sample_every_nimg=far, checkpoint_every_nimg=far
        )
        if arguments.perturb:
            plain = Method.connect

            def connect(method: Method) -> None:
                torch.manual_seed(1)
                with torch.no_grad():
                    for network in method.networks().values():
                        for parameter in network.parameters():
                            parameter.mul_(1 + 1e-7 * torch.randn_like(parameter))
                plain(method)

            Method.connect = connect
        second = load_second_encoder(config.loss.second_encoder_name(), dtype=torch.float32)
        train(
            config,
            data=dataset,
            out=arguments.worker,
            budget=Budget(total_nimg=arguments.steps * batch),
            encoder=load_facenet(dtype=torch.float32) if config.loss.needs_encoder() else None,
            second=second,
        )


def start(arguments: argparse.Namespace, out: Path, processes: int = 1, *more: str) -> subprocess.Popen[bytes]:
    program = [__file__, "--data", arguments.data, "--preset", arguments.preset, "--steps", str(arguments.steps)]
    program += ["--batch", str(arguments.batch)] if arguments.batch else []
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, *program, "--worker", str(out), *more],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=None if arguments.verbose else subprocess.DEVNULL,
    )


def finished(*runs: subprocess.Popen[bytes]) -> None:
    codes = [run.wait() for run in runs]
    if any(codes):
        raise SystemExit("a training failed; --verbose shows why")


def lines(folder: Path) -> list[dict[str, float]]:
    read = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    return [line for line in read if "images_per_s" in line]


def rate(folder: Path) -> float:
    """Images per second after the first steps."""
    read = lines(folder)
    first = read[SKIPPED - 1]
    return (read[-1]["cur_nimg"] - first["cur_nimg"]) / (read[-1]["seconds"] - first["seconds"])


def difference(one: list[dict[str, float]], other: list[dict[str, float]], until: int) -> float:
    """The largest difference of a loss in the first steps, relative to its root mean square."""
    names = [name for name in one[0] if name[:2] in ("D_", "F_", "G_") and not name.endswith("grad_norm")]
    scale = {name: statistics.fmean(line[name] ** 2 for line in one) ** 0.5 for name in names}
    pairs = list(zip(one, other, strict=True))[:until]
    return max(abs(a[name] - b[name]) / scale[name] for a, b in pairs for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="prepared data set")
    parser.add_argument("--preset", default="vultus-cpu")
    parser.add_argument("--batch", type=int, help="of all processes together; default: that of the preset")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=1, help="of the rates")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--perturb", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    rates: dict[str, list[float]] = {"one": [], "two": [], "both": []}
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(arguments.rounds):
            folder = Path(temporary, str(number))
            finished(start(arguments, folder / "one"))
            finished(start(arguments, folder / "two", 2))
            finished(*(start(arguments, folder / name) for name in ("a", "b")))
            for name, parts in (("one", ["one"]), ("two", ["two"]), ("both", ["a", "b"])):
                rates[name].append(sum(rate(folder / part) for part in parts))
        finished(start(arguments, folder / "other", 1, "--perturb"))
        one, two, other = (lines(folder / name) for name in ("one", "two", "other"))
    print(
        f"{arguments.preset}, {arguments.steps} steps, float32: largest difference of a loss from that of one process"
    )
    print("| steps | two processes | one, weights changed by 1e-7 |\n|---|---|---|")
    for until in (until for until in WINDOWS if until <= arguments.steps):
        print(f"| 1 to {until} | {difference(one, two, until):.2g} | {difference(one, other, until):.2g} |")
    one_rate, two_rate, both = (statistics.median(rates[name]) for name in ("one", "two", "both"))
    print(
        f"\nimages/s, medians of {arguments.rounds}: one process {one_rate:.2f}; two {two_rate:.2f}, "
        f"{two_rate / one_rate:.2f} times as many; two trainings side by side {both:.2f} together, "
        f"{both / one_rate:.2f} times as many"
    )


if __name__ == "__main__":
    main()
