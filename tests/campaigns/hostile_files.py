"""Give damaged files to every reader of untrusted bytes.

    python -m tests.campaigns.hostile_files --cases 5000 --seed 0 --report report.json
    python -m tests.campaigns.hostile_files --reader image snapshot --cases 1000 --keep findings

A case is a valid file that is damaged (mutations.py), or a folder of which one file is. The reader runs in a worker
process and must succeed or raise UserError. A finding is anything else: another exception, the end of the process, more
than SECONDS of the processor or WAIT by the clock, more than MEMORY above the idle process, a pickle that looks up a
function, a file written outside of the folder of the case, a process that is started, a connection. With --keep the
damaged files of findings are stored.

A case follows from its number, the reader's name and the seed. The exit code is 1 if there was a finding.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from . import scenes
from .mutations import mutate
from .readers import Reader, readers, write

SECONDS = 5.0  # of the processor, so that other programs on the machine make no findings
WAIT = 60.0  # by the clock: what waits for something without computing
MEMORY = 1 << 30  # bytes
SPACE = 3 << 30  # bytes of addresses above those of the idle process; what asks for more gets a MemoryError


class Watch:
    """An audit hook that notes what a reader must not do. It stays for the rest of the process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.on = str(folder), False
        self.notes: list[str] = []
        sys.addaudithook(self._event)

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "pickle.find_class":
            self.notes.append(f"pickle: looks up {arguments}")
        elif event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork"):
            self.notes.append(f"process: {event} {str(arguments)[:100]}")
        elif event == "socket.connect":
            self.notes.append(f"connection: {arguments[1]}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self._written(arguments[0])
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate"):
            self._written(arguments[-1] if event in ("os.rename", "os.symlink", "os.link") else arguments[0])

    def _written(self, path: Any) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            place = os.path.abspath(os.fsdecode(path))
            if not place.startswith((self.folder, os.devnull)):
                self.notes.append(f"written outside: {place}")


def case(reader: Reader, number: int, seed: int) -> tuple[dict[str, bytes], str]:
    """The files of a case, and the name of the damaged one."""
    rng = random.Random(f"{seed} {reader.name} {number}")
    files = dict(rng.choice(reader.seeds))
    name = rng.choice([name for name in sorted(files) if reader.damaged(name)])
    suffix = name.rpartition(".")[2]
    alike = [data for each in reader.seeds for other, data in each.items() if other.endswith(suffix)]
    files[name] = mutate(name, files[name], rng.choice(alike), rng)
    return files, name


# --- the worker -------------------------------------------------------------------------------------------------------


def _memory(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    return 0


def _work(reader: Reader, numbers: range, seed: int, folder: Path, results: int) -> None:
    """Run the cases, and write a line of JSON before and after each of them."""
    import resource

    from vultus.errors import UserError

    null = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(null, number)
    os.environ["VULTUS_CACHE"] = str(folder / "cache")
    os.chdir(folder)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + SPACE, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch = Watch(folder)
    valid = folder / "valid"
    for files in reader.seeds:  # what is loaded at the first use is not counted; and the valid file must be read
        for name in files:
            if reader.damaged(name):
                write(valid, files)
                reader.read(valid, name)
                break

    def say(**values: Any) -> None:
        os.write(results, json.dumps(values).encode() + b"\n")

    for number in numbers:
        place = folder / f"case-{number}"
        files, name = case(reader, number, seed)
        write(place, files)
        if number % 2:
            try:
                reader.fixed(place, name)
            except Exception:  # the file that is to be corrected is the damaged one
                write(place, files)
        outside = set(os.listdir(folder))
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        idle = _memory("VmRSS")
        say(begun=number)
        start = time.process_time()
        outcome, detail = "read", ""
        watch.on = True
        try:
            reader.read(place, name)
        except UserError as error:
            outcome = "refused"
            if "\n" in str(error):
                outcome, detail = "message", f"not one line: {str(error)[:300]!r}"
        except BaseException as error:
            outcome = type(error).__name__
            detail = "".join(traceback.format_exception(error))[-1800:]
        watch.on = False
        seconds, used = time.process_time() - start, _memory("VmHWM") - idle
        notes, watch.notes = watch.notes, []
        notes += [f"written beside: {name}" for name in set(os.listdir(folder)) - outside - {"cache"}]
        notes += [f"memory: {used >> 20} MiB"] if used > MEMORY else []
        notes += [f"time: {seconds:.1f} s"] if seconds > SECONDS else []
        say(ended=number, outcome=outcome, detail=detail, notes=notes, seconds=round(seconds, 3), memory=used)
        shutil.rmtree(place, ignore_errors=True)


# --- the parent -------------------------------------------------------------------------------------------------------


def _spawn(reader: Reader, numbers: range, seed: int, folder: Path) -> tuple[int, int]:
    results, write_end = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(results)
            _work(reader, numbers, seed, folder, write_end)
            code = 0
        except BaseException as error:
            text = "".join(traceback.format_exception(error))[-1500:]
            os.write(write_end, json.dumps({"failed": text}).encode() + b"\n")
        finally:
            os._exit(code)
    os.close(write_end)
    return pid, results


def examine(reader: Reader, cases: int, seed: int, folder: Path, until: float) -> dict[str, Any]:
    """Run the cases of a reader: {"cases", "outcomes", "longest", "most_memory", "findings"}."""
    outcomes: Counter[str] = Counter()
    found: list[dict[str, Any]] = []
    following, longest, most = 0, 0.0, 0
    while following < cases and time.time() < until:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        pid, results = _spawn(reader, range(following, cases), seed, folder)
        current: int | None = None
        rest, ended = b"", ""
        while True:
            if not select.select([results], [], [], WAIT if current is not None else 2 * WAIT)[0]:
                ended = f"hung: more than {WAIT:g} s"
                break
            data = os.read(results, 1 << 16)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                value = json.loads(line)
                if "failed" in value:
                    raise SystemExit(f"{reader.name}: the worker failed on a valid file: {value['failed']}")
                if "begun" in value:
                    current = value["begun"]
                    continue
                current, following = None, value["ended"] + 1
                longest, most = max(longest, value["seconds"]), max(most, value["memory"])
                wrong = value["outcome"] not in ("read", "refused")
                outcomes["finding" if wrong or value["notes"] else value["outcome"]] += 1
                if wrong or value["notes"]:
                    found.append({"case": value["ended"]} | {k: value[k] for k in ("outcome", "detail", "notes")})
            if time.time() > until:
                break
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(results)
        if current is not None and time.time() <= until:
            code = os.waitstatus_to_exitcode(status)
            found.append({"case": current, "outcome": ended or f"the process ended with {code}", "notes": []})
            outcomes["finding"] += 1
            following = current + 1
    return {"cases": sum(outcomes.values()), "outcomes": dict(outcomes), "longest_s": round(longest, 2),
            "most_memory_mib": most >> 20, "findings": found}  # fmt: skip


def run(
    names: list[str], cases: int, seed: int, root: Path, *, keep: Path | None = None, until: float = float("inf")
) -> dict[str, Any]:
    """The report: {reader: see examine()}."""
    report: dict[str, Any] = {}
    with scenes.imported():
        for reader in readers():
            if names and reader.name not in names:
                continue
            missing = [need for need in reader.needs if importlib.util.find_spec(need) is None]
            if missing:
                report[reader.name] = {"skipped": f"{missing[0]} is not installed"}
                continue
            report[reader.name] = found = examine(reader, cases, seed, root / reader.name, until)
            for finding in found["findings"] if keep else ():
                assert keep is not None
                files, name = case(reader, finding["case"], seed)
                write(keep / f"{reader.name}-{finding['case']}", {name: files[name]})
            shown = {key: value for key, value in found.items() if key != "findings"}
            print(f"{reader.name:<11} {json.dumps(shown)}", file=sys.stderr, flush=True)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description="Give damaged files to every reader.")
    parser.add_argument("--reader", nargs="+", default=[], help="names of readers; default: all")
    parser.add_argument("--cases", type=int, default=5000, help="of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--folder", type=Path, help="for temporary files; default: that of the system")
    parser.add_argument("--keep", type=Path, help="folder for the damaged files of findings")
    parser.add_argument("--report", type=Path, help="JSON file to write; default: stdout")
    options = parser.parse_args()
    until = time.time() + options.minutes * 60
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        found = run(options.reader, options.cases, options.seed, Path(root).resolve(), keep=options.keep, until=until)
    text = json.dumps(found, indent=2)
    if options.report:
        options.report.write_text(text + "\n")
    else:
        print(text)
    return 1 if any(reader.get("findings") for reader in found.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
