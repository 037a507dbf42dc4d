"""`vultus report`."""

from __future__ import annotations

from collections.abc import Sequence

from vultus.cli.options import ArgumentParser
from vultus.errors import UserError


def report_command(arguments: Sequence[str]) -> int:
    """Write a report about run folders."""
    parser = ArgumentParser(prog="vultus report", exit_on_error=False, description="Write a report about run folders.")
    parser.add_argument("runs", type=str, nargs="+", help="run folders; several are shown side by side")
    parser.add_argument("--out", type=str | None, help="folder to write; default: the run folder, if there is one")
    parser.add_argument(
        "--evaluation",
        type=str,
        nargs="+",
        default=[],
        help="folders of evaluations; default: those in the run folders",
    )
    parser.add_argument("--with-photos", action="store_true", help="show photos of the data set beside the faces")
    parser.add_argument("--wandb", action="store_true", help="as a report on Weights & Biases (extra `track`)")
    parser.add_argument("--public", action="store_true", help="with --wandb: create a public link")
    options = parser.parse_args(list(arguments))
    if options.out is None and len(options.runs) > 1:
        raise UserError("a report of several runs needs --out FOLDER")
    if options.public and not options.wandb:
        raise UserError("--public needs --wandb; report.html is a file that you can publish anywhere")
    if options.wandb:
        from vultus.reporting.wandb_report import report_to_wandb

        lines = report_to_wandb(
            options.runs,
            options.out,
            evaluation=options.evaluation,
            public=options.public,
            with_photos=options.with_photos,
        )
    else:
        from vultus.reporting.html import report

        paths = report(options.runs, options.out, evaluation=options.evaluation, with_photos=options.with_photos)
        lines = [str(path) for path in paths]
    print("\n".join(lines))
    return 0
