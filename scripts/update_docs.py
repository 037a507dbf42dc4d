"""Write the figures of the embedded snapshot into the documents.

    python scripts/update_docs.py RUN EVALUATION [--earlier RUN ...] [--minutes 147]

RUN is the run folder, EVALUATION the folder that `vultus evaluate RUN --data DIR --split both --out EVALUATION` wrote.
`--earlier` names the runs whose weights RUN began with (`--init`), oldest first: their images and minutes are added.
These parts are written, the rest of the documents stays:

- docs/results.md, between the comments `embedded snapshot`: the tables of the evaluation
- README.md and docs/recipe.md, the column `embedded snapshot` of their tables
- docs/recipe.md, between the comments `validation`: the cosine over the training, from stats.jsonl
- docs/faces.jpg: the sheet of `vultus demo`, of the snapshot that is embedded now
- docs/identity.png, and docs/progress.jpg: the same people as training proceeds, one noise vector, without their photos
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vultus._files import atomic_path
from vultus.images.io import grid
from vultus.images.xmp import Origin, model_id, save_marked
from vultus.models.snapshot import default_snapshot, gallery, load_snapshot
from vultus.sampling.grids import overview_sheet
from vultus.training.checkpoint import checkpoints
from vultus.training.run_log import read_stats
from vultus.training.sample_files import read_sample, sample_paths

ROOT = Path(__file__).parents[1]
COLUMN = "embedded snapshot"
ROWS, PEOPLE = 6, 8  # of the progress strip

Row = Callable[[Mapping[str, float]], str]


def percent(*names: str) -> Row:
    return lambda values: " / ".join(f"{100 * values[name]:.0f}" for name in names) + " %"


def number(*names: str, digits: int = 3) -> Row:
    return lambda values: " / ".join(f"{values[name]:.{digits}f}" for name in names)


# The rows of the column, by the first words of their first cell.
CELLS: dict[str, Row] = {
    "training": lambda values: f"{values['cur_nimg']:,.0f} images, {values['minutes']:,.0f} min",
    "accepted as the person of the source photo": percent("type1_dlib_far1e-3"),
    "accepted as the person of other photos": percent("type2_dlib_far1e-3"),
    "accepted by dlib at FAR 1e-3, type I / type II": percent("type1_dlib_far1e-3", "type2_dlib_far1e-3"),
    "FaceNet cosine": number("identity_facenet"),
    "Fréchet distance": number("fd", digits=1),
    "precision / recall / coverage": number("precision_effnet", "recall_effnet", "coverage_effnet"),
    "diversity over noise, ST-LPIPS": number("diversity_noise_stlpips"),
    "ST-LPIPS over noise, of which with identity held": number(
        "diversity_noise_stlpips", "diversity_noise_stlpips_held"
    ),
    "cosine, training people minus unseen people": number("gap"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--earlier", type=Path, nargs="+", default=[], help="runs that RUN began from, oldest first")
    parser.add_argument("--minutes", type=float, help="length of the training; default: the sessions of run.json")
    options = parser.parse_args()
    results = json.loads((options.evaluation / "results.json").read_text(encoding="utf-8"))
    values = figures(results)
    runs = [*options.earlier, options.run]
    begins = list(itertools.accumulate((images(run) for run in runs), initial=0))
    values["cur_nimg"] = begins[-1]
    values["minutes"] = options.minutes or sum(seconds(run) for run in runs) / 60
    for name in ("README.md", "docs/recipe.md"):
        edit(ROOT / name, lambda text: with_column(text, values))
    table = (options.evaluation / "table.md").read_text(encoding="utf-8").strip()
    edit(ROOT / "docs/results.md", lambda text: with_block(text, COLUMN, table))
    edit(ROOT / "docs/recipe.md", lambda text: with_block(text, "validation", validation(runs, begins)))
    shutil.copyfile(options.evaluation / "identity.png", ROOT / "docs/identity.png")
    progress(runs, begins, ROOT / "docs/progress.jpg")
    snapshot = load_snapshot(default_snapshot())
    save_marked(
        overview_sheet(snapshot, gallery(), seed=0), ROOT / "docs/faces.jpg", Origin(model_id(snapshot.path), 0)
    )


def figures(results: Mapping[str, Any]) -> dict[str, float]:
    """The values of the test split by metric, with `fd` and `gap`."""
    by_split = {result["context"]["split"]: result for result in results.values()}
    test, train = by_split["test"], by_split["train"]
    values = {name: metric["value"] for name, metric in test["metrics"].items()}
    [values["fd"]] = [value for name, value in values.items() if re.fullmatch(r"fd_effnet_\d+_test", name)]
    values["gap"] = train["metrics"]["identity_facenet"]["value"] - values["identity_facenet"]
    return values


def edit(path: Path, change: Callable[[str], str]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


def with_column(text: str, values: Mapping[str, float]) -> str:
    """The column COLUMN of the tables that have one, with these values in the rows of CELLS."""
    lines, place = text.split("\n"), None
    for index, line in enumerate(lines):
        cells = [cell.strip() for cell in line.split("|")]
        if not line.startswith("|"):
            place = None
        elif COLUMN in cells:
            place = cells.index(COLUMN)
        elif place is not None:
            rows = [row for words, row in CELLS.items() if cells[1].startswith(words)]
            if rows:
                cell = rows[0](values)
                cells[place] = cell if cells[1] == "training" else f"**{cell}**"
                lines[index] = " ".join(["|", *(f"{cell} |" for cell in cells[1:-1])]).replace("|  |", "| |")
    return "\n".join(lines)


def with_block(text: str, name: str, block: str) -> str:
    """What stands between the comments `name` and `/name` replaced by `block`."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"there is no {begin} ... {end}")
    return f"{before}{begin}\n{block}\n{end}{after}"


def images(run: Path) -> int:
    """Images seen in the run: the last that a checkpoint or a measurement counts."""
    numbers = [int(path.stem.split("-")[1]) for path in checkpoints(run)]
    return max(numbers + [row["cur_nimg"] for row in read_stats(run / "stats.jsonl")])


def seconds(run: Path) -> float:
    return max(row["seconds"] for row in read_stats(run / "stats.jsonl") if "seconds" in row)


def validation(runs: Sequence[Path], begins: Sequence[int]) -> str:
    """A table of the cosine over the training: after about 5, 10, 20, 40, 60, 80 and 100 % of the images."""
    measured, time, spent = {}, {}, 0.0
    for run, begin in zip(runs, begins, strict=False):
        for row in read_stats(run / "stats.jsonl"):
            if row.get("evaluator") and row["cur_nimg"]:
                measured[begin + row["cur_nimg"]] = row["identity_facenet"]
            elif "seconds" in row:
                time[begin + row["cur_nimg"]] = spent + row["seconds"]
        spent += seconds(run)
    last = max(measured)
    chosen = sorted(
        {min(measured, key=lambda nimg: abs(nimg - share * last)) for share in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1)}
    )
    minutes = [time[max(nimg for nimg in time if nimg <= number)] / 60 for number in chosen]
    return "\n".join(
        [
            "| images seen | " + " | ".join(f"{nimg:,}" for nimg in chosen) + " |",
            "|---" * (len(chosen) + 1) + "|",
            "| minutes | " + " | ".join(f"{value:.0f}" for value in minutes) + " |",
            "| cosine | " + " | ".join(f"{measured[nimg]:.3f}" for nimg in chosen) + " |",
        ]
    )


def progress(runs: Sequence[Path], begins: Sequence[int], path: Path) -> None:
    """The strip: a row for each of ROWS samples, whose distances double, and a column for each person."""
    resolution = load_snapshot(runs[-1] / "snapshot.safetensors").network.resolution
    paths = [
        (begin + nimg, file)
        for run, begin in zip(runs, begins, strict=False)
        for nimg, file in sample_paths(run / "samples")
        if nimg > 0
    ]
    last = paths[-1][0]
    chosen = sorted({min(paths, key=lambda entry: abs(entry[0] - last / 2**row)) for row in range(ROWS)})
    samples = [read_sample(file, resolution) for _, file in chosen]
    faces = torch.cat([torch.from_numpy(sample.generated[:PEOPLE, 0]) for sample in samples])
    origin = Origin("", detail=f"in training, after up to {last} images")
    save_marked(grid(faces, len(samples[0].generated[:PEOPLE])), path, origin, watermark=False)
    print(f"{path.name}: after {', '.join(f'{nimg:,}' for nimg, _ in chosen)} images")


if __name__ == "__main__":
    main()
