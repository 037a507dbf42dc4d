"""Screenshots of the page for the documentation: docs/serve.png. They show only people who do not exist.

    VULTUS_WEIGHTS=... vultus serve --port 8000 &
    python scripts/screenshot.py --url http://127.0.0.1:8000 --out docs/serve.png

Left, on a desktop: an example, a generated face, is used as the photo. Right, on a phone: random people.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image

from vultus._files import atomic_path

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SCREEN, PHONE, GAP = (1280, 800), (390, 800), 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--out", default="docs/serve.png")
    parser.add_argument("--example", type=int, default=1, help="example that is used as the photo, 1 to 6")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    sheet = Image.new("RGB", (SCREEN[0] + GAP + PHONE[0], SCREEN[1]), "white")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        page = browser.new_page(viewport=dict(zip(("width", "height"), SCREEN, strict=True)), color_scheme="light")
        page.goto(f"{options.url}/#photo")
        page.get_by_role("button", name=f"Example {options.example}:").click()
        page.wait_for_function("() => document.querySelectorAll('.scale[role=img]').length === 16")
        page.mouse.move(0, 0)
        sheet.paste(Image.open(io.BytesIO(page.screenshot())), (0, 0))
        page = browser.new_page(viewport=dict(zip(("width", "height"), PHONE, strict=True)), color_scheme="dark")
        page.goto(f"{options.url}/#random")
        page.wait_for_function("() => document.querySelectorAll('#faces img').length === 4")
        page.wait_for_timeout(500)  # until the opacity transition has ended
        sheet.paste(Image.open(io.BytesIO(page.screenshot())), (SCREEN[0] + GAP, 0))
        browser.close()
    with atomic_path(Path(options.out)) as temporary:
        sheet.quantize(255, dither=Image.Dither.FLOYDSTEINBERG).save(temporary, "PNG")


if __name__ == "__main__":
    main()
