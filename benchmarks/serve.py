"""A server under load, compared with the generator alone: throughput, latency, errors, memory.

    python benchmarks/serve.py [--minutes 10] [--clients 32] [--format png] [--num 1] [--snapshot default]

The load generator is hey (https://github.com/rakyll/hey; `apt install hey`), on the same machine: each client sends one
embedding as binary, and again when the response has arrived. Before and after, the generator runs alone in a process of
its own, 16 faces per call without pauses. Two ratios are reported: faces/s of the server to the mean faces/s of the two
runs alone, and CPU time per face alone to CPU time per served face, which depends less on other load of the machine.
hey uses CPU time too, which reduces the throughput of the server.
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

GENERATOR_ALONE = """
import sys, time, torch
from vultus.sampling.generator import load
generator = load(sys.argv[1], device="cpu").network
z, c = torch.randn(16, generator.z_dim), torch.nn.functional.normalize(torch.randn(16, generator.c_dim))
with torch.inference_mode():
    generator(z, c)
    started, cpu, faces = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < float(sys.argv[2]):
        generator(z, c)
        faces += 16
    print(faces / (time.perf_counter() - started), faces / (time.process_time() - cpu))
"""


def generator_alone(snapshot: str, seconds: float) -> tuple[float, float]:
    """Faces per second, and per second of CPU time."""
    process = subprocess.run(
        [sys.executable, "-c", GENERATOR_ALONE, snapshot, str(seconds)], stdout=subprocess.PIPE, text=True, check=True
    )
    rate, per_cpu = process.stdout.split()
    return float(rate), float(per_cpu)


def metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics") as response:
        lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def write_embedding(snapshot: str, path: Path) -> None:
    code = (
        "import sys; from vultus.sampling.generator import load;"
        "from vultus.sampling.latents import sample_identities;"
        "c = sample_identities(load(sys.argv[1], device='cpu').population, 1, seed=0).numpy();"
        "open(sys.argv[2], 'wb').write(c.astype('<f4').tobytes())"
    )
    subprocess.run([sys.executable, "-c", code, snapshot, str(path)], check=True)


@contextlib.contextmanager
def serving(snapshot: str):
    """The URL of a server that is ready."""
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
    """hey's report after `seconds` of load."""
    target = f"{url}/v1/faces?format={options.format}&num={options.num}"
    arguments = ["-z", f"{seconds:.0f}s", "-c", str(options.clients), "-t", "60", "-cpus", "1"]
    command = ["hey", *arguments, "-m", "POST", "-T", "application/octet-stream", "-D", str(body), target]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="duration of the load")
    parser.add_argument("--clients", type=int, default=32, help="concurrent clients")
    parser.add_argument("--format", choices=["png", "webp", "jpeg", "npy"], default="png")
    parser.add_argument("--num", type=int, default=1, help="faces per request")
    parser.add_argument("--snapshot", default="default")
    options = parser.parse_args()
    if shutil.which("hey") is None:
        sys.exit("this benchmark needs hey: apt install hey, or https://github.com/rakyll/hey")
    with tempfile.TemporaryDirectory() as folder:
        body = Path(folder) / "embedding"
        write_embedding(options.snapshot, body)
        before = generator_alone(options.snapshot, 15)
        with serving(options.snapshot) as url:
            load(options, url, body, 10)  # warm-up, until memory use is stable
            done = threading.Event()

            def resident_mib() -> float:
                return metrics(url)["process_resident_memory_bytes"] / 2**20

            def record_memory() -> None:
                while not done.wait(5):
                    memory.append(resident_mib())

            memory = [resident_mib()]

            first, started = metrics(url), time.perf_counter()
            recorder = threading.Thread(target=record_memory)
            recorder.start()
            text = load(options, url, body, 60 * options.minutes)
            seconds = time.perf_counter() - started
            done.set()
            recorder.join()
            last = metrics(url)
        after = generator_alone(options.snapshot, 15)
    report(options, text, first, last, seconds, (before, after), memory)


def report(options, text, first, last, seconds, alone, memory) -> None:
    increase = {name: value - first.get(name, 0.0) for name, value in last.items()}
    faces, calls = increase["vultus_call_faces_sum"], increase["vultus_call_faces_count"]
    rate, per_cpu = (sum(pair) / 2 for pair in zip(*alone, strict=True))
    served, served_cpu = faces / seconds, faces / increase["process_cpu_seconds_total"]
    responses = {int(status): int(count) for status, count in re.findall(r"\[(\d{3})\]\s+(\d+) responses", text)}
    failures = text.partition("Error distribution:")[2].strip()
    errors = sum(count for status, count in responses.items() if status != 200) + (1 if failures else 0)
    latency = {share: float(took) for share, took in re.findall(r"(\d+)%+ in ([\d.]+) secs", text)}
    threads = os.environ.get("OMP_NUM_THREADS", processors())
    print(f"{options.clients} clients, {options.num} face(s) of one embedding as {options.format}, {seconds:.0f} s")
    print(f"{processors()} cores, {threads} threads for the generator alone")
    print(f"generator alone, 16 per call  {alone[0][0]:7.1f} and {alone[1][0]:.1f} faces/s before and after")
    print(f"served                        {served:7.1f} faces/s, {faces / calls:.1f} per call")
    print(f"ratio of throughput           {served / rate:7.1%}")
    print(f"ratio of CPU time             {served_cpu / per_cpu:7.1%}")
    print(f"latency                       {1e3 * latency['50']:7.0f} ms p50, {1e3 * latency['99']:.0f} ms p99")
    print(f"responses                     {responses}, errors: {errors} {failures}")
    tenth = max(1, len(memory) // 10)
    start, end = sum(memory[:tenth]) / tenth, sum(memory[-tenth:]) / tenth
    print(f"memory                        {start:7.0f} MiB at the start, {end:.0f} at the end, {max(memory):.0f} peak")


if __name__ == "__main__":
    main()
