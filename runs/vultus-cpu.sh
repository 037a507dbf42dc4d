#!/usr/bin/env bash
# The embedded snapshot and its figures, from photos to the table of docs/results.md.
#
#     bash runs/vultus-cpu.sh CELEBA [THREADS]
#
# CELEBA is a folder of photos by person or of Parquet files, VULTUS_WEIGHTS a folder with FaceNet's weights. Some 75
# minutes on one core of a 2-core machine; run it again after an interruption, it goes on where it was.
set -euo pipefail
source=${1:?usage: bash runs/vultus-cpu.sh CELEBA [THREADS]}
export OMP_NUM_THREADS=${2:-1}

vultus prepare "$source" --out data/celeba --licence "CelebA: non-commercial research only, no redistribution"
vultus train --preset vultus-cpu --data data/celeba --out runs/vultus-cpu --images 60000 --dtype float32
vultus evaluate runs/vultus-cpu --data data/celeba --split both --out runs/vultus-cpu/evaluation
vultus report runs/vultus-cpu
python scripts/groups.py runs/vultus-cpu/snapshot.safetensors --data data/celeba --out runs/vultus-cpu/failures.jpg
