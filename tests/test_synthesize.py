"""Synthetic data sets: people kept apart, faces accepted by a judge, shards, resuming, several processes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import vultus
from forked import Forks
from tiny_parts import TinyEncoder, TinyJudge
from vultus.cli.main import main
from vultus.data.prepare import prepare
from vultus.errors import UserError
from vultus.images.detect import examine
from vultus.images.io import to_x
from vultus.images.xmp import SYNTHETIC
from vultus.sampling.generate import render
from vultus.sampling.latents import noise
from vultus.synthesis import people, synthesize
from vultus.synthesis.faces import TRIES
from vultus.synthesis.people import People

PEOPLE, FACES, SEED = 5, 3, 4
THRESHOLD = -0.0533
SMALL = {"people": PEOPLE, "per_person": FACES, "seed": SEED, "min_angle": 85.0, "device": "cpu"}


def run(snapshot: Path, out: Path, **options: Any) -> dict[str, Any]:
    """A small data set; two people in a shard. About every second face passes the judge."""
    judge: dict[str, Any] = {"judge": TinyJudge(), "threshold": THRESHOLD}
    manifest: dict[str, Any] = vultus.synthesize(snapshot, out=out, **{**SMALL, **judge, **options})
    return manifest


def scores_of(snapshot: Path, number: int, c: np.ndarray) -> list[float]:
    """The judge's scores of the first faces of an identity: minus the distance from the average face."""
    generator, judge = vultus.load(snapshot, device="cpu"), TinyJudge()
    z = [torch.zeros(1, 20)] + [noise(SEED, number, 1, 20, variant=variant) for variant in range(TRIES * FACES)]
    x = to_x(render(generator.network, torch.cat(z), torch.from_numpy(c).expand(len(z), -1)))
    found = judge.embed(x)
    return (-(found[1:] - found[:1]).norm(dim=1)).tolist()


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesize, "SHARD_FACES", 2 * FACES)


@pytest.fixture(scope="module")
def whole(tiny_snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthesize, "SHARD_FACES", 2 * FACES)
        out = tmp_path_factory.mktemp("whole") / "out"
        run(tiny_snapshot, out)
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_people_are_the_first_that_are_far_enough_apart(tiny_snapshot: Path) -> None:
    generator = vultus.load(tiny_snapshot, device="cpu")
    c = generator.sample_identities(200, seed=1).double()
    cosines = c @ c.T
    chosen: list[int] = []
    for number in range(len(c)):
        if (cosines[number, chosen] <= math.cos(math.radians(85))).all():
            chosen.append(number)
    assert 10 < len(chosen) < 190
    crowd = People(generator.population, seed=1, min_angle=85)
    found = crowd.take(0, 10) + crowd.take(10, len(chosen) - 10)
    assert [person.number for person in found] == chosen
    assert torch.equal(torch.from_numpy(np.stack([person.c for person in found])).double(), c[chosen])


def test_every_person_has_the_first_faces_that_the_judge_accepts(whole: Path, tiny_snapshot: Path) -> None:
    rows, manifest = rows_of(whole), json.loads((whole / "synthesis.json").read_text())
    expected, left_out = [], 0
    for person in People(vultus.load(tiny_snapshot).population, seed=SEED, min_angle=85).take(0, 40):
        scores = scores_of(tiny_snapshot, person.number, person.c)
        passed = [number for number, score in enumerate(scores) if score > THRESHOLD][:FACES]
        if len(passed) == FACES:
            expected += [(person.number, noise, pytest.approx(scores[noise], abs=1e-5)) for noise in passed]
        else:
            left_out += 1
        if len(expected) == PEOPLE * FACES:
            break
    assert [(row["identity"], row["noise"], row["score"]) for row in rows] == expected
    assert any(row["noise"] >= FACES for row in rows), "no face was rejected"
    counts = manifest["counts"]
    assert counts["tried"] - counts["people"] == left_out > 0, "every person was kept"
    assert counts["rows"] == sum(shard["rows"] for shard in manifest["shards"]) == PEOPLE * FACES
    assert counts["judged"] > counts["accepted"] >= counts["rows"]


def test_images_are_those_of_generate_and_marked(tmp_path: Path) -> None:
    vultus.synthesize(out=tmp_path / "set", people=2, per_person=2, judge=None, seed=SEED, device="cpu")
    row = rows_of(tmp_path / "set")[-1]
    number, variant = row["identity"], row["noise"]
    command = ["generate", "default", "--random", str(number + 1), "--num", "2", "--seed", str(SEED)]
    assert main([*command, "--device", "cpu", "--out", str(tmp_path / "faces")]) == 0
    (face,) = (tmp_path / "faces").glob(f"*{number}_{variant}.png")
    assert face.read_bytes() == row["image"]["bytes"]
    found = examine(face)
    assert found["metadata"]["source"] == SYNTHETIC
    assert found["watermark"]["found"]
    assert np.array_equal(row["embedding"], vultus.load().sample_identities(1, seed=SEED, start=number)[0].numpy())


def test_datasets_and_prepare_read_it(whole: Path, tiny_snapshot: Path, tmp_path: Path) -> None:
    import datasets  # takes a second, which the processes of the other tests need not

    shards = run(tiny_snapshot, tmp_path / "tar", format="webdataset")["shards"]
    assert [shard["people"] for shard in shards] == [
        shard["people"] for shard in json.loads((whole / "synthesis.json").read_text())["shards"]
    ]
    cache = str(tmp_path / "cache")
    table = datasets.load_dataset(str(whole), split="train", cache_dir=cache)
    tar = datasets.load_dataset(str(tmp_path / "tar"), split="train", cache_dir=cache)
    assert len(table) == len(tar) == PEOPLE * FACES
    for one, other in zip(table, tar, strict=True):
        assert one["image"].size == (32, 32)
        assert one["image"].tobytes() == other["png"].tobytes()
        assert {key: one[key] for key in ("identity", "noise", "embedding")} == {
            key: other["json"][key] for key in ("identity", "noise", "embedding")
        }
    manifest = prepare(str(whole), tmp_path / "prepared", resolution=32, encoder=TinyPrepared(), test_fraction=0)
    assert manifest["counts"]["splits"]["train"] == {"images": PEOPLE * FACES, "people": PEOPLE}


class TinyPrepared(TinyEncoder):
    """With the interface that `prepare` needs."""

    def embed_crop(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.nn.functional.adaptive_avg_pool2d(x, 6).flatten(1) @ self.weight)


CHILD = """
import os, signal, sys
from pathlib import Path
from test_synthesize import FACES, run, synthesize
snapshot, out, moment = sys.argv[1:]
synthesize.SHARD_FACES = 2 * FACES
def watch(event, arguments):
    if event == "os.rename" and os.path.basename(arguments[1]) == moment:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
run(Path(snapshot), Path(out))
"""


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_bytes(whole: Path, tiny_snapshot: Path, tmp_path: Path, forks: Forks) -> None:
    out = tmp_path / "out"
    for moment in ("00001.json", "synthesis.json"):
        killed = forks.run(CHILD, str(tiny_snapshot), str(out), moment)
        assert killed.returncode == -signal.SIGKILL, (moment, killed.stderr)
    run(tiny_snapshot, out)
    assert content(out) == content(whole)


@pytest.mark.slow
def test_workers_write_the_same_bytes_and_lost_shards_are_made_again(
    whole: Path, tiny_snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(tiny_snapshot, out, workers=2)
    assert content(out) == content(whole)
    (out / "train-00001.parquet").unlink()
    run(tiny_snapshot, out)
    assert "train-00001.parquet: missing; making it again" in capsys.readouterr().err
    run(tiny_snapshot, out)
    assert "already complete, 15 faces of 5 people; nothing to do" in capsys.readouterr().err
    assert content(out) == content(whole)
    with pytest.raises(UserError, match="was begun with --per-person 3, now it is 2; give the same options or choose"):
        run(tiny_snapshot, out, per_person=2)


def test_full_disk(tiny_snapshot: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk needs root")
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    try:
        with pytest.raises(OSError, match="No space left") as caught:
            run(tiny_snapshot, disk / "out", judge=None, threshold=None)
        assert Path(caught.value.filename).name.startswith("train-0000")
        assert not list((disk / "out").rglob(".*.tmp"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


REFUSED: dict[str, Callable[[Path, Path], Any]] = {
    r"^people must be a whole number from 1": lambda snapshot, out: run(snapshot, out, people=0),
    r"^no room for more people at --min-angle 179: after 1, 50 random identities in a row": lambda snapshot, out: run(
        snapshot, out, min_angle=179
    ),
    r"^\d of \d people have 3 accepted faces among 12; the judge accepted 0.0%": lambda snapshot, out: run(
        snapshot, out, threshold=0.0, min_angle=0
    ),
    r"^--judge umpire needs --threshold": lambda snapshot, out: run(snapshot, out, threshold=None),
    r"^--threshold is of a judge": lambda snapshot, out: run(snapshot, out, judge=None),
    r"^--engine ray needs --workers": lambda snapshot, out: run(snapshot, out, engine="ray"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message: str, tiny_snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(people, "MISSES", 50)
    monkeypatch.setattr(synthesize, "TRIED", 4)
    with pytest.raises(UserError, match=message) as caught:
        REFUSED[message](tiny_snapshot, tmp_path / "out")
    assert "\n" not in str(caught.value)
    if "room" in message:  # another --min-angle may follow
        assert run(tiny_snapshot, tmp_path / "out", min_angle=0)["counts"]["people"] == PEOPLE


def test_command(tiny_snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = [
        "synthesize",
        str(tiny_snapshot),
        "--people",
        "2",
        "--per-person",
        "1",
        "--out",
        str(out),
        "--judge",
        "none",
    ]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["people"] == 2
    assert "no face was rejected" in (out / "README.md").read_text()
    (out / "synthesis.json").unlink()
    assert main(command) == 2
    assert "holds other files (README.md" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["out"]
