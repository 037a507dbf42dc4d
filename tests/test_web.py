"""The folder of scripts/build_web.py, which generates faces in the browser, in headless Chromium."""

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
pytestmark = pytest.mark.xdist_group("web")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    """The names in build_web.py."""
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def runtime(script: dict[str, Any]) -> None:
    """ONNX Runtime Web is in the cache, or npm can download it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("npm_config_fetch_retries", "0")  # without a network npm would try for minutes
        try:
            script["runtime"]()
        except UserError as error:
            if shutil.which("npm") is None or "could not download" in str(error):
                pytest.skip(str(error))
            raise


@pytest.fixture(scope="module")
def folder(script: dict[str, Any], runtime: None, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder built from a tiny model."""
    out = tmp_path_factory.mktemp("web") / "page"
    script["build"](str(models["conditional-norm"][1]), out)
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> OnnxModel:
    return open_onnx(folder / "model.onnx")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def browser(runtime: None) -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("chromium is not installed")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The URL of a static file server."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page once all faces are shown. It must send no request elsewhere and write nothing to the console."""
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    requested: list[str] = []
    console: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("console", lambda message: console.append(message.text))
    page.on("pageerror", lambda error: console.append(str(error)))
    page.goto(address)
    page.wait_for_selector("body[data-done='1']", timeout=60_000)
    yield page
    assert console == []
    assert [url for url in requested if not url.startswith((address, "data:", "blob:"))] == []
    context.close()


def pixels(page: Any, selector: str) -> list[Any]:
    """uint8 [R, R, 3] of each canvas."""
    files = page.evaluate(
        "selector => [...document.querySelectorAll(selector)].map(canvas => canvas.toDataURL().split(',')[1])", selector
    )
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in files]


@pytest.mark.browser
def test_page_in_a_browser(page: Any, model: OnnxModel) -> None:
    assert "synthetic" in page.inner_text(".notice")
    assert "ms per face" in page.inner_text("#status")
    assert f"Model {model.metadata['model']}" in page.inner_text("#about")
    assert "for tests alone" in page.inner_text("#about")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    people = pixels(page, "#people canvas")
    assert len(people) == 12
    assert len({face.tobytes() for face in people}) == 12
    assert min(face.std() for face in people) > 5
    strip = pixels(page, "#way canvas")
    assert len(strip) == 9
    assert np.array_equal(strip[0], people[0])
    assert np.array_equal(pixels(page, "#face")[0], people[0])

    # Choose the third person: the blend goes from the second to the third.
    page.locator("#people button").nth(2).click()
    page.wait_for_selector("body[data-done='2']")
    assert [button.get_attribute("aria-pressed") for button in page.locator("#people button").all()[:4]] == [
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
        comment = f"AI-generated face, snapshot {model.metadata['model']}, seed 0 in a browser, 50 % person 1"
        assert image.info["Comment"].startswith(comment)
        packet = ElementTree.fromstring(image.info["XML:com.adobe.xmp"].partition("?>")[2].rpartition("<?")[0])
    xmp = {node.tag.partition("}")[2]: "".join(node.itertext()).strip() for node in packet.iter()}
    assert xmp["DigitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert xmp["Model"] == model.metadata["model"]
    assert xmp["description"] == image.info["Comment"]

    page.click("#more")  # seed 1
    page.wait_for_selector("body[data-done='3']")
    assert not {face.tobytes() for face in people} & {face.tobytes() for face in pixels(page, "#people canvas")}
    page.fill("#seed", "0")
    page.locator("#seed").blur()
    page.wait_for_selector("body[data-done='4']")
    assert np.array_equal(np.stack(people), np.stack(pixels(page, "#people canvas")))


@pytest.mark.browser
def test_browser_agrees_with_python(page: Any, model: OnnxModel) -> None:
    c, z = sample_identities(model.population, 1, seed=4)[0], noise(4, 0, 1, 20)[0]
    generated = page.evaluate(
        "([c, z]) => import('./app.js').then(app => app.generate(c, z)).then(image => [...image.data])",
        [c.tolist(), z.tolist()],
    )
    x = model.network(z[None], c[None])[0]
    expected = ((x + 1) * 127.5).round().clip(0, 255).permute(1, 2, 0).numpy()
    assert np.abs(np.array(generated).reshape(32, 32, 4)[..., :3] - expected).max() <= 1
    # Other random numbers of the same distribution: compare means and variances of 300 people.
    samples = page.evaluate(
        """async () => {
            const { noise, readPeople, samplePerson, slerp } = await import('./faces.js');
            const about = await (await fetch('model.json')).json();
            const people = readPeople(await (await fetch('people.bin')).arrayBuffer(), about.people);
            const c = Array.from({ length: 300 }, (_, index) => [...samplePerson(people, 1, index)]);
            const z = Array.from({ length: 300 }, (_, index) => [...noise(1, index, 0, about.z_dim)]);
            return { c, z, arc: [0, 0.25, 1].map(t => [...slerp(c[0], c[1], t)]) };
        }"""
    )
    python, browser = sample_identities(model.population, 300, seed=1).numpy(), np.array(samples["c"])
    assert np.linalg.norm(browser, axis=1) == pytest.approx(np.ones(300))
    assert browser.mean(0) @ browser.mean(0) == pytest.approx(python.mean(0) @ python.mean(0), abs=0.02)
    factor = model.population["factor"].numpy()[:, :8]
    axes = factor / np.linalg.norm(factor, axis=0)
    assert (browser @ axes).std(0) == pytest.approx((python @ axes).std(0), rel=0.25)
    z = np.array(samples["z"])
    assert z.mean() == pytest.approx(0, abs=0.05)
    assert z.std() == pytest.approx(1, abs=0.05)
    assert np.abs(np.corrcoef(z) - np.eye(300)).max() < 0.95
    arc = np.array(samples["arc"])
    angles = np.arccos(np.clip(arc @ arc[0], -1, 1))
    assert angles[1] == pytest.approx(angles[2] / 4)


def test_script_errors(script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VULTUS_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm is needed to download onnxruntime-web"):
        script["runtime"]()
    (tmp_path / "npm" / f"onnxruntime-web-{script['VERSION']}.tgz").write_bytes(b"another package")
    with pytest.raises(UserError, match=r"damaged, or not onnxruntime-web"):
        script["runtime"]()
