"""Train a generator on a folder of photos, one sub-folder for each identity, and evaluate it on unseen identities.

    python examples/train_on_folder.py photos/ --out runs/mine --hours 8

The same command resumes an interrupted run.
"""

import argparse
from pathlib import Path

import vultus

parser = argparse.ArgumentParser(description="Train a generator on a folder of photos.")
parser.add_argument("photos", help="folder of photos, one sub-folder for each identity")
parser.add_argument("--preset", default="vultus-cpu", help="preset of the training")
parser.add_argument("--resolution", type=int, default=128, help="side of the images in pixels")
parser.add_argument("--hours", type=float, help="duration of the training")
parser.add_argument("--images", type=int, help="or its length in images")
parser.add_argument("--out", default="runs/mine", help="folder for the data set, the run and the evaluation")
options = parser.parse_args()

out = Path(options.out)
manifest = vultus.prepare(options.photos, out / "data", resolution=options.resolution)
print(f"{manifest['counts']['images']} photos prepared")
snapshot = vultus.train(options.preset, data=out / "data", out=out / "run", hours=options.hours, images=options.images)
results = vultus.evaluate(snapshot, data=out / "data", out=out / "evaluation")
for name, result in results.items():
    print(f"{name}: identity_facenet {result['metrics']['identity_facenet']['value']:.3f}")
faces = vultus.load(snapshot)
grid = faces.sample(faces.sample_identities(8), num=4)
vultus.save_images(grid, out / "faces.png", generator=faces, seed=0, overwrite=True)
