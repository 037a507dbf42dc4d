"""`vultus publish`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from vultus.cli.common import open_snapshot
from vultus.errors import UserError


def publish_command(arguments: Sequence[str]) -> int:
    """Publish on the Hugging Face hub."""
    parser = ArgumentParser(prog="vultus publish", exit_on_error=False, description="Publish on the Hugging Face hub.")
    parser.add_argument("snapshot", type=str, help="snapshot, run folder, `default`, or a folder that --dry-run wrote")
    parser.add_argument("--repo", type=str, required=True, help="its name on the hub: user/name")
    parser.add_argument("--out", type=str | None, help="folder to write; default: RUN/publish, else ./publish")
    parser.add_argument("--dry-run", action="store_true", help="write the folder and upload nothing")
    parser.add_argument("--private", action="store_true", help="nobody else may see it")
    parser.add_argument("--evaluation", type=str | None, help="folder of evaluate --out; default: RUN/evaluation")
    parser.add_argument("--licence", type=str | None, help="id such as mit, unless the data are restricted")
    parser.add_argument("--dtype", type=Literal["float32", "float16"], default="float32", help="of the weights")
    parser.add_argument("--people", type=bool, default=True, help="publish how the training embeddings are spread")
    parser.add_argument("--seed", type=int, default=0, help="of the people and noise in samples.jpg")
    options = parser.parse_args(list(arguments))
    from vultus.export.publish import check_token, upload, write_publication
    from vultus.models.hub import is_published

    source = Path(options.snapshot)
    if not options.dry_run:
        check_token()  # said before the work
    snapshot = open_snapshot(options.snapshot, "cpu")
    if source.is_dir() and is_published(source) and not (source / "snapshot.safetensors").is_file():
        folder = source  # as it is, with what was changed in its card
        given = [name for name in ("out", "evaluation", "licence") if options[name] is not None]
        if given:
            raise UserError(f"{folder}: is published as it is; --{given[0]} goes with a snapshot or run folder")
    else:
        folder = Path(options.out or (source / "publish" if source.is_dir() else "publish"))
        evaluation = options.evaluation
        if evaluation is None and (source / "evaluation" / "results.json").is_file():
            evaluation = source / "evaluation"
        write_publication(
            snapshot,
            options.repo,
            folder,
            evaluation=None if evaluation is None else (Path(evaluation), options.snapshot),
            **{name: options[name] for name in ("licence", "dtype", "people", "seed")},
        )
    print(folder if options.dry_run else upload(folder, options.repo, private=options.private))
    return 0
