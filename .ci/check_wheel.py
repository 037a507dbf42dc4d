"""Fails unless a wheel holds every file of the package: modules, assets, templates, py.typed.

python .ci/check_wheel.py vultus-1.0-py3-none-any.whl src
"""

import sys
import zipfile
from pathlib import Path

wheel, source = Path(sys.argv[1]), Path(sys.argv[2])
expected = {
    path.relative_to(source).as_posix()
    for path in (source / "vultus").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
with zipfile.ZipFile(wheel) as archive:
    packed = {name for name in archive.namelist() if not name.partition("/")[0].endswith(".dist-info")}
print(f"{wheel.name}: {len(packed)} files, {wheel.stat().st_size / 1e6:.1f} MB")
for name in sorted(expected - packed):
    print(f"missing: {name}")
for name in sorted(packed - expected):
    print(f"not of the package: {name}")
sys.exit(expected != packed or "vultus/py.typed" not in packed)
