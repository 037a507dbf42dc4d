"""Linear probes of embeddings, and edits along their directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import vultus
from conftest import write_dataset
from vultus.audit.attributes import ATTRIBUTES, attributes, measure
from vultus.audit.probes import direction_of, explained, fit_probe
from vultus.cli.main import main
from vultus.errors import UserError
from vultus.evaluation.bootstrap import PersonBootstrap
from vultus.models.snapshot import default_snapshot
from vultus.sampling.directions import Directions, load_directions, parse_edits, save_directions
from vultus.sampling.face_files import read_faces

DIM = 16


def people_and_smiles(count: int, *, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """Embeddings [count, DIM] of 5 photos a person: entry 0 follows the attribute of a photo, the others the person.

    People who smile more also have more of entry 1, which is of the person.
    """
    random = torch.Generator().manual_seed(seed)
    person = torch.arange(count) // 5
    traits = torch.randn(count // 5 + 1, DIM, generator=random)[person]
    smile = torch.randn(count, generator=random) + traits[:, 1]
    c = traits.clone()
    c[:, 0] = smile + 0.5 * torch.randn(count, generator=random)
    return c, smile, [str(number) for number in person.tolist()]


def test_probe_reads_a_linear_attribute_of_people_it_was_not_fitted_to() -> None:
    c, y, people = people_and_smiles(2000, seed=0)
    probe = fit_probe(c, y, people, name="smile")
    c, y, people = people_and_smiles(1000, seed=1)
    bootstrap = PersonBootstrap(people)
    share = explained(probe.read(c), probe.standardise(y), bootstrap)
    within = explained(probe.read(c), probe.standardise(y), bootstrap, within=True)
    assert share is not None
    assert within is not None
    # Of the variance 2, entries 0 and 1 leave 1 / (1 + 1 / 0.25) = 0.2; within one person of the variance 1.
    assert share.value == pytest.approx(0.9, abs=0.02)
    assert within.value == pytest.approx(0.8, abs=0.04)
    assert share.low < share.value < share.high
    noise = explained(torch.randn(1000), probe.standardise(y), bootstrap)
    assert noise is not None
    assert noise.value < -0.5  # worse than the mean


def test_direction_raises_the_reading_by_one_and_leaves_the_person() -> None:
    c, y, people = people_and_smiles(5000, seed=2)
    probe = fit_probe(c, y, people, name="smile")
    moved = c + 2 * probe.direction
    assert torch.allclose(probe.read(moved) - probe.read(c), torch.full((5000,), 2.0, dtype=torch.float64), atol=1e-4)
    assert probe.weight[1] > 0.1  # the probe uses what kind of person it is
    assert probe.direction[1:].abs().max() < 0.05 * probe.direction[0]  # the direction leaves that alone


def test_direction_with_one_photo_of_each_person() -> None:
    x = torch.randn(500, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    direction = direction_of(x, weight, torch.arange(500))
    assert direction[0] == pytest.approx(1, abs=1e-5)


def test_probe_ignores_photos_without_value_and_refuses_too_few() -> None:
    c, y, people = people_and_smiles(400, seed=3)
    y[::2] = torch.nan
    kept = y.isfinite()
    a = fit_probe(c, y, people, name="smile")
    b = fit_probe(c[kept], y[kept], [p for p, k in zip(people, kept.tolist(), strict=True) if k], name="smile")
    assert torch.equal(a.weight, b.weight)
    with pytest.raises(UserError, match=r"^smile: measured in 30 training photos; a probe needs 50"):
        fit_probe(c[:60], y[:60], people[:60], name="smile")
    with pytest.raises(UserError, match="nothing to explain"):
        fit_probe(c, torch.ones(400), people, name="smile")


def test_explained_of_nothing() -> None:
    bootstrap = PersonBootstrap(["a", "b", "b"])
    y = torch.tensor([1.0, torch.nan, torch.nan])
    assert explained(torch.zeros(3), y, bootstrap) is None
    assert explained(torch.zeros(3), torch.ones(3), bootstrap) is None


def test_measured_light_of_a_drawn_picture() -> None:
    """A grey picture, then with a brighter edge, a redder face and more contrast."""
    pytest.importorskip("dlib")
    base = np.full((128, 128, 3), 100, np.uint8)
    changed = base.copy()
    changed[:8] = changed[-8:] = 255
    changed[40:90:2, 30:100] = (160, 80, 40)
    before, after = (dict(zip(ATTRIBUTES, measure(each), strict=True)) for each in (base, changed))
    assert before["brightness"] == pytest.approx(100 / 255)
    assert before["contrast"] == pytest.approx(0, abs=1e-9)
    assert all(after[name] > before[name] for name in ("background", "warmth", "contrast", "sharpness"))
    assert abs(before["yaw"]) == before["turn"]


# --- directions and edits ---------------------------------------------------------------------------------------------


def directions(c_dim: int = 4, **metadata: Any) -> Directions:
    vectors = {"smile": torch.eye(c_dim)[0], "pitch": torch.eye(c_dim)[1]}
    return Directions(vectors, {"encoder": {}, "attributes": {}, **metadata})


def test_edit_moves_and_normalises() -> None:
    c = F.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    moved = directions().edit(c, {"smile": 2, "pitch": -1})
    assert torch.allclose(moved, F.normalize(c + torch.tensor([2.0, -1, 0, 0])))
    assert torch.equal(directions().edit(c, {"smile": 0.0}), c)
    with pytest.raises(UserError, match="to zero"):
        directions().edit(-torch.eye(4)[:1], {"smile": 1})


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"age": 1}, "edit age: no such attribute; known are smile, pitch"),
        ({"smile": 4.5}, "edit smile=4.5: the strength is a number from -4 to 4"),
        ({"smile": float("nan")}, "edit smile=nan: the strength is a number from -4 to 4"),
    ],
)
def test_wrong_edits(edits: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        directions().edit(torch.eye(4)[:1], edits)


def test_parse_edits() -> None:
    assert parse_edits(["smile=+1.5", "mouth_open=-.5", "pitch=2"]) == {"smile": 1.5, "mouth_open": -0.5, "pitch": 2}
    for text in ("smile", "smile=", "smile=x", "=1", "smile=nan", "smile=1e9", "Smile=1"):
        with pytest.raises(UserError, match="give NAME=STRENGTH"):
            parse_edits([text])
    with pytest.raises(UserError, match="given twice"):
        parse_edits(["smile=1", "smile=2"])


def test_cost_is_that_of_the_nearest_measured_strength_on_the_same_side() -> None:
    edits = {
        "+1.5": {"change": {"value": 0.9}, "accepted": {"dlib": {"before": {"value": 0.97}, "after": {"value": 0.9}}}}
    }
    one = directions(attributes={"smile": {"edits": edits}})
    expected = (
        "smile +1.5: changes the attribute by +0.90 standard deviations; dlib accepts 90 instead of 97 % of the faces"
    )
    assert one.cost("smile", 3.0) == expected
    assert one.cost("smile", -1.0) == ""
    assert one.cost("pitch", 1.0) == ""


def test_directions_file_is_read_again_and_checked(tmp_path: Path) -> None:
    generator = vultus.load("default", device="cpu")
    encoder = generator.metadata["encoder"]
    path = tmp_path / "directions.safetensors"
    save_directions(path, directions(512, encoder=encoder))
    read = load_directions(path, generator)
    assert set(read.vectors) == {"smile", "pitch"}
    assert torch.equal(read.vectors["smile"], torch.eye(512)[0])
    save_directions(path, directions(512, encoder=encoder | {"id": "mine"}))
    with pytest.raises(UserError, match=r"takes embeddings of .*vultus probe"):
        load_directions(path, generator)
    save_directions(path, directions(8, encoder=encoder))
    with pytest.raises(UserError, match="512 numbers"):
        load_directions(path, generator)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"^{path}: damaged or not a safetensors file"):
        load_directions(path, generator)
    with pytest.raises(UserError, match="no such file"):
        load_directions(tmp_path / "none", generator)
    with pytest.raises(UserError, match="not a file of directions"):
        load_directions(default_snapshot(), generator)


def test_generate_with_edit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The face changes, the list says how, the measured cost is noted; Python gives the same face."""
    generator = vultus.load("default", device="cpu")
    name = next(iter(load_directions(None, generator).vectors))
    plain, edited = tmp_path / "plain", tmp_path / "edited"
    common = ["generate", "default", "--random", "2", "--no-mark", "--device", "cpu"]
    assert main([*common, "--out", str(plain)]) == 0
    assert main([*common, "--out", str(edited), "--edit", f"{name}=+2"]) == 0
    assert f"note: {name} +1.5: changes the attribute by" in capsys.readouterr().err
    lines = read_faces(edited / "faces.jsonl")
    assert [line["edit"] for line in lines] == [{name: 2.0}] * 2
    assert "edit" not in read_faces(plain / "faces.jsonl")[0]
    c = generator.edit(generator.sample_identities(2), {name: 2})
    faces = generator.sample(c)[:, 0].permute(0, 2, 3, 1).numpy()
    for number in range(2):
        written = np.asarray(Image.open(edited / f"00000{number}_0.png"))
        # sample() normalises the edited embedding once more, which may change its last bits.
        assert np.abs(written.astype(int) - faces[number]).max() <= 1
        before = np.asarray(Image.open(plain / f"00000{number}_0.png"))
        assert np.abs(written.astype(int) - before).mean() > 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--edit", "age=1"], "edit age: no such attribute; known are"),
        (["--edit", "smile=9"], "the strength is a number from -4 to 4"),
        (["--edit", "smile"], "--edit smile: give NAME=STRENGTH"),
        (["--directions", "d.safetensors"], "--directions is an option of --edit"),
        (["--edit", "smile=1", "--directions", "none.safetensors"], "none.safetensors: no such file"),
    ],
)
def test_wrong_options_of_generate(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "default", "--random", "1", "--out", str(tmp_path / "o"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_directions_of_the_package_say_what_edits_cost() -> None:
    read = load_directions(None, vultus.load("default", device="cpu"))
    for name in read.vectors:
        about = read.metadata["attributes"][name]
        assert about["explained_within"]["value"] >= 0.05
        assert {"-1.5", "+1.5"} == set(about["edits"])
        for strength, edit in about["edits"].items():
            assert edit["change"]["value"] * float(strength) > 0  # the face follows the edit
            rates = edit["accepted"]["dlib"]
            assert 0 <= rates["after"]["value"] <= 1
    assert "smile" in read.vectors


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose embeddings hold the brightness of the picture in entry 0 and nothing else of it."""
    pytest.importorskip("dlib")

    def embed(x: Tensor) -> Tensor:
        c = torch.randn(len(x), 512, generator=torch.Generator().manual_seed(int(1e6 * x.abs().mean())))
        c[:, 0] = 1000 * (attributes(x)[:, list(ATTRIBUTES).index("brightness")] - 0.5)
        return F.normalize(c)

    folder = tmp_path_factory.mktemp("probed")
    people = {"train": 40, "test": 12}
    return write_dataset(folder, people=people, photos=4, embed=embed, encoder="facenet-vggface2")


@pytest.mark.slow
def test_probe_command(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "probe"
    command = ["probe", "--data", str(photos), "--snapshot", "none", "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["attributes"]) == set(ATTRIBUTES)
    assert all(row["edits"] == {} for row in result["attributes"].values())
    assert result["attributes"]["brightness"]["explained"]["value"] > 0.5
    assert main([*command, "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("| attribute | explained | within one person |\n|---|---|---|\n| yaw | ")
    assert sorted(path.name for path in out.iterdir()) == ["directions.safetensors", "probe.json", "probe.md"]
    assert json.loads((out / "probe.json").read_text()) == result
    assert main([*command, "--out", str(out)]) == 2
    assert "exists already; choose another --out" in capsys.readouterr().err


def test_probe_refuses_a_snapshot_of_another_encoder(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--data", str(photos), "--device", "cpu"]) == 2
    assert "takes embeddings of" in capsys.readouterr().err
