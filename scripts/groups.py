"""Where a generator fails: its metrics by kind of photo, and its worst faces.

    python scripts/groups.py SNAPSHOT --data DIR --groups scripts/groups.json --out failures.jpg

The groups are lists of photos (CelebA's numbers), chosen by eye from 432 photos spread over the test split. For each
group it prints the number of photos, FaceNet's cosine, and the share of faces that dlib accepts as the person of the
source photo at a false accept rate of 1e-3 (threshold from all pairs of the split); the last row has the photos of no
group. The image shows, a row for each group, the faces with the lowest score by dlib; it shows no photos.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from vultus.data.dataset import PreparedDataset
from vultus.evaluation.backbones.face_recognition import load_judge
from vultus.evaluation.verification import pair_scores, row_scores, threshold_at_far
from vultus.images.io import grid, to_x
from vultus.images.xmp import Origin, model_id, save_marked
from vultus.models.facenet import load_facenet
from vultus.sampling.generate import render
from vultus.sampling.generator import load
from vultus.sampling.latents import noise

FAR = 1e-3
SHOWN = 8
BATCH = 32


def embedded(embed, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([embed(part) for part in x.split(BATCH)])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("snapshot")
    parser.add_argument("--data", required=True)
    parser.add_argument("--groups", default=Path(__file__).with_name("groups.json"), type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    groups = json.loads(options.groups.read_text(encoding="utf-8"))
    snapshot = load(options.snapshot, device="cpu")
    generator = snapshot.network
    dataset = PreparedDataset(options.data, "test")
    judge, facenet = load_judge("dlib"), load_facenet()
    batch = dataset.batch(range(len(dataset)))
    real = embedded(judge.embed, to_x(batch.images))
    threshold = threshold_at_far(pair_scores(real, list(batch.identities), judge.similarity)[1], FAR)

    place = {Path(key).stem: row for row, key in enumerate(batch.keys)}
    rows = np.array([place[key] for key in groups["seen"]])
    c = batch.c[rows]
    images = render(generator, noise(options.seed, 0, len(rows), generator.z_dim), c)
    x = to_x(images)
    cosine = (embedded(facenet.embed, x) * c).sum(1)
    score = row_scores(embedded(judge.embed, x), real[rows], judge.similarity)

    named = {name: [groups["seen"].index(key) for key in keys] for name, keys in groups.items() if name != "seen"}
    listed = {index for indices in named.values() for index in indices}
    named["none of these"] = [index for index in range(len(rows)) if index not in listed]
    print("| photos of | N | FaceNet cosine | type I by dlib |\n|---|---|---|---|")
    for name, indices in named.items():
        accepted = (score[indices] > threshold).double().mean()
        print(f"| {name} | {len(indices)} | {cosine[indices].mean():.3f} | {accepted:.2f} |")
    if options.out:
        worst = [sorted(indices, key=lambda index: float(score[index]))[:SHOWN] for indices in named.values()]
        sheet = grid(images[[index for row in worst for index in row]], SHOWN)
        save_marked(sheet, options.out, Origin(model_id(snapshot.path), options.seed), watermark=False)


if __name__ == "__main__":
    main()
