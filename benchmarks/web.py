"""Time and CPU time per face in the browser, with the page of scripts/build_web.py.

    python scripts/build_web.py default --out faces-page/
    python benchmarks/web.py faces-page/ [--faces 60]

The folder is served as static files and opened in headless Chromium: without cross-origin isolation, which allows one
thread, then with it, which allows up to 4. CPU time is that of all Chromium processes and depends little on other load
of the machine; wall-clock time does depend on it.
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
GENERATE = """async count => {
    const { generate } = await import("./app.js"), about = await (await fetch("model.json")).json();
    const c = new Float64Array(about.c_dim).fill(1 / Math.sqrt(about.c_dim)), z = new Float64Array(about.z_dim);
    const times = [];
    for (let i = 0; i < count; i++) {
        const started = performance.now();
        await generate(c, z);
        times.push(performance.now() - started);
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


def cpu_seconds() -> float:
    """User and system time of all child processes so far."""
    return sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))


def measure(folder: str, handler: type[Plain], faces: int) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_selector("body[data-done]", timeout=300_000)
        threads = page.inner_text("#status").partition(", ")[2]
        before = cpu_seconds()
        times = page.evaluate(GENERATE, faces)
        spent = cpu_seconds() - before
        browser.close()
    server.shutdown()
    p50, p99 = times[len(times) // 2], times[int(0.99 * len(times))]
    print(f"{threads:<10} p50 {p50:.0f} ms, p99 {p99:.0f} ms, CPU {1e3 * spent / faces:.0f} ms per face", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="that scripts/build_web.py wrote")
    parser.add_argument("--faces", type=int, default=60, help="faces to generate")
    options = parser.parse_args()
    for handler in (Plain, Isolated):
        measure(options.folder, handler, options.faces)


if __name__ == "__main__":
    main()
