"""`vultus demo`."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser


def demo_verb(arguments: Sequence[str]) -> int:
    """See faces; train a tiny network."""
    parser = ArgumentParser(prog="vultus demo", exit_on_error=False, description="See faces; train a tiny network.")
    parser.add_argument("--out", type=str, default="vultus-demo", help="folder to write")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the tiny training")
    parser.add_argument("--seed", type=int, default=0, help="of noise and random people")
    options = parser.parse_args(list(arguments))
    from vultus.cli.demo import demo

    demo(options.out, seconds=options.seconds, seed=options.seed)
    return 0
