"""Mutation testing: small changes of the code, one at a time; does a test fail?

    python scripts/mutation.py
    python scripts/mutation.py losses --survivors
    python scripts/mutation.py losses --again

mutmut is installed into a virtual environment of its own, with the packages of the Python that runs this. `--work` gets
a copy of the sources and the tests for each module, so that the checkout stays as it is. `--again` copies the tests
anew and runs only the mutants that no test killed the last time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MUTMUT = "mutmut==3.8.1"
KILLED, LEFT = ("killed", "timeout"), ("survived", "no tests")


@dataclass(frozen=True)
class Module:
    """A module under src/vultus, and the tests that are to kill its mutants."""

    path: str
    tests: tuple[str, ...]


MODULES = {
    "metrics": Module("evaluation/metrics.py", ("tests/test_metrics.py",)),
    "losses": Module("training/losses.py", ("tests/test_losses.py",)),
    "checkpoint": Module("training/checkpoint.py", ("tests/test_checkpoint.py",)),
    "dataset": Module("data/dataset.py", ("tests/test_dataset.py",)),
}


def mutmut(work: Path) -> Path:
    """The path of the command, which is installed if it is not there."""
    tools = work / "tools"
    path = tools / "bin" / "mutmut"
    if not path.exists():
        venv.create(tools, with_pip=True, clear=True)
        python = tools / "bin" / "python"
        # As a path only: the .pth file of an editable installation, which leads to the code without mutants, has no
        # effect there.
        libraries = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
        where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        site = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
        (site / "libraries.pth").write_text("\n".join(libraries) + "\n")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", MUTMUT], check=True)
    return path


def prepare(folder: Path, module: Module, *, again: bool) -> None:
    """Copy sources, tests and settings; again: the tests only."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    if not again:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ROOT / "src", folder / "src", ignore=ignored)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignored, dirs_exist_ok=True)
    settings = {
        "source_paths": ["src"],
        "only_mutate": [f"src/vultus/{module.path}"],
        "pytest_add_cli_args_test_selection": list(module.tests),
        "pytest_add_cli_args": ["-o", "addopts=--strict-markers", "-p", "no:cacheprovider",
                                "-o", "tmp_path_retention_policy=none"],
        "process_isolation": "forkserver",  # for torch, which starts threads
        "timeout_constant": 4.0,
        "use_git_change_detection": False,
    }  # fmt: skip
    # A JSON value of these kinds is a TOML value too.
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + "\n[tool.mutmut]\n" + lines)


def statuses(command: Path, folder: Path) -> dict[str, str]:
    """The status of each mutant by its name."""
    arguments = [str(command), "results", "--all", "true"]
    printed = subprocess.run(arguments, cwd=folder, check=True, capture_output=True, text=True).stdout
    pairs = (line.strip().rsplit(": ", 1) for line in printed.splitlines() if ": " in line)
    return dict(pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", choices=[[], *MODULES], help=f"all by default: {', '.join(MODULES)}")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "mutation", help="a folder for copies and mutmut")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="only the mutants that survived the last time")
    parser.add_argument("--survivors", action="store_true", help="print the survivors of the last time, run nothing")
    options = parser.parse_args()
    work = options.work.resolve()
    command = mutmut(work)
    print(f"| module | mutants | {' | '.join((*KILLED, *LEFT))} | share killed |\n|---|---|---|---|---|---|---|")
    for name in options.modules or MODULES:
        folder = work / name
        if not options.survivors:
            prepare(folder, MODULES[name], again=options.again)
            left = [each for each, status in statuses(command, folder).items() if status not in KILLED]
            (folder / "temporary").mkdir(exist_ok=True)
            mutants = folder / "mutants" / "src"
            mutants.mkdir(parents=True, exist_ok=True)  # or Python remembers that this path is absent
            environment = os.environ | {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(mutants),  # of the commands that tests start
                "PYTEST_DEBUG_TEMPROOT": str(folder / "temporary"),
            }
            run = [str(command), "run", "--max-children", str(options.processes), *(left if options.again else [])]
            with open(folder / "log.txt", "w") as log:
                ended = subprocess.run(run, cwd=folder, env=environment, stdout=log, stderr=log, check=False)
            if ended.returncode:
                sys.exit(f"mutmut failed; the reason is in {log.name}")
        found = statuses(command, folder)
        count = Counter(found.values())
        columns = [len(found), *(count[status] for status in (*KILLED, *LEFT))]
        share = sum(count[status] for status in KILLED) / len(found)
        print(f"| `{MODULES[name].path}` | {' | '.join(map(str, columns))} | {share:.1%} |", flush=True)
        if sum(columns[1:]) != len(found):
            print(f"of other kinds: {count}", file=sys.stderr)
        if options.survivors:
            for each in (each for each, status in found.items() if status in LEFT):
                print(subprocess.run([str(command), "show", each], cwd=folder, capture_output=True, text=True).stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
