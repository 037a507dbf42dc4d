"""The arithmetic of benchmarks/scale.py: fits of measurements, and what a number of images costs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import scale


def test_a_straight_line_is_found() -> None:
    fit = scale.Fit.of([100, 200, 400], [3.0, 4.0, 6.0])
    assert (fit.start, fit.slope) == pytest.approx((2.0, 0.01))
    assert fit.error < 1e-9
    assert scale.Fit.of([100, 200, 400], [3.0, 4.0, 9.0]).error > 0.05


@pytest.mark.parametrize(("memory", "flat"), [([400.0, 401.0, 402.0], True), ([400.0, 500.0, 700.0], False)])
def test_growing_memory_is_noticed(
    memory: list[float], flat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scale, "faces", list)
    monkeypatch.setattr(scale, "command", lambda *_: [])
    found = iter(memory)
    monkeypatch.setattr(scale, "measured", lambda *_: (2.0, next(found)))
    options = argparse.Namespace(stages=["stream"], sizes=[1000, 2000, 4000], out=tmp_path, max_growth=100.0)
    assert scale.measure(options) == flat
    assert "| stream | 4,000 | 2.0 |" in capsys.readouterr().out


def test_a_child_process_counts_in_the_memory(tmp_path: Path) -> None:
    child = "import time; block = b'x' * 150_000_000; time.sleep(1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    seconds, peak = scale.measured([sys.executable, "-c", parent], tmp_path / "log")
    assert 1 <= seconds < 30
    assert 150 < peak < 400


def test_projection_by_hand() -> None:
    cluster = scale.Cluster("two nodes", nodes=2, gpus=4, peak=100, cores=10, network=1)
    rates = scale.Rates(
        photo=1000, record=100, decode=50, read=200, facenet_flops=1e9, train_flops=1e10, parameters=1e6, batch=10,
        utilisation=0.5, passes=2,
    )  # fmt: skip
    parts = scale.projected(cluster, rates, 3.6e6)
    assert parts["prepare"] == pytest.approx(
        # 3.6e9 bytes at 2e9 a second; 3.6e6 photos at 50 on each of 20 cores; 1e9 FLOPs each at half of 8e14
        {"read photos": 1.8 / 3600, "decode": 3600 / 3600, "FaceNet": 9 / 3600}
    )
    assert parts["train"] == pytest.approx(
        # 7.2e6 images; 90,000 steps of 80 images, each moves 2 * 4 * 1e6 / 2 bytes at 1e9 a second
        {"read records": 0.36 / 3600, "decode": 1800 / 3600, "training step": 180 / 3600, "all-reduce": 360 / 3600}
    )
    alone = scale.projected(scale.Cluster("cores", 1, 0, 0, 10, 1), scale.Rates(facenet=10, train=1, passes=1), 3.6e6)
    assert alone["prepare"]["FaceNet"] == pytest.approx(10)
    assert alone["train"]["training step"] == pytest.approx(100)
