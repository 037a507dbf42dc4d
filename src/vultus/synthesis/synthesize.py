"""From a snapshot to a labelled data set of people who do not exist.

A shard is the work on a fixed number of people. Some of them may lack accepted faces, so there are rounds: each works
on as many further people as the data set still lacks, which cannot give too many. Every shard is therefore a function
of (snapshot, options, seed), whichever process writes it and in whatever order.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vultus._device import one_thread
from vultus._engines import Engine, check_workers, run_tasks
from vultus._files import folder_lock, make_folder, sha256_file
from vultus._formats import VERSIONS
from vultus._progress import Progress, progress
from vultus._ranges import Angle, Count, FacesOfPerson, NoiseStrength, Score, Seed, checks_arguments
from vultus.data.items import counted
from vultus.errors import UserError
from vultus.evaluation.backbones.face_recognition import Judge, load_judge
from vultus.evaluation.headlines import loss_encoders
from vultus.models.snapshot import Snapshot, load_snapshot
from vultus.sampling.conditioning import check_population
from vultus.sampling.generate import model_of
from vultus.sampling.generator import load
from vultus.synthesis.card import write_card
from vultus.synthesis.faces import TRIES, Faces
from vultus.synthesis.folder import SynthesisFolder, check_place
from vultus.synthesis.people import People, Person
from vultus.synthesis.shards import Format, shard_name, write_shard

SHARD_FACES = 1024  # 20 to 30 s of work on one core, which is what a kill can cost
MIN_ANGLE = 50.0  # degrees between two people; see docs/synthesize.md
FAR = 1e-3  # share of the pairs of different real people that a judge accepts at its threshold; see docs/synthesize.md
THRESHOLDS = {"dlib": -0.567, "mobilefacenet": 0.3526}
SUMMED = ("people", "rows", "tried", "judged", "accepted")  # counts in the record of a shard
PART = 1000  # people that are drawn between two looks at the clock
TRIED, LEAST_KEPT = 64, 0.1  # after so many people, there is no point in going on with a smaller share of them

Json = dict[str, Any]


@dataclass(frozen=True)
class _Task:
    number: int  # of the shard
    people: list[Person]
    expected: str | None  # sha256 of a lost shard that is made again

    def __str__(self) -> str:
        return f"shard {self.number}"


class _ShardWork:
    """Makes and writes a shard."""

    def __init__(self, out: Path, kind: Format, faces: Faces) -> None:
        self._out, self._kind, self._faces = out, kind, faces

    @one_thread()
    def __call__(self, task: _Task) -> Json:
        rows, counts = self._faces(task.people)
        name = shard_name(task.number, self._kind)
        # A shard without a person who has enough faces has no file.
        sha256 = write_shard(self._out / name, rows, self._kind, task.expected) if rows else None
        return {"file": name, "rows": len(rows), "sha256": sha256, **asdict(counts)}


_Run = Callable[[Iterable[_Task]], Iterator[tuple[int, Json]]]  # yields (position of the task, record of the shard)


@one_thread()
def _make_work(
    path: Path, judge: Judge | str | None, device: str, out: Path, kind: Format, settings: Mapping[str, Any]
) -> _ShardWork:
    """The work in a process of its own."""
    loaded = load_judge(judge, device=device) if isinstance(judge, str) else judge
    return _ShardWork(out, kind, Faces(load_snapshot(path, device), loaded, **settings))


@checks_arguments
@one_thread()
def synthesize(
    snapshot: str | Path = "default",
    *,
    out: str | Path,
    people: Count,
    per_person: FacesOfPerson = 20,
    min_angle: Angle = MIN_ANGLE,
    judge: str | Judge | None = "dlib",
    threshold: Score | None = None,
    seed: Seed = 0,
    noise_strength: NoiseStrength = 1.0,
    format: Format = "parquet",
    device: str = "auto",
    workers: Count | None = None,
    engine: Engine = "processes",
) -> Json:
    """Write a labelled data set of generated faces into the folder `out` and return its manifest.

    Args:
        snapshot: as for vultus.load().
        out: the folder to write; the same call again resumes it, and makes lost shards of a complete data set again.
        people: number of people: random identities of the population prior, in their order.
        per_person: faces of each person, of different noise.
        min_angle: least angle between the embeddings of two people, in degrees.
        judge: that accepts each face (see faces.py): `dlib`, `mobilefacenet`, FILE.onnx[:raw], a Judge, or None.
        threshold: the score above which a face is accepted. None: that of THRESHOLDS, which other judges do not have.
        seed: of the random identities and of the noise. Image NUMBER_NOISE of the data set is the face NUMBER_NOISE of
            `vultus generate SNAPSHOT --random` with this seed.
        noise_strength: factor of the noise.
        format: of the shards, see shards.py.
        device: auto (cuda, else mps, else cpu), cuda, mps or cpu.
        workers: number of processes of one thread that write shards; None: this one does. The result is the same.
        engine: of the workers: "processes" of this machine, or "ray" (extra `scale`).

    Raises UserError for a value out of range, a snapshot without a population prior, more people than there is room for
    at `min_angle`, too few accepted faces, and a folder that is locked, holds other files or was begun with other
    options; OSError if `out` cannot be written. What is done is kept; the same call resumes.
    """
    check_workers(workers, engine)
    generator = load(snapshot, device=device)
    check_population(generator)
    assert generator.path is not None
    device = str(next(generator.network.parameters()).device)
    loaded = load_judge(judge, device=device) if isinstance(judge, str) else judge
    limit = _threshold(loaded, threshold)
    options = {
        "snapshot": model_of(generator),
        "people": people,
        "per-person": per_person,
        "min-angle": min_angle,
        "judge": None if loaded is None else loaded.id,
        "threshold": limit,
        "seed": seed,
        "noise_strength": noise_strength,
        "format": format,
        "device": device,
    }
    check_place(Path(out))
    folder = make_folder(out)
    with folder_lock(folder, "synthesize"):
        state = SynthesisFolder(folder)
        manifest = state.open(options)
        entries = dict(enumerate(manifest["shards"])) if manifest else state.recorded()
        lost = state.lost(entries)
        if manifest and not lost:
            print(f"{folder}: already complete, {_described(manifest['counts'])}; nothing to do", file=sys.stderr)
            return manifest
        for number, reason in lost.items():
            print(f"{folder / entries[number]['file']}: {reason}; making it again", file=sys.stderr)
        expected = {number: entries.pop(number)["sha256"] for number in lost}
        settings: Json = {"threshold": limit, "per_person": per_person, "seed": seed, "noise_strength": noise_strength}
        if workers is None:
            run: _Run = functools.partial(_in_order, _ShardWork(folder, format, Faces(generator, loaded, **settings)))
        else:
            make = functools.partial(
                _make_work, generator.path.absolute(), judge, device, folder.absolute(), format, settings
            )
            run = functools.partial(run_tasks, make, workers=workers, engine=engine)
        done = sum(entry["rows"] for entry in entries.values())
        if done:
            print(f"{folder}: resuming after {counted(done, 'face')}", file=sys.stderr)
        crowd = People(generator.population, seed=seed, min_angle=min_angle)
        with progress(people, title="people", unit="person") as shown:
            for start in range(0, people, PART):  # before anything is written, because there may be no room for them
                shown.update(len(crowd.take(start, min(PART, people - start))))
        if manifest is None:
            state.begin(options)
        with progress(people * per_person, title="synthesize", unit="face", initial=done) as shown:
            used = _write_shards(crowd, people, per_person, entries, expected, run, state, shown)
        passed_over = crowd.take(used - 1, 1)[0].number + 1 - used
        manifest = _manifest(generator, loaded, options, [entries[number] for number in sorted(entries)], passed_over)
        write_card(folder, manifest)
        state.finish(manifest)
        print(f"{folder}: {_described(manifest['counts'])}", file=sys.stderr)
        return manifest


def _manifest(
    generator: Snapshot, judge: Judge | None, options: Json, shards: Sequence[Json], passed_over: int
) -> Json:
    """The content of synthesis.json; `passed_over` random identities were too near to others."""
    metadata, threshold = generator.metadata, options["threshold"]
    in_loss = loss_encoders(metadata)
    judged = judge and {
        "id": judge.id,
        "weights_sha256": judge.weights_sha256,
        "similarity": judge.similarity,
        "threshold": threshold,
        "false_accept_rate": FAR if threshold == THRESHOLDS.get(judge.short) else None,
        "in_loss": judge.short in in_loss,
    }
    content = "".join(f"{shard['file']} {shard['rows']} {shard['sha256']}\n" for shard in shards)
    return {
        "format": VERSIONS["synthetic data set"],
        "options": options,
        "snapshot": {
            "model": model_of(generator),
            "file_sha256": sha256_file(generator.path) if generator.path else None,
            "loss_encoders": in_loss,
            **{name: metadata.get(name) for name in ("preset", "licence", "encoder")},
        },
        "judge": judged,
        "counts": {name: sum(shard[name] for shard in shards) for name in SUMMED} | {"passed_over": passed_over},
        "resolution": generator.network.resolution,
        "shards": shards,
        "content_sha256": hashlib.sha256(content.encode()).hexdigest(),
    }


def _threshold(judge: Judge | None, threshold: float | None) -> float | None:
    if judge is None:
        if threshold is not None:
            raise UserError("--threshold is of a judge; leave it out, or name the --judge")
        return None
    if threshold is None and judge.short not in THRESHOLDS:
        raise UserError(
            f"--judge {judge.short} needs --threshold, the score above which it takes two faces for one person"
        )
    return THRESHOLDS[judge.short] if threshold is None else threshold


def _described(counts: Mapping[str, int]) -> str:
    return f"{counted(counts['rows'], 'face')} of {counts['people']} people"


def _write_shards(
    crowd: People,
    people: int,
    per_person: int,
    entries: dict[int, Json],
    expected: Mapping[int, str],
    run: _Run,
    state: SynthesisFolder,
    shown: Progress,
) -> int:
    """Write the shards that are not among `entries`, and add theirs. Returns how many people of `crowd` were tried."""
    size = max(1, SHARD_FACES // per_person)
    totals: collections.Counter[str] = collections.Counter()
    for entry in entries.values():
        totals.update({name: entry[name] for name in SUMMED})
    start = kept = number = 0
    while kept < people:
        missing = people - kept
        firsts = {number + at // size: at for at in range(0, missing, size)}  # of the shards of this round
        lacking = [shard for shard in firsts if shard not in entries]
        tasks = (  # a generator, because people that wait in memory would be a copy of all
            _Task(shard, crowd.take(start + firsts[shard], min(size, missing - firsts[shard])), expected.get(shard))
            for shard in lacking
        )
        for position, entry in run(tasks):
            entries[lacking[position]] = entry
            state.record(lacking[position], entry)
            shown.update(entry["rows"])
            totals.update({name: entry[name] for name in SUMMED})
            _check_kept(totals, per_person)
        kept += sum(entries[shard]["people"] for shard in firsts)
        start, number = start + missing, number + len(firsts)
    return start


def _check_kept(totals: Mapping[str, int], per_person: int) -> None:
    """Raise UserError if hardly anybody has enough accepted faces."""
    if totals["tried"] >= TRIED and totals["people"] < LEAST_KEPT * totals["tried"]:
        raise UserError(
            f"{totals['people']} of {totals['tried']} people have {counted(per_person, 'accepted face')} among "
            f"{TRIES * per_person}; the judge accepted {totals['accepted'] / totals['judged']:.1%} of all; lower "
            "--threshold or --noise_strength, or take another snapshot, with another --out"
        )


def _in_order(work: _ShardWork, tasks: Iterable[_Task]) -> Iterator[tuple[int, Json]]:
    return enumerate(map(work, tasks))
