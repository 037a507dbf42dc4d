"""`vultus` whose server fails where a request asks for it, with the request's data in the message of the error."""

from __future__ import annotations

import base64
import sys
from typing import Any

from vultus.cli.main import main
from vultus.serving.engine import Engine

SEED = 666
generator_inputs = Engine.generator_inputs


def failing_inputs(self: Engine, c: Any, num: int, seed: int, *others: Any) -> Any:
    if seed == SEED:
        try:
            raise ValueError(f"injected: could not use {c.tolist()}")
        except ValueError as error:
            raise RuntimeError(f"injected: {c[0, 0].item()!r}") from error
    return generator_inputs(self, c, num, seed, *others)


def failing_embed(self: Engine, data: bytes, *_: Any) -> Any:
    raise RuntimeError(f"injected: cannot read {data!r} {base64.b64encode(data).decode()}")


if __name__ == "__main__":
    Engine.generator_inputs = failing_inputs  # type: ignore[method-assign]
    if "--fail-photos" in sys.argv:
        sys.argv.remove("--fail-photos")
        Engine.embed = failing_embed  # type: ignore[method-assign]
        missing = Engine.__init__

        def without_missing(self: Engine, *arguments: Any, **options: Any) -> None:
            missing(self, *arguments, **options)
            self.missing.pop("photos", None)

        Engine.__init__ = without_missing  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
