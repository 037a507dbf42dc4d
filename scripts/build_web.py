"""Build a folder that generates faces in the browser, without a server program: any static file server is enough.

    python scripts/build_web.py default --out faces/ [--precision float16]
    python -m http.server --directory faces/ --bind 127.0.0.1 8080

The folder contains the page of scripts/web, the exported model, its population prior, and ONNX Runtime Web, which npm
downloads in the pinned version; its hash is checked. Needs npm and the extra `export`.
"""

import argparse
import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from vultus._download import cache_folder
from vultus._files import atomic_path, make_folder, write_json
from vultus.errors import UserError
from vultus.export.onnx_export import export_onnx
from vultus.images.xmp import Origin, xmp_packet
from vultus.models.onnx_runtime import is_onnx, open_onnx
from vultus.sampling.generator import load

PAGE = Path(__file__).parent / "web"
PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
LICENCE = "ONNX Runtime Web {version}, Copyright (c) Microsoft Corporation, MIT licence; npm package {package}.\n"


def runtime() -> Path:
    """The npm package's tarball, from the cache or npm. Raises UserError if it is unavailable or not the pinned one."""
    path = make_folder(cache_folder() / "npm") / f"{PACKAGE}-{VERSION}.tgz"
    if not path.is_file():
        if shutil.which("npm") is None:
            raise UserError(f"npm is needed to download {PACKAGE}; install Node.js, or put the package at {path}")
        with tempfile.TemporaryDirectory() as folder:
            command = ["npm", "pack", f"{PACKAGE}@{VERSION}", "--pack-destination", folder, "--loglevel=error"]
            process = subprocess.run(command, capture_output=True, text=True, check=False)
            if process.returncode:
                reason = " ".join(process.stderr.split())[:200]
                raise UserError(f"npm could not download {PACKAGE}@{VERSION} ({reason}); check the network")
            with atomic_path(path) as temporary:
                shutil.copyfile(Path(folder) / path.name, temporary)
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if integrity != INTEGRITY:
        raise UserError(f"{path}: damaged, or not {PACKAGE} {VERSION}; delete it and run this script again")
    return path


def build(snapshot: str, out: Path, *, precision: str = "float16") -> dict[str, int]:
    """Write the folder; return {file: bytes}. Raises UserError as export_onnx, open_onnx and runtime do."""
    tarball = runtime()
    make_folder(out / "ort")
    model = out / "model.onnx"
    if is_onnx(snapshot):
        open_onnx(snapshot)
        shutil.copyfile(snapshot, model)
    else:
        export_onnx(load(snapshot, device="cpu"), model, precision=precision, overwrite=True)
    exported = open_onnx(model)
    if not exported.population:
        raise UserError(f"{snapshot}: has no population prior, which the page needs to sample random people")
    entries, parts, offset = [], [], 0
    for name, value in exported.population.items():
        entries.append({"name": name, "shape": list(value.shape), "offset": offset})
        parts.append(value.numpy().astype("<f4").tobytes())
        offset += len(parts[-1])
    (out / "people.bin").write_bytes(b"".join(parts))
    about = {key: exported.metadata.get(key) for key in ("model", "licence", "precision")}
    about |= {key: exported.metadata["generator"][key] for key in ("resolution", "z_dim", "c_dim")}
    about["xmp"] = xmp_packet(Origin(exported.metadata["model"], detail="@detail@")).decode()
    write_json(out / "model.json", about | {"people": entries})
    with tarfile.open(tarball) as archive:
        for name in RUNTIME:
            file = archive.extractfile(f"package/dist/{name}")
            assert file is not None
            (out / "ort" / name).write_bytes(file.read())
    (out / "ort" / "LICENCE.txt").write_text(LICENCE.format(version=VERSION, package=PACKAGE), encoding="utf-8")
    for path in PAGE.iterdir():
        shutil.copyfile(path, out / path.name)
    return {path.relative_to(out).as_posix(): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("snapshot", help="snapshot as for `vultus export`, or an .onnx file that it wrote")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--precision", choices=["float32", "float16", "int8"], default="float16")
    options = parser.parse_args()
    try:
        sizes = build(options.snapshot, options.out, precision=options.precision)
    except UserError as error:
        print(f"build_web: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(json.dumps(sizes, indent=2))


if __name__ == "__main__":
    main()
