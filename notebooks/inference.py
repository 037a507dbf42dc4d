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
# A generator turns 512 numbers that FaceNet reads from a photo, and a bit of noise, back into a face. This notebook
# shows faces of people who do not exist, of people the training saw and people it never saw, of your own photo, what
# the noise does, and the way from one person to another.
#
# It runs as it is, with the snapshot that comes with vultus. Cells that need data, a photo or FaceNet's weights say so
# in one line and are passed over. Faces are made up by a network: do not use them to deceive.

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
# ## What to show
#
# Edit the values, or set the environment variables.

# %%
import os

SNAPSHOT = os.environ.get("VULTUS_NB_SNAPSHOT", "default")  # a run folder, a snapshot file, or `default`
DATA = os.environ.get("VULTUS_NB_DATA")  # folder of a prepared data set (`vultus prepare`), or None
PHOTO = os.environ.get("VULTUS_NB_PHOTO")  # a photo of a face, or None
BETWEEN = os.environ.get("VULTUS_NB_BETWEEN", "random:1 random:2 random:3").split()  # photos, FILE#ROW, random:N
PEOPLE = int(os.environ.get("VULTUS_NB_PEOPLE", "5"))  # rows of a sheet
NOISES = int(os.environ.get("VULTUS_NB_NOISES", "6"))  # faces of each person
SEED = int(os.environ.get("VULTUS_NB_SEED", "0"))  # the same seed gives the same faces

# %%
from pathlib import Path

import torch
from IPython.display import display

from vultus.data.dataset import PreparedDataset
from vultus.errors import told
from vultus.images.io import centre_crop, decode_image, from_pil, to_x
from vultus.models.facenet import load_facenet
from vultus.models.snapshot import default_snapshot, load_snapshot
from vultus.sampling.conditioning import from_photos, one_embedding
from vultus.sampling.generate import render
from vultus.sampling.grids import noise_sheet, people_sheet, way_sheet
from vultus.sampling.population import noise, sample_identities

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
snapshot = load_snapshot(default_snapshot() if SNAPSHOT == "default" else SNAPSHOT, DEVICE)
about = snapshot.metadata
side = about["generator"]["resolution"]
print(f"{SNAPSHOT}: {side}×{side}, preset {about['preset']}, trained on {about['cur_nimg']:,} images; {DEVICE}")
print(f"terms: {about.get('licence') or 'none given'}")

# %% [markdown]
# ## People who do not exist
#
# A row for each person, drawn from how the training embeddings are spread; a column for each noise.

# %%
person = sample_identities(snapshot.population, PEOPLE, seed=SEED)
display(people_sheet(snapshot, person, noises=NOISES, seed=SEED))

# %% [markdown]
# ## People of the training, and people it never saw
#
# The photo, then faces made of the photo's embedding alone. The gap between the two sheets is what the generator knows
# by heart.

# %%
for split, title in (("train", "people of the training"), ("test", "people never seen")):
    if DATA is None:
        print(f"left out, {title}: set DATA to a prepared data set")
        continue
    with told():
        dataset = PreparedDataset(DATA, split)
        photos = dataset.batch(dataset.people(PEOPLE))
        sheet = people_sheet(snapshot, photos.c, photos.images, noises=NOISES, seed=SEED)
        print(title)
        display(sheet)

# %% [markdown]
# ## Your own photo
#
# FaceNet reads the photo, the generator draws what FaceNet read. The numbers are the cosine between that embedding and
# the one that FaceNet reads from each face: two photos of one person have 0.7 on average, of two people 0.0.

# %%
if PHOTO is None:
    print("left out: set PHOTO to a picture file")
else:
    with told():
        _, c = next(iter(from_photos([PHOTO], snapshot, device=DEVICE).chunks))
        photo = from_pil([centre_crop(decode_image(Path(PHOTO).read_bytes()), side)])
        display(people_sheet(snapshot, c, photo, noises=NOISES, seed=SEED))
        z = torch.cat([noise(SEED, 0, 1, snapshot.network.z_dim, variant=variant) for variant in range(NOISES)])
        made = load_facenet(device=DEVICE).embed(to_x(render(snapshot.network, z, c.expand(NOISES, -1))).to(DEVICE))
        print("cosine:", *(f"{value:.2f}" for value in (made.cpu() @ c[0]).tolist()))

# %% [markdown]
# ## What the noise does
#
# One person. Each row turns one noise up, from none at all (left) to more than the training ever saw (right).

# %%
display(noise_sheet(snapshot, person[0], seed=SEED))

# %% [markdown]
# ## From one person to another
#
# The embedding goes along the arc from each person of `BETWEEN` to the next, the noise stays.

# %%
with told():
    ends = [one_embedding(end, snapshot, seed=SEED, device=DEVICE) for end in BETWEEN]
    display(way_sheet(snapshot, torch.stack(ends), seed=SEED))
