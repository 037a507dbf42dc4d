"""`vultus synthesize`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from vultus._ranges import Angle, Count, FacesOfPerson, NoiseStrength, Score, Seed
from vultus.cli.options import ArgumentParser, add_device, add_workers


def synthesize_command(arguments: Sequence[str]) -> int:
    """Write a labelled data set of people who do not exist."""
    parser = ArgumentParser(
        prog="vultus synthesize",
        exit_on_error=False,
        description="Write a labelled data set of people who do not exist.",
    )
    parser.add_argument(
        "snapshot",
        type=str,
        nargs="?",
        default="default",
        help="snapshot, run or published folder, hf://user/name, FILE.onnx, `default`",
    )
    parser.add_argument("--people", type=Count, required=True, help="number of people")
    parser.add_argument("--per-person", type=FacesOfPerson, default=20, help="faces of each person")
    parser.add_argument("--out", type=str, required=True, help="folder to write; an interrupted run is resumed")
    parser.add_argument(
        "--min-angle", type=Angle, default=50.0, help="least angle between the embeddings of two people, in degrees"
    )
    parser.add_argument(
        "--judge",
        type=str,
        default="dlib",
        help="accepts each face: dlib, mobilefacenet, FILE.onnx[:raw]; none: no judge",
    )
    parser.add_argument(
        "--threshold",
        type=Score | None,
        help="score of the judge above which a face is accepted: cosine, for dlib minus the distance. default: false "
        "accept rate 0.001",
    )
    parser.add_argument("--seed", type=Seed, default=0, help="of noise and random identities")
    parser.add_argument(
        "--noise_strength", type=NoiseStrength, default=1.0, help="factor of the noise; below 1: less variation"
    )
    parser.add_argument("--format", type=Literal["parquet", "webdataset"], default="parquet", help="of the shards")
    add_device(parser)
    add_workers(parser, "processes of one thread that share the work, same result. default: this one")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    options = parser.parse_args(list(arguments))
    from vultus.synthesis.synthesize import synthesize

    manifest = synthesize(
        options.snapshot,
        out=options.out,
        people=options.people,
        per_person=options.per_person,
        min_angle=options.min_angle,
        judge=None if options.judge == "none" else options.judge,
        threshold=options.threshold,
        seed=options.seed,
        noise_strength=options.noise_strength,
        format=options.format,
        device=options.device,
        workers=options.workers,
        engine=options.engine,
    )
    print(json.dumps(manifest, indent=2) if options.json else options.out)
    return 0
