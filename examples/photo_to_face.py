"""Generate faces from the FaceNet embeddings of photos and print how similar their embeddings are to the photo's.

    python examples/photo_to_face.py me.jpg you.jpg --num 4 --out faces.png

Two photos of one identity have a cosine of 0.7 on average, two photos of different identities 0.0.
"""

import argparse

import vultus

parser = argparse.ArgumentParser(description="Generate faces from photos.")
parser.add_argument("photos", nargs="+", help="image files")
parser.add_argument("--generator", default="default", help="snapshot, run folder, hf://user/name or FILE.onnx")
parser.add_argument("--num", type=int, default=4, help="faces of each photo")
parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same faces")
parser.add_argument("--out", default="faces.png", help="image file, or a folder for single files")
options = parser.parse_args()

generator = vultus.load(options.generator)
c = vultus.embed(options.photos)  # [N, 512], unit norm
faces = generator.sample(c, num=options.num, seed=options.seed)  # uint8 [N, num, 3, R, R]
for photo, embedding, images in zip(options.photos, c, faces, strict=True):
    cosines = vultus.embed(images) @ embedding
    print(f"{photo}: cosine {', '.join(f'{cosine:.2f}' for cosine in cosines)}")
vultus.save_images(faces, options.out, generator=generator, seed=options.seed)
print(options.out)
