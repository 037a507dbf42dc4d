"""The layout is the architecture: a module imports from lower floors only, and stays small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "vultus"

FLOORS = [
    {"errors"},
    {"files", "trackers"},
    {"ahead", "charts", "config", "images", "intervals", "layers", "metrics", "provenance", "runs", "shards", "tables"}
    | {"draws", "tracking", "watermark"}
    | {"verification", "weights"},
    {"card", "embeddings", "exported", "marks", "presets"},
    {"credentials", "pretrained", "vectors"},
    {
        "assess",
        "augment",
        "critics",
        "dlib_resnet",
        "encoders",
        "faces",
        "features",
        "figures",
        "inception",
        "losses",
        "networks",
        "people",
    }
    | {"describe", "perceptual", "sources"},
    {"checkpoint", "conditions", "dataset", "gan", "judges", "prepare", "samples", "story"},
    {"batching", "coded", "detect", "probe"},
    {"export", "generate", "instruments", "measure", "report", "serving", "train", "wandb_report"},
    {"demo", "evaluate", "sheets"},
    {"exhibits", "publish"},
    {"compare", "options"},
    {"api_models"},
    {"api_edges"},
    {"api_work"},
    {"api"},
    {"verbs_make", "verbs_serve", "verbs_tell", "verbs_train"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOOR = {module: number for number, floor in enumerate(FLOORS) for module in floor}


def imports(path: Path) -> set[str]:
    """Modules of vultus that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("vultus.")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vultus":
            rest = node.module.split(".")[1:]
            found |= {rest[0]} if rest else {name.name for name in node.names}
    return found


def test_every_module_has_a_floor() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(FLOOR)


@pytest.mark.parametrize("module", sorted(FLOOR))
def test_imports_go_down(module: str) -> None:
    above = {name for name in imports(PACKAGE / f"{module}.py") if FLOOR[name] >= FLOOR[module]}
    assert not above, f"{module} is on floor {FLOOR[module]} and imports {above}"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_modules_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 420


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "datasets", "dlib", "matplotlib")
    code = f"import vultus, vultus.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=["lint", "format", "types"],
)
def test_lint_and_types(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
