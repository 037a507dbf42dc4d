"""Marks of generated images: metadata that other programs read, a robust watermark, a manifest that verifies."""

from __future__ import annotations

import datetime
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import c2pa
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image

from vultus.cli import main as cli
from vultus.errors import UserError
from vultus.images import watermark
from vultus.images.c2pa import Signer, read_credentials
from vultus.images.io import centre_crop, decode_image
from vultus.images.watermark import ALARM, add_watermark, detect_watermark, mark_pixels
from vultus.images.xmp import (
    COMPOSITE,
    MEDIA_TYPES,
    SYNTHETIC,
    Origin,
    SyntheticMetadata,
    encode_marked,
    mark_gif,
    read_marks,
    read_metadata,
    read_packet,
    xmp_packet,
)
from vultus.models.snapshot import default_snapshot, load_snapshot
from vultus.sampling.conditioning import random_identities
from vultus.sampling.generate import generate
from vultus.sampling.interpolate import interpolate
from vultus.sampling.latents import noise
from vultus.training.sample_grid import SampleGrid

ORIGIN = Origin("0123456789abcdef", 9, "embedding 3, noise 0, <é & \x00>")
FORMATS = ("PNG", "JPEG", "WEBP")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    """Faces of the embedded snapshot without watermark."""
    out = tmp_path_factory.mktemp("faces")
    snapshot = load_snapshot(default_snapshot())
    generate(snapshot, random_identities(snapshot, 32, seed=5), out, seed=5, mark=False)
    return [Image.open(path).convert("RGB") for path in sorted(out.glob("*.png"))]


@pytest.fixture(scope="module")
def marked(faces: list[Image.Image]) -> list[Image.Image]:
    return [add_watermark(face) for face in faces]


def reencoded(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(buffer).convert("RGB")


# --- metadata ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_metadata_in_every_format(faces: list[Image.Image], kind: Any) -> None:
    data = encode_marked(faces[0], kind, ORIGIN)
    assert data == encode_marked(faces[0], kind, ORIGIN)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == kind
        metadata = read_metadata(image)
        assert metadata.source == SYNTHETIC
        assert metadata.synthetic
        assert (metadata.model, metadata.seed) == ("0123456789abcdef", 9)
        assert metadata.tool is not None
        assert metadata.tool.startswith("vultus ")
        description = "AI-generated face, snapshot 0123456789abcdef, seed 9, embedding 3, noise 0, <é &  >"
        assert metadata.description == description
        if kind == "PNG":
            assert (image.text["Software"], image.text["Comment"]) == ("vultus", description)
        if kind == "JPEG":
            assert image.info["comment"].decode() == description
    plain = encode_marked(faces[0], kind, ORIGIN, watermark=False)
    if kind == "PNG":
        assert np.array_equal(Image.open(io.BytesIO(plain)), faces[0])
        assert np.array_equal(Image.open(io.BytesIO(data)), add_watermark(faces[0]))


def test_the_packet_is_where_the_standards_define_it(faces: list[Image.Image]) -> None:
    packet = xmp_packet(ORIGIN)
    png, jpeg, webp = (encode_marked(faces[0], kind, ORIGIN) for kind in FORMATS)
    assert b"iTXtXML:com.adobe.xmp\0\0\0\0\0" + packet in png
    assert b"\xff\xe1" + (len(packet) + 31).to_bytes(2) + b"http://ns.adobe.com/xap/1.0/\0" + packet in jpeg
    assert b"XMP " + len(packet).to_bytes(4, "little") + packet in webp


def test_a_gif_keeps_its_frames_and_has_the_packet(faces: list[Image.Image]) -> None:
    buffer = io.BytesIO()
    frames = [face.quantize(64) for face in faces[:3]]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], loop=0)
    data = mark_gif(buffer.getvalue(), ORIGIN)
    with Image.open(buffer) as before, Image.open(io.BytesIO(data)) as after:
        assert after.n_frames == before.n_frames == 3
        for number in range(3):
            before.seek(number)
            after.seek(number)
            assert np.array_equal(before.convert("RGB"), after.convert("RGB"))
    # A reader that does not know the extension skips blocks by their lengths, and must arrive at the last two bytes.
    place = data.index(b"XMP DataXMP") + 11
    assert data[place:].startswith(xmp_packet(ORIGIN))
    while data[place]:
        place += 1 + data[place]
    assert data[place:] == b"\0\x3b"


def test_composites_and_images_without_origin() -> None:
    assert read_packet(xmp_packet(Origin("", photos=True))).source == COMPOSITE
    metadata = read_packet(xmp_packet(Origin("")))
    assert (metadata.model, metadata.seed, metadata.description) == (None, None, "AI-generated face")


def test_packets_of_other_programs_are_read() -> None:
    attributes = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description rdf:about="" xmlns:e="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        b'e:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
        b"</rdf:RDF></x:xmpmeta>"
    )
    assert read_packet(attributes) == SyntheticMetadata(source=SYNTHETIC)
    camera = read_packet(attributes.replace(b"trainedAlgorithmicMedia", b"digitalCapture"))
    assert camera.source is not None
    assert not camera.synthetic
    bomb = b'<!DOCTYPE a [<!ENTITY b "bbbbbbbb">]>' + attributes
    for packet in (b"", b"no xml", attributes[:-3], bomb, b"\xff\xfe\x00"):
        assert read_packet(packet) == SyntheticMetadata()


def test_every_writer_marks(tmp_path: Path) -> None:
    snapshot = load_snapshot(default_snapshot())
    c = next(iter(random_identities(snapshot, 2, seed=1).chunks))[1]
    generate(snapshot, random_identities(snapshot, 2, seed=1), tmp_path / "one", seed=4)
    generate(snapshot, random_identities(snapshot, 2, seed=1), tmp_path / "raw", seed=4, mark=False)
    strip, animation = interpolate(snapshot, c[0], c[1], tmp_path / "interpolation", steps=3, seed=4)
    sheets = [tmp_path / f"sheet.{suffix}" for suffix in ("png", "jpg", "webp")]
    for sheet in sheets:
        generate(snapshot, random_identities(snapshot, 2, seed=1), sheet, num=2, grid=True, seed=4)
    for path in [*tmp_path.glob("one/*.png"), *tmp_path.glob("raw/*.png"), strip, *sheets]:
        with Image.open(path) as image:
            metadata = read_metadata(image)
            assert (metadata.source, metadata.seed) == (SYNTHETIC, 4), path
            assert len(metadata.model or "") == 16
            assert detect_watermark(image).found == (path.parent.name != "raw"), path
    packet = animation.read_bytes()
    packet = packet[packet.index(b"XMP DataXMP") + 11 : packet.index(b'<?xpacket end="r"?>') + 19]
    assert read_packet(packet).source == SYNTHETIC
    # The grid contains the same face.
    with Image.open(sheets[0]) as sheet, Image.open(tmp_path / "one" / "000001_0.png") as face:
        assert np.array_equal(np.asarray(sheet)[130:258, :128], np.asarray(face))


def test_sheets_with_photos_are_composites(tmp_path: Path) -> None:
    """Sample grids of a training have no watermark."""
    snapshot = load_snapshot(default_snapshot())
    c = next(iter(random_identities(snapshot, 2, seed=1).chunks))[1]
    photos, z = torch.full((2, 3, 128, 128), 99, dtype=torch.uint8), noise(1, 0, 2, snapshot.network.z_dim)
    samples = SampleGrid(tmp_path, photos, c, z)
    sheet = samples.draw(snapshot.network, 700, "cpu", torch.float32)
    for path in (sheet, samples.strip(700)):
        with Image.open(path) as image:
            metadata = read_metadata(image)
            assert (metadata.source, metadata.model) == (COMPOSITE, None)
            assert metadata.description == "AI-generated faces beside real photos, in training, after 700 images"
            assert not detect_watermark(image).found


# --- the watermark ----------------------------------------------------------------------------------------------------


def crop(image: Image.Image, number: int) -> Image.Image:
    """A tenth of each side cropped, at a position that depends on the number."""
    left, top = (7 * number) % 14, (5 * number) % 14
    return image.crop((left, top, left + 115, top + 115))


ATTACKS = {
    "none": lambda image, number: image,
    "jpeg 75": lambda image, number: reencoded(image, "JPEG", quality=75),
    "webp 90": lambda image, number: reencoded(image, "WEBP", quality=90),
    "to 64 and back": lambda image, number: image.resize((64, 64)).resize((128, 128)),
    "to 64": lambda image, number: image.resize((64, 64)),
    "crop": crop,
    "crop, stretched back": lambda image, number: crop(image, number).resize((128, 128)),
    "mirrored": lambda image, number: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_watermark_survives(marked: list[Image.Image], attack: str) -> None:
    """Of 32 faces; scripts/watermark.py measures 1,000."""
    found = [detect_watermark(ATTACKS[attack](image, number)).found for number, image in enumerate(marked)]
    assert sum(found) >= 31


def test_unmarked_faces_are_not_found(faces: list[Image.Image]) -> None:
    assert not any(detect_watermark(face).found for face in faces)


def test_real_faces_are_not_found(shared: Path) -> None:
    """Of 300 faces; scripts/watermark.py measures all of them."""
    table = pq.read_table(shared / "celeba" / "test-00000-of-00002.parquet", columns=["image"])
    photos = [decode_image(row["image"]["bytes"]) for row in table.slice(0, 300).to_pylist()]
    scores = [detect_watermark(centre_crop(photo, 128)) for photo in photos]
    assert len(scores) == 300
    assert not any(score.found for score in scores)
    # The p-values are calibrated, approximately: 1 in 10 is below 0.1.
    assert 0.04 < np.mean([score.p_value < 0.1 for score in scores]) < 0.18


def test_the_watermark_is_hardly_visible(faces: list[Image.Image], marked: list[Image.Image]) -> None:
    for face, other in zip(faces, marked, strict=True):
        error = np.asarray(face, float) - np.asarray(other)
        assert 10 * np.log10(255**2 / (error**2).mean()) > 35
        assert abs(error.mean()) < 0.2
    assert np.array_equal(add_watermark(faces[0]), marked[0])
    images = np.stack([np.asarray(face).transpose(2, 0, 1) for face in faces[:2]])
    assert np.array_equal(mark_pixels(images)[1].transpose(1, 2, 0), marked[1])


@pytest.mark.parametrize("size", [(64, 64), (70, 200), (256, 256), (300, 130)])
def test_images_of_other_sizes(faces: list[Image.Image], size: tuple[int, int]) -> None:
    image = faces[3].resize(size)
    before, after = detect_watermark(image), detect_watermark(add_watermark(image))
    assert add_watermark(image).size == size
    assert not before.found
    assert after.found
    assert 0 <= after.p_value < ALARM < before.p_value <= 1


def test_images_that_cannot_be_marked() -> None:
    """Too small, or of one colour: unchanged, and no watermark is found."""
    for image in (Image.new("RGB", (63, 200), (90, 120, 40)), Image.new("RGB", (128, 128), "white")):
        assert np.array_equal(add_watermark(image), image)
        assert not detect_watermark(image).found
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 500, 3), np.uint8))
    assert not detect_watermark(noise).found


def test_the_pattern_does_not_change() -> None:
    """Images marked by earlier versions are detected only while the waves are the same."""
    waves = watermark._WAVES
    assert waves.shape == (17, 17)
    np.testing.assert_allclose(waves[8, 11:14], [0, 0.72237 + 0.69150j, -0.98627 + 0.16515j], atol=1e-4)
    np.testing.assert_allclose(waves, waves[::-1, ::-1].conj(), atol=1e-6)


def test_no_torch() -> None:
    code = (
        "import sys, vultus.images.detect; from vultus.images.xmp import Origin, encode_marked; from PIL import Image;"
        "encode_marked(Image.new('RGB', (128, 128), 'red'), 'PNG', Origin('m', 1)); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- the manifest -----------------------------------------------------------------------------------------------------

USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


def certificate(name: str, public: Any, issuer_key: Any, usage: str, *, days: int = 30) -> x509.Certificate:
    """A certificate issued by `test root` that meets the requirements of C2PA."""
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, who)]) for who in (name, "test root")]
    builder = x509.CertificateBuilder().subject_name(names[0]).issuer_name(names[1]).public_key(public)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=60))
    builder = builder.not_valid_after(now + datetime.timedelta(days=days))
    authority = usage == "key_cert_sign"
    builder = builder.add_extension(x509.BasicConstraints(authority, None), critical=True)
    builder = builder.add_extension(x509.KeyUsage(**{one: one == usage for one in USAGES}), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    builder = builder.add_extension(identifier, critical=False)
    if not authority:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: root.pem, and for ec, rsa and old a chain NAME.pem and a key NAME.key; `old` is expired."""
    folder = tmp_path_factory.mktemp("keys")
    root = ec.generate_private_key(ec.SECP256R1())
    top = certificate("test root", root.public_key(), root, "key_cert_sign").public_bytes(Encoding.PEM)
    (folder / "root.pem").write_bytes(top)
    private = {
        "ec": ec.generate_private_key(ec.SECP256R1()),
        "rsa": rsa.generate_private_key(65537, 2048),
        "old": ec.generate_private_key(ec.SECP384R1()),
    }
    for name, key in private.items():
        days = -1 if name == "old" else 30
        own = certificate(f"test {name}", key.public_key(), root, "digital_signature", days=days)
        (folder / f"{name}.pem").write_bytes(own.public_bytes(Encoding.PEM) + top)
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (folder / f"{name}.key").write_bytes(secret)
    return folder


@pytest.mark.parametrize("name", ["ec", "rsa"])
@pytest.mark.parametrize("kind", MEDIA_TYPES)
def test_signed_images_verify(faces: list[Image.Image], keys: Path, kind: Any, name: str) -> None:
    plain = encode_marked(faces[0], kind, ORIGIN)
    data = Signer(keys / f"{name}.pem", keys / f"{name}.key")(plain, kind, ORIGIN)
    assert len(data) < len(plain) + 40_000
    mime = MEDIA_TYPES[kind]
    trust = {"trust": {"trust_anchors": (keys / "root.pem").read_text()}, "verify": {"verify_trust": True}}
    with c2pa.Reader(mime, io.BytesIO(data), context=c2pa.Context.from_dict(trust)) as reader:
        assert reader.get_validation_state() == "Trusted"
        manifest = reader.get_active_manifest()
    (actions,) = (one for one in manifest["assertions"] if one["label"].startswith("c2pa.actions"))
    (action,) = actions["data"]["actions"]
    assert action["action"] == "c2pa.created"
    assert action["digitalSourceType"] == SYNTHETIC
    assert action["description"] == ORIGIN.description
    with Image.open(io.BytesIO(data)) as image:
        assert read_marks(data).seed == 9
        with Image.open(io.BytesIO(plain)) as unsigned:
            assert np.array_equal(image.convert("RGB"), unsigned.convert("RGB"))
    assert read_credentials(data, kind) == {"state": "Valid", "source": SYNTHETIC, "signer": f"test {name}"}
    assert read_credentials(plain, kind) is None
    place = data.index(b"http://ns.adobe.com/xap/1.0/")  # in the packet, which is part of the signed bytes
    changed = data[:place] + b"H" + data[place + 1 :]
    assert (read_credentials(changed, kind) or {})["state"] == "Invalid"


def test_unusable_certificates(faces: list[Image.Image], keys: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pem").write_text("no PEM")
    for cert, key, message in (
        (keys / "none.pem", keys / "ec.key", r"none\.pem: cannot be read \(No such file"),
        (keys / "ec.pem", keys / "rsa.key", r"rsa\.key: is not the key of the first certificate in .*ec\.pem"),
        (tmp_path / "text.pem", keys / "ec.key", r"text\.pem: holds no PEM certificate"),
        (keys / "ec.pem", tmp_path / "text.pem", r"text\.pem: holds no PEM private key"),
    ):
        with pytest.raises(UserError, match=message):
            Signer(cert, key)
    with pytest.raises(UserError, match=r"old\.pem: the C2PA library rejects"):
        Signer(keys / "old.pem", keys / "old.key")(encode_marked(faces[0], "PNG", ORIGIN), "PNG", ORIGIN)


# --- the command line -------------------------------------------------------------------------------------------------


def test_generate_signs_and_detect_reports(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["generate", "default", "--random", "1", "--device", "cpu"]
    signing = ["--c2pa-cert", str(keys / "ec.pem"), "--c2pa-key", str(keys / "ec.key")]
    assert cli.main([*command, "--out", "signed", *signing]) == 0
    assert cli.main([*command, "--out", "plain", "--no-mark"]) == 0
    reencoded(Image.open("signed/000000_0.png").convert("RGB"), "PNG").save("bare.png")
    reencoded(Image.open("plain/000000_0.png").convert("RGB"), "PNG").save("nothing.png")
    files = ["signed/000000_0.png", "plain/000000_0.png", "bare.png", "nothing.png"]
    capsys.readouterr()
    assert cli.main(["detect", *files, "--json"]) == 0
    signed, plain, bare, nothing = json.loads(capsys.readouterr().out)
    assert [one["synthetic"] for one in (signed, plain, bare, nothing)] == [True, True, True, False]
    assert signed["credentials"] == {"state": "Valid", "source": SYNTHETIC, "signer": "test ec"}
    assert [one["watermark"]["found"] for one in (signed, plain, bare, nothing)] == [True, False, True, False]
    assert plain["metadata"]["seed"] == 0
    assert bare["metadata"] is None
    assert cli.main(["detect", *files]) == 0
    shown = capsys.readouterr().out
    assert "credentials: Valid, trainedAlgorithmicMedia, signed by test ec" in shown
    assert "nothing.png: no sign that it is synthetic" in shown
    Path("text.png").write_text("not an image")
    for file, message in {"text.png": "not a JPEG, PNG or WebP", "none.png": "No such file"}.items():
        assert cli.main(["detect", file]) == 2
        assert message in capsys.readouterr().err
    assert cli.main([*command, "--out", "x", "--c2pa-cert", "a.pem"]) == 2
    assert "are needed together" in capsys.readouterr().err
