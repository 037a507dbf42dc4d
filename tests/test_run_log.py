"""The run log with the real trackers: what they wrote is read back from their own files and from a page."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from test_train import without_facenet
from vultus.cli.main import main
from vultus.config import GANConfig, OptimConfig
from vultus.errors import UserError
from vultus.images.io import from_pil
from vultus.presets import get_preset
from vultus.training.environment import hardware, peak_memory
from vultus.training.run_log import RunLog, check_trackers, cut_stats, read_stats
from vultus.training.sample_files import read_samples
from vultus.training.sample_grid import ROWS, SampleGrid
from vultus.training.trainer import Budget, train

ALL = ("tensorboard", "wandb", "trackio")
TINY = get_preset("tiny")
TINY = replace(
    TINY,
    generator=replace(TINY.generator, base_width=8, max_width=16),
    discriminator=replace(TINY.discriminator, base_width=8, max_width=16),
    optim=OptimConfig(batch=4, ema_nimg=50),
    dtype="float32",
    log_every_nimg=4,
    sample_every_nimg=800,
    checkpoint_every_nimg=8,
)
VALUES = {"D_adversarial", "G_adversarial", "G_mse", "G_total", "G_grad_norm", "D_grad_norm", "lr"}
VALUES |= {"images_per_s", "data_wait", "peak_memory_mib", "seconds"}


def alone(patch: pytest.MonkeyPatch, home: Path) -> None:
    """Without the keys, settings and home folder of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_", "NETRC", "HF_TOKEN"))]:
        patch.delenv(name)
    patch.setenv("HOME", str(home))


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    alone(monkeypatch, tmp_path / "home")


# --- reading back -----------------------------------------------------------------------------------------------------


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a log in LevelDB's format of 32 KiB blocks, behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_files(out: Path) -> list[Path]:
    return sorted((out / "wandb").glob("offline-run-*/*.wandb"))


def wandb_history(path: Path) -> list[dict[str, Any]]:
    rows = []
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items})
    return rows


def tensorboard(out: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def trackio_rows(out: Path, project: str = "vultus") -> dict[str, Any]:
    """Through trackio's interface, in a process of its own: it keeps one folder for each."""
    code = (
        "import json, trackio\nfrom trackio.sqlite_storage import SQLiteStorage\n"
        f"runs = list(trackio.Api().runs({project!r}))\n"
        f"logs = [SQLiteStorage.get_logs({project!r}, run.name, run_id=run.id) for run in runs]\n"
        "print('@' + json.dumps({'ids': [r.id for r in runs], 'config': runs[0].config, 'logs': logs}, default=str))\n"
    )
    environment = os.environ | {"TRACKIO_DIR": str(out / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("@"))[1:])


def stats(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]


def steps_of(rows: list[dict[str, Any]], key: str, step: str) -> list[int]:
    return [row[step] for row in rows if key in row]


def ids(out: Path) -> dict[str, str]:
    return {name: entry["id"] for name, entry in json.loads((out / "tracking.json").read_text()).items()}


# --- all of them at once ----------------------------------------------------------------------------------------------


def validate(generator: torch.nn.Module) -> dict[str, float]:
    return {"identity_facenet": 0.25, "n_images": 4}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 24 images in two sessions, logged by every tracker."""
    from conftest import tiny_dataset

    folder = tmp_path_factory.mktemp("tracked")
    write = getattr(tiny_dataset, "_fixture_function", None) or tiny_dataset.__wrapped__
    data, out = write(folder)(), folder / "lamp"
    with pytest.MonkeyPatch.context() as patch:
        alone(patch, folder)
        for budget in (16, 24):
            options: dict[str, Any] = {"evaluators": [("unseen", validate, 8)], "track": ALL, "project": "faces"}
            train(TINY, data=data, out=out, budget=Budget(total_nimg=budget), **options)
    return out


def test_jsonl_has_every_value(tracked: Path) -> None:
    lines = [line for line in stats(tracked) if "evaluator" not in line]
    assert [line["cur_nimg"] for line in lines] == list(range(4, 25, 4))
    for line in lines:
        assert line.keys() >= VALUES
        assert line["lr"] == TINY.optim.lr
        assert 0 <= line["data_wait"] <= 1
        assert 10 < line["peak_memory_mib"] < 100_000
        assert line["G_grad_norm"] > 0
        assert line["D_grad_norm"] > 0


def test_tensorboard_reads_back(tracked: Path) -> None:
    events = tensorboard(tracked)
    tags = events.Tags()
    assert set(tags["scalars"]) >= {f"train/{name}" for name in VALUES} | {"unseen/identity_facenet"}
    logged = [(event.step, pytest.approx(event.value)) for event in events.Scalars("train/G_mse")]
    assert logged == [(line["cur_nimg"], line["G_mse"]) for line in stats(tracked) if "G_mse" in line]
    assert [event.step for event in events.Images("samples")] == [0, 8, 16, 24]
    sheet = events.Images("samples")[-1]
    assert sheet.encoded_image_string == (tracked / "samples" / "0000000024.png").read_bytes()
    text = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in tags["tensors"]}
    assert '"batch": 4' in text["config/text_summary"]
    assert "content_sha256" in text["data/text_summary"]
    assert '"cpu"' in text["session/text_summary"]
    assert "| unseen/identity_facenet | 0.25 |" in text["snapshot/text_summary"]


def test_wandb_reads_back(tracked: Path) -> None:
    """Offline, two sessions of one run: the values, pictures, config and artifact are in its own files."""
    first, second = wandb_files(tracked)
    rows = wandb_history(first) + wandb_history(second)
    measured = {row["_step"]: row["train/G_mse"] for row in rows if "train/G_mse" in row}
    assert measured == {line["cur_nimg"]: line["G_mse"] for line in stats(tracked) if "G_mse" in line}
    steps = [row["_step"] for row in rows]
    assert steps == sorted(steps)
    assert steps_of(rows, "train/G_mse", "_step") == list(range(4, 25, 4))
    assert steps_of(rows, "unseen/identity_facenet", "_step") == [0, 8, 16, 24]
    assert len(list((tracked / "wandb").glob("offline-run-*/files/media/images/samples_*.png"))) == 4
    kinds: dict[str, list[Any]] = {}
    for path in (first, second):
        for record in wandb_records(path):
            kind = record.WhichOneof("record_type")
            kinds.setdefault(kind, []).append(getattr(record, kind))
    assert {run.run_id for run in kinds["run"]} == {ids(tracked)["wandb"]}
    run = kinds["run"][0]
    assert (run.project, run.display_name) == ("faces", "lamp")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["config"]["optim"]["lr"] == TINY.optim.lr
    assert (
        config["data"]["content_sha256"] == json.loads((tracked / "config.json").read_text())["data"]["content_sha256"]
    )
    assert config["session"]["hardware"]["cpu"]
    models = [artifact for artifact in kinds["artifact"] if artifact.type == "model"]
    assert [model.name for model in models] == ["lamp-snapshot"] * 2
    contents = {entry.path for entry in models[-1].manifest.contents}
    assert contents == {"snapshot.safetensors", "figures.table.json"}


def test_trackio_reads_back(tracked: Path) -> None:
    found = trackio_rows(tracked, "faces")
    assert found["ids"] == [ids(tracked)["trackio"]]
    assert found["config"]["config"]["optim"]["batch"] == 4
    (rows,) = found["logs"]
    measured = {row["step"]: row["train/G_mse"] for row in rows if "train/G_mse" in row}
    assert measured == {line["cur_nimg"]: line["G_mse"] for line in stats(tracked) if "G_mse" in line}
    assert steps_of(rows, "train/G_mse", "step") == list(range(4, 25, 4))
    assert steps_of(rows, "samples", "step") == [0, 8, 16, 24]


def test_provenance_of_both_sessions(tracked: Path) -> None:
    record = json.loads((tracked / "run.json").read_text())
    assert record["data"]["content_sha256"]
    assert [(part["from_nimg"], part["cur_nimg"]) for part in record["sessions"]] == [(0, 16), (16, 24)]
    for part in record["sessions"]:
        assert part["versions"]["torch"] == torch.__version__
        assert part["seconds"] > 0
        assert part["hardware"]["cores"] >= 1
        assert part["git"] is None or len(part["git"]["revision"]) == 40


def test_provenance_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without os.sysconf and without the module `resource`."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert hardware("cpu")["cores"] >= 1
    assert "memory_gib" not in hardware("cpu")
    assert peak_memory("cpu") == {}


def test_trackio_page_in_a_browser(tracked: Path, tmp_path: Path) -> None:
    """trackio's page shows the curves of this run and its images."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("chromium is not installed")
    from playwright.sync_api import sync_playwright

    environment = os.environ | {"TRACKIO_DIR": str(tracked / "trackio"), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    show = "trackio.show('faces', open_browser=False, block_thread=False)[1]"
    code = f"import trackio; print('@' + {show}, flush=True); input()"
    server = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        url = next(line[1:].strip() for line in server.stdout if line.startswith("@"))
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
        quiet += ["--disable-background-networking", "--disable-component-update"]
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=chromium, headless=True, args=quiet)
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            outside: list[str] = []
            page.on("request", lambda request: None if request.url.startswith(url) else outside.append(request.url))
            page.goto(f"{url.rstrip('/')}/?project=faces")
            page.get_by_text("G_mse").first.wait_for(timeout=30_000)
            page.get_by_text("lamp").first.wait_for(timeout=30_000)
            page.screenshot(path=str(tmp_path / "curves.png"))
            page.get_by_text("Media & Tables").first.click()
            image = page.locator("img[src*='.png'][src*='lamp']").first
            image.wait_for(timeout=30_000)
            loaded = "e => e.complete ? e.naturalWidth : new Promise(r => e.onload = () => r(e.naturalWidth))"
            assert image.evaluate(loaded) > 32 * 4
            page.screenshot(path=str(tmp_path / "pictures.png"))
            browser.close()
        assert not [url for url in outside if not url.startswith(("data:", "blob:"))]
        assert np.asarray(Image.open(tmp_path / "curves.png")).std() > 5
    finally:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.close()
        server.kill()
        server.wait()
        server.stdout.close()


# --- resuming ---------------------------------------------------------------------------------------------------------


def command(data: Path, out: Path, *more: str) -> list[str]:
    settings = ["--generator.base_width", "8", "--generator.max_width", "16", "--discriminator.base_width", "8",
                "--discriminator.max_width", "16", "--optim.batch", "4", "--dtype", "float32", "--device", "cpu",
                "--log_every_nimg", "4", "--sample_every_nimg", "800", "--checkpoint_every_nimg", "40"]  # fmt: skip
    return [sys.executable, "-m", "vultus", "train", "--preset", "tiny", "--data", str(data), "--out", str(out),
            *settings, *more]  # fmt: skip


@pytest.mark.slow
def test_kill_9_resumes_the_same_runs(
    tiny_dataset: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed 20 images or more after a checkpoint: no step twice, none backwards, the same ids."""
    data, out = tiny_dataset(), tmp_path / "run"
    without_facenet(monkeypatch)
    monkeypatch.setenv("no_proxy", "*")
    start = command(data, out, "--track", *ALL)
    killed = subprocess.Popen([*start, "--images", "4000000"], stderr=subprocess.DEVNULL)

    def sent() -> int:
        try:
            entries = json.loads((out / "tracking.json").read_text())
            return min(entries[name]["sent"]["train"] for name in ALL)
        except (OSError, KeyError):
            return 0

    end = time.monotonic() + 300
    while not (sent() >= 60 and sent() % 40 >= 20):
        assert killed.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before, reached = ids(out), sent()
    checkpoint = max(int(path.stem.split("-")[1]) for path in out.glob("checkpoint-*.pt"))
    total = str(max(checkpoint, reached) + 40 - reached % 4)
    capsys.readouterr()
    assert main([*start[3:], "--images", total]) == 0
    printed = capsys.readouterr()
    assert f"wandb sync {out}/wandb/offline-run-*-{before['wandb']}" in printed.err
    assert printed.out.strip() == str(out / "snapshot.safetensors")
    assert ids(out) == before
    everything = [line["cur_nimg"] for line in stats(out) if "evaluator" not in line]
    assert everything == list(range(4, int(total) + 1, 4))
    rows = [row for path in wandb_files(out) for row in wandb_history(path)]
    logged = {
        "tensorboard": [event.step for event in tensorboard(out).Scalars("train/G_mse")],
        "wandb": steps_of(rows, "train/G_mse", "_step"),
        "trackio": steps_of(trackio_rows(out)["logs"][0], "train/G_mse", "step"),
    }
    for name, steps in logged.items():
        assert steps == sorted(set(steps)), name
        assert steps[-1] == int(total), name
        assert len(everything) - len(steps) <= 4, name  # calls in progress when the process was killed


def test_a_tracker_that_is_added_later_gets_the_whole_log(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    data, out = tiny_dataset(), tmp_path / "run"
    train(TINY, data=data, out=out, budget=Budget(total_nimg=8))
    train(TINY, data=data, out=out, budget=Budget(total_nimg=16), track=["tensorboard"])
    events = tensorboard(out)
    assert [event.step for event in events.Scalars("train/G_mse")] == [4, 8, 12, 16]
    assert [event.step for event in events.Images("samples")] == [0, 8, 16]


def test_lines_after_the_checkpoint_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    path.write_text('{"cur_nimg": 4, "a": 1}\n{"cur_nimg": 8}\n{"cur_nimg": 12}\n{"cur_ni')
    cut_stats(path, 8)
    assert [line["cur_nimg"] for line in read_stats(path, 100)] == [4, 8]


# --- failing ----------------------------------------------------------------------------------------------------------


def warnings_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("vultus: warning: ")]


def descendants(name: str) -> list[Any]:
    """Child processes of this one, and their children."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_wandb_killed_warns_once_and_training_continues(
    tiny_dataset: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 of wandb's own service, found among the descendants of this process."""
    out = tmp_path / "run"
    killed: list[int] = []

    def kill(generator: torch.nn.Module) -> dict[str, float]:
        end = time.monotonic() + 60
        while not killed and time.monotonic() < end:
            entries = json.loads((out / "tracking.json").read_text()) if (out / "tracking.json").is_file() else {}
            services = descendants("wandb-core")
            if services and entries.get("wandb", {}).get("sent", {}).get("samples") == 0:
                services[0].kill()
                killed.append(services[0].pid)
            time.sleep(0.02)
        return {"figure": 1.0}

    options: dict[str, Any] = {"evaluators": [("kill", kill, 8)], "track": ["wandb", "tensorboard"]}
    train(TINY, data=tiny_dataset(), out=out, budget=Budget(total_nimg=16), **options)
    assert killed
    (warning,) = warnings_of(capsys)
    assert warning.startswith("vultus: warning: wandb is off for the rest of this session: ")
    assert len(tensorboard(out).Scalars("train/G_mse")) == 4
    assert stats(out)[-1]["cur_nimg"] == 16
    assert not descendants("vultus.training.trackers")


@pytest.mark.parametrize("name", ALL)
def test_full_disk_of_a_tracker(
    name: str, tiny_dataset: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file system of 256 KiB for the tracker's folder alone."""
    out = tmp_path / "run"
    (out / name).mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(out / name)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        (out / name / "filler").write_bytes(b"x" * 200_000)
        train(TINY, data=tiny_dataset(), out=out, budget=Budget(total_nimg=120), track=[name])
        assert stats(out)[-1]["cur_nimg"] == 120
        assert [line.split()[2] for line in warnings_of(capsys)] == [name]
    finally:
        subprocess.run(["umount", "--lazy", str(out / name)], check=True)  # wandb's service may be ending yet


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("a file in place of the folder")
    with RunLog(tmp_path, trackers=["tensorboard"], project="p", config={}, cur_nimg=0) as sink:
        for nimg in (4, 8):
            sink.log({"G_mse": 1.0}, nimg)
    assert len(warnings_of(capsys)) == 1
    assert [line["cur_nimg"] for line in stats(tmp_path)] == [4, 8]
    (tmp_path / "tensorboard").unlink()
    with RunLog(tmp_path, trackers=["tensorboard"], project="p", config={}, cur_nimg=8):
        pass
    assert [event.step for event in tensorboard(tmp_path).Scalars("train/G_mse")] == [4, 8]


def test_missing_extra_and_wrong_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--track tensorbord: no such tracker; there are tensorboard, wandb, trackio"):
        check_trackers(["tensorbord"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'vultus\[track\]'"):
        train(GANConfig(), data=tmp_path, out=tmp_path / "run", track=["wandb"])
    assert not (tmp_path / "run").exists()


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples_are_the_same_people_and_noise(tracked: Path) -> None:
    samples, messages = read_samples(tracked / "samples", 32)
    assert messages == []
    assert [each.cur_nimg for each in samples] == [0, 8, 16, 24]
    assert all(np.array_equal(each.photos, samples[0].photos) for each in samples)
    assert samples[0].generated.shape == (4, 5, 3, 32, 32)
    for person in range(4):
        assert len({each.generated[person, 0].tobytes() for each in samples}) == 4


def test_progress_strip_shows_first_and_last_of_a_long_run(tmp_path: Path) -> None:
    photos = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    samples = SampleGrid(tmp_path, photos, torch.zeros(3, 4), torch.zeros(2, 5))

    class Flat(torch.nn.Module):
        def forward(self, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            return torch.full((len(z), 3, 64, 64), self.level / 127.5 - 1)

    generator = Flat()
    for number in range(40):
        generator.level = number
        samples.draw(generator, number * 100, "cpu", torch.float32)  # type: ignore[arg-type]
    strip = Image.open(samples.strip(3000))
    pixels = from_pil([strip.convert("RGB")])[0]
    assert torch.equal(pixels[:, :64, 64:128], photos[0])
    levels = [int(pixels[0, row * 66 + 5, 70]) for row in range(1, ROWS)]
    assert levels[0] == 0
    assert levels[-1] == 30  # later samples belong to steps that a resumed run repeats
    assert levels == sorted(set(levels))


def test_training_does_not_depend_on_trackers(tracked: Path, tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    train(TINY, data=tiny_dataset(), out=tmp_path / "plain", budget=Budget(total_nimg=24))
    same = [(line["G_total"], line["D_adversarial"]) for line in stats(tmp_path / "plain")]
    assert same == [(line["G_total"], line["D_adversarial"]) for line in stats(tracked) if "G_total" in line]
