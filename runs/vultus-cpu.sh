#!/usr/bin/env bash
# The recipe and its evaluation, from photos to the tables of the documentation.
#
#     bash runs/vultus-cpu.sh CELEBA [IMAGES] [THREADS]
#
# CELEBA is a folder with a sub-folder of photos for each person, or with Parquet files. VULTUS_WEIGHTS is a folder with
# the weights of FaceNet and MobileFaceNet; without it they are downloaded. IMAGES is the number of images seen in
# training, 180,000 by default: three and a half to four hours on two cores, and 30 minutes for the rest. After an
# interruption, run it again: it resumes.
#
# With EMBED=1 (in a clone of the repository, installed with -e) the snapshot then becomes the embedded one, and the
# tables and pictures of the documentation are measured again with it.
set -euo pipefail
source=${1:?usage: bash runs/vultus-cpu.sh CELEBA [IMAGES] [THREADS]}
images=${2:-180000}
export OMP_NUM_THREADS=${3:-2}
data=data/celeba run=runs/vultus-cpu

vultus prepare "$source" --out $data --licence "CelebA: non-commercial research only, no redistribution"
vultus train --preset vultus-cpu --data $data --out $run --images "$images"
vultus evaluate $run --data $data --split both --judge dlib mobilefacenet --out $run/evaluation
vultus report $run
python scripts/groups.py $run/snapshot.safetensors --data $data --out $run/failures.jpg

if [ -n "${EMBED:-}" ]; then
    python scripts/embed_snapshot.py $run/snapshot.safetensors $run/evaluation/results.json --data $data
    python scripts/update_docs.py $run $run/evaluation
    cp $run/failures.jpg docs/failures.jpg
    # The tables of docs/generate.md and docs/marks.md are printed.
    for count in 1 4; do
        vultus evaluate default --data $data --limit 300 --best-of $count --judge dlib mobilefacenet
    done
    python scripts/photos_of_a_person.py default --data $data
    python scripts/watermark.py default photos --data $data
fi
