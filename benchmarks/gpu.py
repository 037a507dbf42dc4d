"""A preset on a GPU, in one call: speed, share of the peak, wait for data, bfloat16 against float32, resuming.

    python benchmarks/gpu.py --out gpu [--preset vultus-base] [--data DIR] [--batches 64 128 256] [--images 12800]
        [--peak TFLOPS]

Needs no network. Without --data it trains on faces that the embedded snapshot generates; without the weights of FaceNet
and MobileFaceNet it gives them random weights, which cost the same, and says so. It writes report.md and report.json
into --out. On a CPU it measures what can be measured there, with --batches and --images as small as needed.

1. Steps, variants alternating, medians of --rounds; the ratio is that against the first line, which is float32 (TF32
   where the GPU has it) in contiguous memory. The share of the peak counts the FLOPs of a step
   (torch.utils.flop_counter) against the dense bfloat16 peak of the GPU's data sheet.
2. A training on --data: images/s, and the share of the time that steps wait for data (aim: at most 0.02).
3. The same training in float32 and in bfloat16, from one seed: whether losses are finite, and how they go.
4. The same training killed by SIGKILL and resumed, against the one of 3 that was not: the largest difference of a
   weight. On a GPU, kernels may add in another order each time; two undisturbed runs are compared as well.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from vultus._files import make_folder, write_json, write_text
from vultus.cli.demo import write_generated_faces
from vultus.config import TrainConfig
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError, in_one_line
from vultus.models.facenet import FaceNet, InceptionResnetV1, load_facenet
from vultus.models.mobilefacenet import MobileFaceNet, MobileFaceNetNetwork, load_mobilefacenet
from vultus.models.snapshot import default_snapshot, load_snapshot
from vultus.presets import fitted, get_preset
from vultus.training.checkpoint import checkpoints, load_checkpoint
from vultus.training.environment import hardware, peak_memory
from vultus.training.methods import METHODS
from vultus.training.run_log import read_stats
from vultus.training.step import Method
from vultus.training.trainer import Budget, train

# Dense bfloat16 TFLOP/s by the manufacturer's data sheets, by the names that CUDA gives. Others: --peak.
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA L40S": 362,
    "NVIDIA L4": 121,
    "NVIDIA GeForce RTX 4090": 165,
}
LOSSES = ("D_adversarial", "F_adversarial", "G_mse", "G_identity", "G_total")
VARIANTS: dict[str, tuple[torch.dtype, torch.memory_format, str | None]] = {
    "float32, contiguous": (torch.float32, torch.contiguous_format, None),
    "float32, channels_last": (torch.float32, torch.channels_last, None),
    "bfloat16, contiguous": (torch.bfloat16, torch.contiguous_format, None),
    "bfloat16, channels_last": (torch.bfloat16, torch.channels_last, None),
    "bfloat16, channels_last, torch.compile": (torch.bfloat16, torch.channels_last, "default"),
    "bfloat16, channels_last, torch.compile, CUDA graphs": (torch.bfloat16, torch.channels_last, "reduce-overhead"),
}


def encoders(device: str, dtype: torch.dtype | None) -> tuple[FaceNet, MobileFaceNet, bool]:
    """FaceNet and MobileFaceNet, and whether their weights are the real ones."""
    try:
        return load_facenet(device=device, dtype=dtype), load_mobilefacenet(device=device), True
    except UserError:
        torch.manual_seed(0)
        facenet = FaceNet(InceptionResnetV1(), device=device, dtype=dtype)
        return facenet, MobileFaceNet(MobileFaceNetNetwork().eval(), device=device), False


def compiled(model: Method[Any, Any], mode: str) -> None:
    """Compile the networks that a step runs. The step itself has branches on the host."""
    for network in model.networks().values():
        network.compile(mode=mode)
    if hasattr(model.D, "read"):
        model.D.read = torch.compile(model.D.read, mode=mode)
    face = getattr(model, "face", None)
    if face is not None:
        face.shallow, face.rest = (torch.compile(part, mode=mode) for part in (face.shallow, face.rest))


def measured_steps(options: argparse.Namespace, config: TrainConfig) -> list[dict[str, Any]]:
    """Images/s of each variant and batch size."""
    peak = options.peak or PEAKS.get(gpu_name(options.device))
    rows = []
    for batch in options.batches:
        images = torch.randint(0, 256, (batch, 3, config.generator.resolution, config.generator.resolution))
        images = images.to(torch.uint8)
        c = F.normalize(torch.randn(batch, config.generator.c_dim))
        row: dict[str, Any] = {"batch": batch, "variants": {}}
        rows.append(row)
        steps: dict[str, Callable[[int], Any]] = {}
        for name, variant in VARIANTS.items():
            if options.device != "cuda" and variant[2] == "reduce-overhead":
                row["variants"][name] = {"failed": "left out: CUDA graphs need a GPU"}
                continue
            try:
                step = partial(built(options, config, batch, *variant).step, images, c)
                if "gflop_per_image" not in row:
                    with FlopCounterMode(display=False) as counter:
                        step(0)
                    row["gflop_per_image"] = round(counter.get_total_flops() / batch / 1e9, 2)
                for number in range(options.warmup):  # every side at which FaceNet reads is compiled once
                    step(number * batch)
            except Exception as error:  # a compiler that fails, or too little memory, is a result
                row["variants"][name] = {"failed": in_one_line(error)}
                continue
            steps[name] = step
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(options.rounds):
            for name, step in steps.items():
                seconds[name].append(timed(step, options.steps, batch, options.device))
        base = seconds.get(next(iter(VARIANTS)))
        for name, values in seconds.items():
            rate = options.steps * batch / statistics.median(values)
            found: dict[str, Any] = {"images_per_s": round(rate, 1)}
            if base:
                found["ratio"] = round(statistics.median(base) / statistics.median(values), 2)
            if peak:
                found["share_of_peak"] = round(rate * row["gflop_per_image"] / (peak * 1e3), 4)
            row["variants"][name] = found
        row["peak memory, all variants of the batch size"] = peak_memory(options.device)
        if options.device == "cuda":
            steps.clear()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return rows


def built(
    options: argparse.Namespace,
    config: TrainConfig,
    batch: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    mode: str | None,
) -> Method[Any, Any]:
    """The networks of a variant."""
    facenet, second, _ = encoders(options.device, dtype)
    config = replace(config, optim=replace(config.optim, batch=batch))
    method = METHODS[config.method]
    model = method(
        config, device=options.device, dtype=dtype, encoder=facenet, second=second, memory_format=memory_format
    )
    if mode is not None:
        compiled(model, mode)
    return model


def gpu_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else ""


def timed(step: Callable[[int], Any], count: int, batch: int, device: str) -> float:
    start = time.perf_counter()
    for number in range(count):
        step(number * batch)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def run(options: argparse.Namespace, config: TrainConfig, data: Path) -> None:
    """One training, in a process of its own, with checkpoints at a quarter of its length."""
    every = max(options.images // 4, config.optim.batch)
    config = replace(
        config,
        dtype=options.dtype,
        log_every_nimg=max(every // 4, config.optim.batch),
        sample_every_nimg=every,
        checkpoint_every_nimg=every,
        keep=0,
    )
    facenet, second, _ = encoders(options.device, getattr(torch, options.dtype))
    train(
        config,
        data=data,
        out=options.run,
        budget=Budget(total_nimg=options.images),
        device=options.device,
        encoder=facenet if config.loss.needs_encoder() else None,
        second=second if config.loss.second_encoder_name() == "mobilefacenet" else None,
    )


def trained(options: argparse.Namespace, name: str, dtype: str, *, kill: bool = False) -> Path:
    """The folder of a training in another process; `kill`: by SIGKILL at its second checkpoint."""
    out = options.out / name
    arguments = [__file__, *sys.argv[1:], "--run", str(out), "--dtype", dtype]
    process = subprocess.Popen([sys.executable, *arguments])
    while process.poll() is None:
        if kill and len(checkpoints(out)) >= 2:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return trained(options, name, dtype)
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"the training {name} failed")
    return out


def difference(a: Path, b: Path) -> float:
    """The largest difference of a weight of the generator at the end of two runs, relative to the largest weight."""
    states = [load_checkpoint(folder) for folder in (a, b)]
    one, two = (state[0]["gan"]["G"] for state in states if state is not None)
    scale = max(float(value.abs().max()) for value in one.values() if value.is_floating_point())
    return max(float((one[key].float() - two[key].float()).abs().max()) for key in one) / scale


def trainings(options: argparse.Namespace) -> dict[str, Any]:
    """Parts 2, 3 and 4."""
    runs = {name: trained(options, name, dtype) for name, dtype in (("bfloat16", "bfloat16"), ("float32", "float32"))}
    again = trained(options, "again", "bfloat16")
    resumed = trained(options, "resumed", "bfloat16", kill=True)
    lines = {
        name: [line for line in read_stats(out / "stats.jsonl") if "G_total" in line] for name, out in runs.items()
    }
    steady = lines["bfloat16"][1:]  # the first line has the start of the kernels in it
    return {
        "images_per_s": round(statistics.median(line["images_per_s"] for line in steady), 1),
        "data_wait": round(statistics.fmean(line["data_wait"] for line in steady), 4),
        "all losses finite": all(
            math.isfinite(line[key])
            for part in lines.values()
            for line in part
            for key in line
            if key[:2] in ("D_", "F_", "G_")
        ),
        "losses": {name: [{key: line.get(key) for key in LOSSES} for line in values] for name, values in lines.items()},
        "two undisturbed runs differ by": difference(runs["bfloat16"], again),
        "killed and resumed differs by": difference(runs["bfloat16"], resumed),
    }


def report(values: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    machine = values["hardware"]
    text = [f"# {values['preset']} on {machine.get('gpu', machine['cpu'])}", "", f"{json.dumps(machine)}", ""]
    text += [f"{values['encoders']}; trained on {values['data']}.", "", "## Steps", ""]
    text += ["| batch | variant | images/s | ratio | share of peak |", "|---|---|---|---|---|"]
    for row in values["steps"]:
        for name, measured in row["variants"].items():
            cells = [measured.get(key, "") for key in ("images_per_s", "ratio", "share_of_peak")]
            cells[0] = measured.get("failed", cells[0])
            text.append(f"| {row['batch']} | {name} | " + " | ".join(map(str, cells)) + " |")
    for row in values["steps"]:
        memory = row["peak memory, all variants of the batch size"]
        text += ["", f"Batch {row['batch']}: {row.get('gflop_per_image')} GFLOP per image; peak memory of all variants "
                 f"together {json.dumps(memory)}"]  # fmt: skip
    text += ["", "## Trainings", ""]
    for key, value in values["trainings"].items():
        if key != "losses":
            text.append(f"- {key}: {json.dumps(value)}")
    text += ["", "| dtype | loss | over the training |", "|---|---|---|"]
    for name, lines in values["trainings"]["losses"].items():
        for key in LOSSES:
            if lines[0].get(key) is not None:
                text.append(f"| {name} | {key} | {', '.join(f'{line[key]:.3g}' for line in lines)} |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--preset", default="vultus-base")
    parser.add_argument("--data", type=Path, help="prepared data set; default: generated faces")
    parser.add_argument("--side", type=int, help="of generated faces; default: that of the preset")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--images", type=int, default=12_800, help="of each training")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=12, help="steps before the time is taken")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device; default: by its name")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    config = get_preset(options.preset)
    data = options.data or make_folder(options.out) / "faces"
    if options.data is None and not options.run:
        side = options.side or config.generator.resolution
        write_generated_faces(load_snapshot(default_snapshot()), data, seed=0, side=side)
    config = fitted(config, PreparedDataset(data).resolution)
    if options.run:
        run(options, config, data)
        return
    real = encoders(options.device, torch.float32)[2]
    values: dict[str, Any] = {
        "preset": options.preset,
        "hardware": hardware(options.device),
        "encoders": "FaceNet and MobileFaceNet with their " + ("weights" if real else "architecture, random weights"),
        "data": str(options.data.name) if options.data else "generated faces",
        "steps": measured_steps(options, config),
        "trainings": trainings(options),
    }
    write_json(options.out / "report.json", values)
    write_text(options.out / "report.md", report(values))
    print(report(values))


if __name__ == "__main__":
    main()
