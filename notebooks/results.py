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
# The evaluation of `vultus evaluate` as a notebook: the course of the training, the table with its intervals, plots,
# and the best and worst faces, for one snapshot or several side by side. The metrics are defined in `docs/metrics.md`.
#
# The evaluation needs a prepared data set and FaceNet's weights. Without them the notebook shows the results that the
# snapshots contain, and prints one line for what it left out.

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
# Edit the values, or set the environment variables. Two faces of each of 2,500 photos take a quarter of an hour or more
# on one CPU core, for each snapshot and split; `LIMIT` uses fewer photos, spread over the data set.

# %%
import os

SNAPSHOTS = os.environ.get("VULTUS_NB_SNAPSHOT", "default").split()  # run folders, snapshot files, `default`
DATA = os.environ.get("VULTUS_NB_DATA")  # folder of a prepared data set (`vultus prepare`), or None
SPLIT = os.environ.get("VULTUS_NB_SPLIT", "both")  # test: unseen people; train; both: with the gap between them
LIMIT = int(os.environ.get("VULTUS_NB_LIMIT", "0")) or None  # photos of a split; None: all
NOISES = int(os.environ.get("VULTUS_NB_NOISES", "2"))  # faces of each photo
JUDGES = os.environ.get("VULTUS_NB_JUDGES", "dlib").split()  # dlib, and files of ONNX face encoders
FETCH = bool(os.environ.get("VULTUS_NB_FETCH"))  # download the weights of FID and LPIPS (340 MB)
OUT = os.environ.get("VULTUS_NB_OUT", "vultus-results")  # folder for the table, plots and images

# %%
# %matplotlib inline
import json
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import Image, Markdown, display

import vultus

snapshots = {name: vultus.load(name) for name in SNAPSHOTS}
for name, g in snapshots.items():
    print(f"{name}: preset {g.metadata['preset']}, {g.metadata['cur_nimg']:,} images, {g.metadata['hours']} h")

# %% [markdown]
# ## The training
#
# Losses of the two networks, and the validation on people who are not in the training data, for snapshots that are run
# folders.


# %%
def plot_training(lines):
    """Plot the lines of a run's stats.jsonl."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
    for evaluator, axis in ((None, axes[0]), ("unseen", axes[1])):
        rows = [line for line in lines if line.get("evaluator") == evaluator]
        keys = ["G_adversarial", "D_adversarial"] if evaluator is None else ["identity_facenet", "mse"]
        for key in keys:
            points = [(row["cur_nimg"], row[key]) for row in rows if key in row]
            axis.plot([x for x, _ in points], [y for _, y in points], label=key)
        axis.set(xlabel="images seen", title="losses" if evaluator is None else "validation")
        axis.legend()
    plt.close(figure)
    return figure


for name in SNAPSHOTS:
    stats = Path(name) / "stats.jsonl"
    if stats.is_file():
        print(name)
        display(plot_training([json.loads(line) for line in stats.read_text().splitlines()]))
    else:
        print(f"left out, {name}: not a run folder, so it has no statistics of its training")

# %% [markdown]
# ## The evaluation
#
# The column *real photos* is what a perfect generator would reach. Brackets are 95 % intervals over people. The plots
# show the similarity of two photos of one person, of photos of two people, and of generated faces with the photos of
# the target person; then the distance of faces to training photos.

# %%
results = {}
if DATA is None:
    print("left out, the evaluation: set DATA to a prepared data set; the snapshots contain these results:")
    for name, g in snapshots.items():
        print(f"{name}: {json.dumps(g.metadata.get('metrics') or 'none')}")
else:
    settings = {"split": SPLIT, "limit": LIMIT, "noises": NOISES, "judges": tuple(JUDGES), "fetch": FETCH}
    try:
        results = vultus.evaluate(SNAPSHOTS, data=DATA, out=OUT, **settings)
    except vultus.UserError as error:
        print(f"left out, the evaluation: {error}")
    else:
        display(Markdown((Path(OUT) / "table.md").read_text()))
        for path in sorted(Path(OUT).glob("*.png")):
            display(Image(filename=str(path)))

# %% [markdown]
# ## Images
#
# For each snapshot: people beside their photo; the best and the worst faces according to the judge; the faces nearest
# to a training photo, with these photos below them.

# %%
if results:
    for path in sorted(Path(OUT).glob("*.jpg")):
        print(path.stem)
        display(Image(filename=str(path)))

# %% [markdown]
# ## Best and worst people
#
# People by how well the judge recognises them in their faces: name, mean score, photos.

# %%
for name, result in results.items():
    for judge, people in result["people"].items():
        print(f"{name}, {judge}: best {people[:3]}, worst {people[-3:]}")
