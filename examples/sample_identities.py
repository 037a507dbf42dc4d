"""Generate faces of people who do not exist and save them as one grid, one row for each identity.

python examples/sample_identities.py --count 4 --num 6 --out identities.png
"""

import argparse

import vultus

parser = argparse.ArgumentParser(description="Generate faces of random identities.")
parser.add_argument("--generator", default="default", help="snapshot, run folder, hf://user/name or FILE.onnx")
parser.add_argument("--count", type=int, default=4, help="number of identities")
parser.add_argument("--num", type=int, default=6, help="faces of each identity")
parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same faces")
parser.add_argument("--out", default="identities.png", help="image file, or a folder for single files")
options = parser.parse_args()

generator = vultus.load(options.generator)
c = generator.sample_identities(options.count, seed=options.seed)  # [count, 512], unit norm
faces = generator.sample(c, num=options.num, seed=options.seed)  # uint8 [count, num, 3, R, R]
for path in vultus.save_images(faces, options.out, generator=generator, seed=options.seed):
    print(path)
