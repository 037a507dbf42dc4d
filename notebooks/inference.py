# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Faces from embeddings
#
# A generator turns an embedding (512 numbers that FaceNet computes from a photo) and a noise vector into a face. This
# notebook generates faces of people who do not exist, of people of the training data and of people who are not in it,
# and of your own photo. It shows the effect of the noise, and the interpolation between people.
#
# It runs without any setting, with the snapshot that comes with vultus. Cells that need data, a photo or FaceNet's
# weights print one line and are left out. The faces are synthetic: do not use them to deceive.

# %% [markdown]
# ## Install
#
# On your own machine: `pip install -e ".[eval]" notebook` in a checkout of vultus. In
# [Colab](https://colab.research.google.com): *File → Upload notebook*, put the address of the vultus repository into
# `REPOSITORY`, and run the cell below.

# %%
import sys

REPOSITORY = ""  # address of the repository, as on its page; needed in Colab only

if "google.colab" in sys.modules:
    if not REPOSITORY:
        raise SystemExit("put the address of the vultus repository into REPOSITORY, then run this cell again")
    from IPython import get_ipython

    get_ipython().run_line_magic("pip", f'install --quiet "vultus[eval] @ git+{REPOSITORY}"')

# %% [markdown]
# ## Settings
#
# Edit the values, or set the environment variables.

# %%
import os

SNAPSHOT = os.environ.get("VULTUS_NB_SNAPSHOT", "default")  # run folder, snapshot file, hf://user/name, or `default`
DATA = os.environ.get("VULTUS_NB_DATA")  # folder of a prepared data set (`vultus prepare`), or None
PHOTO = os.environ.get("VULTUS_NB_PHOTO")  # a photo of a face, or None
BETWEEN = os.environ.get("VULTUS_NB_BETWEEN", "random:1 random:2 random:3").split()  # photos, FILE.npy#ROW, random:N
PEOPLE = int(os.environ.get("VULTUS_NB_PEOPLE", "5"))  # rows of an image grid
NOISES = int(os.environ.get("VULTUS_NB_NOISES", "6"))  # faces of each person
SEED = int(os.environ.get("VULTUS_NB_SEED", "0"))  # the same seed gives the same faces

# %%
import numpy as np
from IPython.display import display
from PIL import Image, ImageOps

import vultus
from vultus.data.dataset import PreparedDataset

g = vultus.load(SNAPSHOT)
size = f"{g.resolution}×{g.resolution}"
print(f"{SNAPSHOT}: {size}, preset {g.metadata['preset']}, trained on {g.metadata['cur_nimg']:,} images")
print(f"terms: {g.metadata.get('licence') or 'none given'}")


def grid(images, gap=2):
    """Images uint8 [rows, columns, 3, R, R] as one image."""
    rows, columns, _, height, width = np.shape(images)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for row, column in np.ndindex(rows, columns):
        top, left = row * (height + gap), column * (width + gap)
        sheet[top : top + height, left : left + width] = np.moveaxis(np.asarray(images[row][column]), 0, -1)
    return Image.fromarray(sheet)


# %% [markdown]
# ## People who do not exist
#
# One row for each person, whose embedding is sampled from the population prior, a distribution fitted to the training
# embeddings; one column for each noise vector.

# %%
identities = g.sample_identities(PEOPLE, seed=SEED)
display(grid(g.sample(identities, num=NOISES, seed=SEED)))

# %% [markdown]
# ## People of the training data, and unseen people
#
# The photo, then faces generated from the photo's embedding alone. If the first grid is much better than the second,
# the generator has memorized the training data.

# %%
for split, title in (("train", "people of the training data"), ("test", "people who are not in the training data")):
    if DATA is None:
        print(f"left out, {title}: set DATA to a prepared data set")
        continue
    try:
        dataset = PreparedDataset(DATA, split)
        photos = dataset.batch(dataset.people(PEOPLE))
        faces = g.sample(photos.c, num=NOISES, seed=SEED)
    except vultus.UserError as error:
        print(f"left out, {title}: {error}")
    else:
        print(title)
        display(grid(np.concatenate([photos.images[:, None], faces], axis=1)))

# %% [markdown]
# ## Your own photo
#
# FaceNet embeds the photo, the generator generates faces of that embedding. The numbers are the cosines between that
# embedding and the embeddings of the faces: two photos of one person have 0.7 on average, photos of two people 0.0.

# %%
if PHOTO is None:
    print("left out, your own photo: set PHOTO to an image file")
else:
    try:
        c = vultus.embed([PHOTO])
        faces = g.sample(c, num=NOISES, seed=SEED)
        cosines = np.asarray(vultus.embed(faces[0])) @ np.asarray(c)[0]
    except vultus.UserError as error:
        print(f"left out, your own photo: {error}")
    else:
        photo = ImageOps.fit(Image.open(PHOTO).convert("RGB"), (g.resolution, g.resolution))
        display(grid(np.concatenate([np.moveaxis(np.asarray(photo), -1, 0)[None, None], faces], axis=1)))
        print("cosine:", *(f"{value:.2f}" for value in cosines))

# %% [markdown]
# ## The effect of the noise
#
# One person. Each row scales one noise vector, from no noise (left) to more than in the training (right).

# %%
STRENGTHS = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5)
scaled = [g.sample(identities[:1], num=3, seed=SEED, noise_strength=strength)[0] for strength in STRENGTHS]
print("noise times", *STRENGTHS)
display(grid(np.stack(scaled, axis=1)))

# %% [markdown]
# ## Interpolation
#
# The embedding moves along the arc from each person of `BETWEEN` to the next; the noise stays the same.


# %%
def embedding_of(name):
    """The embedding [c_dim] that `random:N`, `FILE.npy#ROW` or a photo names."""
    if name.startswith("random:"):
        return np.asarray(g.sample_identities(1, seed=SEED, start=int(name.removeprefix("random:"))))[0]
    file, _, row = name.partition("#")
    if file.endswith(".npy"):
        return np.load(file)[int(row or 0)]
    return np.asarray(vultus.embed([name]))[0]


def arc(a, b, steps=9):
    """`steps` unit vectors on the shorter arc between the directions of a and b."""
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    angle = np.arccos(np.clip(a @ b, -1, 1))
    t = np.linspace(0, 1, steps)[:, None]
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


try:
    ends = [embedding_of(name) for name in BETWEEN]
except (vultus.UserError, OSError) as error:
    print(f"left out, interpolation: {error}")
else:
    # One call per face, because the noise of a face depends on its place in the call.
    strips = [[g.sample(c, seed=SEED)[0, 0] for c in arc(a, b)] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    display(grid(strips))
