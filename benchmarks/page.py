"""How long a visitor of the page waits for the first face, and then for new ones.

    vultus serve --port 8000 &
    python benchmarks/page.py --url http://127.0.0.1:8000 --runs 20 --photo me.jpg

In one headless Chromium, by turns: from opening the page to the first face shown; from a click on New to all new
faces; with --photo, from choosing the file to the first face of it, and to all similarities. Seconds, median and most.
Beside them the same request without a browser, which is the server's share.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
import urllib.request
from collections.abc import Callable
from typing import Any

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SHOWN = """before => {
    const shown = [...document.querySelectorAll("#faces img")];
    return shown.length && shown[0].src !== before && shown.every((one) => one.complete && one.naturalWidth);
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--photo", help="with one face; left out, photos are not measured")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    found: dict[str, list[float]] = {}

    def clock(name: str, work: Callable[[], object]) -> None:
        begun = time.perf_counter()
        work()
        found.setdefault(name, []).append(time.perf_counter() - begun)

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        for _ in range(options.runs + 1):
            page = browser.new_page(viewport={"width": 1280, "height": 860})
            clock("page opened: first face", lambda page=page: (page.goto(options.url), faces(page)))
            before = page.get_attribute("#faces img", "src")
            clock("New: 8 faces", lambda page=page, before=before: (page.click("#seed-new"), faces(page, before)))
            if options.photo:
                page.click("#tab-photo")
                chosen = time.perf_counter()
                page.set_input_files("#photo-file", options.photo)
                faces(page)
                found.setdefault("photo chosen: 8 faces", []).append(time.perf_counter() - chosen)
                page.wait_for_function("() => document.querySelectorAll('.score-value:not(:empty)').length >= 8")
                found.setdefault("photo chosen: all similarities", []).append(time.perf_counter() - chosen)
            page.close()
            address = f"{options.url}/v1/random?num=8"
            request = urllib.request.Request(address, headers={"Accept": "application/json"})
            clock("8 faces without a browser", lambda request=request: urllib.request.urlopen(request).read())
        browser.close()
    for name, seconds in found.items():
        kept = seconds[1:]  # the first one is for warming up
        print(f"{name}: {statistics.median(kept):.2f} s (at most {max(kept):.2f})")


def faces(page: Any, before: str | None = "") -> None:
    page.wait_for_function(SHOWN, arg=before)


if __name__ == "__main__":
    main()
