"""The page of `vultus serve` in a headless browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from served import WEIGHTS, ServerThread, needs_dlib, needs_facenet, serving_thread
from vultus.images.io import decode_image, to_pil
from vultus.images.xmp import model_id, read_metadata
from vultus.models.snapshot import default_snapshot, gallery, load_snapshot
from vultus.sampling.generate import render
from vultus.sampling.latents import noise, sample_identities

EMBEDDINGS = gallery().numpy()
pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("page")]
VIEWS = ["random", "photo", "blend", "embedding"]
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync"]
# A fake camera, and computedName: the name of an element for screen readers.
ARGUMENTS += ["--use-fake-device-for-media-stream", "--enable-blink-features=ComputedAccessibilityInfo"]
NAMELESS = """[...document.querySelectorAll("button, a, input, textarea, img, dialog, fieldset, [role]")]
    .filter((node) => node.checkVisibility() && !node.computedName && !["status", "alert"].includes(node.role))
    .map((node) => node.outerHTML)"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def served() -> Iterator[ServerThread]:
    """With FaceNet and dlib, if they are available, and photos of at most 1 MB."""
    with serving_thread(weights=WEIGHTS, max_body_bytes=1_000_000) as served:
        yield served


@pytest.fixture(scope="module")
def camera_image(folder: Path) -> Path:
    """A JPEG file of a generated face, which the fake camera shows."""
    snapshot = load_snapshot(default_snapshot())
    c = sample_identities(snapshot.population, 1, seed=0, start=7)
    face = to_pil(render(snapshot.network, noise(0, 0, 1, snapshot.network.z_dim), c)[0])
    frame = Image.new("RGB", (640, 480), "grey")
    frame.paste(face.resize((480, 480), Image.Resampling.BICUBIC), (80, 0))
    frame.save(folder / "camera.mjpeg", "JPEG", quality=95)
    return folder / "camera.mjpeg"


@pytest.fixture(scope="module")
def browser(camera_image: Path) -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("chromium is not installed")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    camera = f"--use-file-for-fake-video-capture={camera_image}"
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[*ARGUMENTS, camera])
        yield browser
        browser.close()


class Visit:
    """An open page, its requests and console messages, and what a visitor does with it."""

    def __init__(self, browser: Any, url: str, view: str = "", **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}} | options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.url = url
        self.console: list[str] = []
        self.requests: list[Any] = []
        self.cancelled: list[str] = []
        self.statuses: list[int] = []
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.context.on("request", lambda request: self.requests.append(request))
        self.page.on("requestfailed", lambda request: self.cancelled.append(request.failure))
        self.page.on("response", lambda response: self.statuses.append(response.status))
        self.page.goto(f"{url}/#{view}")

    def close(self) -> None:
        """Check: no request to another host, and nothing in the console but Chromium's lines about error responses."""
        errors = sum(status >= 400 for status in self.statuses)
        other = [line for line in self.console if not line.startswith("Failed to load resource: the server responded")]
        assert other == []
        assert len(self.console) <= errors
        requested = [request.url for request in self.requests]
        assert requested
        assert [url for url in requested if not url.startswith((f"{self.url}/", "data:", f"blob:{self.url}"))] == []
        self.context.close()

    def wait(self, condition: str, argument: Any = None) -> None:
        self.page.wait_for_function(condition, arg=argument)

    def faces(self, count: int, alt: str = "") -> list[np.ndarray]:
        """Wait for `count` loaded faces whose alternative text contains `alt`; their pixels."""
        self.wait(
            """([count, alt]) => {
                const shown = [...document.querySelectorAll("#faces img")];
                return shown.length === count && shown.every((image) => image.complete && image.naturalWidth > 0)
                    && shown.every((image) => image.alt.startsWith("synthetic face") && image.alt.includes(alt))
                    && document.querySelector("#stage").ariaBusy === "false";
            }""",
            [count, alt],
        )
        uris = self.page.eval_on_selector_all("#faces img", "all => all.map((image) => image.src)")
        return [pixels(uri) for uri in uris]

    def slide(self, name: str, value: float) -> None:
        self.page.get_by_label(name, exact=True).fill(str(value))

    def changes(self, act: Callable[[], None]) -> None:
        """Act, and wait until the first face is another one."""
        before = self.page.get_attribute("#faces img", "src")
        act()
        self.wait("before => document.querySelector('#faces img').src !== before", before)

    def slide_hidden(self, name: str, value: float) -> None:
        """The same while the sliders are hidden because there are no faces yet."""
        self.wait("() => !document.querySelector('#panel').hidden")
        self.page.eval_on_selector(f"#{name}", "(slider, value) => slider.value = value", str(value))

    def error(self, text: str) -> None:
        """Wait for an error message of one line that contains `text`."""
        self.wait("text => document.querySelector('#error').textContent.includes(text)", text)
        assert "\n" not in self.page.inner_text("#error")

    def saved(self, click: Callable[[], None]) -> tuple[str, bytes]:
        with self.page.expect_download() as waiting:
            click()
        return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def api_faces(served: ServerThread, c: np.ndarray, **options: Any) -> list[np.ndarray]:
    """The faces that the API returns."""
    with served.client() as client:
        response = client.post("/v1/faces", json={"embeddings": [c.tolist()], "num": 8} | options, headers=ACCEPT)
    return [pixels(face["image"]) for face in response.json()["faces"]]


ACCEPT = {"Accept": "application/json"}


def same(user: list[np.ndarray], other: list[np.ndarray]) -> bool:
    """Up to rounding, which depends on the size of the server's batch."""
    return all(int(np.abs(a.astype(int) - b).max()) <= 1 for a, b in zip(user, other, strict=True))


@pytest.fixture
def visit(browser: Any, served: ServerThread) -> Iterator[Callable[..., Visit]]:
    visits: list[Visit] = []

    def start(view: str = "", **options: Any) -> Visit:
        visits.append(Visit(browser, served.url, view, **options))
        return visits[-1]

    yield start
    for user in visits:
        user.close()


# --- random people and blends -----------------------------------------------------------------------------------------


def test_random_people(visit: Callable[..., Visit], served: ServerThread) -> None:
    user = visit()
    first = user.faces(8, "seed 0")
    assert "faces are synthetic" in user.page.inner_text("header")
    assert user.page.inner_text("#stage-title") == "8 people who do not exist"
    user.slide("Seed as a number", 41)
    assert not same(user.faces(8, "seed 41"), first)
    user.slide("Seed", 0)
    assert same(user.faces(8, "seed 0"), first)
    user.changes(lambda: user.slide("Noise strength", 0))
    with served.client() as client:
        people = client.get("/v1/random?num=8&noise_strength=0", headers=ACCEPT).json()["faces"]
    assert same(user.faces(8), [pixels(face["image"]) for face in people])
    user.slide("Faces", 3)
    user.faces(3)
    before = user.page.input_value("#seed-number")
    user.wait("() => document.querySelector('#status').textContent.startsWith('3 faces in ')")
    while user.page.input_value("#seed-number") == before:  # one new seed in a thousand is the old one
        user.page.get_by_role("button", name="New", exact=True).click()
    user.faces(3, f"seed {user.page.input_value('#seed-number')}")
    name, data = user.saved(
        lambda: user.page.get_by_role("link", name="Save synthetic face of random person 2").click()
    )
    assert re.fullmatch(r"vultus-random-\d+-2\.png", name)
    marks = read_metadata(Image.open(io.BytesIO(data)))
    assert (marks.synthetic, marks.model) == (True, model_id(default_snapshot()))


def test_faces_of_a_random_person_and_their_link(visit: Callable[..., Visit], served: ServerThread) -> None:
    """Vary stays in its view; the first face is the one that it was chosen by, as in the API."""
    user = visit("random?seed=41&count=3&strength=1")
    people = user.faces(3, "seed 41")
    user.page.get_by_role("button", name="More faces of random person 2").click()
    faces = user.faces(3, "of random person 2 of seed 41")
    assert user.page.get_attribute("#tab-random", "aria-selected") == "true"
    assert user.page.evaluate("[document.activeElement.id, scrollY]") == ["back", 0]
    with served.client() as client:
        person = client.get("/v1/random?seed=41&start=1", headers=ACCEPT).json()["faces"][0]
    assert same([faces[0], pixels(person["image"])], [people[1], people[1]])
    assert same(faces, api_faces(served, np.array(person["embedding"]), num=3, seed=41, start=1))
    user.changes(lambda: user.slide("Noise strength", 0.5))
    faces = user.faces(3, "of seed 41")
    user.page.get_by_role("button", name="Copy link").click()
    user.wait("() => location.hash.includes('who=41.1')")
    other = visit(user.page.url.partition("#")[2])
    assert same(other.faces(3, "of random person 2 of seed 41"), faces)
    other.page.get_by_role("button", name="All people").click()
    other.faces(3, ", seed 41")
    assert other.page.url.endswith("#random"), "the link is not that of these faces"
    assert other.page.evaluate("document.activeElement.ariaLabel") == "More faces of random person 2, seed 41"


def test_edits(visit: Callable[..., Visit], served: ServerThread) -> None:
    """A slider changes the faces as the API does, says what it costs, and stays in the link."""
    user = visit("random?seed=41&count=2&strength=1")
    plain = user.faces(2, "seed 41")
    user.page.get_by_text("Edit", exact=True).click()
    user.changes(lambda: user.slide("smile", 1.5))
    edited = user.faces(2, "seed 41")
    with served.client() as client:
        asked = "/v1/random?num=2&seed=41&edit=smile%3D1.5"
        assert same(edited, [pixels(face["image"]) for face in client.get(asked, headers=ACCEPT).json()["faces"]])
    assert re.search(r"At \+1\.5: changes the attribute by .* dlib accepts", user.page.inner_text("#edit-list"))
    user.page.get_by_role("button", name="Copy link").click()
    user.wait("() => location.hash.includes('edit=smile')")
    assert same(visit(user.page.url.partition("#")[2]).faces(2, "seed 41"), edited)
    user.changes(lambda: user.page.get_by_role("button", name="Reset").click())
    assert same(user.faces(2, "seed 41"), plain)


def test_bad_links(visit: Callable[..., Visit]) -> None:
    user = visit("embedding?seed=1&who=AAAA")
    user.error("This link is damaged")
    user.page.goto(f"{user.url}/#random?seed=-1&count=0&strength=x&model=other&who=7.1")
    user.error("This link is of the model other")
    user.faces(1, "of random person 2 of seed 7, noise 1 of seed 0")
    user.slide("Faces", 2)
    user.faces(2)
    assert user.page.inner_text("#error") == ""


def test_new_request_cancels_the_previous_one(visit: Callable[..., Visit]) -> None:
    user = visit()
    user.faces(8)
    user.slide("Faces", 16)
    user.faces(16)
    for _ in range(3):
        with user.page.expect_request("**/v1/random*"):
            user.page.get_by_role("button", name="New", exact=True).click()
    user.faces(16, f"seed {user.page.input_value('#seed-number')}")
    assert user.cancelled == ["net::ERR_ABORTED"] * len(user.cancelled)
    assert user.cancelled
    assert user.page.inner_text("#error") == ""
    # While a slider is dragged there are few requests.
    user.slide("Faces", 1)
    user.faces(1)
    before = len(user.requests)
    user.page.focus("#seed")
    for _ in range(20):
        user.page.keyboard.press("ArrowLeft")
        user.page.keyboard.press("ArrowRight")
    user.page.keyboard.press("Home")
    user.faces(1, "seed 0")
    assert len(user.requests) - before < 20


@pytest.mark.parametrize("drawn", [0, 0.5, 0.999_999])
def test_new_is_always_another_seed(visit: Callable[..., Visit], drawn: float) -> None:
    user = visit()
    user.faces(8)
    user.page.evaluate("drawn => Math.random = () => drawn", drawn)
    for seed in (0, 499, 999, 1500):
        user.page.get_by_label("Seed as a number").fill(str(seed))
        user.faces(8, f"seed {seed}")
        user.page.get_by_role("button", name="New", exact=True).click()
        new = int(user.page.input_value("#seed-number"))
        assert new != seed
        assert 0 <= new < 1000
        user.faces(8, f"seed {new}")


def test_blend(visit: Callable[..., Visit], served: ServerThread) -> None:
    user = visit("blend")
    user.wait("() => document.querySelectorAll('#strip img').length === 9")
    shown = "() => document.querySelector('#blend-image').src"
    middle = pixels(user.page.evaluate(shown))
    slider = user.page.get_by_label("Blend position")
    assert slider.get_attribute("aria-valuetext") == "50 % of the way to the second person"
    user.slide("Blend position", 0)
    first = pixels(user.page.evaluate(shown))
    assert np.array_equal(first, pixels(user.page.get_attribute(".slot-image >> nth=0", "src")))
    user.page.get_by_label("Blend position").press("End")
    last = pixels(user.page.evaluate(shown))
    assert user.page.inner_text("#way-value") == "100 %"
    body = next(request.post_data for request in user.requests if request.url.endswith("/v1/between"))
    with served.client() as client:
        response = client.post("/v1/between", content=body, headers={"Content-Type": "application/json"}).json()
    expected = [pixels(face["image"]) for face in response["faces"]]
    assert len(expected) == 9
    assert same([first, middle, last], [expected[0], expected[4], expected[8]])
    assert not same([first], [last])
    user.page.get_by_role("button", name="100 % of the way").focus()
    user.page.locator("#strip button >> nth=2").press("Enter")
    assert user.page.inner_text("#way-value") == "25 %"
    name, data = user.saved(lambda: user.page.get_by_role("link", name="Save PNG").click())
    assert name == "vultus-blend-25.png"
    assert read_metadata(Image.open(io.BytesIO(data))).synthetic
    before = user.page.get_attribute("#blend-second", "src")
    user.page.get_by_role("button", name="Random person as the first person").click()
    user.wait("([person, before]) => document.querySelector('#blend-first').src !== person", [before, before])
    # Once all images are generated, the slider has finer steps than the strip.
    user.slide("Blend position", 0.41)
    user.wait("() => document.querySelector('#way-value').textContent === '41 %'")
    assert len(unzipped(user)) == 9


def unzipped(user: Visit) -> list[np.ndarray]:
    """The images of the archive of all faces."""
    name, data = user.saved(lambda: user.page.get_by_role("button", name="Save all").click())
    assert re.fullmatch(r"vultus-\w+-\d+\.zip", name)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [np.asarray(Image.open(archive.open(file))) for file in archive.namelist()]


def test_blend_of_three_people(visit: Callable[..., Visit], served: ServerThread) -> None:
    with served.client() as client:
        people = client.get("/v1/random?seed=5&num=3").json()["faces"]
    user = visit("blend?seed=2&count=3&who=5.0&who=5.1&who=5.2&weight=1&weight=1&weight=0")
    first = user.faces(3, "a blend of 3 people")
    user.changes(lambda: user.slide("Weight of the third person", 0.5))
    faces = user.faces(3, "seed 2")
    body = {"embeddings": [face["embedding"] for face in people], "weights": [1, 1, 0.5], "num": 3, "seed": 2}
    with served.client() as client:
        expected = client.post("/v1/faces", json=body).json()["faces"]
    assert same(faces, [pixels(face["image"]) for face in expected])
    assert not same(faces[:1], first[:1])
    assert all(map(np.array_equal, unzipped(user), faces))
    assert user.page.evaluate(NAMELESS) == []
    user.page.get_by_role("button", name="Copy link").click()
    user.wait("() => location.hash.includes('weight=0.5')")
    assert re.findall(r"who=([\d.]+)", user.page.url) == ["5.0", "5.1", "5.2"]
    for name in ("first", "second"):
        user.slide(f"Weight of the {name} person", 0)
    user.slide("Weight of the third person", 0)
    user.error("All weights are 0")
    user.page.get_by_role("button", name="Remove the second person").click()
    user.wait("() => document.querySelectorAll('#strip img').length === 9")
    assert user.page.locator(".slot").count() == 2


# --- embeddings -------------------------------------------------------------------------------------------------------


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


PARSE = """async ([bytes, name]) => {
    const { parseFile } = await import("./vectors.js");
    const file = new File([Uint8Array.from(atob(bytes), (character) => character.charCodeAt(0))], name);
    return parseFile(file, 512, 1e8).then((rows) => ({ rows }), ({ message }) => ({ message }));
}"""


def test_embeddings_in_every_format(visit: Callable[..., Visit]) -> None:
    user = visit("embedding")
    rows = EMBEDDINGS[:3]
    files = {
        "list": json.dumps(rows[0].tolist()).encode(),
        "rows": json.dumps(rows.tolist()).encode(),
        "api": json.dumps({"embeddings": rows.tolist()}).encode(),
        "response": json.dumps({"faces": [{"embedding": row.tolist()} for row in rows]}).encode(),
        "csv": "\n".join(",".join(map(str, row)) for row in rows).encode(),
        "spaces": " ".join(map(str, rows[0])).encode(),
        "printed": np.array2string(rows[0], threshold=1000).encode(),
        "f4": npy(rows[0]),
        "f8": npy(rows[0].astype(np.float64)),
        "big": npy(rows[0].astype(">f4")),
        "many": npy(rows),
        "fortran": npy(np.asfortranarray(rows.astype(np.float64))),
    }
    for name, data in files.items():
        parsed = np.float32(user.page.evaluate(PARSE, [base64.b64encode(data).decode(), name])["rows"])
        expected = rows if len(parsed) > 1 else rows[:1]
        assert np.abs(parsed - expected).max() < (1e-7 if name == "printed" else 1e-12), name
        assert len(parsed) == (3 if name in ("rows", "api", "response", "csv", "many", "fortran") else 1)


def test_embedding(visit: Callable[..., Visit], served: ServerThread) -> None:
    user = visit("embedding")
    user.wait("() => document.querySelectorAll('#examples img').length === 6")
    user.page.fill("#numbers", json.dumps(EMBEDDINGS[0].tolist()))
    assert same(user.faces(8, "of this embedding"), api_faces(served, EMBEDDINGS[0]))
    assert user.page.inner_text("#numbers-status") == "512 numbers read."
    file = {"name": "vectors-é.npy", "mimeType": "", "buffer": npy(EMBEDDINGS[:3])}
    user.page.set_input_files("#numbers-file", file)
    user.wait("() => document.querySelector('#row-count').textContent === 'of 3'")
    user.slide("Row", 3)
    user.wait("number => JSON.parse(document.querySelector('#numbers').value)[0] === number", text_of(EMBEDDINGS[2, 0]))
    assert same(user.faces(8), api_faces(served, EMBEDDINGS[2], start=2))  # as of row 2 in `vultus generate`
    user.slide_hidden("count", 2)
    user.page.get_by_label("All rows").check()
    last = user.faces(6)[4:]
    assert same(last, api_faces(served, EMBEDDINGS[2], num=2, start=2))
    user.page.get_by_label("All rows").uncheck()
    user.faces(2)
    user.page.get_by_role("button", name="Copy link").click()
    user.wait("() => location.hash.includes('start=2')")
    link = user.page.url.partition("#")[2]
    other = visit(link)
    assert same(other.faces(2), last)
    assert other.page.url.endswith(link)
    assert user.page.inner_text("#error") == ""
    user.page.fill("#numbers", "")
    user.faces(0)


def text_of(value: np.float32) -> float:
    return float(f"{float(value):.9g}")


def test_bad_embeddings(visit: Callable[..., Visit]) -> None:
    user = visit("embedding")
    numbers = EMBEDDINGS[0].tolist()
    texts = {
        json.dumps(numbers[:511]): "511 numbers; this model takes 512",
        " ".join(map(str, numbers * 2 + [1.0])): "1025 numbers; this model takes 512",
        json.dumps([numbers, numbers[:3]]): "Row 2 has 3 numbers",
        json.dumps([*numbers[:7], float("nan"), *numbers[8:]]): "Number 8 is “NaN”",
        json.dumps([*numbers[:7], None, *numbers[8:]]): "Number 8 is “null”",
        json.dumps([0] * 512): "only zeros",
        '{"embedding": [1, 2': "truncated or damaged",
        '{"vector": [1]}': "This JSON contains no embedding",
        "hello": "Number 1 is “hello”",
    }
    files = {text.encode(): message for text, message in texts.items()} | {
        npy(EMBEDDINGS[0, :511]): "shape (511); this model takes (512,) or (N, 512)",
        npy(EMBEDDINGS[0].astype(np.float16)): "contains f2; save it as float32 or float64",
        npy(EMBEDDINGS[:2])[:-4]: "truncated or damaged",
        b"\x93NUMPY": "not a .npy file",
        b"%PDF-1.7\n\xff\xfe": "neither .npy nor text",
        b"": "No numbers found",
    }
    for data, message in files.items():
        assert message in user.page.evaluate(PARSE, [base64.b64encode(data).decode(), "a.npy"])["message"]
    # One error of each input as the page shows it.
    user.page.fill("#numbers", "hello")
    user.error("Number 1 is “hello”")
    user.page.fill("#numbers", "")
    user.wait("() => document.querySelector('#error').textContent === ''")
    user.page.set_input_files("#numbers-file", {"name": "a.npy", "mimeType": "", "buffer": b"\x93NUMPY"})
    user.error("not a .npy file")
    assert user.page.locator("#faces img").count() == 0


# --- photos -----------------------------------------------------------------------------------------------------------


def jpeg(image: Image.Image, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def choose(user: Visit, data: bytes, name: str = "я 顔.jpg", kind: str = "image/jpeg", to: str = "#photo-file") -> None:
    user.page.set_input_files(to, {"name": name, "mimeType": kind, "buffer": data})


@pytest.fixture(scope="module")
def photos(shared: Path) -> list[Image.Image]:
    """Two real people."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(shared / "celeba" / "test-00000-of-00002.parquet")
    batch = next(file.iter_batches(60, columns=["celeb_id", "image"]))
    rows = {row["celeb_id"]: row["image"]["bytes"] for row in batch.to_pylist()}
    return [decode_image(rows[key]) for key in sorted(rows)[:2]]


def photo_visit(visit: Callable[..., Visit], **options: Any) -> Visit:
    user = visit("photo", **options)
    user.slide_hidden("count", 3)
    return user


@needs_facenet
@needs_dlib
def test_photo(visit: Callable[..., Visit], photos: list[Image.Image], served: ServerThread) -> None:
    user = photo_visit(visit)
    choose(user, jpeg(photos[0]))
    faces = user.faces(3, "of this photo")
    user.wait("() => document.querySelectorAll('.scale[role=img]').length === 6")
    assert user.page.is_visible("#crop-image")
    assert user.page.evaluate("() => document.querySelector('#crop-image').naturalWidth") == 160
    labels = user.page.eval_on_selector_all(".scale[role=img]", "all => all.map((scale) => scale.ariaLabel)")
    scores = [re.fullmatch(r"(FaceNet|dlib distance) (-?\d\.\d\d): .*(one person|strangers)", line) for line in labels]
    assert all(scores)
    assert min(float(score[2]) for score in scores if score and score[1] == "FaceNet") > 0.2
    # The position of the mark on the scale follows the number.
    left = user.page.eval_on_selector_all(
        ".score:first-child .mark", "all => all.map((mark) => parseFloat(mark.style.left))"
    )
    by_label = [float(score[2]) for score in scores[::2] if score]
    assert np.corrcoef(left, by_label)[0, 1] > 0.9
    assert "two photos of one person" in user.page.inner_text("#legend")
    name, data = user.saved(lambda: user.page.get_by_role("button", name="Save embedding").click())
    assert name == "vultus-embedding.json"
    assert same(api_faces(served, np.array(json.loads(data)["embedding"]), num=3), faces)
    # The saved file can be opened again.
    user.page.get_by_role("tab", name="Embedding").click()
    user.page.set_input_files("#numbers-file", {"name": name, "mimeType": "application/json", "buffer": data})
    assert same(user.faces(3, "of this embedding"), faces)
    user.wait("() => document.querySelectorAll('.scale[role=img]').length === 3")  # dlib needs the photo
    # Two photos, blended.
    user.page.get_by_role("tab", name="Photo").click()
    user.page.get_by_role("button", name="Blend", exact=True).click()
    choose(user, jpeg(photos[1]), to=".slot-file >> nth=1")
    user.wait(
        "() => [...document.querySelectorAll('.slot-text')].every((node) => node.textContent.startsWith('Your photo'))"
    )
    user.wait("() => document.querySelectorAll('#strip img').length === 9")
    assert user.page.locator(".slot-image").evaluate_all("all => all.every((image) => image.naturalWidth === 160)")


@needs_facenet
@needs_dlib
def test_several_faces_and_photos(visit: Callable[..., Visit], photos: list[Image.Image], served: ServerThread) -> None:
    user = photo_visit(visit)
    both = Image.new("RGB", (480, 200), "grey")
    both.paste(photos[0].resize((200, 200)), (0, 0))
    both.paste(photos[1].resize((160, 160)), (280, 20))
    choose(user, jpeg(both, "PNG"), "two.png", "image/png")
    user.faces(3)
    assert "2 faces" in user.page.inner_text("#photo-note")
    # Both of them; then a second photo of the first, as one person.
    user.page.get_by_label("Use face 2").press(" ")
    user.faces(6, "of person")
    user.page.get_by_label("Use face 2").press(" ")
    user.faces(3)
    choose(user, jpeg(photos[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT)), to="#photo-add")
    mean = user.faces(3, "of the mean of 2 crops")
    crops = user.page.eval_on_selector_all("#picks img", "all => all.map((image) => image.src)")
    assert len(crops) == 3
    assert user.page.evaluate(NAMELESS) == []
    _, data = user.saved(lambda: user.page.get_by_role("button", name="Save embedding").click())
    assert same(api_faces(served, np.array(json.loads(data)["embedding"]), num=3), mean)
    # Files without a face are left out.
    images = {"wall.jpg": Image.new("RGB", (200, 200), "grey"), "one.jpg": photos[0], "two.jpg": photos[1]}
    files = [{"name": name, "mimeType": "image/jpeg", "buffer": jpeg(image)} for name, image in images.items()]
    user.page.set_input_files("#photo-file", files)
    user.wait("() => document.querySelectorAll('#picks img').length === 2")
    assert "wall.jpg is left out" in user.page.inner_text("#photo-note")
    user.faces(3, "of the mean of 2 crops")


@needs_facenet
@needs_dlib
def test_photos_of_many_formats(visit: Callable[..., Visit], photos: list[Image.Image]) -> None:
    user = photo_visit(visit)
    # Larger than 1 MB and of a format that the server does not accept: the browser converts it.
    large = np.asarray(photos[0].resize((900, 900), Image.Resampling.BICUBIC)).astype(int)
    grain = np.random.default_rng(0).integers(-9, 10, large.shape)
    data = jpeg(Image.fromarray((large + grain).clip(0, 255).astype(np.uint8)), "BMP")
    assert len(data) > 1_000_000
    choose(user, data, "large.bmp", "image/bmp")
    user.wait("() => document.querySelector('#photo-note').textContent === ''")
    user.faces(3)
    # Drag and drop.
    user.page.get_by_role("tab", name="Random people").click()
    user.faces(3, "random person")
    transfer = user.page.evaluate_handle(
        """(text) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
            transfer.items.add(new File([bytes], "dropped.jpg", { type: "image/jpeg" }));
            return transfer;
        }""",
        base64.b64encode(jpeg(photos[1])).decode(),
    )
    user.page.dispatch_event("footer", "drop", {"dataTransfer": transfer})
    user.faces(3, "of this photo")


@needs_facenet
@needs_dlib
def test_bad_photos(visit: Callable[..., Visit], photos: list[Image.Image], tmp_path: Path) -> None:
    user = photo_visit(visit)
    pdf = b"%PDF-1.7\n1 0 obj <<>> endobj\ntrailer <<>>\n%%EOF\n"
    huge = tmp_path / "huge.jpg"
    with huge.open("wb") as file:
        file.truncate(50_000_000)
    for data, name, kind, words in (
        (pdf, "paper.pdf", "application/pdf", "cannot be read as an image"),
        (pdf, "paper.png", "image/png", "the photo: "),
        (b"", "empty.jpg", "image/jpeg", "This file is empty"),
        (jpeg(Image.new("RGB", (200, 200), "grey")), "wall.jpg", "image/jpeg", "no face"),
    ):
        choose(user, data, name, kind)
        user.error(words)
    choose(user, jpeg(photos[0]))
    user.faces(3)
    assert user.page.inner_text("#error") == ""
    user.page.set_input_files("#photo-file", huge)
    user.error("of at most 1 MB")
    # The faces of the previous photo are removed.
    user.faces(0)
    assert not user.page.is_visible("#crop")
    assert user.page.locator("#examples img").count() == 6


@needs_facenet
@needs_dlib
def test_camera(visit: Callable[..., Visit]) -> None:
    user = photo_visit(visit, permissions=["camera"])
    user.page.get_by_role("button", name="Camera", exact=True).click()
    user.page.get_by_role("button", name="Take photo").click()
    user.faces(3, "of this photo")
    assert user.page.evaluate("() => document.querySelector('#camera-video').srcObject") is None
    denied = visit("photo", permissions=[])
    denied.page.get_by_role("button", name="Camera", exact=True).click()
    denied.wait("() => document.querySelector('#camera-problem').textContent.includes('denied')")
    denied.page.keyboard.press("Escape")
    assert not denied.page.is_visible("#camera")


# --- screens and accessibility ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_screens(visit: Callable[..., Visit], width: int, scheme: str) -> None:
    user = visit(viewport={"width": width, "height": 844}, color_scheme=scheme, has_touch=width < 500)
    user.faces(4 if width < 500 else 8)
    ground = user.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", ground)[0]) < 128) == (scheme == "dark")
    for view in VIEWS:
        tab = user.page.locator(f"#tab-{view}")
        (tab.tap if width < 500 else tab.click)()
        assert tab.get_attribute("aria-selected") == "true"
        user.wait("() => [...document.querySelectorAll('#stage img')].some((image) => image.checkVisibility())")
        assert user.page.evaluate("document.documentElement.scrollWidth") <= width
        assert user.page.evaluate(NAMELESS) == []
        small = """[...document.querySelectorAll("main :is(button, .button, input, .save)")].filter((node) => {
            const { height, width } = node.getBoundingClientRect();
            const counts = node.checkVisibility() && !node.matches(".visually-hidden, #strip *");
            return counts && (height < 32 || width < 32);
        }).map((node) => node.outerHTML)"""
        assert user.page.evaluate(small) == []


def test_keyboard(visit: Callable[..., Visit]) -> None:
    user = visit("random")
    user.faces(8)
    user.page.focus("#tab-random")
    for key, view in (("ArrowRight", "photo"), ("ArrowLeft", "random"), ("ArrowLeft", "embedding"), ("Home", "random")):
        user.page.keyboard.press(key)
        assert user.page.evaluate("document.activeElement.id") == f"tab-{view}"
        assert user.page.get_attribute("#panel", "aria-labelledby") == f"tab-{view}"
        assert user.page.url.endswith(f"#{view}")
    user.page.go_back()
    assert user.page.get_attribute("#tab-embedding", "aria-selected") == "true"
    assert user.page.get_attribute("#status", "role") == "status"
    assert user.page.get_attribute("#error", "role") == "alert"


# --- a server without FaceNet, with a token, overloaded, stopped ------------------------------------------------------


def test_bare_server(browser: Any) -> None:
    with serving_thread(weights="", max_queue=20, max_faces=20, token="abc") as bare:
        user = Visit(browser, bare.url)
        for token, hint in (("wrong", "It was set when the server was started."), ("abc", "This token is wrong.")):
            user.wait("hint => document.querySelector('#token-hint').textContent === hint", hint)
            user.page.get_by_label("Token", exact=True).fill(token)
            user.page.get_by_role("button", name="Continue").click()
        user.faces(8)
        user.page.reload()
        user.faces(8)
        assert not user.page.is_visible("#token")
        user.page.get_by_role("tab", name="Photo").click()
        missing = user.page.inner_text("#photo-missing")
        assert "FaceNet" in missing
        assert "VULTUS_WEIGHTS" in missing
        user.page.get_by_role("button", name="Example 1").click()
        user.faces(8, "of this embedding")
        assert "FaceNet similarity is not available" in user.page.inner_text("#legend")
        user.page.get_by_role("tab", name="Blend").click()
        user.wait("() => document.querySelectorAll('#strip img').length === 9")
        assert not user.page.is_visible(".slot-camera")
        user.page.get_by_role("tab", name="Random people").click()
        overload(user, bare)
        bare.stop()
        user.page.get_by_role("button", name="New", exact=True).click()
        user.error("The server does not respond")
        (line,) = [line for line in user.console if "ERR_CONNECTION" in line]
        user.console.remove(line)
        user.close()


def overload(user: Visit, bare: ServerThread) -> None:
    """While other clients keep the queue full, the page waits; then it continues by itself."""
    stop = threading.Event()

    def send() -> None:
        with bare.client(headers={"Authorization": "Bearer abc"}) as client:
            while not stop.is_set():
                assert client.get("/v1/random?num=20&format=npy").status_code in (200, 429)

    others = [threading.Thread(target=send) for _ in range(3)]
    for other in others:
        other.start()
    try:
        while 429 not in user.statuses:
            user.page.get_by_role("button", name="New", exact=True).click()
            user.page.wait_for_timeout(100)
    finally:
        stop.set()
        for other in others:
            other.join()
    user.faces(8, f"seed {user.page.input_value('#seed-number')}")
    assert user.page.inner_text("#error") == ""


def test_only_the_page_is_served(served: ServerThread) -> None:
    with served.client() as client:
        home = client.get("/")
        policy = home.headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        for name in ("app.js", "style.css", "icon.svg"):
            assert client.get(f"/{name}").status_code == 200
        for name in ("../default.safetensors", "%2e%2e/default.safetensors", "default.safetensors", "nothing.js"):
            assert client.get(f"/{name}").status_code == 404
    assert isinstance(home, httpx2.Response)
