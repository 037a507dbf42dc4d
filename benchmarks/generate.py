"""Time per face: PyTorch and ONNX Runtime by batch size, and the sampling of a diffusion model for comparison.

    python benchmarks/generate.py [--snapshot default] [--batches 1 16 64] [--calls 100] [--unet_steps 3]

The backends alternate call by call, so that a machine whose speed drifts affects all of them alike; all use the same
number of threads (OMP_NUM_THREADS). ONNX files are written first, to a temporary folder.

The diffusion model is the UNet of Stable Diffusion 1.5 at 512x512 (its published config, random weights, which do not
change the cost), 25 steps of two evaluations each, for classifier-free guidance. Only --unet_steps of these steps are
run and the median is multiplied; text encoder and image decoder are left out, in its favour. It needs
`pip install diffusers`, which nothing else here needs, and 4 GB of memory; --unet_steps 0 omits it.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import vultus
from vultus.errors import UserError
from vultus.export.onnx_export import Precision, examples, export_onnx
from vultus.models.onnx_runtime import open_onnx
from vultus.models.snapshot import Snapshot

STEPS, GUIDANCE = 25, 2  # of one sampling; evaluations of each step
UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
Call = Callable[[Any, Any], Any]


def backends(snapshot: Snapshot, folder: Path) -> dict[str, Call]:
    """{name: call of z, c as arrays}."""
    generator = snapshot.network

    def torch_in(dtype: torch.dtype) -> Call:
        return lambda z, c: generator(torch.from_numpy(z).to(dtype), torch.from_numpy(c).to(dtype))

    def onnx_in(path: Path) -> Call:
        network = open_onnx(path, threads=torch.get_num_threads()).network
        return lambda z, c: network(torch.from_numpy(z), torch.from_numpy(c))

    calls = {"PyTorch float32": torch_in(torch.float32), "PyTorch bfloat16": torch_in(torch.bfloat16)}
    for precision in get_args(Precision):
        path = folder / f"{precision}.onnx"
        try:
            parity = export_onnx(snapshot, path, precision=precision)
        except UserError as error:
            print(f"ONNX Runtime {precision} is skipped: {error}")
            continue
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {parity}")
        calls[f"ONNX Runtime {precision}"] = onnx_in(path)
    return calls


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(snapshot: Snapshot, calls: dict[str, Call], batch: int, count: int) -> None:
    z, c = examples(snapshot, batch, seed=0)
    for call in calls.values():
        call(z, c)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(count):
        for name, call in calls.items():
            seconds[name].append(timed(lambda call=call: call(z, c)))
    first = statistics.median(next(iter(seconds.values())))
    print(f"\nbatch {batch}, {count} calls each\n{'':<22} images/s   p50 ms   p99 ms   speed")
    for name, durations in seconds.items():
        p50, p99 = np.percentile(durations, [50, 99])
        print(f"{name:<22} {batch / p50:8.1f} {1e3 * p50:8.1f} {1e3 * p99:8.1f} {first / p50:6.2f} x")


def flops(network: torch.nn.Module, *inputs: torch.Tensor) -> float:
    """Floating-point operations of one call, a multiplication and an addition being two."""
    counter = FlopCounterMode(display=False)
    with counter:
        network(*inputs)
    return float(counter.get_total_flops())


def diffusion(snapshot: Snapshot, steps: int) -> None:
    try:
        from diffusers import UNet2DConditionModel
    except ImportError:
        print("\nno diffusion model: pip install diffusers")
        return
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET).eval()
        inputs = torch.empty(GUIDANCE, 4, 64, 64), torch.tensor(500), torch.empty(GUIDANCE, 77, 768)
        work = {"sampling": STEPS * flops(unet, *inputs)}
    unet = unet.to_empty(device="cpu")
    for parameter in unet.parameters():
        parameter.data.uniform_(-0.02, 0.02)  # extreme values such as denormals could cost more
    millions = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
    z, c = (torch.from_numpy(rows) for rows in examples(snapshot, 1, seed=0))
    generator = snapshot.network
    latents, text, when = torch.randn(GUIDANCE, 4, 64, 64), torch.randn(GUIDANCE, 77, 768), torch.tensor(500)
    work["face"] = flops(generator, z, c)
    seconds: dict[str, list[float]] = {"face": [], "float32": []}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        unet.to(dtype)
        inputs = latents.to(dtype), when, text.to(dtype)
        seconds[name] = [timed(lambda inputs=inputs: unet(*inputs)) for _ in range(steps)]
        seconds["face"] += [timed(lambda: generator(z, c)) for _ in range(20)]
    face = statistics.median(seconds.pop("face"))
    print(f"\nUNet of Stable Diffusion 1.5, {millions:.0f} million parameters, {STEPS} steps of {GUIDANCE} evaluations")
    print(f"operations: a face {work['face'] / 1e9:.2f} GFLOP, a sampling {work['sampling'] / 1e9:.0f} GFLOP, ", end="")
    print(f"{work['sampling'] / work['face']:.0f} times as many")
    print(f"a face by PyTorch, float32, batch 1: {1e3 * face:.1f} ms")
    for name, durations in seconds.items():
        step = statistics.median(durations)
        print(f"a step in {name}: {step:.2f} s (median of {steps}), so a sampling {STEPS * step:.0f} s, ", end="")
        print(f"{STEPS * step / face:.0f} faces")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshot", default="default")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--calls", type=int, default=100, help="of each backend at batch 1; fewer at larger batches")
    parser.add_argument("--unet_steps", type=int, default=3)
    options = parser.parse_args()
    snapshot = vultus.load(options.snapshot, device="cpu")
    settings = snapshot.metadata["generator"]
    size = sum(parameter.numel() for parameter in snapshot.network.parameters()) / 1e6
    print(
        f"{options.snapshot}: {settings['kind']}, {settings['resolution']}x{settings['resolution']}, {size:.1f} million"
    )
    print(f"CPU, {torch.get_num_threads()} threads (OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')})")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        calls = backends(snapshot, Path(folder))
        for batch in options.batches:
            compare(snapshot, calls, batch, max(5, options.calls // batch))
        if options.unet_steps:
            diffusion(snapshot, options.unet_steps)


if __name__ == "__main__":
    main()
