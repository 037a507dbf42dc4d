"""A server under load, against the bare generator: throughput, latency, errors, memory.

    python benchmarks/serve.py [--minutes 10] [--clients 32] [--format png] [--num 1] [--snapshot default]

Load comes from hey (https://github.com/rakyll/hey; `apt install hey`): so many clients on one machine, each of which
sends one embedding as binary and asks again once it has its answer. The bare generator draws 16 faces to a call without
a pause, in a process of its own, before and after. Two shares are told. Of throughput: faces/s of the server against
the mean of the two. Of processor time: what a bare face takes of it against what a served face takes, in which other
work on the same machine matters less. The client's own time counts against the server's throughput.
"""

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from vultus._files import processors

BARE = """
import sys, time, torch
from vultus.cli.common import open_snapshot
generator = open_snapshot(sys.argv[1], "cpu").generator
z, c = torch.randn(16, generator.z_dim), torch.nn.functional.normalize(torch.randn(16, generator.c_dim))
with torch.inference_mode():
    generator(z, c)
    begun, used, faces = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begun < float(sys.argv[2]):
        generator(z, c)
        faces += 16
    print(faces / (time.perf_counter() - begun), faces / (time.process_time() - used))
"""


def bare(snapshot: str, seconds: float) -> tuple[float, float]:
    """Faces per second, and per second of processor time."""
    done = subprocess.run(
        [sys.executable, "-c", BARE, snapshot, str(seconds)], stdout=subprocess.PIPE, text=True, check=True
    )
    rate, per_cpu = done.stdout.split()
    return float(rate), float(per_cpu)


def figures(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def embedding(snapshot: str, path: Path) -> None:
    code = (
        "import sys; from vultus.cli.common import open_snapshot; from vultus.sampling.population import sample_identities;"
        "c = sample_identities(open_snapshot(sys.argv[1], 'cpu').population, 1, seed=0).numpy();"
        "open(sys.argv[2], 'wb').write(c.astype('<f4').tobytes())"
    )
    subprocess.run([sys.executable, "-c", code, snapshot, str(path)], check=True)


@contextlib.contextmanager
def serving(snapshot: str):
    """The address of a server that has warmed up."""
    command = [sys.executable, "-m", "vultus", "serve", snapshot, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    url = process.stdout.readline().strip()
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/readyz").close()
                break
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def load(options: argparse.Namespace, url: str, body: Path, seconds: float) -> str:
    """What hey says of so many seconds."""
    target = f"{url}/v1/faces?format={options.format}&num={options.num}"
    how = ["-z", f"{seconds:.0f}s", "-c", str(options.clients), "-t", "60", "-cpus", "1"]
    command = ["hey", *how, "-m", "POST", "-T", "application/octet-stream", "-D", str(body), target]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of load")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--format", choices=["png", "webp", "jpeg", "npy"], default="png")
    parser.add_argument("--num", type=int, default=1, help="faces of a request")
    parser.add_argument("--snapshot", default="default")
    options = parser.parse_args()
    if shutil.which("hey") is None:
        sys.exit("the load comes from hey: apt install hey, or https://github.com/rakyll/hey")
    with tempfile.TemporaryDirectory() as folder:
        body = Path(folder) / "embedding"
        embedding(options.snapshot, body)
        before = bare(options.snapshot, 15)
        with serving(options.snapshot) as url:
            load(options, url, body, 10)  # until memory has its size
            memory: list[float] = []
            done = threading.Event()

            def watch() -> None:
                while not done.wait(5):
                    memory.append(figures(url)["process_resident_memory_bytes"] / 2**20)

            first, begun = figures(url), time.perf_counter()
            watching = threading.Thread(target=watch)
            watching.start()
            said = load(options, url, body, 60 * options.minutes)
            seconds = time.perf_counter() - begun
            done.set()
            watching.join()
            last = figures(url)
        after = bare(options.snapshot, 15)
    report(options, said, first, last, seconds, (before, after), memory)


def report(options, said, first, last, seconds, bares, memory) -> None:
    grown = {name: value - first.get(name, 0.0) for name, value in last.items()}
    faces, calls = grown["vultus_call_faces_sum"], grown["vultus_call_faces_count"]
    rate, per_cpu = (sum(pair) / 2 for pair in zip(*bares, strict=True))
    served, served_cpu = faces / seconds, faces / grown["process_cpu_seconds_total"]
    answers = {int(status): int(count) for status, count in re.findall(r"\[(\d{3})\]\s+(\d+) responses", said)}
    broken = said.partition("Error distribution:")[2].strip()
    wrong = sum(count for status, count in answers.items() if status != 200) + (1 if broken else 0)
    latency = {share: float(took) for share, took in re.findall(r"(\d+)%+ in ([\d.]+) secs", said)}
    threads = os.environ.get("OMP_NUM_THREADS", processors())
    print(f"{options.clients} clients, {options.num} face(s) of one embedding as {options.format}, {seconds:.0f} s")
    print(f"{threads} threads, {processors()} processors")
    print(f"bare generator, 16 to a call  {bares[0][0]:7.1f} and {bares[1][0]:.1f} faces/s before and after")
    print(f"served                        {served:7.1f} faces/s, {faces / calls:.1f} to a call")
    print(f"share of throughput           {served / rate:7.1%}")
    print(f"share of processor time       {served_cpu / per_cpu:7.1%}")
    print(f"latency                       {1e3 * latency['50']:7.0f} ms p50, {1e3 * latency['99']:.0f} ms p99")
    print(f"answers                       {answers}, errors: {wrong} {broken}")
    tenth = max(1, len(memory) // 10)
    start, end = sum(memory[:tenth]) / tenth, sum(memory[-tenth:]) / tenth
    print(
        f"memory                        {start:7.0f} MiB at the beginning, {end:.0f} at the end, {max(memory):.0f} peak"
    )


if __name__ == "__main__":
    main()
