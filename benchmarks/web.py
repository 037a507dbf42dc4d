"""What a face costs in the browser, on the page of scripts/build_web.py.

    python scripts/build_web.py default --out faces-page/
    python benchmarks/web.py faces-page/ [--faces 60]

The page is served as files and opened in Chromium without a window, with one thread as a plain server gives it, then
isolated, with as many as the page takes (at most 4). Processor time is that of all of Chromium's processes, and depends
little on what else the machine does; the time on the clock does.
"""

import argparse
import functools
import http.server
import shutil
import threading
from typing import Any

import psutil
from playwright.sync_api import sync_playwright

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
DRAW = """async count => {
    const { draw } = await import("./app.js"), about = await (await fetch("model.json")).json();
    const c = new Float64Array(about.c_dim).fill(1 / Math.sqrt(about.c_dim)), z = new Float64Array(about.z_dim);
    const times = [];
    for (let i = 0; i < count; i++) {
        const begun = performance.now();
        await draw(c, z);
        times.push(performance.now() - begun);
    }
    return times.sort((a, b) => a - b);
}"""


class Plain(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


class Isolated(Plain):
    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()


def processor() -> float:
    """Seconds that the processes below this one took so far."""
    return sum(sum(one.cpu_times()[:2]) for one in psutil.Process().children(recursive=True))


def measure(folder: str, handler: type[Plain], faces: int) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=ARGUMENTS)
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_selector("body[data-done]", timeout=300_000)
        threads = page.inner_text("#status").partition(", ")[2]
        before = processor()
        times = page.evaluate(DRAW, faces)
        spent = processor() - before
        browser.close()
    server.shutdown()
    p50, p99 = times[len(times) // 2], times[int(0.99 * len(times))]
    print(
        f"{threads:<10} p50 {p50:.0f} ms, p99 {p99:.0f} ms, processor {1e3 * spent / faces:.0f} ms a face", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--faces", type=int, default=60)
    options = parser.parse_args()
    for handler in (Plain, Isolated):
        measure(options.folder, handler, options.faces)


if __name__ == "__main__":
    main()
