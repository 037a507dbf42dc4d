"""What is written beside and around generated faces: their list, other formats and sizes, labelled grids, videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from test_generate import CONFIG
from vultus.cli.main import main
from vultus.errors import UserError
from vultus.images.detect import examine
from vultus.images.xmp import read_marks
from vultus.models.generators import build_generator
from vultus.models.snapshot import Snapshot, load_snapshot, save_snapshot
from vultus.sampling.conditioning import ConditionSource, random_identities
from vultus.sampling.face_files import Face, FaceList, Pictures
from vultus.sampling.generate import generate
from vultus.sampling.population import fit_population
from vultus.sampling.sheet import Sheet


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small generator of 64 pixels, which has room for the watermark."""
    torch.manual_seed(0)
    config = CONFIG | {"resolution": 64, "kind": "dcgan"}
    population = fit_population([torch.nn.functional.normalize(torch.randn(64, 512))])
    path = tmp_path_factory.mktemp("snapshot") / "s.safetensors"
    network = build_generator(**config)
    save_snapshot(path, network=network, population=population, metadata={"generator": config})
    return path


@pytest.fixture
def snapshot(file: Path) -> Snapshot:
    return load_snapshot(file)


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "faces.jsonl").read_text().splitlines()]
    assert len({line["file"] for line in lines}) == len(lines)
    return {line["file"]: line for line in lines}


def test_a_list_says_what_each_face_is(snapshot: Snapshot, tmp_path: Path) -> None:
    out = tmp_path / "faces"
    generate(snapshot, random_identities(snapshot, 2, seed=5, start=3), out, num=2, seed=5)
    first = listed(out)
    assert set(first) == {path.name for path in out.glob("*.png")}
    line = first["000001_1.png"]
    assert (line["source"], line["embedding"], line["noise"], line["seed"]) == ("random:4", 1, 1, 5)
    assert line["model"] in read_marks((out / "000001_1.png").read_bytes()).description  # type: ignore[operator]
    # A later call keeps the lines of the pictures that it does not write.
    generate(snapshot, random_identities(snapshot, 1, seed=5, start=3), out, num=2, seed=5)
    assert listed(out) == first
    vectors = tmp_path / "v.npy"
    np.save(vectors, np.random.default_rng(0).standard_normal((1, 512)).astype(np.float32))
    assert (
        main(["generate", str(snapshot.path), "--embeddings", str(vectors), "--out", str(out), "--format", "jpg"]) == 0
    )
    assert listed(out) == first | {"000000_0.jpg": listed(out)["000000_0.jpg"]}
    assert listed(out)["000000_0.jpg"].items() >= {"source": str(vectors), "row": 0}.items()


def test_a_list_is_whole_or_as_before(tmp_path: Path) -> None:
    with FaceList(tmp_path) as faces:
        faces.add(tmp_path / "a.png", seed=1)
    before = (tmp_path / "faces.jsonl").read_bytes()

    def interrupted() -> None:
        with FaceList(tmp_path) as faces:
            faces.add(tmp_path / "b.png", seed=2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["faces.jsonl"]
    assert (tmp_path / "faces.jsonl").read_bytes() == before
    (tmp_path / "faces.jsonl").write_text('{"name": "mine"}\n')
    with pytest.raises(UserError, match=r"faces\.jsonl: line 1 does not say which picture"):
        FaceList(tmp_path)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_marks_survive_every_format_and_size(snapshot: Snapshot, tmp_path: Path, kind: Any) -> None:
    generate(snapshot, random_identities(snapshot, 1), tmp_path, pictures=Pictures(kind, 95, 128))
    path = tmp_path / f"000000_0.{kind}"
    with Image.open(path) as image:
        assert image.size == (128, 128)
    found = examine(path)
    assert found["synthetic"]
    # Pixels of a random network are no face, and WebP changes them more than those of one.
    assert found["watermark"]["found"] or kind == "webp"
    assert "resized from 64 to 128 pixels (Lanczos)" in read_marks(path.read_bytes()).description  # type: ignore[operator]


def test_quality_changes_the_size_of_a_file(snapshot: Snapshot, tmp_path: Path) -> None:
    for quality in (50, 95):
        pictures = Pictures("jpg", quality)
        generate(snapshot, random_identities(snapshot, 1), tmp_path / str(quality), pictures=pictures)
    small, large = ((tmp_path / name / "000000_0.jpg").stat().st_size for name in ("50", "95"))
    assert small < large


def test_a_labelled_grid_shows_the_photo_before_its_faces(snapshot: Snapshot, tmp_path: Path) -> None:
    people = random_identities(snapshot, 2)
    photos = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    source = ConditionSource(2, people.chunks, frames=photos)
    generate(snapshot, source, tmp_path / "grid.png", num=2, grid=True, labels=True)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    red, blue = (np.argwhere((sheet == colour).all(2)) for colour in ((255, 0, 0), (0, 0, 255)))
    assert len(red) == len(blue) == 128**2  # twice the size, so that words fit above
    assert red[:, 1].max() == blue[:, 1].max() < sheet.shape[1] / 2
    assert red[:, 0].max() < blue[:, 0].min()
    assert "beside real photos" in read_marks((tmp_path / "grid.png").read_bytes()).description  # type: ignore[operator]
    plain = Sheet(1, labels=True)
    plain.add([Face(0, 0, 0, "ada", 0)], torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [0.5])
    assert plain.draw().height > 128


def test_frames_and_a_video_of_an_interpolation(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    av = pytest.importorskip("av")
    command = ["generate", str(file), "--between", "random:0", "random:1", "--steps", "4", "--frames", "--mp4"]
    out = tmp_path / "way"
    assert main([*command, "--out", str(out)]) == 0
    with av.open(str(out / "between.mp4")) as video:
        assert "AI-generated face" in video.metadata["comment"]
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in video.decode(video=0)]
    assert len(frames) == 6  # forward and back
    for number in range(4):
        face = np.asarray(Image.open(out / f"{number:06d}_0.png"), int)
        assert np.abs(face - frames[number]).mean() < 6
    assert [line["position"] for line in listed(out).values()] == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-5)
    assert main([*command, "--out", str(out)]) == 0  # its own files again
    other = tmp_path / "other"
    other.mkdir()
    (other / "between.mp4").write_bytes(b"a video of mine")
    assert main([*command, "--out", str(other)]) == 2
    assert "between.mp4: exists and is no earlier result" in capsys.readouterr().err
    assert [path.name for path in other.iterdir()] == ["between.mp4"]


def test_options_without_meaning_are_refused(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, needed in (("--labels", "--grid"), ("--mp4", "--between")):
        assert main(["generate", str(file), "--random", "1", "--out", str(tmp_path / "x"), option]) == 2
        assert f"{option} is an option of {needed}" in capsys.readouterr().err
    assert main(["generate", str(file), "--random", "1", "--out", str(tmp_path / "x"), "--quality", "0"]) == 2
    assert not (tmp_path / "x").exists()
