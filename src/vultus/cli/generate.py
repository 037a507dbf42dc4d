"""`vultus generate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from vultus._ranges import Count, ImageFormat, NoiseStrength, PictureSide, Quality, Seed, Steps
from vultus.cli.options import ArgumentParser, add_device
from vultus.errors import UserError


def generate_command(arguments: Sequence[str]) -> int:
    """Generate faces."""
    parser = ArgumentParser(prog="vultus generate", exit_on_error=False, description="Generate faces.")
    parser.add_argument(
        "snapshot", type=str, help="snapshot, run or published folder, hf://user/name, FILE.onnx, `default`"
    )
    parser.add_argument(
        "--embeddings", type=str | None, help="FILE.npy, .npz, .csv, .json, .safetensors, .parquet[:COLUMN]"
    )
    parser.add_argument("--photos", type=str, nargs="+", help="photos, or folders of photos")
    parser.add_argument(
        "--as-one", action="store_true", help="the mean of all photos or embeddings: several photos of one person"
    )
    parser.add_argument("--random", type=Count | None, help="number of random identities")
    parser.add_argument(
        "--between", type=str, nargs=2, help="interpolate between two embeddings: photo, FILE#ROW or random:N"
    )
    parser.add_argument("--out", type=str, required=True, help="folder to write, or with --grid an image file")
    parser.add_argument("--num", type=Count, default=1, help="faces of each embedding")
    parser.add_argument("--seed", type=Seed, default=0, help="of noise and random identities")
    parser.add_argument("--grid", action="store_true", help="one grid of all faces instead of single files")
    parser.add_argument(
        "--labels", action="store_true", help="with --grid: names of rows and columns, and the photo before its faces"
    )
    parser.add_argument("--format", type=ImageFormat, default="png", help="of single files")
    parser.add_argument("--quality", type=Quality, default=95, help="of JPEG and WebP")
    parser.add_argument("--size", type=PictureSide | None, help="side in pixels, to which faces are resized (Lanczos)")
    parser.add_argument(
        "--scores", action="store_true", help="list the cosine of each face to its embedding, by the same encoder"
    )
    parser.add_argument("--frames", action="store_true", help="with --between: also one file for each face")
    parser.add_argument("--mp4", action="store_true", help="with --between: also a video (extra `video`)")
    parser.add_argument("--steps", type=Steps, default=9, help="faces of --between")
    parser.add_argument(
        "--noise_strength", type=NoiseStrength, default=1.0, help="factor of the noise; below 1: less variation"
    )
    parser.add_argument(
        "--best-of", type=Count, default=1, help="draw K times as many noises, keep the faces most like the embedding"
    )
    parser.add_argument(
        "--align", type=bool | None, help="find and align the face in photos; default: if the extra is installed"
    )
    parser.add_argument(
        "--encoder", type=str | None, help="FILE.onnx that embeds the photos, where the model was trained on one"
    )
    parser.add_argument(
        "--edit", type=str, nargs="+", help="NAME=STRENGTH, e.g. smile=+1.5, in standard deviations (see vultus probe)"
    )
    parser.add_argument("--directions", type=str | None, help="of --edit: file that vultus probe wrote")
    parser.add_argument("--batch", type=Count, default=16, help="faces in memory at once; does not change the faces")
    parser.add_argument("--no-mark", action="store_true", help="no invisible watermark, for metrics on the pixels")
    parser.add_argument("--c2pa-cert", type=str | None, help="CHAIN.pem: sign the images (C2PA, extra `sign`)")
    parser.add_argument("--c2pa-key", type=str | None, help="KEY.pem of that certificate")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace existing files that show something else; never the inputs"
    )
    add_device(parser)
    options = parser.parse_args(list(arguments))
    given = [name for name in ("embeddings", "photos", "random", "between") if options[name] is not None]
    if len(given) != 1:
        raise UserError("give one of --embeddings FILE, --photos PATH ..., --random N, --between A B")
    if options.as_one and options.photos is None and options.embeddings is None:
        raise UserError("--as-one takes the mean of --photos or --embeddings; give one of these")
    if options.best_of > 1 and options.between is not None:
        raise UserError("--best-of chooses faces of one embedding; leave it out with --between, whose faces form a row")
    for name, needed in (("labels", "grid"), ("frames", "between"), ("mp4", "between")):
        if options[name] and not options[needed]:
            raise UserError(f"--{name} is an option of --{needed}; leave it out, or add --{needed}")
    if options.directions is not None and not options.edit:
        raise UserError("--directions is an option of --edit; leave it out, or add --edit NAME=STRENGTH")
    if (options.c2pa_cert is None) != (options.c2pa_key is None):
        raise UserError("--c2pa-cert CHAIN.pem and --c2pa-key KEY.pem are needed together")
    from vultus.data.items import counted
    from vultus.sampling.conditioning import (
        as_one,
        from_embeddings,
        from_photos,
        inputs_of,
        one_embedding,
        random_identities,
    )
    from vultus.sampling.directions import edited, load_directions, parse_edits
    from vultus.sampling.face_files import Pictures
    from vultus.sampling.generate import generate
    from vultus.sampling.generator import load
    from vultus.sampling.interpolate import interpolate

    edits = parse_edits(options.edit or ())
    snapshot = load(options.snapshot, device=options.device)
    directions = load_directions(options.directions, snapshot) if edits else None
    if directions is not None:
        directions.check(edits)
        for name, strength in edits.items():
            if cost := directions.cost(name, strength):
                print(f"note: {cost} (measured by vultus probe)", file=sys.stderr)
    photo: dict[str, Any] = {"align": options.align, "device": next(snapshot.network.parameters()).device}
    photo["encoder"] = options.encoder
    common: dict[str, Any] = {
        "seed": options.seed,
        "noise_strength": options.noise_strength,
        "mark": not options.no_mark,
        "overwrite": bool(options.overwrite),
        "pictures": Pictures(options.format, options.quality, options.size),
        "inputs": [path for path in (options.c2pa_cert, options.c2pa_key) if path is not None],
    }
    if options.c2pa_cert is not None:
        from vultus.images.c2pa import Signer

        common["signer"] = Signer(options.c2pa_cert, options.c2pa_key)
    if options.between is not None:
        common["inputs"] += [path for text in options.between for path in inputs_of(text)]
        a, b = (one_embedding(text, snapshot, seed=options.seed, **photo) for text in options.between)
        if directions is not None:
            a, b = (directions.edit(one[None], edits)[0] for one in (a, b))
            common["noted"] = {"edit": edits}
        common |= {"steps": options.steps, "frames": options.frames, "mp4": options.mp4}
        for path in interpolate(snapshot, a, b, options.out, **common):
            print(path)
        return 0
    if options.embeddings is not None:
        source = from_embeddings(options.embeddings, snapshot)
    elif options.photos is not None:
        source = from_photos(options.photos, snapshot, keep_frames=options.grid and options.labels, **photo)
    else:
        source = random_identities(snapshot, options.random, seed=options.seed)
    if options.as_one:
        source = as_one(source)
    if directions is not None:
        source = edited(source, directions, edits)
    summary = generate(
        snapshot,
        source,
        options.out,
        num=options.num,
        batch=options.batch,
        grid=bool(options.grid),
        labels=options.labels,
        scores=options.scores,
        best_of=options.best_of,
        **common,
    )
    skipped = f", {counted(len(summary.skipped), 'photo')} skipped" if summary.skipped else ""
    faces, embeddings = counted(summary.faces, "face"), counted(summary.embeddings, "embedding")
    print(f"{faces} of {embeddings}{skipped}", file=sys.stderr)
    print(summary.out)
    return 0
