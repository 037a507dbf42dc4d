"""The cost of an evaluation: time relative to its FaceNet pass, and memory relative to a quarter of the photos.

    python benchmarks/evaluate.py --data data/celeba [--limit 2527] [--snapshot default]

Each part runs in its own process with an empty cache. Peak memory is resident memory, on Linux without file pages,
which the kernel may drop.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from vultus._files import processors


def private_mib() -> float:
    """Resident anonymous memory of this process in MiB; all resident memory where Linux's /proc is absent."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(options: argparse.Namespace) -> None:
    import torch

    from vultus.data.dataset import PreparedDataset
    from vultus.evaluation.backbones.loading import load_backbones
    from vultus.evaluation.evaluate import EvaluationSettings, evaluate
    from vultus.evaluation.extract import GeneratedFaces, extract, vectors
    from vultus.models.facenet import load_facenet
    from vultus.models.snapshot import load_snapshot

    peak = 0.0

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, private_mib())
            time.sleep(0.05)

    snapshot = load_snapshot(options.snapshot)
    test, train = PreparedDataset(options.data, "test"), PreparedDataset(options.data, "train")
    backbones = load_backbones(load_facenet())
    threading.Thread(target=watch, daemon=True).start()
    with tempfile.TemporaryDirectory() as cache:
        settings = EvaluationSettings(limit=options.limit, cache=Path(cache))
        start = time.perf_counter()
        if options.child == "facenet":
            faces = GeneratedFaces(snapshot, seed=0, device="cpu")
            rows = torch.arange(min(options.limit, len(test))).numpy()
            extract(faces, test, rows, [vectors("facenet", backbones.encoder, settings.noises)], **settings.extraction)
        else:
            evaluate(snapshot, test, backbones=backbones, other=train, settings=settings)
        print(json.dumps({"seconds": time.perf_counter() - start, "peak_mib": peak}))


def run(options: argparse.Namespace, part: str, limit: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--data", options.data, "--snapshot", options.snapshot]
    done = subprocess.run(
        [*command, "--child", part, "--limit", str(limit)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--snapshot", default="default")
    parser.add_argument("--limit", type=int, default=2527)
    parser.add_argument("--child", choices=["facenet", "evaluation"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    threads = os.environ.get("OMP_NUM_THREADS", processors())
    facenet, whole = (run(options, part, options.limit) for part in ("facenet", "evaluation"))
    quarter = run(options, "evaluation", options.limit // 4)
    print(f"{options.limit} photos x 2 noises, {threads} threads")
    print(f"FaceNet on the faces alone   {facenet['seconds']:7.1f} s")
    print(f"whole evaluation, cold cache {whole['seconds']:7.1f} s   {whole['seconds'] / facenet['seconds']:.2f} x")
    print(
        f"peak memory {whole['peak_mib']:.0f} MiB, with a quarter of the photos {quarter['peak_mib']:.0f} MiB: "
        f"{whole['peak_mib'] / quarter['peak_mib']:.2f} x"
    )


if __name__ == "__main__":
    main()
