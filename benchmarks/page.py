"""Latency of the web page: until the first face is shown, and until new faces are shown.

    vultus serve --port 8000 &
    python benchmarks/page.py --url http://127.0.0.1:8000 --runs 20 --photo me.jpg

In headless Chromium, median and maximum seconds: from opening the page to the first face; from a click on New to all
new faces; with --photo, from choosing the file to the faces, and to all similarities. For comparison, the same request
without a browser.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import statistics
import time
import urllib.request
from collections.abc import Callable
from typing import Any

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SHOWN = """before => {
    const shown = [...document.querySelectorAll("#faces img")];
    return shown.length && shown[0].src !== before && shown.every((image) => image.complete && image.naturalWidth);
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--runs", type=int, default=20, help="repetitions, after one for warming up")
    parser.add_argument("--photo", help="photo of one face; default: photos are not measured")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    latencies: dict[str, list[float]] = {}

    def measure(name: str, action: Callable[[], object]) -> None:
        started = time.perf_counter()
        action()
        latencies.setdefault(name, []).append(time.perf_counter() - started)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        for _ in range(options.runs + 1):
            page = browser.new_page(viewport={"width": 1280, "height": 860})
            measure("open page: first face", functools.partial(open_page, page, options.url))
            before = page.get_attribute("#faces img", "src")
            measure("New: 8 faces", functools.partial(new_faces, page, before))
            if options.photo:
                page.click("#tab-photo")
                started = time.perf_counter()
                page.set_input_files("#photo-file", options.photo)
                wait_for_faces(page)
                latencies.setdefault("choose photo: 8 faces", []).append(time.perf_counter() - started)
                page.wait_for_function("() => document.querySelectorAll('.score-value:not(:empty)').length >= 8")
                latencies.setdefault("choose photo: all similarities", []).append(time.perf_counter() - started)
            page.close()
            address = f"{options.url}/v1/random?num=8"
            request = urllib.request.Request(address, headers={"Accept": "application/json"})
            measure("8 faces without a browser", functools.partial(fetch, request))
        browser.close()
    for name, seconds in latencies.items():
        kept = seconds[1:]  # without the run for warming up
        print(f"{name}: median {statistics.median(kept):.2f} s, maximum {max(kept):.2f} s")


def fetch(request: urllib.request.Request) -> bytes:
    with urllib.request.urlopen(request) as response:
        return response.read()


def open_page(page: Any, url: str) -> None:
    page.goto(url)
    wait_for_faces(page)


def new_faces(page: Any, before: str) -> None:
    page.click("#seed-new")
    wait_for_faces(page, before)


def wait_for_faces(page: Any, before: str | None = "") -> None:
    page.wait_for_function(SHOWN, arg=before)


if __name__ == "__main__":
    main()
