"""The folder that draws faces in the browser, built as its script says and driven in a real Chromium."""

import base64
import functools
import http.server
import io
import runpy
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tiny_exports import Models
from vultus.errors import UserError
from vultus.models.onnx_runtime import OnnxModel, open_onnx
from vultus.sampling.latents import noise, sample_identities

SCRIPT = Path(__file__).parents[1] / "scripts" / "build_web.py"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    """The names in build_web.py."""
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def folder(script: dict[str, Any], models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built folder with a tiny model."""
    try:
        script["runtime"]()
    except UserError as error:
        if shutil.which("npm") is None or "could not fetch" in str(error):
            pytest.skip(str(error))
        raise
    out = tmp_path_factory.mktemp("web") / "page"
    script["build"](str(models["conditional-norm"][1]), out)
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> OnnxModel:
    return open_onnx(folder / "model.onnx")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def page(folder: Path) -> Iterator[Any]:
    """The page, served as files and nothing else; what it asked for and complained of is in `asked` and `said`."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}/"
    try:
        with api.sync_playwright() as play:
            browser = play.chromium.launch(executable_path=chromium, args=ARGUMENTS)
            page = browser.new_context(viewport={"width": 390, "height": 844}).new_page()
            asked: list[str] = []
            said: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.goto(address)
            page.wait_for_selector("body[data-done='1']", timeout=60_000)
            yield page
            assert said == []
            assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
            browser.close()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def pixels(page: Any, selector: str) -> list[Any]:
    """uint8 [R, R, 3] of each canvas."""
    found = page.evaluate(
        "selector => [...document.querySelectorAll(selector)].map(one => one.toDataURL().split(',')[1])", selector
    )
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in found]


def test_page_in_a_browser(page: Any, model: OnnxModel) -> None:
    assert "synthetic" in page.inner_text(".notice")
    assert "ms a face" in page.inner_text("#status")
    assert f"Model {model.metadata['model']}" in page.inner_text("#about")
    assert "for tests alone" in page.inner_text("#about")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    people = pixels(page, "#people canvas")
    assert len(people) == 12
    assert len({face.tobytes() for face in people}) == 12
    assert min(face.std() for face in people) > 5
    way = pixels(page, "#way canvas")
    assert len(way) == 9
    assert np.array_equal(way[0], people[0])
    assert np.array_equal(pixels(page, "#face")[0], people[0])

    # The third person joins; the blend goes from the second to it.
    page.locator("#people button").nth(2).click()
    page.wait_for_selector("body[data-done='2']")
    assert [one.get_attribute("aria-pressed") for one in page.locator("#people button").all()[:4]] == [
        "false",
        "true",
        "true",
        "false",
    ]
    page.evaluate("const e = document.getElementById('blend'); e.value = 50; e.dispatchEvent(new Event('input'))")
    page.wait_for_function("document.getElementById('caption').textContent.startsWith('50 % person 1, 50 % person 2')")
    assert np.array_equal(pixels(page, "#face")[0], pixels(page, "#way canvas")[4])

    with page.expect_download() as download:
        page.click("#save")
    data = Path(download.value.path()).read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), pixels(page, "#face")[0])
        assert image.info["Software"] == "vultus"
        words = f"AI-generated face, snapshot {model.metadata['model']}, seed 0 in a browser, 50 % person 1"
        assert image.info["Comment"].startswith(words)
        packet = ElementTree.fromstring(image.info["XML:com.adobe.xmp"].partition("?>")[2].rpartition("<?")[0])
    said = {one.tag.partition("}")[2]: "".join(one.itertext()).strip() for one in packet.iter()}
    assert said["DigitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert said["Model"] == model.metadata["model"]
    assert said["description"] == image.info["Comment"]

    page.click("#more")  # seed 1
    page.wait_for_selector("body[data-done='3']")
    assert not {face.tobytes() for face in people} & {face.tobytes() for face in pixels(page, "#people canvas")}
    page.fill("#seed", "0")
    page.locator("#seed").blur()
    page.wait_for_selector("body[data-done='4']")
    assert np.array_equal(np.stack(people), np.stack(pixels(page, "#people canvas")))


def test_browser_draws_and_samples_as_the_program_does(page: Any, model: OnnxModel) -> None:
    c, z = sample_identities(model.population, 1, seed=4)[0], noise(4, 0, 1, 20)[0]
    found = page.evaluate(
        "([c, z]) => import('./app.js').then(app => app.draw(c, z)).then(image => [...image.data])",
        [c.tolist(), z.tolist()],
    )
    expected = ((model.network(z[None], c[None])[0] + 1) * 127.5).round().clip(0, 255).transpose(1, 2, 0)
    assert np.abs(np.array(found).reshape(32, 32, 4)[..., :3] - expected).max() <= 1
    # Other random numbers, the same spread: means and variances of 300 people along the axes of both.
    drawn = page.evaluate(
        """async () => {
            const { noise, readPeople, samplePerson, slerp } = await import('./faces.js');
            const about = await (await fetch('model.json')).json();
            const people = readPeople(await (await fetch('people.bin')).arrayBuffer(), about.people);
            const some = Array.from({ length: 300 }, (_, index) => [...samplePerson(people, 1, index)]);
            const z = Array.from({ length: 300 }, (_, index) => [...noise(1, index, 0, about.z_dim)]);
            return { some, z, way: [0, 0.25, 1].map(t => [...slerp(some[0], some[1], t)]) };
        }"""
    )
    here, there = sample_identities(model.population, 300, seed=1), np.array(drawn["some"])
    assert np.linalg.norm(there, axis=1) == pytest.approx(np.ones(300))
    assert there.mean(0) @ there.mean(0) == pytest.approx(here.mean(0) @ here.mean(0), abs=0.02)
    axes = model.population["factor"][:, :8] / np.linalg.norm(model.population["factor"][:, :8], axis=0)
    assert (there @ axes).std(0) == pytest.approx((here @ axes).std(0), rel=0.25)
    z = np.array(drawn["z"])
    assert z.mean() == pytest.approx(0, abs=0.05)
    assert z.std() == pytest.approx(1, abs=0.05)
    assert np.abs(np.corrcoef(z) - np.eye(300)).max() < 0.95
    angles = np.arccos(np.clip(np.array(drawn["way"]) @ np.array(drawn["way"])[0], -1, 1))
    assert angles[1] == pytest.approx(angles[2] / 4)


def test_script_says_what_is_wrong(script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VULTUS_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm is needed to fetch onnxruntime-web"):
        script["runtime"]()
    (tmp_path / "npm" / f"onnxruntime-web-{script['VERSION']}.tgz").write_bytes(b"another package")
    with pytest.raises(UserError, match=r"not onnxruntime-web .* as pinned, or damaged"):
        script["runtime"]()
