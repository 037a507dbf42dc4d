#!/usr/bin/env bash
# The recipe and its evaluation, from photos to the tables of docs/results.md.
#
#     bash runs/vultus-cpu.sh CELEBA [IMAGES] [THREADS]
#
# CELEBA is a folder with a sub-folder of photos for each person, or with Parquet files. VULTUS_WEIGHTS is a folder with
# FaceNet's weights. IMAGES is the number of images seen in training, 156,000 by default: two to two and a half hours on
# two cores (three and a half on one), and 20 minutes for the evaluation. After an interruption, run it again: it resumes.
set -euo pipefail
source=${1:?usage: bash runs/vultus-cpu.sh CELEBA [IMAGES] [THREADS]}
images=${2:-156000}
export OMP_NUM_THREADS=${3:-2}

vultus prepare "$source" --out data/celeba --licence "CelebA: non-commercial research only, no redistribution"
vultus train --preset vultus-cpu --data data/celeba --out runs/vultus-cpu --images "$images" --dtype float32
vultus evaluate runs/vultus-cpu --data data/celeba --split both
vultus report runs/vultus-cpu
python scripts/groups.py runs/vultus-cpu/snapshot.safetensors --data data/celeba --out runs/vultus-cpu/failures.jpg
