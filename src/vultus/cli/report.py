"""`vultus report`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from vultus.errors import UserError


def report_command(arguments: Sequence[str]) -> int:
    """Tell what was trained, and how well."""
    parser = ArgumentParser(
        prog="vultus report", exit_on_error=False, description="Tell what was trained, and how well."
    )
    parser.add_argument("runs", type=str, nargs="+", help="run folders; several are shown side by side")
    parser.add_argument("--out", type=str | None, help="folder to write; default: the run folder, if there is one")
    parser.add_argument(
        "--evaluation", type=str, nargs="+", default=[], help="folders of evaluate --out; default: RUN/evaluation"
    )
    parser.add_argument("--with-photos", action="store_true", help="show photos of the data set beside the faces")
    parser.add_argument("--wandb", action="store_true", help="as a report on Weights & Biases (extra `track`)")
    parser.add_argument("--public", action="store_true", help="with --wandb: a link for everybody")
    options = parser.parse_args(list(arguments))
    if options.out is None and len(options.runs) > 1:
        raise UserError("a report of several runs needs --out FOLDER")
    if options.public and not options.wandb:
        raise UserError("--public goes with --wandb; the page itself is a file to send or to put anywhere")
    from vultus.reporting.content import tell
    from vultus.reporting.run_folder import read_evaluations, read_runs

    runs = read_runs(options.runs)
    story = tell(runs, read_evaluations(runs, options.evaluation))
    for each in story.runs:
        for line in [*([each.state] if each.state else []), *each.remarks]:
            print(f"vultus: {each.run.name}: {line}", file=sys.stderr)
    for line in story.remarks:
        print(f"vultus: {line}", file=sys.stderr)
    out = options.out or options.runs[0]
    if options.wandb:
        from vultus.reporting.wandb_report import write_wandb_report

        lines = write_wandb_report(story, out, public=options.public, with_photos=options.with_photos)
    else:
        from vultus.reporting.html import write_report

        lines = [str(path) for path in write_report(story, out, with_photos=options.with_photos)]
    print("\n".join(lines))
    return 0
