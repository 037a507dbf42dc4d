"""Training speed of a preset against that of the two reference systems' implementation, measured in one run.

    python benchmarks/train_step.py [--preset reference-dcgan] [--data DIR | --resolution SIDE] [--steps 4]
        [--rounds 3]

Baseline: the same networks in float32, contiguous memory, with FaceNet run on every batch.
Ours: the preset as `vultus train` runs it: the faster dtype, channels_last, embeddings read from the prepared data set.
The two alternate, so that a change of the machine's speed affects both; the ratio is that of the medians. Without
--data random pixels take the place of photos (the time of a step does not depend on what they show).
"""

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from vultus._prefetch import Prefetch
from vultus.data.dataset import PreparedDataset, batches
from vultus.errors import UserError
from vultus.images.io import to_x
from vultus.models.facenet import FaceNet, InceptionResnetV1, fastest_dtype, load_facenet
from vultus.presets import fitted, get_preset
from vultus.training.environment import peak_memory
from vultus.training.methods import METHODS


def facenet(device: str) -> FaceNet:
    """FaceNet in float32, contiguous; with random weights, which cost the same, where there are no real ones."""
    try:
        encoder = load_facenet(device=device, dtype=torch.float32)
    except UserError:
        encoder = FaceNet(InceptionResnetV1(), device=device, dtype=torch.float32)
    encoder.body.to(memory_format=torch.contiguous_format)
    return encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="reference-dcgan")
    pixels = parser.add_mutually_exclusive_group()
    pixels.add_argument("--data", help="prepared data set, read and decoded as in training")
    pixels.add_argument("--resolution", type=int, help="side of the random images; default: that of the preset")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    config = get_preset(options.preset)
    dataset = PreparedDataset(options.data) if options.data else None
    side = dataset.resolution if dataset else options.resolution or config.generator.resolution
    config = fitted(config, side)
    device, batch = options.device, config.optim.batch
    encoder = facenet(device)
    random = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
    vectors = F.normalize(torch.randn(batch, 512))
    stack = contextlib.ExitStack()
    source = itertools.repeat((random, vectors))
    if dataset:
        decoded = stack.enter_context(Prefetch(batches(dataset, batch=batch, cur_nimg=0, seed=0), 3))
        source = ((item.images, item.c) for _, item in decoded)

    method = METHODS[config.method]
    plain = method(config, device=device, dtype=torch.float32, encoder=encoder, memory_format=torch.contiguous_format)
    dtype = fastest_dtype(device)
    ours = method(config, device=device, dtype=dtype, encoder=encoder)

    def baseline(nimg: int) -> None:
        images, _ = next(source)
        with torch.no_grad():
            c = encoder.embed(to_x(images.to(device)))
        plain.step(images, c, nimg)

    def default(nimg: int) -> None:
        ours.step(*next(source), nimg)

    def rate(step: Callable[[int], None]) -> float:
        start = time.perf_counter()
        for index in range(options.steps):
            step(index * batch)
        if device == "cuda":
            torch.cuda.synchronize()
        return options.steps * batch / (time.perf_counter() - start)

    for step in (baseline, default):
        step(0)
    rates: dict[str, list[float]] = {"baseline": [], "ours": []}
    for _ in range(options.rounds):
        rates["baseline"].append(rate(baseline))
        rates["ours"].append(rate(default))
    stack.close()
    print(f"{options.preset}, batch {batch}, {side}x{side}, {device}, {torch.get_num_threads()} threads")
    for name, values in rates.items():
        print(f"{name:<9} {statistics.median(values):7.1f} images/s   ({', '.join(f'{r:.1f}' for r in values)})")
    ratio = statistics.median(rates["ours"]) / statistics.median(rates["baseline"])
    print(f"ratio     {ratio:7.2f}   ({str(dtype).removeprefix('torch.')}, channels_last, stored embeddings)")
    for name, mib in peak_memory(device).items():
        print(f"{name} {mib:.0f}, both sets of networks")


if __name__ == "__main__":
    main()
