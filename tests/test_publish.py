"""Published folders, model cards, and upload and download with a stand-in for the hub on this machine."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from PIL import Image
from torch import Tensor

from forked import Forks
from stand_in_models import serve_models
from vultus._files import write_json
from vultus.cli.main import main
from vultus.config import GeneratorConfig, to_dict
from vultus.errors import UserError
from vultus.export import publish
from vultus.export.model_card import licence_of, model_card, result_in
from vultus.models.generators import ConditionalNormGenerator, DCGANGenerator, GeneratorNetwork, build_generator
from vultus.models.hub import fetch
from vultus.models.snapshot import Snapshot, default_snapshot, load_snapshot, save_snapshot
from vultus.sampling.latents import noise, sample_identities
from vultus.sampling.population import fit_population

CELEBA = "CelebA: non-commercial research only, no redistribution"
FILES = ["LICENSE.md", "README.md", "config.json", "model.safetensors", "people.safetensors", "samples.jpg"]


def write_run(folder: Path, kind: str = "dcgan", licence: str | None = CELEBA, images: int = 14_035) -> Path:
    """A run folder with the snapshot of a small generator."""
    torch.manual_seed(0)
    config = GeneratorConfig(kind=kind, resolution=32, base_width=8, max_width=16, projection=32)
    generator = build_generator(**to_dict(config))
    c = F.normalize(torch.randn(40, 512))
    metadata = {
        "generator": generator.settings(),
        "preset": "tiny",
        "cur_nimg": 800,
        "hours": 0.01,
        "encoder": {"id": "facenet-vggface2", "dim": 512},
        "crop": {"kind": "centre", "encoder_fraction": 0.8},
        "data": {"content_sha256": "0" * 64, "images": images},
        "licence": licence,
    }
    folder.mkdir()
    save_snapshot(folder / "snapshot.safetensors", network=generator, population=fit_population(c), metadata=metadata)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def faces(generator: Any) -> Tensor:
    with torch.inference_mode():
        return generator(noise(0, 0, 3, 100), F.normalize(torch.ones(3, 512)))


def evaluation(cur_nimg: int = 800) -> dict[str, Any]:
    row = {"value": 0.5, "low": 0.4, "high": 0.6}
    return {
        "format": 2,
        "context": {"split": "test", "n_images": 9, "n_people": 3, "noises": 2, "cur_nimg": cur_nimg},
        "metrics": {"identity_facenet": row | {"real": 0.9}, "type2_dlib_far1e-3": row, "fd_effnet_9_test": row},
        "distributions": {},
        "missing": {"lpips": "its weights are not here"},
        "alarms": ["noise is idle"],
        "notes": [],
    }


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "cls"), [("dcgan", DCGANGenerator), ("conditional-norm", ConditionalNormGenerator)])
def test_mixin_round_trip_keeps_class_weights_population_and_licence(tmp_path: Path, kind: str, cls: type) -> None:
    snapshot = load_snapshot(write_run(tmp_path / "run", kind))
    snapshot.network.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {key: value for key, value in config.items() if key != "vultus"} == snapshot.network.settings()
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"config.json", "model.safetensors", "people.safetensors"} <= files <= set(FILES)
    for read in (GeneratorNetwork.from_pretrained(tmp_path / "saved"), cls.from_pretrained(str(tmp_path / "saved"))):
        assert type(read) is cls
        assert not read.training
        assert torch.equal(faces(read), faces(snapshot.network))
        assert torch.equal(
            sample_identities(read.population, 3, seed=1), sample_identities(snapshot.population, 3, seed=1)
        )
        assert read.metadata["licence"] == CELEBA
    again = load_snapshot(tmp_path / "saved")
    assert again.metadata == snapshot.metadata
    assert torch.equal(faces(again.network), faces(snapshot.network))
    assert set(safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors")) == set(read.state_dict())
    other = ConditionalNormGenerator if cls is DCGANGenerator else DCGANGenerator
    with pytest.raises(UserError, match=f"holds a {cls.__name__}"):
        other.from_pretrained(tmp_path / "saved")


def test_fresh_generator_can_be_saved_and_never_pickled_weights_are_read(tmp_path: Path) -> None:
    generator = build_generator(**to_dict(GeneratorConfig(resolution=32, base_width=8, max_width=16)))
    generator.save_pretrained(tmp_path)
    assert not (tmp_path / "people.safetensors").exists()
    assert GeneratorNetwork.from_pretrained(tmp_path).population == {}
    torch.save(generator.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        GeneratorNetwork.from_pretrained(tmp_path)


def test_damaged_folders_name_the_file(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    load_snapshot(run).network.save_pretrained(folder)
    config, weights = (folder / "config.json").read_text(), (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-7])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        load_snapshot(folder)
    (folder / "model.safetensors").write_bytes(weights)
    for text, message in [
        ("{", "not valid JSON"),
        ("[]", "not the config of a vultus generator"),
        (config.replace('"format": "1"', '"format": "9"'), "of version 9"),
        (config.replace('"kind"', '"sort"'), "unknown key sort"),
        (config.replace('"base_width": 8', '"base_width": 4'), "weights do not fit"),
    ]:
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load_snapshot(folder)


@pytest.mark.parametrize("name", ["none", "a/b/c", "/none/here", "hf://", "hf://a", "ada/..", "ada/x--y", "ada/x.git"])
def test_names_that_can_not_be_on_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="neither a local folder nor a name on the hub"):
        fetch(name)


# --- the card ---------------------------------------------------------------------------------------------------------


def test_dry_run_writes_a_card_that_the_hub_reads(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (run / "evaluation").mkdir()
    write_json(run / "evaluation" / "results.json", {str(run): evaluation(), "default": evaluation(7)})
    (run / "evaluation" / "run-faces.jpg").write_bytes(b"a photo")
    assert main(["publish", str(run), "--repo", "ada/faces", "--dry-run"]) == 0
    printed = capsys.readouterr()
    folder = run / "publish"
    assert printed.out.strip() == str(folder)
    assert "research only" in printed.err
    assert sorted(path.name for path in folder.iterdir() if path.name != ".lock") == FILES
    card = ModelCard.load(folder / "README.md")
    head = card.data
    assert (head.license, head.license_name, head.license_link) == ("other", "research-only", "LICENSE.md")
    assert (head.library_name, head.pipeline_tag) == ("vultus", "unconditional-image-generation")
    assert {"face", "gan", "facenet", "face-embedding", "vultus", "research-only"} <= set(head.tags)
    assert {result.metric_type: result.metric_value for result in head.eval_results} == {
        "identity_facenet": 0.5,
        "type2_dlib_far1e-3": 0.5,
        "fd_effnet_9_test": 0.5,
    }
    assert {(result.dataset_type, result.dataset_split) for result in head.eval_results} == {
        ("flwrlabs/celeba", "test")
    }
    for part in (
        "![Faces of people who do not exist](samples.jpg)",
        "Research only",
        CELEBA,
        "Not intended",
        "Limits and bias",
        "biometric",
        "embeddings are personal data",
        "| `identity_facenet` ↑ | 0.500 [0.400, 0.600] | 0.900 |",
        "noise is idle",
        "@software{vultus_ada_faces",
        'vultus.load("hf://ada/faces")',
    ):
        assert part in card.text, part
    with Image.open(folder / "samples.jpg") as sheet:
        assert sheet.info["comment"].startswith(b"AI-generated")
        assert np.asarray(sheet).std() > 5
    # What was changed by hand in the card stays when the folder itself is published.
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nBy hand.\n")
    assert main(["publish", str(folder), "--repo", "ada/faces", "--dry-run"]) == 0
    assert (folder / "README.md").read_text().endswith("By hand.\n")
    assert main(["generate", str(folder), "--random", "4", "--out", str(tmp_path / "generated")]) == 0
    assert len(list((tmp_path / "generated").glob("*.png"))) == 4


def test_the_program_in_the_card_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = publish.write_publication(load_snapshot(run), "ada/faces", tmp_path / "folder")
    program = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert program is not None
    monkeypatch.chdir(tmp_path)
    exec(program[1].replace("hf://ada/faces", str(folder)), {})
    images = sorted((tmp_path / "faces").rglob("*.png"))
    assert len(images) == 4 * 8
    with Image.open(images[0]) as image:
        assert image.size == (32, 32)


def test_republishing_without_population_in_float16(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = load_snapshot(run)
    full = publish.write_publication(snapshot, "ada/faces", tmp_path / "out")
    size = (full / "model.safetensors").stat().st_size
    publish.write_publication(snapshot, "ada/faces", full, population=False, dtype="float16")
    assert not (full / "people.safetensors").exists()
    assert (full / "model.safetensors").stat().st_size < 0.6 * size
    assert "sample_identities" not in (full / "README.md").read_text()
    again = load_snapshot(full)
    assert again.population == {}
    assert (faces(again.network) - faces(snapshot.network)).abs().max() < 0.02
    capsys.readouterr()
    publish.write_publication(load_snapshot(write_run(tmp_path / "few", images=30)), "ada/few", tmp_path / "out2")
    assert "30 photos only" in capsys.readouterr().err


def test_folder_of_something_else_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match="contains other files"):
        publish.write_publication(load_snapshot(run), "ada/faces", tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("data_terms", "chosen", "expected"),
    [
        (CELEBA, None, ("other", "research-only", True)),
        (None, None, ("other", "research-only", True)),
        ("my own photos, everyone agreed", None, ("other", "terms-of-the-training-photos", False)),
        ("my own photos, everyone agreed", "mit", ("mit", None, False)),
        (None, "mit", ("mit", None, False)),
        (CELEBA, "mit", "the data are under 'CelebA"),
        ("CC BY-NC 4.0", "mit", "the data are under 'CC BY-NC"),
        ("CC-BY-NC-SA-4.0", "mit", "the data are under 'CC-BY-NC"),
        (None, "MIT License", "not a licence id of the hub"),
    ],
)
def test_licence_follows_the_data(data_terms: str | None, chosen: str | None, expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            licence_of(data_terms, chosen)
        return
    licence = licence_of(data_terms, chosen)
    assert (licence.id, licence.name, licence.research_only) == expected
    card = model_card({"licence": data_terms}, to_dict(GeneratorConfig()), licence=licence)
    assert ("Research only" in card) == licence.research_only


def test_metrics_in_the_embedded_snapshot_are_in_its_card() -> None:
    metadata = load_snapshot(default_snapshot()).metadata
    result = result_in(metadata["metrics"])
    assert result is not None
    row = result["metrics"]["identity_facenet"]
    card = ModelCard(model_card(metadata, metadata["generator"]))
    assert card.data.eval_results
    assert f"| `identity_facenet` ↑ | {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}] |" in card.text
    assert "mse_best8" in card.text  # in the table of all metrics
    result["context"] |= {"noise_strength": 0.5, "best_of": 4, "chosen_by": ["facenet"]}
    text = ModelCard(model_card(metadata, metadata["generator"], result=result)).text
    assert "2 faces for each, noise times 0.5, the best of 4 times as many by the encoder of the condition." in text
    assert "chose the faces)" in text


def test_metrics_of_old_snapshots_are_plain_values() -> None:
    values = {"identity_facenet": 0.4, "identity_facenet_real": 0.7, "identity_facenet_std": 0.1, "split": "test"}
    result = result_in(values | {"n_images": 9, "n_people": 3, "noises": 2})
    assert result is not None
    assert result["metrics"] == {"identity_facenet": {"value": 0.4, "real": 0.7, "std": 0.1}}
    card = model_card({}, to_dict(GeneratorConfig()), result=result)
    assert "9 photos of 3 people (people never seen in training), 2 faces for each." in card
    assert "| `identity_facenet` ↑ | 0.400 | 0.700 |" in card
    assert result_in({}) is None


def test_results_of_another_snapshot_are_refused(run: Path, tmp_path: Path) -> None:
    snapshot = load_snapshot(run)
    for results, message in [
        ({"a": evaluation(), "b": evaluation()}, "no column run, only a, b"),
        ({"a": evaluation(4)}, "measured at 4 images, the snapshot is of 800"),
        ({"a": 3}, "not the results of vultus evaluate"),
    ]:
        write_json(tmp_path / "results.json", results)
        with pytest.raises(UserError, match=message):
            publish.write_publication(snapshot, "ada/faces", tmp_path / "out", evaluation=(tmp_path, "run"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{run}", "--repo", "faces", "--dry-run"], "--repo faces: neither"),
        (["{run}", "--repo", "ada/faces"], "no Hugging Face token"),
        (["{run}/none", "--repo", "ada/faces", "--dry-run"], "no such snapshot"),
        (["{run}", "--repo", "ada/faces", "--dry-run", "--licence", "mit"], "the data are under"),
        (["{run}", "--repo", "ada/faces", "--dry-run", "--evaluation", "{run}/none"], "no results.json"),
        (["{run}", "--repo", "ada/faces", "--dry-run", "--dtype", "int8"], "dtype"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    expected: str,
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main(["publish", *(argument.format(run=run) for argument in arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("vultus: error: ")] == lines[-1:]
    assert expected in lines[-1]
    assert not (run / "publish" / "README.md").exists()


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_script(forks: Forks, tmp_path: Path) -> Callable[..., list[str]]:
    """A function that runs a program in a process of its own, because the hub's client reads its address when it is
    imported, and returns the lines that it prints."""

    def run(address: str, script: str, *arguments: str, token: str = "hf_right") -> list[str]:
        known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
        own = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": token}
        environment = {**known, **own, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = forks.run(script, *arguments, environment=environment)
        assert done.returncode == 0, done.stderr
        return (done.stdout + done.stderr).splitlines()

    return run


LOAD = """
import sys
import torch
from vultus.models.snapshot import load_snapshot
from vultus.cli.main import main
from vultus.models.generators import GeneratorNetwork
run, folder, out = sys.argv[1:]
assert main(["publish", run, "--repo", "ada/faces", "--out", folder, "--private"]) == 0
remote, local, hub = GeneratorNetwork.from_pretrained("ada/faces"), GeneratorNetwork.from_pretrained(folder), "hf://ada/faces"
assert type(remote) is type(local)
assert all(torch.equal(a, b) for a, b in zip(remote.state_dict().values(), local.state_dict().values(), strict=True))
assert load_snapshot(hub).metadata == load_snapshot(folder).metadata
assert set(load_snapshot(hub).population) == set(local.population) != set()
assert main(["generate", hub, "--random", "2", "--out", out]) == 0
assert main(["publish", run, "--repo", "ada/faces", "--out", folder, "--people", "false"]) == 0
assert load_snapshot(hub).population == {}
"""


OFFLINE = """
import sys
from vultus.models.snapshot import load_snapshot
print(load_snapshot(sys.argv[1]).metadata["preset"])
"""


@pytest.mark.slow
def test_to_the_hub_and_back(run: Path, tmp_path: Path, run_script: Callable[..., list[str]]) -> None:
    with serve_models() as (address, hub):
        lines = run_script(address, LOAD, str(run), str(tmp_path / "folder"), str(tmp_path / "generated"))
    assert f"{address}/ada/faces" in lines
    commits = hub.repos["ada/faces"]["commits"]
    assert hub.repos["ada/faces"]["private"]
    assert len(commits) == 3  # none, then one for each publication
    assert sorted(commits[1]) == FILES
    assert sorted(commits[2]) == [name for name in FILES if name != "people.safetensors"]
    now = {path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir() if path.name != ".lock"}
    assert commits[2] == now
    assert safetensors.torch.load(commits[1]["people.safetensors"])["factor"].shape == (512, 512)
    assert len(list((tmp_path / "generated").glob("*.png"))) == 2
    assert run_script(address, OFFLINE, "hf://ada/faces") == ["tiny"]  # without the server, from the cache


ERRORS = """
import sys
from vultus.errors import UserError
from vultus.models.snapshot import load_snapshot
from vultus.export.publish import upload
for name in sys.argv[2:]:
    try:
        if name.startswith("hf://"):
            load_snapshot(name)
        else:
            upload(sys.argv[1], name, private=name == "ada/public")
    except UserError as error:
        print(error)
"""


def test_the_hub_s_errors_are_one_line(run: Path, tmp_path: Path, run_script: Callable[..., list[str]]) -> None:
    folder = str(publish.write_publication(load_snapshot(run), "ada/faces", tmp_path / "folder"))
    with serve_models() as (address, hub):
        hub.repos["ada/public"] = {"private": False, "commits": [{"README.md": b"# text"}]}
        names = ["eve/faces", "ada/public", "hf://ada/none", "hf://ada/public"]
        lines = run_script(address, ERRORS, folder, *names)
        refused = run_script(address, ERRORS, folder, "ada/faces", token="hf_wrong")
        assert len(hub.repos["ada/public"]["commits"]) == 1
    assert len(lines) == len(names), lines
    assert "refuses the token (403)" in lines[0]
    assert "ada/public: is public already" in lines[1]
    assert "hf://ada/none: no such model" in lines[2]
    assert "hf://ada/public: not a vultus model" in lines[3]
    assert len(refused) == 1
    assert "refuses the token (401)" in refused[0]
    assert f"the folder {folder} is ready" in refused[0]
    gone = run_script(address, ERRORS, folder, "ada/faces", "hf://ada/faces")  # without the server
    assert len(gone) == 2, gone
    assert all("can't be reached" in line and "check the network" in line for line in gone)


def test_snapshot_without_population_has_no_samples(run: Path, tmp_path: Path) -> None:
    snapshot = load_snapshot(run)
    snapshot.network.population = {}
    folder = publish.write_publication(Snapshot(snapshot.network, {}, snapshot.metadata), "ada/faces", tmp_path / "out")
    assert not (folder / "samples.jpg").exists()
    assert "samples.jpg" not in (folder / "README.md").read_text()
