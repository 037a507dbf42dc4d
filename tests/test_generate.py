"""From embeddings, photos and random identities to files, with small generators and, if it is available, FaceNet."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vultus.cli.main import main
from vultus.errors import UserError
from vultus.images import align as faces
from vultus.images.io import to_x
from vultus.models.facenet import FaceNet
from vultus.models.generators import build_generator
from vultus.models.snapshot import Snapshot, load_snapshot, save_snapshot
from vultus.sampling.best import choose, likeness
from vultus.sampling.conditioning import as_one, from_embeddings, from_photos, one_embedding, random_identities
from vultus.sampling.generate import MAX_GRID, STEP, generate, render
from vultus.sampling.generator import load
from vultus.sampling.interpolate import interpolate
from vultus.sampling.latents import noise
from vultus.sampling.population import fit_population

CONFIG = {"resolution": 32, "z_dim": 20, "c_dim": 512, "base_width": 8, "max_width": 16, "projection": 32}


def unit(count: int, seed: int = 0, dim: int = 512) -> Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)))


def write_snapshot(path: Path, kind: str = "conditional-norm", encoder: str = FaceNet.id, **changes: int) -> Path:
    config = {"kind": kind, **CONFIG, **changes}
    torch.manual_seed(0)
    generator = build_generator(**config)
    for parameter in generator.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # at the start, blocks pass their skip path only
    metadata = {"generator": config, "encoder": {"id": encoder, "dim": 512}}
    population = {"mean": torch.zeros(config["c_dim"]), "factor": torch.zeros(config["c_dim"], 1)}
    if config["c_dim"] <= 512:  # more take many seconds
        population = fit_population(unit(30, dim=config["c_dim"]))
    save_snapshot(path, network=generator, population=population, metadata=metadata)
    return path


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    return load_snapshot(write_snapshot(tmp_path / "snapshot.safetensors"))


def images(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.mark.parametrize("kind", ["conditional-norm", "dcgan"])
def test_same_seed_same_faces_whatever_the_batch_size(tmp_path: Path, kind: str) -> None:
    snapshot = load_snapshot(write_snapshot(tmp_path / "s.safetensors", kind))
    np.save(tmp_path / "c.npy", unit(19).numpy())
    written = {}
    for batch in (1, 7, 16, 40):
        summary = generate(
            snapshot, from_embeddings(tmp_path / "c.npy", snapshot), tmp_path / str(batch), num=2, seed=3, batch=batch
        )
        assert (summary.faces, summary.embeddings, summary.skipped) == (38, 19, [])
        written[batch] = images(tmp_path / str(batch))
    assert sorted(written[1]) == [f"{index:06d}_{variant}.png" for index in range(19) for variant in range(2)]
    assert written[1] == written[7] == written[16] == written[40]
    assert len(set(written[1].values())) == 38
    # The fifth face is the same when it is generated alone.
    z = noise(3, 4, 1, 20, variant=1)
    alone = render(snapshot.network, z, unit(19)[4:5])
    assert np.array_equal(alone[0].permute(1, 2, 0), Image.open(tmp_path / "1" / "000004_1.png"))
    generate(snapshot, from_embeddings(tmp_path / "c.npy", snapshot), tmp_path / "other", num=2, seed=4)
    assert not set(images(tmp_path / "other").values()) & set(written[1].values())


def test_generator_always_runs_on_the_same_number_of_faces(snapshot: Snapshot) -> None:
    sizes = []
    snapshot.network.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    faces = render(snapshot.network, torch.zeros(STEP + 1, 20), unit(STEP + 1))
    assert sizes == [STEP, STEP]
    assert faces.shape == (STEP + 1, 3, 32, 32)
    assert faces.dtype == torch.uint8
    assert render(snapshot.network, torch.zeros(0, 20), unit(0)).shape == (0, 3, 32, 32)


def test_files_name_their_seed(snapshot: Snapshot, tmp_path: Path) -> None:
    generate(snapshot, random_identities(snapshot, 1, seed=1), tmp_path / "out", seed=9)
    with Image.open(tmp_path / "out" / "000000_0.png") as image:
        assert image.size == (32, 32)
        assert image.text["Software"] == "vultus"
        assert "AI-generated" in image.text["Comment"]
        assert "seed 9" in image.text["Comment"]


def test_random_identities_do_not_depend_on_their_number(snapshot: Snapshot, tmp_path: Path) -> None:
    few = torch.cat([c for _, c in random_identities(snapshot, 5, seed=2).chunks])
    chunks = list(random_identities(snapshot, 600, seed=2).chunks)
    many = torch.cat([c for _, c in chunks])
    assert len(chunks) > 1
    assert torch.equal(many[:5], few)
    assert [name for names, _ in chunks for name in names][599] == "000599"
    assert torch.equal(one_embedding("random:3", snapshot, seed=2), few[3])
    snapshot.population.clear()
    with pytest.raises(UserError, match=r"snapshot\.safetensors: holds no population prior"):
        random_identities(snapshot, 1)
    with pytest.raises(UserError, match="must be a whole number from 1"):
        random_identities(snapshot, 0)


def test_many_faces_are_split_into_folders(snapshot: Snapshot, tmp_path: Path) -> None:
    generate(snapshot, random_identities(snapshot, 501), tmp_path, num=2)
    names = list(images(tmp_path))
    assert len(names) == 1002
    assert names[:2] == ["0000/000000_0.png", "0000/000000_1.png"]
    assert names[-2:] == ["0001/000500_0.png", "0001/000500_1.png"]


def test_grid(snapshot: Snapshot, tmp_path: Path) -> None:
    summary = generate(snapshot, random_identities(snapshot, 3), tmp_path / "out", num=4, grid=True)
    assert summary.out == tmp_path / "out" / "grid.png"
    with Image.open(summary.out) as sheet:
        assert sheet.size == (4 * 34 - 2, 3 * 34 - 2)  # a row for each embedding
        assert "AI-generated" in sheet.text["Comment"]
        generate(snapshot, random_identities(snapshot, 3), tmp_path / "single", num=4)
        with Image.open(tmp_path / "single" / "000001_2.png") as face:
            assert np.array_equal(np.asarray(sheet)[34:66, 68:100], np.asarray(face))
    square = generate(snapshot, random_identities(snapshot, 7), tmp_path / "new" / "sheet.jpg", grid=True)
    with Image.open(square.out) as sheet:
        assert sheet.size == (3 * 34 - 2, 3 * 34 - 2)
        assert sheet.format == "JPEG"
    with pytest.raises(UserError, match=f"1026 faces do not fit in one grid of {MAX_GRID}"):
        generate(snapshot, random_identities(snapshot, 513), tmp_path / "large", num=2, grid=True)
    assert not (tmp_path / "large").exists()


def test_low_noise_strength_makes_faces_more_alike(snapshot: Snapshot, tmp_path: Path) -> None:
    spread = {}
    for strength in (0.0, 0.5, 1.0):
        out = tmp_path / str(strength)
        generate(snapshot, random_identities(snapshot, 1), out, num=8, noise_strength=strength)
        faces = np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))])
        spread[strength] = faces.astype(float).std(0).mean()
    assert spread[0.0] == 0
    assert 0 < spread[0.5] < spread[1.0]
    with pytest.raises(UserError, match="noise_strength must be a number from 0 to 4, not -1"):
        generate(snapshot, random_identities(snapshot, 1), tmp_path / "none", noise_strength=-1)
    with pytest.raises(UserError, match="noise_strength must be a number from 0 to 4, not nan"):
        interpolate(snapshot, unit(1)[0], unit(2)[1], tmp_path / "none", noise_strength=math.nan)
    assert not (tmp_path / "none").exists()


def test_bad_embeddings_are_reported_before_the_first_face(snapshot: Snapshot, tmp_path: Path) -> None:
    rows = unit(40).numpy()
    rows[33] = np.nan
    np.save(tmp_path / "bad.npy", rows)
    with pytest.raises(UserError, match=r"bad\.npy: row 33 holds NaN"):
        generate(snapshot, from_embeddings(tmp_path / "bad.npy", snapshot), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    np.save(tmp_path / "narrow.npy", rows[:, :128])
    with pytest.raises(UserError, match="128-dimensional"):
        from_embeddings(tmp_path / "narrow.npy", snapshot)


def test_output_paths_that_cannot_be_used(snapshot: Snapshot, tmp_path: Path) -> None:
    source = random_identities(snapshot, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        generate(snapshot, source, tmp_path / "file")
    with pytest.raises(UserError, match=r"x\.png: a folder is needed"):
        generate(snapshot, source, tmp_path / "x.png")
    with pytest.raises(UserError, match="must be a whole number from 1"):
        generate(snapshot, source, tmp_path / "out", num=0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "000000_0.png").write_text("old")
    with pytest.raises(
        UserError, match="exists and was not written by vultus; choose another --out, or replace it with"
    ):
        generate(snapshot, source, tmp_path / "out")
    generate(snapshot, random_identities(snapshot, 1), tmp_path / "out", overwrite=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"000000_0.png", "faces.jsonl"}
    with Image.open(tmp_path / "out" / "000000_0.png") as image:
        assert image.size == (32, 32)


def test_interpolation_is_a_row_and_an_animation(snapshot: Snapshot, tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", unit(3).numpy())
    a = one_embedding(f"{tmp_path / 'c.npy'}#2", snapshot)
    b = one_embedding(str(tmp_path / "c.npy"), snapshot)
    torch.testing.assert_close(a, unit(3)[2])
    torch.testing.assert_close(b, unit(3)[0])
    strip, animation = interpolate(snapshot, a, b, tmp_path / "out", steps=5, seed=1)
    with Image.open(strip) as image:
        assert image.size == (5 * 34 - 2, 32)
        sheet = np.asarray(image)
    ends = render(snapshot.network, noise(1, 0, 1, 20).expand(2, -1), torch.stack([a, b]))
    assert np.array_equal(sheet[:, :32], ends[0].permute(1, 2, 0))
    assert np.abs(sheet[:, -32:].astype(int) - ends[1].permute(1, 2, 0).numpy()).max() <= 1
    with Image.open(animation) as gif:
        assert gif.n_frames == 8  # forward and back, the ends once
        assert gif.info["loop"] == 0
    for steps in (1, 10_000):
        with pytest.raises(UserError, match="steps must be a whole number from 2 to 240"):
            interpolate(snapshot, a, b, tmp_path / "out", steps=steps)


def test_photos_and_embeddings_of_another_encoder(tmp_path: Path) -> None:
    snapshot = load_snapshot(write_snapshot(tmp_path / "other.safetensors", encoder="arcface"))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"other\.safetensors: was trained on embeddings of arcface"):
        from_photos([tmp_path / "a.png"], snapshot)
    (tmp_path / "empty").mkdir()
    for path, message in {"none.jpg": "no such photo or folder", "empty": "no photos in this folder"}.items():
        with pytest.raises(UserError, match=message):
            from_photos([tmp_path / path], snapshot)
    with pytest.raises(UserError, match="no photos given"):
        from_photos([], snapshot)


@pytest.fixture
def album(shared: Path, tmp_path: Path) -> Path:
    """A folder with two real photos, a damaged one and one without a face."""
    table = pq.read_table(shared / "celeba" / "test-00000-of-00002.parquet")
    photos = {row["celeb_id"]: row["image"]["bytes"] for row in table.to_pylist()}
    one, two = (photos[key] for key in sorted(photos)[:2])
    album = tmp_path / "album"
    (album / "Ann").mkdir(parents=True)
    (album / "Ann" / "1.webp").write_bytes(one)
    (album / "b b.webp").write_bytes(two)
    (album / "cut.webp").write_bytes(two[: len(two) // 3])
    Image.new("RGB", (200, 200), "grey").save(album / "grey.png")
    return album


@pytest.mark.skipif(not faces.available(), reason="the extra `align` is not installed")
def test_photos(
    snapshot: Snapshot, album: Path, tmp_path: Path, facenet: FaceNet, capsys: pytest.CaptureFixture[str]
) -> None:
    conditions = from_photos([album, album / "b b.webp"], snapshot, encoder=facenet)
    assert conditions.count == 5
    summary = generate(snapshot, conditions, tmp_path / "out")
    assert (summary.faces, summary.embeddings) == (3, 3)
    assert sorted(images(tmp_path / "out")) == ["Ann_1_0.png", "b_b-2_0.png", "b_b_0.png"]
    skipped = dict(summary.skipped)
    assert skipped.keys() == {f"{album}/cut.webp", f"{album}/grey.png"}
    assert "damaged" in skipped[f"{album}/cut.webp"]
    assert skipped[f"{album}/grey.png"] == "no face found"
    shown = capsys.readouterr().err
    assert f"skipped {album}/grey.png: no face found" in shown
    # The embedding is that of the face: close to that of the photo without alignment, far from the other identity's.
    aligned = one_embedding(str(album / "Ann" / "1.webp"), snapshot, encoder=facenet)
    plain = one_embedding(str(album / "Ann" / "1.webp"), snapshot, encoder=facenet, align=False)
    other = one_embedding(str(album / "b b.webp"), snapshot, encoder=facenet)
    assert float(aligned @ plain) > 0.9
    assert float(aligned @ other) < 0.5
    with pytest.raises(UserError, match=r"grey\.png: no face found; no photo could be used"):
        generate(snapshot, from_photos([album / "grey.png"], snapshot, encoder=facenet), tmp_path / "none")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_faces(tmp_path: Path) -> None:
    """1,100 long embeddings are 26 MB more than 300, their images 10 MB; the process may use 20 MB more.

    The allocator's own steps are 4 to 11 MB, and do not become more with 3,300 embeddings.
    The peak is VmHWM where there is /proc: ru_maxrss of a new process begins at the memory of the one that started it.
    """
    path = write_snapshot(tmp_path / "snapshot.safetensors", resolution=64, c_dim=8192)
    program = """
import json, resource, sys, torch
from pathlib import Path
from vultus.sampling import embedding_arrays
from vultus.models.snapshot import load_snapshot
from vultus.sampling.conditioning import from_embeddings
from vultus.sampling.generate import generate
torch.set_num_threads(1)
embedding_arrays.CHUNK = 128  # several chunks in both files, and small ones
status = Path("/proc/self/status")
snapshot = load_snapshot(sys.argv[1])
peaks = []
for path in sys.argv[2:]:
    generate(snapshot, from_embeddings(path, snapshot), Path(path).with_suffix(""))
    lines = status.read_text().splitlines() if status.is_file() else []
    peak = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    peaks.append(peak[0] if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(json.dumps(peaks))
"""
    files = []
    for count in (300, 1100):
        files.append(str(tmp_path / f"{count}.npy"))
        np.save(files[-1], np.random.default_rng(0).standard_normal((count, 8192), dtype=np.float32))
    result = subprocess.run(
        [sys.executable, "-c", program, str(path), *files], capture_output=True, text=True, check=True
    )
    assert len(images(tmp_path / "1100")) == 1100
    small, large = json.loads(result.stdout)
    assert (large - small) * (1 if sys.platform == "darwin" else 1024) < 20 * 2**20


def test_as_one_is_the_mean(snapshot: Snapshot, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of a file as one embedding; a row of somebody else is named."""
    person, somebody = unit(1), unit(1, seed=5)
    rows = torch.cat(
        [F.normalize(person + 0.02 * torch.randn(4, 512, generator=torch.Generator().manual_seed(1))), somebody]
    )
    np.save(tmp_path / "c.npy", rows.numpy())
    [(names, c)] = as_one(from_embeddings(tmp_path / "c.npy", snapshot)).chunks
    assert names == ["mean"]
    assert torch.allclose(c, F.normalize(rows.sum(0), dim=0)[None], atol=1e-6)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "000004 is unlike the others" in error
    out = tmp_path / "out"
    command = ["generate", str(snapshot.path), "--embeddings", str(tmp_path / "c.npy"), "--as-one", "--num", "2"]
    assert main([*command, "--out", str(out)]) == 0
    assert sorted(images(out)) == ["mean_0.png", "mean_1.png"]
    assert main(["generate", str(snapshot.path), "--random", "3", "--as-one", "--out", str(out)]) == 2
    assert "--as-one takes the mean of --photos or --embeddings" in capsys.readouterr().err


def test_the_best_faces_are_no_copies() -> None:
    levels = torch.tensor([10, 200, 201, 60, 120, 199], dtype=torch.uint8)
    candidates = levels[:, None, None, None].expand(-1, 3, 32, 32).contiguous()
    score = levels.float()
    assert choose(candidates, score, 2) == [2, 4]  # 200 and 199 are copies of the best
    assert sorted(choose(candidates, score, 6)) == list(range(6))
    assert choose(candidates[:1], score[:1], 1) == [0]
    same = candidates[1:2].expand(6, -1, -1, -1)  # where the noise has no effect
    assert choose(same, score, 2) == [2, 1]


def test_a_face_without_likeness_comes_last(random_facenet: FaceNet) -> None:
    class Broken(FaceNet):
        """Gives NaN for the second face."""

        def embed(self, x: Tensor, size: int | None = None) -> Tensor:
            """See Encoder."""
            embeddings = torch.zeros(len(x), 2)
            embeddings[:, 0], embeddings[1] = -0.5, torch.nan
            return embeddings

    images = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    score = likeness(images, torch.tensor([[1.0, 0.0]]).expand(3, -1), Broken(random_facenet.network))
    assert score.argsort().tolist()[0] == 1


@pytest.mark.slow
def test_best_of_keeps_the_faces_most_like_their_embedding(
    snapshot: Snapshot,
    tmp_path: Path,
    random_facenet: FaceNet,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("vultus.models.encoders.load_facenet", lambda **_: random_facenet)
    generator = load(str(snapshot.path), device="cpu")
    c = unit(2)
    np.save(tmp_path / "c.npy", c.numpy())
    all_faces, best = generator.sample(c, num=6, seed=3), generator.sample(c, num=2, seed=3, best_of=3)
    for index in range(2):
        with torch.inference_mode():
            cosine = random_facenet.embed(to_x(all_faces[index])) @ c[index]
        places = [[bool((face == one).all()) for one in all_faces[index]].index(True) for face in best[index]]
        assert places[0] == int(cosine.argmax())
        assert len(set(places)) == 2
    command = ["generate", str(snapshot.path), "--embeddings", str(tmp_path / "c.npy"), "--num", "2", "--seed", "3"]
    for extra, expected in ((["--best-of", "3"], best), (["--best-of", "1"], all_faces[:, :2])):
        out = tmp_path / "-".join(extra)
        assert main([*command, *extra, "--no-mark", "--out", str(out)]) == 0
        written = [np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))]
        assert np.array_equal(np.stack(written), expected.flatten(0, 1).permute(0, 2, 3, 1).numpy())
    assert main([*command, "--best-of", "3", "--grid", "--out", str(tmp_path / "grid.png")]) == 0


def test_where_best_of_has_no_meaning(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(**_: object) -> FaceNet:
        raise UserError("weights.pt: not found; download them")

    monkeypatch.setattr("vultus.models.encoders.load_facenet", missing)
    start = ["generate", str(snapshot.path), "--out", str(tmp_path / "out"), "--best-of"]
    for extra, expected in (
        (["2", "--between", "random:1", "random:2"], "--best-of chooses faces of one embedding"),
        (["600", "--random", "1", "--num", "2"], "1200 candidates of one embedding; 1024 is the most"),
        (["2", "--random", "1"], "--best-of needs the encoder of the condition to choose faces: weights.pt: not found"),
        (["0", "--random", "1"], "--best-of must be"),
    ):
        assert main([*start, *extra]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
    other = load(write_snapshot(tmp_path / "other.safetensors", encoder="another"), device="cpu")
    with pytest.raises(UserError, match="another"):
        other.sample(unit(1), best_of=2)
