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
3. The same training in float32 and in bfloat16, from one seed: the losses at its end.
4. The same training killed by SIGKILL and resumed, against the one of 3 that was not: the largest difference of a
   weight. On a GPU, kernels may add in another order each time; two undisturbed runs are compared as well.
"""

from __future__ import annotations

import argparse
import json
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

# Dense bfloat16 TFLOP/s by the manufacturer's data sheets.
PEAKS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165, "A10": 125}
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
    device, side, rows = options.device, config.generator.resolution, []
    peak = options.peak or next((value for name, value in PEAKS.items() if name in gpu_name(device)), None)
    for batch in options.batches:
        images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
        c = F.normalize(torch.randn(batch, config.generator.c_dim))
        steps: dict[str, Callable[[int], Any]] = {}
        for name, (dtype, memory_format, mode) in VARIANTS.items():
            facenet, second, _ = encoders(device, dtype)
            sized = replace(config, optim=replace(config.optim, batch=batch))
            model = METHODS[config.method](
                sized, device=device, dtype=dtype, encoder=facenet, second=second, memory_format=memory_format
            )
            try:
                if mode is not None:
                    compiled(model, mode)
                if not rows or rows[-1]["batch"] != batch:
                    with FlopCounterMode(display=False) as counter:
                        model.step(images, c, 0)
                    flops = counter.get_total_flops() / batch
                    rows.append({"batch": batch, "gflop_per_image": round(flops / 1e9, 2), "variants": {}})
                for number in range(options.warmup):  # every side at which FaceNet reads is compiled once
                    model.step(images, c, number * batch)
            except Exception as error:  # a compiler that fails is a result
                rows[-1]["variants"][name] = {"failed": in_one_line(error)}
                continue
            steps[name] = partial(model.step, images, c)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(options.rounds):
            for name, step in steps.items():
                seconds[name].append(timed(step, options.steps, batch, device))
        first = statistics.median(next(iter(seconds.values())))
        for name, values in seconds.items():
            rate = options.steps * batch / statistics.median(values)
            row = {"images_per_s": round(rate, 1), "ratio": round(first / statistics.median(values), 2)}
            if peak:
                row["share_of_peak"] = round(rate * flops / (peak * 1e12), 4)
            rows[-1]["variants"][name] = row
        rows[-1] |= peak_memory(device)
    return rows


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
        "last losses": {name: {key: values[-1].get(key) for key in LOSSES} for name, values in lines.items()},
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
    text += ["", f"{values['steps'][0]['gflop_per_image']} GFLOP per image.", "", "## Trainings", ""]
    for key, value in values["trainings"].items():
        text.append(f"- {key}: {json.dumps(value)}")
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
