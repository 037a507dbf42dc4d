"""The page of `vultus serve` in a real browser, on a real server process."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from conftest import SHARED
from test_report import ARGUMENTS
from test_serve import FACENET, Served, needs_dlib, needs_facenet, serving
from vultus.images.io import decode_image, to_pil
from vultus.images.xmp import model_id, read_marks
from vultus.models.snapshot import default_snapshot, gallery, load_snapshot
from vultus.sampling.generate import render
from vultus.sampling.population import noise, sample_identities

EMBEDDINGS = gallery().numpy()
VIEWS = ["random", "photo", "blend", "embedding"]
# What the camera of the browser shows instead of a room; and names of elements as a screen reader hears them.
CAMERA = ["--use-fake-device-for-media-stream", "--enable-blink-features=ComputedAccessibilityInfo"]
NAMELESS = """[...document.querySelectorAll("button, a, input, textarea, img, dialog, fieldset, [role]")]
    .filter((one) => one.checkVisibility() && !one.computedName && !["status", "alert"].includes(one.role))
    .map((one) => one.outerHTML)"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    """With all that is at hand, and little room for photos."""
    weights = str(SHARED / "weights") if FACENET else ""
    with serving(folder / "full", "--megabytes", "1", weights=weights) as served:
        yield served


@pytest.fixture(scope="module")
def made(folder: Path) -> bytes:
    """A large picture of a drawn face, as JPEG; the camera shows it."""
    snapshot = load_snapshot(default_snapshot())
    c = sample_identities(snapshot.population, 1, seed=0, start=7)
    face = to_pil(render(snapshot.network, noise(0, 0, 1, snapshot.network.z_dim), c)[0])
    frame = Image.new("RGB", (640, 480), "grey")
    frame.paste(face.resize((480, 480), Image.Resampling.BICUBIC), (80, 0))
    frame.save(folder / "camera.mjpeg", "JPEG", quality=95)
    return (folder / "camera.mjpeg").read_bytes()


@pytest.fixture(scope="module")
def browser(made: bytes, folder: Path) -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    camera = [*CAMERA, f"--use-file-for-fake-video-capture={folder / 'camera.mjpeg'}"]
    with api.sync_playwright() as play:
        started = play.chromium.launch(executable_path=chromium, args=ARGUMENTS + camera)
        yield started
        started.close()


class Visit:
    """A page, all that it asked for and said, and what a visitor does with it."""

    def __init__(self, browser: Any, url: str, view: str = "", **how: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}} | how)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.url = url
        self.said: list[str] = []
        self.requests: list[Any] = []
        self.cancelled: list[str] = []
        self.answers: list[int] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.context.on("request", lambda request: self.requests.append(request))
        self.page.on("requestfailed", lambda request: self.cancelled.append(request.failure))
        self.page.on("response", lambda response: self.answers.append(response.status))
        self.page.goto(f"{url}/#{view}")

    def close(self) -> None:
        """Nothing went elsewhere, and nothing is wrong in the console but the refusals that Chromium writes there."""
        refused = sum(status >= 400 for status in self.answers)
        other = [line for line in self.said if not line.startswith("Failed to load resource: the server responded")]
        assert other == []
        assert len(self.said) <= refused
        asked = [request.url for request in self.requests]
        assert asked
        assert [url for url in asked if not url.startswith((f"{self.url}/", "data:", f"blob:{self.url}"))] == []
        self.context.close()

    def wait(self, condition: str, argument: Any = None) -> None:
        self.page.wait_for_function(condition, arg=argument)

    def faces(self, count: int, alt: str = "") -> list[np.ndarray]:
        """Wait for so many faces with words like `alt`, all drawn."""
        self.wait(
            """([count, alt]) => {
                const shown = [...document.querySelectorAll("#faces img")];
                return shown.length === count && shown.every((one) => one.complete && one.naturalWidth > 0)
                    && shown.every((one) => one.alt.startsWith("synthetic face") && one.alt.includes(alt))
                    && document.querySelector("#stage").ariaBusy === "false";
            }""",
            [count, alt],
        )
        return [pixels(uri) for uri in self.page.eval_on_selector_all("#faces img", "all => all.map((one) => one.src)")]

    def slide(self, name: str, value: float) -> None:
        self.page.get_by_label(name, exact=True).fill(str(value))

    def slide_hidden(self, name: str, value: float) -> None:
        """The same before anything is drawn, while the sliders are hidden."""
        self.wait("() => !document.querySelector('#panel').hidden")
        self.page.eval_on_selector(f"#{name}", "(one, value) => one.value = value", str(value))

    def problem(self, words: str) -> None:
        """Wait for a line of error."""
        self.wait("words => document.querySelector('#error').textContent.includes(words)", words)
        assert "\n" not in self.page.inner_text("#error")

    def saved(self, click: Callable[[], None]) -> tuple[str, bytes]:
        with self.page.expect_download() as waiting:
            click()
        return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def faces_of(served: Served, c: np.ndarray, **options: Any) -> list[np.ndarray]:
    """As the API gives them."""
    with served.client() as client:
        answer = client.post("/v1/faces", json={"embeddings": [c.tolist()], "num": 8} | options, headers=ACCEPT)
    return [pixels(face["image"]) for face in answer.json()["faces"]]


ACCEPT = {"Accept": "application/json"}


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    """But for a rounding of the last bit, which the size of the server's batch may turn."""
    return all(int(np.abs(a.astype(int) - b).max()) <= 1 for a, b in zip(one, other, strict=True))


@pytest.fixture
def visit(browser: Any, served: Served) -> Iterator[Callable[..., Visit]]:
    open_ones: list[Visit] = []

    def start(view: str = "", **how: Any) -> Visit:
        open_ones.append(Visit(browser, served.url, view, **how))
        return open_ones[-1]

    yield start
    for one in open_ones:
        one.close()


# --- people who do not exist ------------------------------------------------------------------------------------------


def test_random_people(visit: Callable[..., Visit], served: Served) -> None:
    one = visit()
    first = one.faces(8, "seed 0")
    assert "faces are synthetic" in one.page.inner_text("header")
    assert one.page.inner_text("#stage-title") == "8 people who do not exist"
    one.slide("Seed as a number", 41)
    assert not same(one.faces(8, "seed 41"), first)
    one.slide("Seed", 0)
    assert same(one.faces(8, "seed 0"), first)
    one.slide("Noise strength", 0)
    one.wait(
        "before => document.querySelector('#faces img').src !== before", one.page.get_attribute("#faces img", "src")
    )
    with served.client() as client:
        people = client.get("/v1/random?num=8&noise_strength=0", headers=ACCEPT).json()["faces"]
    assert same(one.faces(8), [pixels(face["image"]) for face in people])
    one.slide("Faces", 3)
    one.faces(3)
    before = one.page.input_value("#seed-number")
    one.wait("() => document.querySelector('#status').textContent.startsWith('3 faces in ')")
    while one.page.input_value("#seed-number") == before:  # one new seed in a thousand is the old one
        one.page.get_by_role("button", name="New", exact=True).click()
    one.faces(3, f"seed {one.page.input_value('#seed-number')}")
    name, data = one.saved(lambda: one.page.get_by_role("link", name="Save synthetic face of random person 2").click())
    assert re.fullmatch(r"vultus-random-\d+-2\.png", name)
    said = read_marks(Image.open(io.BytesIO(data)))
    assert (said.synthetic, said.model) == (True, model_id(default_snapshot()))
    # Somebody of them, more closely: the same numbers.
    one.page.get_by_role("button", name="More faces of random person 2").click()
    one.faces(3, "embedding")
    with served.client() as client:
        query = {"seed": one.page.input_value("#seed-number"), "num": 2}
        people = client.get("/v1/random", params=query, headers=ACCEPT).json()["faces"]
    written = json.loads(one.page.input_value("#numbers"))
    assert np.array_equal(np.float32(written), np.float32(people[1]["embedding"]))


def test_a_newer_request_cancels_the_one_before(visit: Callable[..., Visit]) -> None:
    one = visit()
    one.faces(8)
    one.slide("Faces", 16)
    one.faces(16)
    for _ in range(3):
        with one.page.expect_request("**/v1/random*"):
            one.page.get_by_role("button", name="New", exact=True).click()
    one.faces(16, f"seed {one.page.input_value('#seed-number')}")
    assert one.cancelled == ["net::ERR_ABORTED"] * len(one.cancelled)
    assert one.cancelled
    assert one.page.inner_text("#error") == ""
    # A slider that is dragged asks when it rests.
    one.slide("Faces", 1)
    one.faces(1)
    before = len(one.requests)
    one.page.focus("#seed")
    for _ in range(20):
        one.page.keyboard.press("ArrowLeft")
        one.page.keyboard.press("ArrowRight")
    one.page.keyboard.press("Home")
    one.faces(1, "seed 0")
    assert len(one.requests) - before < 20


def test_blend(visit: Callable[..., Visit], served: Served) -> None:
    one = visit("blend")
    one.wait("() => document.querySelectorAll('#strip img').length === 9")
    shown = "() => document.querySelector('#blend-image').src"
    middle = pixels(one.page.evaluate(shown))
    assert (
        one.page.get_by_label("Along the way").get_attribute("aria-valuetext") == "50 % of the way to the second person"
    )
    one.slide("Along the way", 0)
    first = pixels(one.page.evaluate(shown))
    assert np.array_equal(first, pixels(one.page.get_attribute(".slot-image >> nth=0", "src")))
    one.page.get_by_label("Along the way").press("End")
    last = pixels(one.page.evaluate(shown))
    assert one.page.inner_text("#way-value") == "100 %"
    body = next(request.post_data for request in one.requests if request.url.endswith("/v1/between"))
    with served.client() as client:
        answer = client.post("/v1/between", content=body, headers={"Content-Type": "application/json"}).json()
    way = [pixels(face["image"]) for face in answer["faces"]]
    assert len(way) == 9
    assert same([first, middle, last], [way[0], way[4], way[8]])
    assert not same([first], [last])
    one.page.get_by_role("button", name="100 % of the way").focus()
    one.page.locator("#strip button >> nth=2").press("Enter")
    assert one.page.inner_text("#way-value") == "25 %"
    name, data = one.saved(lambda: one.page.get_by_role("link", name="Save PNG").click())
    assert name == "vultus-blend-25.png"
    assert read_marks(Image.open(io.BytesIO(data))).synthetic
    before = one.page.get_attribute("#blend-second", "src")
    one.page.get_by_role("button", name="Random person as the first person").click()
    one.wait("([person, before]) => document.querySelector('#blend-first').src !== person", [before, before])
    # Once all pictures are there, the slider goes in finer steps than the strip.
    one.slide("Along the way", 0.41)
    one.wait("() => document.querySelector('#way-value').textContent === '41 %'")


# --- embeddings -------------------------------------------------------------------------------------------------------


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


PARSE = """async ([bytes, name]) => {
    const { parseFile } = await import("./vectors.js");
    const file = new File([Uint8Array.from(atob(bytes), (one) => one.charCodeAt(0))], name);
    return parseFile(file, 512, 1e8);
}"""


def test_embeddings_in_every_form(visit: Callable[..., Visit]) -> None:
    one = visit("embedding")
    rows = EMBEDDINGS[:3]
    forms = {
        "list": json.dumps(rows[0].tolist()).encode(),
        "rows": json.dumps(rows.tolist()).encode(),
        "api": json.dumps({"embeddings": rows.tolist()}).encode(),
        "answer": json.dumps({"faces": [{"embedding": row.tolist()} for row in rows]}).encode(),
        "csv": "\n".join(",".join(map(str, row)) for row in rows).encode(),
        "spaces": " ".join(map(str, rows[0])).encode(),
        "printed": np.array2string(rows[0], threshold=1000).encode(),
        "f4": npy(rows[0]),
        "f8": npy(rows[0].astype(np.float64)),
        "big": npy(rows[0].astype(">f4")),
        "many": npy(rows),
        "fortran": npy(np.asfortranarray(rows.astype(np.float64))),
    }
    for name, data in forms.items():
        found = np.float32(one.page.evaluate(PARSE, [base64.b64encode(data).decode(), name]))
        expected = rows if len(found) > 1 else rows[:1]
        assert np.abs(found - expected).max() < (1e-7 if name == "printed" else 1e-12), name
        assert len(found) == (3 if name in ("rows", "api", "answer", "csv", "many", "fortran") else 1)


def test_an_embedding(visit: Callable[..., Visit], served: Served) -> None:
    one = visit("embedding")
    one.wait("() => document.querySelectorAll('#examples img').length === 6")
    one.page.fill("#numbers", json.dumps(EMBEDDINGS[0].tolist()))
    assert same(one.faces(8, "of this embedding"), faces_of(served, EMBEDDINGS[0]))
    assert one.page.inner_text("#numbers-status") == "512 numbers read."
    file = {"name": "vectors-é.npy", "mimeType": "", "buffer": npy(EMBEDDINGS[:3])}
    one.page.set_input_files("#numbers-file", file)
    one.wait("() => document.querySelector('#row-count').textContent === 'of 3'")
    one.slide("Row", 3)
    one.wait("number => JSON.parse(document.querySelector('#numbers').value)[0] === number", text_of(EMBEDDINGS[2, 0]))
    assert same(one.faces(8), faces_of(served, EMBEDDINGS[2]))
    assert one.page.inner_text("#error") == ""
    one.page.fill("#numbers", "")
    one.faces(0)


def text_of(value: np.float32) -> float:
    return float(f"{float(value):.9g}")


def test_bad_embeddings(visit: Callable[..., Visit]) -> None:
    one = visit("embedding")
    numbers = EMBEDDINGS[0].tolist()
    texts = {
        json.dumps(numbers[:511]): "511 numbers; this model takes 512",
        " ".join(map(str, numbers * 2 + [1.0])): "1025 numbers; this model takes 512",
        json.dumps([numbers, numbers[:3]]): "Row 2 has 3 numbers",
        json.dumps([*numbers[:7], float("nan"), *numbers[8:]]): "Number 8 is “NaN”",
        json.dumps([*numbers[:7], None, *numbers[8:]]): "Number 8 is “null”",
        json.dumps([0] * 512): "only zeros",
        '{"embedding": [1, 2': "cut off or damaged",
        '{"vector": [1]}': "No embedding in this JSON",
        "hello": "Number 1 is “hello”",
    }
    for text, words in texts.items():
        one.page.fill("#numbers", text)
        one.problem(words)
    one.page.fill("#numbers", "")
    one.wait("() => document.querySelector('#error').textContent === ''")
    files = {
        npy(EMBEDDINGS[0, :511]): "shape (511); this model takes (512,) or (N, 512)",
        npy(EMBEDDINGS[0].astype(np.float16)): "holds f2; save it as float32 or float64",
        npy(EMBEDDINGS[:2])[:-4]: "cut off or damaged",
        b"\x93NUMPY": "not a .npy file",
        b"%PDF-1.7\n\xff\xfe": "neither .npy nor text",
        b"": "nothing in it",
    }
    for data, words in files.items():
        one.page.set_input_files("#numbers-file", {"name": "a.npy", "mimeType": "", "buffer": data})
        one.problem(words)
    assert one.page.locator("#faces img").count() == 0


# --- photos -----------------------------------------------------------------------------------------------------------


def jpeg(image: Image.Image, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def give(one: Visit, data: bytes, name: str = "я 顔.jpg", kind: str = "image/jpeg", to: str = "#photo-file") -> None:
    one.page.set_input_files(to, {"name": name, "mimeType": kind, "buffer": data})


@pytest.fixture(scope="module")
def photos(shared: Path) -> list[Image.Image]:
    """Two real people."""
    import pyarrow.parquet as pq

    table = pq.read_table(shared / "celeba" / "test-00000-of-00002.parquet").slice(0, 60)
    rows = {row["celeb_id"]: row["image"]["bytes"] for row in table.to_pylist()}
    return [decode_image(rows[key]) for key in sorted(rows)[:2]]


def photo_visit(visit: Callable[..., Visit], **how: Any) -> Visit:
    one = visit("photo", **how)
    one.slide_hidden("count", 3)
    return one


@needs_facenet
@needs_dlib
def test_a_real_photo(visit: Callable[..., Visit], photos: list[Image.Image], served: Served) -> None:
    one = photo_visit(visit)
    give(one, jpeg(photos[0]))
    faces = one.faces(3, "of this photo")
    one.wait("() => document.querySelectorAll('.scale[role=img]').length === 6")
    assert one.page.is_visible("#crop-image")
    assert one.page.evaluate("() => document.querySelector('#crop-image').naturalWidth") == 160
    told = one.page.eval_on_selector_all(".scale[role=img]", "all => all.map((one) => one.ariaLabel)")
    scores = [re.fullmatch(r"(FaceNet|dlib distance) (-?\d\.\d\d): .*(one person|strangers)", line) for line in told]
    assert all(scores)
    assert min(float(score[2]) for score in scores if score and score[1] == "FaceNet") > 0.2
    # The mark lies on the scale where the number says, beside the range of real photos.
    left = one.page.eval_on_selector_all(
        ".score:first-child .mark", "all => all.map((one) => parseFloat(one.style.left))"
    )
    by_label = [float(score[2]) for score in scores[::2] if score]
    assert np.corrcoef(left, by_label)[0, 1] > 0.9
    assert "two photos of one person" in one.page.inner_text("#legend")
    name, data = one.saved(lambda: one.page.get_by_role("button", name="Save embedding").click())
    assert name == "vultus-embedding.json"
    assert same(faces_of(served, np.array(json.loads(data)["embedding"]), num=3), faces)
    # The saved file goes in again.
    one.page.get_by_role("tab", name="Embedding").click()
    one.page.set_input_files("#numbers-file", {"name": name, "mimeType": "application/json", "buffer": data})
    assert same(one.faces(3, "of this embedding"), faces)
    one.wait("() => document.querySelectorAll('.scale[role=img]').length === 3")  # the judge needs the photo
    # Two photos, blended.
    one.page.get_by_role("tab", name="Photo").click()
    one.page.get_by_role("button", name="Blend", exact=True).click()
    give(one, jpeg(photos[1]), to=".slot-file >> nth=1")
    one.wait(
        "() => [...document.querySelectorAll('.slot-words')].every((one) => one.textContent.startsWith('Your photo'))"
    )
    one.wait("() => document.querySelectorAll('#strip img').length === 9")
    assert one.page.locator(".slot-image").evaluate_all("all => all.every((one) => one.naturalWidth === 160)")


@needs_facenet
@needs_dlib
def test_photos_of_many_kinds(visit: Callable[..., Visit], photos: list[Image.Image]) -> None:
    one = photo_visit(visit)
    both = Image.new("RGB", (480, 200), "grey")
    both.paste(photos[0].resize((200, 200)), (0, 0))
    both.paste(photos[1].resize((160, 160)), (280, 20))
    give(one, jpeg(both, "PNG"), "two.png", "image/png")
    one.faces(3)
    assert "2 faces" in one.page.inner_text("#photo-note")
    # Too large for this server (1 MB), or of a kind that it does not read: the browser makes it fit.
    large = np.asarray(photos[0].resize((900, 900), Image.Resampling.BICUBIC)).astype(int)
    grain = np.random.default_rng(0).integers(-9, 10, large.shape)
    data = jpeg(Image.fromarray((large + grain).clip(0, 255).astype(np.uint8)), "BMP")
    assert len(data) > 1_000_000
    give(one, data, "large.bmp", "image/bmp")
    one.wait("() => document.querySelector('#photo-note').textContent === ''")
    one.faces(3)
    # Dropped anywhere.
    one.page.get_by_role("tab", name="Random people").click()
    one.faces(3, "random person")
    transfer = one.page.evaluate_handle(
        """(text) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
            transfer.items.add(new File([bytes], "dropped.jpg", { type: "image/jpeg" }));
            return transfer;
        }""",
        base64.b64encode(jpeg(photos[1])).decode(),
    )
    one.page.dispatch_event("footer", "drop", {"dataTransfer": transfer})
    one.faces(3, "of this photo")


@needs_facenet
@needs_dlib
def test_bad_photos(visit: Callable[..., Visit], photos: list[Image.Image], tmp_path: Path) -> None:
    one = photo_visit(visit)
    pdf = b"%PDF-1.7\n1 0 obj <<>> endobj\ntrailer <<>>\n%%EOF\n"
    huge = tmp_path / "huge.jpg"
    with huge.open("wb") as file:
        file.truncate(50_000_000)
    for data, name, kind, words in (
        (pdf, "paper.pdf", "application/pdf", "not a picture that can be read here"),
        (pdf, "paper.png", "image/png", "the photo: "),
        (b"", "empty.jpg", "image/jpeg", "This file is empty"),
        (jpeg(Image.new("RGB", (200, 200), "grey")), "wall.jpg", "image/jpeg", "no face"),
    ):
        give(one, data, name, kind)
        one.problem(words)
    give(one, jpeg(photos[0]))
    one.faces(3)
    assert one.page.inner_text("#error") == ""
    one.page.set_input_files("#photo-file", huge)
    one.problem("of at most 1 MB")
    # The faces of another photo do not stay beside it.
    one.faces(0)
    assert not one.page.is_visible("#crop")
    assert one.page.locator("#examples img").count() == 6


@needs_facenet
@needs_dlib
def test_the_camera(visit: Callable[..., Visit], made: bytes) -> None:
    one = photo_visit(visit, permissions=["camera"])
    one.page.get_by_role("button", name="Camera", exact=True).click()
    one.page.get_by_role("button", name="Take the picture").click()
    one.faces(3, "of this photo")
    assert one.page.evaluate("() => document.querySelector('#camera-video').srcObject") is None
    refused = visit("photo", permissions=[])
    refused.page.get_by_role("button", name="Camera", exact=True).click()
    refused.wait("() => document.querySelector('#camera-problem').textContent.includes('not allowed')")
    refused.page.keyboard.press("Escape")
    assert not refused.page.is_visible("#camera")


# --- on every screen, for everybody -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_screens(visit: Callable[..., Visit], width: int, scheme: str) -> None:
    one = visit(viewport={"width": width, "height": 844}, color_scheme=scheme, has_touch=width < 500)
    one.faces(4 if width < 500 else 8)
    ground = one.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", ground)[0]) < 128) == (scheme == "dark")
    for view in VIEWS:
        tab = one.page.locator(f"#tab-{view}")
        (tab.tap if width < 500 else tab.click)()
        assert tab.get_attribute("aria-selected") == "true"
        one.wait("() => [...document.querySelectorAll('#stage img')].some((one) => one.checkVisibility())")
        assert one.page.evaluate("document.documentElement.scrollWidth") <= width
        assert one.page.evaluate(NAMELESS) == []
        small = """[...document.querySelectorAll("main button, main .button, main input, main .save")].filter((one) => {
            const box = one.getBoundingClientRect();
            return one.checkVisibility() && !one.matches(".unseen, #strip *") && (box.height < 32 || box.width < 32);
        }).map((one) => one.outerHTML)"""
        assert one.page.evaluate(small) == []


def test_by_keyboard(visit: Callable[..., Visit]) -> None:
    one = visit("random")
    one.faces(8)
    one.page.focus("#tab-random")
    for key, view in (("ArrowRight", "photo"), ("ArrowLeft", "random"), ("ArrowLeft", "embedding"), ("Home", "random")):
        one.page.keyboard.press(key)
        assert one.page.evaluate("document.activeElement.id") == f"tab-{view}"
        assert one.page.get_attribute("#panel", "aria-labelledby") == f"tab-{view}"
        assert one.page.url.endswith(f"#{view}")
    one.page.go_back()
    assert one.page.get_attribute("#tab-embedding", "aria-selected") == "true"
    assert one.page.get_attribute("#status", "role") == "status"
    assert one.page.get_attribute("#error", "role") == "alert"


# --- without FaceNet, with a token, and with a server that has too much to do, or is gone -----------------------------


def test_a_bare_server(browser: Any, folder: Path) -> None:
    with serving(folder / "bare", "--queue", "20", "--faces", "20", weights="", VULTUS_TOKEN="abc") as bare:
        one = Visit(browser, bare.url)
        for token, words in (("wrong", "It was chosen when the server was started."), ("abc", "That was not it.")):
            one.wait("words => document.querySelector('#token-words').textContent === words", words)
            one.page.get_by_label("Token", exact=True).fill(token)
            one.page.get_by_role("button", name="Go on").click()
        one.faces(8)
        one.page.reload()
        one.faces(8)
        assert not one.page.is_visible("#token")
        one.page.get_by_role("tab", name="Photo").click()
        missing = one.page.inner_text("#photo-missing")
        assert "FaceNet" in missing
        assert "VULTUS_WEIGHTS" in missing
        one.page.get_by_role("button", name="Example 1").click()
        one.faces(8, "of this embedding")
        assert "FaceNet cannot compare here" in one.page.inner_text("#legend")
        one.page.get_by_role("tab", name="Blend").click()
        one.wait("() => document.querySelectorAll('#strip img').length === 9")
        assert not one.page.is_visible(".slot-camera")
        one.page.get_by_role("tab", name="Random people").click()
        busy(one, bare)
        bare.process.kill()
        bare.process.wait()
        one.page.get_by_role("button", name="New", exact=True).click()
        one.problem("The server does not answer")
        gone = [line for line in one.said if "ERR_CONNECTION" in line]
        assert len(gone) == 1
        one.said.remove(gone[0])
        one.close()


def busy(one: Visit, bare: Served) -> None:
    """While others keep the server's queue full the page waits, and then it goes on by itself."""
    stop = threading.Event()

    def ask() -> None:
        with bare.client(headers={"Authorization": "Bearer abc"}) as client:
            while not stop.is_set():
                assert client.get("/v1/random?num=20&format=npy").status_code in (200, 429)

    others = [threading.Thread(target=ask) for _ in range(3)]
    for other in others:
        other.start()
    try:
        while 429 not in one.answers:
            one.page.get_by_role("button", name="New", exact=True).click()
            one.page.wait_for_timeout(100)
    finally:
        stop.set()
        for other in others:
            other.join()
    one.faces(8, f"seed {one.page.input_value('#seed-number')}")
    assert one.page.inner_text("#error") == ""


def test_only_the_page_is_served(served: Served) -> None:
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
