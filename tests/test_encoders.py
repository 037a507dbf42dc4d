"""Conditions of other encoders than FaceNet: networks in ONNX files and tables, from the photos to the loss."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from test_prepare import TinyEncoder, jpeg, rows, skipped, write_photos
from vultus.cli.main import main
from vultus.config import GANConfig
from vultus.data.dataset import PreparedDataset
from vultus.data.embedding_table import read_table
from vultus.data.prepare import prepare
from vultus.data.separation import check_spread, separation
from vultus.errors import UserError
from vultus.evaluation.headlines import loss_encoders
from vultus.images.io import centre_crop, crop_x, from_pil, to_x
from vultus.models.encoders import OnnxEncoder, difference, encoder_entry, load_face_encoder, template_crop
from vultus.models.mobilefacenet import BOX, MobileFaceNet
from vultus.presets import fitted, get_preset
from vultus.training import losses
from vultus.training.gan import GAN

ARCFACE = [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]


def write_onnx(path: Path, *, shape: list[Any] | None = None, outputs: int = 1, scale: float = 1.0) -> Path:
    """A network that averages each of 4x4 parts of an image of 112 pixels: 48 numbers, by `scale`."""
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    shape = shape or ["n", 3, 112, 112]
    nodes, images = [], "x"
    if shape[-1] == 3:
        nodes, images = [helper.make_node("Transpose", ["x"], ["chw"], perm=[0, 3, 1, 2])], "chw"
    nodes += [
        helper.make_node("AveragePool", [images], ["parts"], kernel_shape=[28, 28], strides=[28, 28]),
        helper.make_node("Flatten", ["parts"], ["flat"]),
        helper.make_node("Mul", ["flat", "scale"], ["e0"]),
        *(helper.make_node("Identity", ["e0"], [f"e{number}"]) for number in range(1, outputs)),
    ]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(f"e{number}", kind, [shape[0], 48]) for number in range(outputs)],
        [onnx.numpy_helper.from_array(np.float32(scale), "scale")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.fixture
def encoder_file(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "parts.onnx")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos", people=8, photos=4)
    return tmp_path / "photos"


# --- networks in ONNX files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [["n", 3, 112, 112], [1, 3, 112, 112], ["n", 112, 112, 3]])
def test_a_network_reads_crops_as_the_file_beside_it_says(tmp_path: Path, shape: list[Any]) -> None:
    path = write_onnx(tmp_path / "parts.onnx", shape=shape)
    settings = {"id": "mine", "mean": [10, 20, 30], "std": [50, 60, 70], "channels": "bgr", "crop": [0.1, 0.2, 0.5]}
    path.with_suffix(".json").write_text(json.dumps(settings))
    encoder = OnnxEncoder(path)
    x = torch.rand(3, 3, 128, 128) * 2 - 1
    crops = crop_x(x, 112, (0.1, 0.2, 0.5))
    values = (crops.flip(1) * 127.5 + 127.5 - torch.tensor([10.0, 20, 30]).view(3, 1, 1)) / torch.tensor(
        [50.0, 60, 70]
    ).view(3, 1, 1)
    expected = F.normalize(F.avg_pool2d(values, 28).flatten(1))
    assert torch.allclose(encoder.embed(x), expected, atol=1e-5)
    assert encoder_entry(encoder)["id"] == "mine"
    assert not encoder.normalised
    again = pickle.loads(pickle.dumps(encoder))  # as the worker processes of `prepare` get it
    assert torch.equal(again.embed_crop(crops), encoder.embed_crop(crops))


def test_a_template_gives_the_square_that_it_is_in() -> None:
    (left, right), size = (ARCFACE[0], ARCFACE[1]), 112
    crop = template_crop(((left[0], left[1]), (right[0], right[1])), size)
    assert crop == pytest.approx(BOX, abs=1e-3)


def test_a_crop_off_the_centre_reads_that_part_of_the_photo() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8))
    square = image.crop((16, 0, 112, 96))
    expected = square.crop((24, 12, 72, 60))
    assert np.array_equal(np.asarray(centre_crop(image, 48, (0.25, 0.125, 0.5))), np.asarray(expected))
    assert torch.equal(crop_x(to_x(from_pil([square])), 48, (0.25, 0.125, 0.5)), to_x(from_pil([expected])))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": 200}, "size is 200; the network takes 112"),
        ({"sice": 112}, "has no key 'sice'"),
        ({"crop": [0.5, 0.5, 0.8]}, "which is not in the frame"),
        ({"crop": BOX, "template": ARCFACE}, "leave one out"),
        ({"template": [[73, 51], [38, 51]]}, "the eye on the left of the image comes first"),
        ({"std": 0}, "numbers above 0"),
        ({"mean": [1, 2]}, "1 or 3 numbers"),
        ({"channels": "grey"}, '"rgb" or "bgr"'),
        ([1], "an object such as"),
    ],
)
def test_a_wrong_value_beside_a_network_is_named(encoder_file: Path, settings: Any, said: str) -> None:
    encoder_file.with_suffix(".json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"parts\.json") as error:
        OnnxEncoder(encoder_file)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ({"outputs": 2}, "has 2 outputs (e0, e1)"),
        ({"shape": [4, 3, 112, 112]}, "takes exactly 4 images at a time"),
        ({"shape": ["n", 1, 112, 112]}, "it is no face encoder"),
        ({"scale": float("nan")}, "no finite numbers"),
    ],
)
def test_a_file_that_is_no_face_encoder_is_refused(tmp_path: Path, network: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        OnnxEncoder(write_onnx(tmp_path / "parts.onnx", **network))
    assert said in str(error.value)


def test_prepare_refuses_what_cannot_be_an_encoder(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_onnx(tmp_path / "alike.onnx")
    # The mean is far from the values, so all images are nearly the same to the network.
    path.with_suffix(".json").write_text(json.dumps({"mean": -100_000}))
    table = tmp_path / "t.csv"
    table.write_text("key,a\nx,1\n")
    (tmp_path / "text.onnx").write_text("no network")
    for more, said in (
        (["--encoder", str(path)], "nearly the same (mean cosine 1.000)"),
        (["--encoder", str(tmp_path / "text.onnx")], "not an ONNX model"),
        (["--encoder", "facenett"], "give facenet, mobilefacenet, dlib or FILE.onnx"),
        (["--encoder", str(path), "--embeddings", str(table)], "leave one out"),
    ):
        out = tmp_path / f"out {len(said)}"
        assert main(["prepare", str(photos), "--out", str(out), "--no-facenet", *more]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("vultus: error: ")
        assert said in error


def test_prepare_with_a_network_and_what_is_known_of_it(photos: Path, encoder_file: Path, tmp_path: Path) -> None:
    manifest = prepare(photos, tmp_path / "data", encoder=encoder_file, facenet=False, resolution=32)
    dataset = PreparedDataset(tmp_path / "data", None)
    encoder = OnnxEncoder(encoder_file)
    first = rows(tmp_path / "data")[0]
    crop = centre_crop(Image.open(photos / first["key"]).convert("RGB"), 112, BOX)
    assert torch.allclose(encoder.embed_crop(to_x(from_pil([crop])))[0], dataset.embeddings([0])[0], atol=1e-6)
    assert manifest["encoder"]["dim"] == 48
    assert "facenet" not in manifest
    assert manifest["separation"] is not None
    again = prepare(photos, tmp_path / "data", encoder=encoder_file, facenet=False, resolution=32)
    assert again == manifest
    with pytest.raises(UserError, match="was begun with --encoder"):
        prepare(photos, tmp_path / "data", encoder="mobilefacenet", facenet=False, resolution=32)


# --- tables -----------------------------------------------------------------------------------------------------------


def write_table(path: Path, vectors: Mapping[str, Any]) -> Path:
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", *(f"v{number}" for number in range(len(next(iter(vectors.values())))))])
            writer.writerows([key, *map(float, vector)] for key, vector in vectors.items())
    else:
        columns = {"key": list(vectors), "embedding": [list(map(float, vector)) for vector in vectors.values()]}
        pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_prepare_with_a_table_of_vectors(photos: Path, tmp_path: Path, suffix: str) -> None:
    keys = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.jpg"))
    random = np.random.default_rng(0)
    vectors = {key: 5 * random.standard_normal(7) for key in keys[1:]}
    table = write_table(tmp_path / f"mine{suffix}", vectors)
    manifest = prepare(photos, tmp_path / "data", embeddings=table, encoder="box", facenet=False, resolution=32)
    expected = {"id": "box", "dim": 7, "normalised": False, "network": False}
    assert expected.items() <= manifest["encoder"].items()
    read = rows(tmp_path / "data")
    assert {row["key"] for row in read} == set(keys[1:])
    for row in read:
        vector = vectors[row["key"]]
        assert np.allclose(row["embedding"], vector / np.linalg.norm(vector), atol=1e-6)
    assert skipped(tmp_path / "data") == {keys[0]: f"no row in mine{suffix}"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("key,a,b\nx,1,2\ny,3,4\nx,5,6\n", "rows 0 and 2 have the same key, 'x'"),
        ("key,a,b\nx,1,2\ny,0,0\n", "row 1 (y) holds only zeros"),
        ("key,a,b\nx,1,2\ny,nan,4\n", "row 1 (y) holds values that are not finite"),
        ("key\nx\n", "no columns of numbers"),
        ("key,a\n", "holds no row"),
        ("a,b\n1,2\n", "no row for the first 32 photos"),
    ],
)
def test_a_wrong_table_is_refused(photos: Path, tmp_path: Path, content: str, said: str) -> None:
    table = tmp_path / "t.csv"
    table.write_text(content)
    with pytest.raises(UserError, match=r"--embeddings .*t\.csv") as error:
        prepare(photos, tmp_path / "data", embeddings=table, facenet=False)
    assert said in str(error.value)


def test_vectors_of_different_lengths_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"key": ["a", "b"], "embedding": [[1.0, 2.0], [1.0]]}), path)
    with pytest.raises(UserError, match="row 1 holds 1 numbers, the first row 2"):
        read_table(path)


# --- what is measured of them -----------------------------------------------------------------------------------------


def test_separation_is_the_area_under_the_roc_curve() -> None:
    random = np.random.default_rng(0)
    people = [str(number // 4) for number in range(400)]
    centres = random.standard_normal((100, 16))
    weak = centres.repeat(4, 0) * 0.1 + random.standard_normal((400, 16))
    strong = centres.repeat(4, 0) + 0.1 * random.standard_normal((400, 16))
    found = [
        separation((values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32), people)
        for values in (strong, weak)
    ]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0]["auc"] > 0.99
    assert 0.4 < found[1]["auc"] < 0.7
    assert found[0]["same"] > 0.9 > 0.2 > abs(found[0]["different"])
    check_spread(strong.astype(np.float32) / 4, "x")


def test_encoders_differ_by_what_both_know() -> None:
    known = {"id": "a", "dim": 4, "weights_sha256": "12" * 32}
    assert difference(known, {"id": "a", "dim": 4, "weights_sha256": ""}) == ""
    assert "b (4 numbers) instead of a (4 numbers)" in difference(known, known | {"id": "b"})
    assert "weights 565656565656 instead of" in difference(known, known | {"weights_sha256": "56" * 32})


def test_the_encoder_of_the_condition_judges_nothing() -> None:
    metadata: dict[str, Any] = {"loss_encoders": ["facenet"], "encoder": {"id": "facenet-vggface2"}}
    assert loss_encoders(metadata) == ["facenet"]
    assert loss_encoders(metadata | {"encoder": {"id": "dlib-resnet-v1-fixed"}}) == ["facenet", "dlib"]


# --- training and generating ------------------------------------------------------------------------------------------


class CropLess:
    """The encoder of a loss, of 6 numbers."""

    id, dim, weights_sha256, crop, size, dtype = "loss", 6, "", 1.0, 8, torch.float32

    def embed(self, x: Tensor, size: int | None = None) -> Tensor:
        return F.normalize(F.adaptive_avg_pool2d(x, (1, 2)).flatten(1))


def test_the_identity_loss_compares_with_the_embedding_beside_the_condition() -> None:
    config = fitted(get_preset("tiny"), 32, c_dim=5)
    assert isinstance(config, GANConfig)
    assert config.generator.c_dim == config.discriminator.c_dim == 5
    config = replace(
        config,
        loss=replace(config.loss, identity_weight=1.0, identity_start=1.0, identity_nimg=0, identity_fraction=1.0),
    )
    encoder = CropLess()
    gan = GAN(config, device="cpu", dtype=torch.float32, encoder=encoder)
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=random, dtype=torch.uint8)
    c, target = (F.normalize(torch.randn(4, dim, generator=random)) for dim in (5, 6))
    seen: list[Tensor] = []
    plain = losses.identity
    try:
        losses.identity = lambda embedding, other: seen.append(other) or plain(embedding, other)  # type: ignore[func-returns-value]
        named = gan.step(images, c, 0, facenet=target)
    finally:
        losses.identity = plain
    assert torch.equal(seen[0], target)
    assert named["G_identity"].isfinite()


def test_a_run_on_another_encoder_from_photos_to_faces(
    photos: Path,
    encoder_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tiny_dataset: Callable[..., Path],
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    prepare(photos, data, encoder=encoder_file, facenet=False, resolution=32)
    train = ["train", "--preset", "tiny", "--data", str(data), "--device", "cpu"]
    assert main([*train, "--out", str(run), "--optim.batch", "4", "--images", "8"]) == 0
    assert main([*train[:2], "vultus-cpu", *train[3:], "--out", str(tmp_path / "other"), "--optim.batch", "4"]) == 2
    assert "prepare the photos again without --no-facenet" in capsys.readouterr().err
    generate = ["generate", str(run), "--num", "1", "--out"]
    assert main([*generate, str(tmp_path / "faces"), "--embeddings", str(data)]) == 0
    photo = str(next(photos.rglob("*.jpg")))
    asked = [*generate, str(tmp_path / "faces 2"), "--photos", photo, "--align", "false"]
    assert main(asked) == 2
    assert "give its network with --encoder FILE.onnx" in capsys.readouterr().err
    assert main([*asked, "--encoder", str(encoder_file)]) == 0
    other = write_onnx(tmp_path / "other.onnx", scale=2.0)
    assert main([*asked, "--encoder", str(other), "--overwrite"]) == 2
    assert "other (48 numbers) instead of parts (48 numbers)" in capsys.readouterr().err
    mismatched = tiny_dataset("mismatched", dim=48)
    assert main([*generate, str(tmp_path / "faces 3"), "--embeddings", str(mismatched)]) == 2
    assert "instead of parts (48 numbers)" in capsys.readouterr().err


def test_a_given_encoder_object_is_used_alone(photos: Path, tmp_path: Path) -> None:
    manifest = prepare(photos, tmp_path / "data", encoder=TinyEncoder(), resolution=32)
    assert manifest["encoder"]["id"] == "tiny"
    assert "facenet" not in manifest


def test_a_prepared_set_with_mobilefacenet_holds_facenets_embedding_too(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    assert main(["prepare", str(folder), "--out", str(tmp_path / "data"), "--encoder", "mobilefacenet"]) == 0
    dataset = PreparedDataset(tmp_path / "data", None)
    assert dataset.embeddings().shape == (4, 128)
    assert dataset.batch([0, 1]).facenet.shape == (2, 512)  # type: ignore[union-attr]
    encoder = load_face_encoder("mobilefacenet")
    assert isinstance(encoder, MobileFaceNet)
    crop = centre_crop(Image.open(folder / "0.jpg"), 112, BOX)
    row = dataset.batch(range(4)).keys.index("0.jpg")
    assert torch.allclose(encoder.embed_crop(to_x(from_pil([crop])))[0], dataset.embeddings([row])[0], atol=1e-5)
