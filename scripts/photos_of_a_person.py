"""What several photos of one person are worth: type II success of faces generated from 1, 2, 5 and 10 photos.

    python scripts/photos_of_a_person.py SNAPSHOT --data DIR

The condition is the normalised mean of the embeddings of a person's first photos, as `vultus generate --as-one` takes
it. The faces are judged against the person's photos after the first 10, which are in none of the conditions: the pairs
that are judged are the same for every number of photos. A face's value is the share of these photos against which a
judge accepts it, at a false accept rate of 1e-3 (threshold from all pairs of different people of the split). Intervals
are of 95 %, people resampled. The last row has the first 10 photos themselves in place of generated faces.
"""

import argparse
import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.evaluation.backbones.face_recognition import Judge, load_judge
from vultus.evaluation.bootstrap import PersonBootstrap
from vultus.evaluation.headlines import IN_LOSS, loss_encoders
from vultus.evaluation.verification import pair_scores, person_rows, scores, threshold_at_far
from vultus.images.io import to_x
from vultus.models.snapshot import Snapshot
from vultus.sampling.generate import render
from vultus.sampling.generator import load
from vultus.sampling.latents import noise
from vultus.training.environment import hardware

FAR = 1e-3
COUNTS = (1, 2, 5, 10)
BATCH = 64


def embedded(judge: Judge, images: Tensor) -> Tensor:
    return torch.cat([judge.embed(to_x(part)) for part in images.split(BATCH)])


def of_all_photos(judge: Judge, dataset: PreparedDataset) -> Tensor:
    parts = torch.arange(len(dataset)).split(BATCH)
    return torch.cat([judge.embed(to_x(dataset.batch(part.numpy()).images)) for part in parts])


def accepted(judge: Judge, faces: Tensor, photos: list[Tensor], threshold: float) -> Tensor:
    """The share of `photos` [P][M, D] that accept each of `faces` [P, K, D]: [P, K]."""
    pairs = zip(faces, photos, strict=True)
    return torch.stack([(scores(a, b, judge.similarity) > threshold).double().mean(1) for a, b in pairs])


@torch.inference_mode()
def measure(
    snapshot: Snapshot,
    dataset: PreparedDataset,
    judges: list[Judge],
    *,
    counts: tuple[int, ...] = COUNTS,
    judged: int = 5,
    noises: int = 2,
    seed: int = 0,
) -> dict[str, Any]:
    theirs, ours = snapshot.metadata.get("encoder") or {}, dataset.manifest["encoder"]
    if (theirs.get("id"), theirs.get("dim")) != (ours["id"], ours["dim"]):
        raise UserError(f"{dataset.folder} has embeddings of {ours['id']}, the snapshot needs {theirs.get('id')}")
    counts = tuple(sorted(counts))
    most = counts[-1]
    people = [rows for rows in person_rows(dataset.identities) if len(rows) >= most + judged]
    if len(people) < 2:
        raise UserError(
            f"{dataset.folder}: fewer than 2 people have {most + judged} photos; lower --counts or --judged"
        )
    z_dim = snapshot.network.z_dim
    z = torch.cat([noise(seed, person, 1, z_dim, variant=k) for person in range(len(people)) for k in range(noises)])
    photos = [F.normalize(dataset.embeddings(rows[:most].numpy()).float()) for rows in people]
    generated = {}
    for count in counts:
        c = torch.stack([F.normalize(own[:count].sum(0), dim=0) for own in photos])
        generated[count] = render(snapshot.network, z, c.repeat_interleave(noises, 0))

    bootstrap = PersonBootstrap([str(person) for person in range(len(people))], seed=seed)
    success: dict[str, dict[str, Any]] = {}
    for judge in judges:
        real = of_all_photos(judge, dataset)
        threshold = threshold_at_far(pair_scores(real, list(dataset.identities), judge.similarity)[1], FAR)
        others = [real[rows[most:]] for rows in people]
        values = {
            str(count): accepted(judge, embedded(judge, images).unflatten(0, (-1, noises)), others, threshold)
            for count, images in generated.items()
        }
        values["real photos"] = accepted(judge, torch.stack([real[rows[:most]] for rows in people]), others, threshold)
        first = values[str(counts[0])]
        success[judge.short] = {name: bootstrap.mean(own).to_dict() for name, own in values.items()}
        for count in counts[1:]:  # of the same people and pairs: narrower than the intervals of the rows
            gain = bootstrap.mean(values[str(count)] - first)
            success[judge.short][str(count)]["gain"] = gain.to_dict()
    return {
        "people": len(people),
        "judged_photos": sum(len(rows) - most for rows in people),
        "split": dataset.split,
        "n_split": len(dataset),
        "noises": noises,
        "seed": seed,
        "far": FAR,
        "loss_encoders": loss_encoders(snapshot.metadata),
        "type2": success,
        **hardware("cpu"),
    }


def table(result: dict[str, Any]) -> str:
    def percent(row: dict[str, float]) -> str:
        return f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"

    names = list(result["type2"])
    heads = [name + (IN_LOSS if name in result["loss_encoders"] else "") for name in names]
    first = next(iter(result["type2"][names[0]]))
    columns = [title for head in heads for title in (f"{head}, type II, %", f"minus {first} photo")]
    lines = [["photos", *columns], ["---"] * (1 + len(columns))]
    for count in result["type2"][names[0]]:
        cells = [count]
        for name in names:
            row = result["type2"][name][count]
            cells += [percent(row), percent(row["gain"]) if "gain" in row else ""]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("snapshot")
    parser.add_argument("--data", required=True, help="prepared data set")
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), help="photos of the conditions")
    parser.add_argument("--judged", type=int, default=5, help="a person needs so many photos more than the condition")
    parser.add_argument("--judge", nargs="+", default=["dlib", "mobilefacenet"], help="see vultus evaluate --judge")
    parser.add_argument("--noises", type=int, default=2, help="faces of each condition")
    parser.add_argument("--seed", type=int, default=0, help="of the noise and of the resampled people")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    if min(*options.counts, options.judged, options.noises) < 1:
        parser.error("--counts, --judged and --noises must be 1 or more")
    try:
        result = measure(
            load(options.snapshot, device="cpu"),
            PreparedDataset(options.data, "test"),
            [load_judge(name) for name in options.judge],
            counts=tuple(options.counts),
            judged=options.judged,
            noises=options.noises,
            seed=options.seed,
        )
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(
        f"{result['people']} people, {result['judged_photos']} photos of them judged, {result['noises']} noises, seed "
        f"{result['seed']}, {result['device']} ({result['cpu']}, threads: {result['threads']})\n"
    )
    print(table(result))


if __name__ == "__main__":
    main()
