"""`vultus publish`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from vultus._ranges import Seed
from vultus.cli.options import ArgumentParser


def publish_command(arguments: Sequence[str]) -> int:
    """Publish on the Hugging Face hub."""
    parser = ArgumentParser(prog="vultus publish", exit_on_error=False, description="Publish on the Hugging Face hub.")
    parser.add_argument("snapshot", type=str, help="snapshot, run folder, `default`, or a folder that --dry-run wrote")
    parser.add_argument("--repo", type=str, required=True, help="name on the hub: user/name")
    parser.add_argument("--out", type=str | None, help="folder to write; default: RUN/publish, else ./publish")
    parser.add_argument("--dry-run", action="store_true", help="write the folder and upload nothing")
    parser.add_argument("--private", action="store_true", help="create the model as a private one")
    parser.add_argument(
        "--evaluation",
        type=str | None,
        help="folder of an evaluation; default: the one of this snapshot in the run folder",
    )
    parser.add_argument("--licence", type=str | None, help="licence id such as mit, unless the data are restricted")
    parser.add_argument("--dtype", type=Literal["float32", "float16"], default="float32", help="of the weights")
    parser.add_argument("--people", type=bool, default=True, help="publish the distribution of the training embeddings")
    parser.add_argument("--seed", type=Seed, default=0, help="of the identities and the noise in samples.jpg")
    options = parser.parse_args(list(arguments))
    from vultus.export.publish import publish

    names = ("out", "dry_run", "private", "evaluation", "licence", "dtype", "seed")
    given = {name: options[name] for name in names}
    print(publish(options.snapshot, options.repo, population=options.people, **given))
    return 0
