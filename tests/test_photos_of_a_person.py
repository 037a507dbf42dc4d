"""scripts/photos_of_a_person.py on small networks."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_parts import DIM, SIDE, Memory, TinyEncoder, TinyGenerator, TinyJudge, snapshot
from vultus.data.dataset import PreparedDataset
from vultus.evaluation.verification import pair_scores, scores, threshold_at_far
from vultus.images.io import to_x

SCRIPT = Path(__file__).parents[1] / "scripts" / "photos_of_a_person.py"


class Repeating(Memory):
    """A Memory with a parameter, whose device is asked for."""

    def __init__(self, dataset: PreparedDataset) -> None:
        super().__init__(dataset)
        self.unused = torch.nn.Parameter(torch.zeros(1))


@pytest.fixture
def data(tiny_dataset: Callable[..., Path]) -> Path:
    encoder = TinyEncoder()
    return tiny_dataset(resolution=SIDE, people={"train": 1, "test": 12}, photos=6, dim=DIM, embed=encoder.embed)


@pytest.fixture
def run(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The output of the script; `generator` is what it loads."""

    def call(generator: Any, *options: str, code: int = 0) -> str:
        test = PreparedDataset(data, "test")
        loaded = snapshot(generator(test), test, loss_encoders=["umpire"])
        monkeypatch.setattr("vultus.sampling.generator.load", lambda *_, **__: loaded)
        monkeypatch.setattr("vultus.evaluation.backbones.face_recognition.load_judge", lambda _: TinyJudge())
        words = ["script", "default", "--data", str(data), "--judge", "umpire", "--counts", "1", "2", "4"]
        monkeypatch.setattr(sys, "argv", [*words, "--judged", "2", *options])
        if code:
            with pytest.raises(SystemExit) as raised:
                runpy.run_path(str(SCRIPT), run_name="__main__")
            assert raised.value.code == code
        else:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        out, err = capsys.readouterr()
        return err if code else out

    return call


def test_every_number_of_photos_has_a_row_and_its_gain(run: Callable[..., str]) -> None:
    result = json.loads(run(lambda _: TinyGenerator(noise=0), "--json"))
    rows = result["type2"]["umpire"]
    assert list(rows) == ["1", "2", "4", "real photos"]
    assert result | {"people": 12, "judged_photos": 24, "noises": 2, "split": "test"} == result
    for row in rows.values():
        assert 0 <= row["low"] <= row["value"] <= row["high"] <= 1
    assert rows["4"]["gain"]["value"] == pytest.approx(rows["4"]["value"] - rows["1"]["value"])


def test_photos_that_are_judged_are_in_no_condition(run: Callable[..., str], data: Path) -> None:
    """A generator that repeats photos gives the first one of a person, which the last 2 of 6 photos judge."""
    rows = json.loads(run(Repeating, "--json"))["type2"]["umpire"]
    test, judge = PreparedDataset(data, "test"), TinyJudge()
    embeddings = judge.embed(to_x(test.batch(range(len(test))).images))
    different = pair_scores(embeddings, list(test.identities), judge.similarity)[1]
    threshold = threshold_at_far(different, 1e-3)
    people = embeddings.unflatten(0, (12, 6))  # photos of a person are in a row
    accepted = [(scores(own[:1], own[4:], judge.similarity) > threshold).double().mean() for own in people]
    assert rows["1"]["value"] == pytest.approx(float(torch.stack(accepted).mean()))
    real = [(scores(own[:4], own[4:], judge.similarity) > threshold).double().mean() for own in people]
    assert rows["real photos"]["value"] == pytest.approx(float(torch.stack(real).mean()))


def test_the_table_says_who_judged(run: Callable[..., str]) -> None:
    first, _, head, *lines = run(lambda _: TinyGenerator()).splitlines()
    assert first.startswith("12 people, 24 photos of them judged, 2 noises, seed 0, cpu (")
    assert head == "| photos | umpire (in the loss), type II, % | minus 1 photo |"
    assert [line.split(" | ")[0] for line in lines] == ["| ---", "| 1", "| 2", "| 4", "| real photos"]


def test_what_cannot_be_measured_is_one_line(run: Callable[..., str]) -> None:
    assert "fewer than 2 people have 104 photos; lower --counts or --judged" in run(
        Repeating, "--judged", "100", code=2
    )
    assert "must be 1 or more" in run(Repeating, "--noises", "0", code=2)
    other = "embeddings of tiny-test, the snapshot needs another"

    def foreign(test: PreparedDataset) -> Any:
        test.manifest["encoder"] = test.manifest["encoder"] | {"id": "another"}
        return TinyGenerator()

    assert other in run(foreign, code=2)
