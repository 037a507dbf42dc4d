"""`vultus serve` under a steady load with faults: slow, half-open and leaving clients, wrong requests, bursts.

    python -m tests.campaigns.server --minutes 30 --seed 0 --report report.json
    VULTUS_WEIGHTS=FOLDER python -m tests.campaigns.server --photos PHOTOS --fault burst slow

A real server process, with a token and limits, gets mixed requests at random moments. A cycle is a control window
without faults, then each fault, followed by a window for recovery, and a pause in which memory, open files and threads
are measured. The first cycle is the warm-up: later ones are compared with its end. A finding is:

- an answer that is not due, or no answer: the steady load gets 200, and 429 or 503 with Retry-After only during bursts;
  faults.py says what is due for each fault;
- an answer that differs from the first one to the same request (images: by more than the rounding of batches);
- resident or proportional memory that has grown by more than 5 %, more open files, more than THREADS more threads, work
  that is not finished in the pause;
- after a fault, no window within 10 s whose p99 latency is within those of the control windows, or a p99 of all
  requests from 10 s after such faults on that is above that of every control window;
- in the log, which is all that the server writes: a token, the name of a photo, parts of a photo, numbers of an
  embedding, a traceback;
- a server that does not end with exit code 0 at SIGTERM.

Uploads of photos need FaceNet's weights (VULTUS_WEIGHTS) and --photos; without them they are left out, and the report
says so. The exit code is 1 if there was a finding.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import re
import secrets
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .faults import FAULTS, Limits, Target
from .process import growth, leaks, medians, memory, open_files, threads, waited
from .steady import Kind, Load, Sample, basic_kinds, photo_kinds, quantile, recovery, rolling_p99

TESTS = Path(__file__).resolve().parents[1]
GROWTH = 0.05
THREADS = 4  # those that answer requests for files come and go
RECOVERY = 10.0  # seconds after which the p99 must be the old one
WINDOW = 10.0  # seconds of requests of which a p99 is taken
LEAST = 25  # requests in a window, on average, for its p99 to be judged; below 100 it is the longest
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Campaign:
    """A running server and what was measured.

    Args:
        pid: of the server.
        load, target: of the same server.
        options: of the command line.
    """

    def __init__(self, pid: int, load: Load, target: Target, options: argparse.Namespace) -> None:
        self.pid, self.load, self.target, self.options = pid, load, target, options
        self.controls: list[tuple[float, float]] = []
        self.after: list[tuple[str, float, float]] = []  # fault, its end, the end of the recovery window
        self.states: list[dict[str, Any]] = []  # at the end of each cycle
        self.series: list[dict[str, float]] = []
        self.started = time.monotonic()
        self.waited: dict[str, list[float]] = {}  # in each window, of the server: seconds per second, over all threads
        self.busy: list[float] = []  # load averages
        self.lags: list[float] = []  # seconds by which this process woke up too late

    async def run(self) -> None:
        loading, sampling = asyncio.create_task(self.load.run()), asyncio.create_task(self._sample())
        try:
            self.before = await self._state("before the load")
            cycle, until = 0, time.monotonic() + 60 * self.options.minutes
            while cycle == 0 or time.monotonic() < until:
                until += await self._cycle(cycle, until)
                cycle += 1
        finally:
            for task in (loading, sampling):
                task.cancel()
            await asyncio.gather(loading, sampling, return_exceptions=True)
        if not loading.cancelled() and (error := loading.exception()):
            raise error

    async def _cycle(self, cycle: int, until: float) -> float:
        """The seconds of the pause at its end, which do not count."""
        options = self.options
        self.load.resume()
        start = time.monotonic()
        await self._watched("control", options.control)
        if cycle:
            self.controls.append((start, time.monotonic()))
        for name in options.fault:
            if cycle and time.monotonic() >= until:
                break
            # In a thread with an event loop of its own: it delays the steady load and its clock less.
            await asyncio.to_thread(asyncio.run, FAULTS[name](self.target, time.monotonic() + options.phase))
            end = time.monotonic()
            await self._watched(name, options.recovery)
            if cycle:
                self.after.append((name, end, time.monotonic()))
            print(f"{end - self.started:6.0f} s  cycle {cycle}  {name}", file=sys.stderr, flush=True)
        self.load.pause()
        start = time.monotonic()
        self.states.append(await self._state(f"cycle {cycle}"))
        return time.monotonic() - start

    async def _watched(self, name: str, seconds: float) -> None:
        before = waited(self.pid)
        await asyncio.sleep(seconds)
        self.waited.setdefault(name, []).append(round((waited(self.pid) - before) / seconds, 2))

    async def _state(self, name: str) -> dict[str, Any]:
        """Measured when the connections of the load are closed."""
        await asyncio.sleep(self.options.pause)
        await self.load.client.get("/")  # threads that have waited for 10 s end when another one is needed
        await asyncio.sleep(self.target.limits.idle_seconds + 1)
        measured = []
        for _ in range(5):
            measured.append(memory(self.pid))
            await asyncio.sleep(0.1)
        state = {"at": name, "memory_mib": medians(measured), "threads": threads(self.pid)}
        state["open_files"] = open_files(self.pid)
        text = (await self.load.client.get("/metrics")).text
        state["waiting_faces"] = float(
            next(line for line in text.splitlines() if line.startswith("vultus_waiting_faces ")).split()[1]
        )
        print(f"{name}: {json.dumps(state)}", file=sys.stderr, flush=True)
        return state

    async def _sample(self) -> None:
        while True:
            self.busy.append(os.getloadavg()[0])
            self.series.append({"s": round(time.monotonic() - self.started)} | memory(self.pid))
            for _ in range(50):
                due = time.monotonic() + 0.1
                await asyncio.sleep(0.1)
                self.lags.append(time.monotonic() - due)

    # --- the verdict --------------------------------------------------------------------------------------------------

    def judged_state(self) -> tuple[dict[str, Any], list[str]]:
        """Memory, open files and threads of each cycle against those after the warm-up."""
        first, *others = self.states
        found = []
        found += [f"{state['at']}: work is not finished" for state in self.states if state["waiting_faces"]]
        for state in others:
            state["growth"] = growth(first["memory_mib"], state["memory_mib"])
            grown = {name: state["growth"][name] for name in ("Rss", "Pss") if state["growth"][name] > GROWTH}
            found += [f"{state['at']}: memory: {name} has grown by {share:.1%}" for name, share in grown.items()]
            if state["open_files"] > first["open_files"]:
                found.append(
                    f"{state['at']}: {state['open_files']} open files, {first['open_files']} after the warm-up"
                )
            if state["threads"] > first["threads"] + THREADS:
                found.append(f"{state['at']}: {state['threads']} threads, {first['threads']} after the warm-up")
        return {"before": self.before, "cycles": self.states, "judged": bool(others), "series_mib": self.series}, found

    def judged_latency(self) -> tuple[dict[str, Any], list[str]]:
        return judge_latency(self.load.samples, self.controls, self.after)


def judge_latency(
    samples: Sequence[Sample], controls: Sequence[tuple[float, float]], after: Sequence[tuple[str, float, float]]
) -> tuple[dict[str, Any], list[str]]:
    """Latency in the windows after faults against that of the control windows, whose spread is the noise.

    Args:
        samples: of the whole run.
        controls: start and end of the windows without a fault.
        after: fault, its end, the end of the window for recovery.
    """

    def within(start: float, end: float) -> list[float]:
        return [sample.seconds for sample in samples if start <= sample.start < end]

    control = [value for start, end in controls for value in rolling_p99(samples, start, end, WINDOW)]
    each = [within(start, end) for start, end in controls]
    long_enough = bool(after) and all(end - start >= RECOVERY + WINDOW for _, start, end in after)
    judged = bool(control) and long_enough and min(map(len, each)) >= LEAST * (controls[0][1] - controls[0][0]) / WINDOW
    pooled = [value for values in each for value in values]
    report: dict[str, Any] = {
        "judged": judged,
        "control": {
            "requests": len(pooled),
            "p50_ms": _ms(quantile(pooled, 0.5)),
            "p99_ms": _ms(quantile(pooled, 0.99)),
            "p99_ms_of_each": [_ms(quantile(values, 0.99)) for values in each],
            "p99_ms_of_10_s": [_ms(quantile(control, share)) for share in (0, 0.5, 1)],
        },
        "after": {},
    }
    found: list[str] = []
    bound = quantile(control, 1)
    for fault in dict.fromkeys(name for name, _, _ in after):
        windows = [(start, end) for name, start, end in after if name == fault]
        seconds = [recovery(rolling_p99(samples, start, end, WINDOW), bound) for start, end in windows]
        late = [value for start, end in windows for value in within(start + RECOVERY, end)]
        report["after"][fault] = {
            "recovered_s": seconds,
            "requests": len(late),
            "p50_ms": _ms(quantile(late, 0.5)),
            "p99_ms": _ms(quantile(late, 0.99)),
        }
        if judged:
            bad = [value for value in seconds if value is None or value > RECOVERY]
            found += [f"latency: after {fault}: not back within {RECOVERY:g} s"] * len(bad)
            if quantile(late, 0.99) > bound:
                found.append(
                    f"latency: after {fault}: p99 {_ms(quantile(late, 0.99))} ms, control {_ms(bound)} ms at most"
                )
    return report, found


def _ms(seconds: float) -> float | None:
    return None if math.isnan(seconds) else round(1000 * seconds, 1)


def by_kind(load: Load) -> dict[str, Any]:
    """Answers, p50 and p99 of each kind of the steady load."""
    found: dict[str, Any] = {}
    for name, counts in load.counts.items():
        seconds = [sample.seconds for sample in load.samples if sample.kind == name and sample.status == 200]
        found[name] = {
            "answers": dict(counts),
            "p50_ms": _ms(quantile(seconds, 0.5)),
            "p99_ms": _ms(quantile(seconds, 0.99)),
        }
    return found


async def answered(load: Load) -> Counter[str]:
    """Answers by status, as the server counts them."""
    statuses: Counter[str] = Counter()
    for line in (await load.client.get("/metrics")).text.splitlines():
        if line.startswith("vultus_requests_total{"):
            statuses[line.partition('status="')[2][:3]] += int(float(line.rpartition(" ")[2]))
    return statuses


async def usable_photos(load: Load, folder: Path | None, most: int = 6) -> list[Path]:
    """Photos in which the server finds a face."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES) if folder else []
    found: list[Path] = []
    for path in paths:
        form = {"photo": (path.name, path.read_bytes())}
        response = await load.client.post("/v1/embeddings", files=form)
        if response.status_code == 200:
            found.append(path)
        if len(found) == most:
            break
    return found


async def campaign(served: Any, token: str, wrong_token: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run it, and return the report without what is known after the server's end."""
    from vultus.models.snapshot import gallery

    embeddings = gallery().numpy().astype(np.float32)
    keep_alive = 0.3 * options.idle_seconds
    load = Load(served.url, token, [], options.rate, options.seed, keep_alive=keep_alive)
    model = (await load.client.get("/v1/model")).json()
    kinds: list[Kind] = basic_kinds(embeddings, [edit["name"] for edit in model["edits"]])
    photos = await usable_photos(load, options.photos) if model["photos"]["available"] else []
    kinds += photo_kinds(photos)
    await load.client.aclose()
    load = Load(served.url, token, kinds, options.rate, options.seed, keep_alive=keep_alive)
    limits = Limits(
        options.seconds, options.header_seconds, options.idle_seconds, options.connections // 2, options.burst,
        int(options.megabytes * 1e6), model["limits"]["faces"] * model["c_dim"] * 32 + 4096,
    )  # fmt: skip
    photo = photos[0].read_bytes() if photos else None
    rng = random.Random(f"{options.seed} faults")
    target = Target(served.port, token, wrong_token, limits, embeddings, photo, load.overloads, rng)
    before = await answered(load)
    measured = Campaign(served.process.pid, load, target, options)
    try:
        await measured.run()
        statuses = await answered(load) - before
    finally:
        await load.client.aclose()
    state, in_state = measured.judged_state()
    latency, in_latency = measured.judged_latency()
    findings = [*load.findings, *target.findings, *in_state, *in_latency]
    if statuses["500"]:
        findings.append(f"the server counts {statuses['500']} answers of status 500")
    without = "left out: " + (
        "no usable photo in --photos" if model["photos"]["available"] else model["photos"]["missing"]
    )
    return {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "limits": asdict(limits),
        "photos": len(photos) or without,
        "seconds": round(time.monotonic() - measured.started),
        "load_average": [round(pick(measured.busy), 1) for pick in (min, statistics.median, max)],
        "server_waited": measured.waited,
        "client_lag_ms": {"p99": _ms(quantile(measured.lags, 0.99)), "max": _ms(max(measured.lags))},
        "steady": by_kind(load),
        "largest_difference": load.largest_difference,
        "faults": dict(sorted(target.counts.items())),
        "statuses_of_the_server": dict(sorted(statuses.items())),
        "state": state,
        "latency": latency,
        "findings": findings,
        "sent": {"photos": photos, "embeddings": embeddings[:4]},
    }


def run(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """The report."""
    weights = os.environ.get("VULTUS_WEIGHTS", "")
    sys.path[:0] = [entry for entry in (str(TESTS.parent / "src"), str(TESTS)) if entry not in sys.path]
    from served import serving_process  # the modules of the tests unset it

    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192) if hard > 0 else 8192, hard))
    token, wrong_token = (f"{word}-{secrets.token_hex(8)}" for word in ("right", "wrong"))
    names = ("queue", "megabytes", "seconds", "header_seconds", "idle_seconds", "connections")
    limits = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    report: dict[str, Any] = {}
    ended = ""
    folder = root / "server"
    program = ("-m", "vultus") if options.program is None else (str(options.program.resolve()),)
    try:
        with serving_process(folder, *limits, weights=weights, program=program, VULTUS_TOKEN=token) as served:
            report = asyncio.run(campaign(served, token, wrong_token, options))
    except AssertionError as error:  # of serving_process, at the end
        ended = f"the server's end: {str(error)[:500]}"
    log = folder.with_suffix(".err").read_text(errors="replace")
    sent = report.pop("sent", {"photos": [], "embeddings": []})
    names_of_photos = [path.name for path in sent["photos"]]
    findings = report.setdefault("findings", [])
    findings += [ended] if ended else []
    findings += leaks(
        log,
        secrets=[token, wrong_token, *names_of_photos],
        files=[path.read_bytes() for path in sent["photos"]],
        embeddings=sent["embeddings"],
    )
    if "Traceback" in log:
        findings.append(f"log: a traceback: {log[log.index('Traceback') :][:1500]}")
    report["log_lines"] = len(log.splitlines())
    report["log_messages"] = Counter(
        line for line in log.splitlines() if "connection(s) closed" not in line
    ).most_common(20)
    findings = [re.sub(r"\d+ s\b", "... s", text) for text in findings]
    report["findings"] = [{"finding": text, "times": count} for text, count in Counter(findings).most_common()]
    if options.log:
        options.log.write_text(log)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description="vultus serve under load with faults.")
    parser.add_argument("--minutes", type=float, default=30.0, help="of load; the cycle of the warm-up is always whole")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", nargs="+", choices=FAULTS, default=list(FAULTS), help="default: all")
    parser.add_argument("--photos", type=Path, help="folder of photos of faces, for uploads")
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second of the steady load")
    parser.add_argument("--control", type=float, default=40.0, help="seconds of a control window")
    parser.add_argument("--phase", type=float, default=12.0, help="seconds of a fault, at least")
    parser.add_argument("--recovery", type=float, default=22.0, help="seconds after a fault")
    parser.add_argument("--burst", type=int, default=500, help="requests at the same moment")
    parser.add_argument("--pause", type=float, default=11.0, help="seconds without load before memory is measured")
    parser.add_argument("--queue", type=int, default=128, help="option of vultus serve, as the following")
    parser.add_argument("--megabytes", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--header-seconds", type=float, default=8.0)
    parser.add_argument("--idle-seconds", type=float, default=4.0)
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--program", type=Path, help="Python program to run in the place of vultus, to test this one")
    parser.add_argument("--folder", type=Path, help="for temporary files; default: that of the system")
    parser.add_argument("--log", type=Path, help="file for the server's log")
    parser.add_argument("--report", type=Path, help="JSON file to write; default: stdout")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        found = run(options, Path(root).resolve())
    text = json.dumps(found, indent=2)
    if options.report:
        options.report.write_text(text + "\n")
    else:
        print(text)
    for each in found["findings"]:
        print(f"{each['times']:5} x {each['finding'][:300]}", file=sys.stderr)
    return 1 if found["findings"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
