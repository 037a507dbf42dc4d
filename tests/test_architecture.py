"""What the import contracts in pyproject.toml cannot say. The contracts themselves: `lint-imports`."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "datasets", "pyarrow", "onnx", "onnxruntime", "matplotlib", "fastapi", "huggingface_hub", "wandb"}


def loaded(code: str) -> set[str]:
    """The top-level modules that are loaded after `code` in a new process."""
    code = f"{code}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "code",
    [
        "import vultus; dir(vultus); vultus.__version__; vultus.UserError",
        "from vultus.cli.main import main; main(['--help'])",
    ],
    ids=["import vultus", "vultus --help"],
)
def test_the_package_and_its_help_load_nothing_heavy(code: str) -> None:
    modules = loaded(code)
    assert "vultus" in modules
    assert not modules & HEAVY


def test_the_package_says_that_it_is_typed() -> None:
    import vultus

    assert (Path(vultus.__file__).parent / "py.typed").is_file()
