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
# # How good is a generator?
#
# The evaluation of `vultus evaluate` as a notebook: how the training went, the table with its intervals, plots, and the
# best and worst faces, for one snapshot or several side by side. What each row means: `docs/metrics.md`.
#
# The evaluation needs a prepared data set and FaceNet's weights. Without them the notebook shows what the snapshots
# themselves carry, and says in one line what it left out.

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
# ## What to measure
#
# Edit the values, or set the environment variables. Two faces of each of 2,500 photos take a quarter of an hour or more
# on one processor core, for each snapshot and split; `LIMIT` takes fewer photos, spread over the data set.

# %%
import os

SNAPSHOTS = os.environ.get("VULTUS_NB_SNAPSHOT", "default").split()  # run folders, snapshot files, `default`
DATA = os.environ.get("VULTUS_NB_DATA")  # folder of a prepared data set (`vultus prepare`), or None
SPLIT = os.environ.get("VULTUS_NB_SPLIT", "both")  # test: people never seen; train; both: and the gap between them
LIMIT = int(os.environ.get("VULTUS_NB_LIMIT", "0")) or None  # photos of a split; None: all
NOISES = int(os.environ.get("VULTUS_NB_NOISES", "2"))  # faces of each photo
JUDGES = os.environ.get("VULTUS_NB_JUDGES", "dlib").split()  # dlib, and files of ONNX face encoders
FETCH = bool(os.environ.get("VULTUS_NB_FETCH"))  # download the weights of FID and LPIPS (340 MB)
OUT = os.environ.get("VULTUS_NB_OUT", "vultus-results")  # folder for the table, plots and pictures

# %%
# %matplotlib inline
import json
from pathlib import Path

import torch
from IPython.display import Image, Markdown, display

from vultus.errors import told
from vultus.evaluation.compare import compare
from vultus.evaluation.plots import curves, distributions, intervals
from vultus.models.facenet import load_facenet
from vultus.models.snapshot import default_snapshot, load_snapshot
from vultus.training.run_log import read_stats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
snapshots = {name: load_snapshot(default_snapshot() if name == "default" else name, DEVICE) for name in SNAPSHOTS}
for name, snapshot in snapshots.items():
    about = snapshot.metadata
    print(f"{name}: preset {about['preset']}, {about['cur_nimg']:,} images, {about['hours']} h; {DEVICE}")

# %% [markdown]
# ## The training
#
# Losses of the two networks, and the error on people kept out of it, for snapshots that are run folders.

# %%
for name in SNAPSHOTS:
    stats = Path(name) / "stats.jsonl"
    if stats.is_file():
        print(name)
        display(curves(read_stats(stats)))
    else:
        print(f"left out, {name}: not a run folder, it holds no statistics of its training")

# %% [markdown]
# ## The evaluation
#
# The column *real photos* is what a perfect generator would reach. Brackets are 95 % intervals over people.

# %%
results = {}
if DATA is None:
    print("left out: set DATA to a prepared data set; what the snapshots say of themselves:")
    for name, snapshot in snapshots.items():
        print(f"{name}: {json.dumps(snapshot.metadata.get('metrics') or 'nothing')}")
else:
    with told():
        text, results = compare(
            snapshots,
            DATA,
            encoder=load_facenet(device=DEVICE),
            judges=tuple(JUDGES),
            fetch=FETCH,
            split=SPLIT,
            noises=NOISES,
            limit=LIMIT,
            out=OUT,
            device=DEVICE,
        )
        display(Markdown(text))

# %% [markdown]
# ## Figures
#
# A point with its interval for each snapshot; the dashed line is real photos; the arrow says which way is better.

# %%
if results:
    display(intervals(results))

# %% [markdown]
# ## Scores
#
# How alike two photos of one person are, photos of two people, and faces and photos of the person asked for; for every
# encoder, the first one being FaceNet, which may have been in the loss. Then: how near faces come to a training photo.

# %%
if results:
    kinds = dict.fromkeys(kind for result in results.values() for kind in result["distributions"])
    display(distributions(results, list(kinds)))

# %% [markdown]
# ## Pictures
#
# For each snapshot: people beside their photo; the best and the worst faces by the judge; the faces nearest to a
# training photo, and below them these photos.

# %%
if results:
    for path in sorted(Path(OUT).glob("*.jpg")):
        print(path.stem)
        display(Image(filename=path))

# %% [markdown]
# ## Who is drawn best
#
# People by how well the judge recognises them in their faces: name, mean score, photos.

# %%
for name, result in results.items():
    for judge, people in result["people"].items():
        print(f"{name}, {judge}: best {people[:3]}, worst {people[-3:]}")
