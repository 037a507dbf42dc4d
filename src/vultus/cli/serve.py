"""`vultus serve`: a web page and an HTTP API."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from vultus._device import resolve_device
from vultus._download import HUB
from vultus._files import processors
from vultus._ranges import Amount, Count, Port, Seconds
from vultus.cli.options import ArgumentParser, add_device
from vultus.errors import UserError

MISSING = "serving needs the extra `serve`: pip install 'vultus[serve]'"


def serve_command(arguments: Sequence[str]) -> int:
    """Parse the options, open the snapshot and serve it until a signal."""
    parser = ArgumentParser(prog="vultus serve", exit_on_error=False, description="A web page and an HTTP API.")
    parser.add_argument(
        "snapshot",
        type=str,
        nargs="?",
        default="default",
        help="snapshot, run or published folder, hf://user/name, FILE.onnx, `default`",
    )
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address to listen on; 0.0.0.0: all interfaces")
    parser.add_argument("--port", type=Port, default=8000, help="port to listen on; 0: a free one")
    parser.add_argument("--token", type=str | None, help="bearer token that requests must carry; safer in VULTUS_TOKEN")
    parser.add_argument(
        "--cors",
        type=str,
        nargs="+",
        default=[],
        help="origins whose pages may use the API from a browser, as https://a.example; *: every origin",
    )
    parser.add_argument("--faces", type=Count, default=64, help="maximal number of faces per request")
    parser.add_argument(
        "--queue", type=Count, default=256, help="maximal number of faces waiting or in progress; more get status 429"
    )
    parser.add_argument("--megabytes", type=Amount, default=16.0, help="maximal size of a photo's file")
    parser.add_argument("--megapixels", type=Amount, default=50.0, help="maximal number of pixels of a photo")
    parser.add_argument(
        "--seconds",
        type=Seconds,
        default=30.0,
        help="time limit for receiving a body, for answering it, and for reading each 64 KiB of the answer",
    )
    parser.add_argument(
        "--connections",
        type=Count | None,
        help="maximal number of open connections; default: 1000, if the system allows",
    )
    parser.add_argument(
        "--client-connections", type=Count | None, help="the same of one client address; default: half of --connections"
    )
    parser.add_argument(
        "--header-seconds", type=Seconds, default=10.0, help="time limit for receiving the header of a request"
    )
    parser.add_argument(
        "--idle-seconds", type=Seconds, default=5.0, help="time after which a connection without a request is closed"
    )
    parser.add_argument(
        "--align", type=bool | None, help="detect and align the face in photos; default: if the extra is installed"
    )
    parser.add_argument(
        "--exact", action="store_true", help="fixed batch size: bit-identical faces, but slower single faces"
    )
    parser.add_argument("--no-mark", action="store_true", help="no invisible watermark, for measurements")
    parser.add_argument(
        "--encoder",
        type=str | None,
        help="FILE.onnx: the encoder of the embeddings, where the model was trained on one",
    )
    parser.add_argument("--directions", type=str | None, help="of edits: file that vultus probe wrote")
    add_device(parser)
    options = parser.parse_args(list(arguments))
    token = options.token or os.environ.get("VULTUS_TOKEN") or None
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise UserError("--token: only printable ASCII characters without spaces can be sent in an HTTP header")
    # Two generator calls may run at the same time, each on half of the cores. With all cores for every matrix product
    # the threads wait for each other, and for HTTP, watermarks and PNG: slower in total (docs/log).
    # torch and numpy read the variable when they are imported, which must not have happened yet.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, processors() // 2)))
    try:
        from vultus.serving import server
        from vultus.serving.connections import connection_limits
        from vultus.serving.settings import ServerSettings, checked_origins
    except ImportError as error:
        raise UserError(f"{MISSING} ({error.name} is not installed)") from None
    from vultus.sampling.generator import load
    from vultus.serving.engine import open_engine

    settings = ServerSettings(
        max_faces=options.faces,
        max_queue=options.queue,
        max_body_bytes=int(options.megabytes * 1e6),
        max_megapixels=options.megapixels,
        timeout=options.seconds,
        connections=connection_limits(
            options.connections,
            options.client_connections,
            header=options.header_seconds,
            idle=options.idle_seconds,
            transfer=options.seconds,
        ),
        token=token,
        cors=checked_origins(options.cors),
    )
    with server.bind(options.host, options.port) as listener:  # before loading: a port in use is reported at once
        device = resolve_device(options.device)
        engine = open_engine(
            load(options.snapshot, device=device),
            align=options.align,
            device=device,
            encoder_file=options.encoder,
            directions_file=options.directions,
            name=options.snapshot if options.snapshot.startswith(HUB) else None,
            exact=options.exact,
            watermark=not options.no_mark,
        )
        for line in engine.missing.values():
            print(f"note: {line}", file=sys.stderr)
        server.serve(engine, settings, listener)
    return 0
