"""One run in words: what was trained on what, on which machine, and how to do it again."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vultus.config import differences, to_dict
from vultus.evaluation.charts import compact
from vultus.presets import PRESETS
from vultus.reporting.run_folder import EVALUATION, Run


@dataclass(frozen=True)
class RunSummary:
    """One run in words.

    Attributes:
        state: what is unusual about it, or empty.
        lead: what it is, in a sentence.
        whom: whose faces it is shown with.
        facts, machine: (name, value).
        commands: a shell script that makes it again.
        remarks: of the reader.
    """

    run: Run
    state: str
    lead: str
    whom: str
    facts: list[tuple[str, str]]
    machine: list[tuple[str, str]]
    commands: str
    remarks: list[str]


def describe(run: Run) -> RunSummary:
    """This run in words."""
    return RunSummary(run, _state(run), _lead(run), _whom(run), _facts(run), _machine(run), _commands(run), run.remarks)


def _state(run: Run) -> str:
    if run.running:
        return f"in progress: figures up to {run.cur_nimg:,} images"
    if run.diverged:
        return f"stopped: diverged at {run.diverged.get('cur_nimg', '?')} images"
    return "" if run.snapshot else "no snapshot yet"


def _counts(run: Run) -> tuple[int, int, int]:
    """(training photos used, people to train on, people kept out), 0 where unknown."""
    splits = run.data.get("counts", {}).get("splits", {})
    train, test = splits.get("train", {}), splits.get("test", {})
    photos = run.snapshot.get("data", {}).get("images") or train.get("images", 0)
    most = run.config.get("loader", {}).get("max_images", 0)
    return min(photos, most) if most and photos else photos, train.get("people", 0), test.get("people", 0)


def _lead(run: Run) -> str:
    photos, people, _ = _counts(run)
    machine = dict(_machine(run))
    where = machine.get("device", "").split(",")[0]
    begun = "has been learning" if run.running else "learned"
    text = f"A generator of {run.resolution}×{run.resolution} faces {begun} from {photos:,} photos"
    if run.config.get("loader", {}).get("max_images"):
        text += f" (a subset of {people:,} people's)"
    else:
        text += f" of {people:,} people"
    text += f": {run.cur_nimg:,} images seen"
    if run.hours:
        text += f" in {_hours(run.hours)}"
    text += f" on {where}." if where else "."
    return text


def _whom(run: Run) -> str:
    unseen = _counts(run)[2]
    if unseen:
        return f"Faces and figures below are of {unseen:,} other people, whom it never saw, unless they say otherwise."
    return "Nobody was kept out of the training: faces and figures below are of people it has seen."


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 0.995 else f"{hours:.2f} h"


def loss_words(loss: Mapping[str, Any]) -> str:
    """The generator's loss, term by term."""
    parts = []
    if loss.get("adversarial_weight", 1.0):
        weight = loss.get("adversarial_weight", 1.0)
        name = str(loss.get("adversarial", "?"))
        parts.append(("" if weight == 1 else f"{weight:g}·") + (name.upper() if name == "bce" else name))
    if loss.get("mse_weight"):
        term = f"{loss['mse_weight']:g}·MSE"
        if loss.get("mse_nimg"):
            term += f" (falling to a tenth over {loss['mse_nimg']:,} images)"
        parts.append(term)
    if loss.get("identity_weight"):
        term = f"{loss['identity_weight']:g}·identity through FaceNet"
        if loss.get("identity_nimg"):
            term += f" (from {loss.get('identity_start', 0):g} over {loss['identity_nimg']:,} images)"
        parts.append(term)
    named = {"perceptual_weight": "FaceNet's features", "feature_weight": "feature discriminator", "kl_weight": "KL"}
    parts += [f"{loss[key]:g}·{words}" for key, words in named.items() if loss.get(key)]
    if loss.get("gamma"):
        parts.append(f"R1 + R2 with γ = {loss['gamma']:g}")
    return " + ".join(parts) or "none"


def _facts(run: Run) -> list[tuple[str, str]]:
    config, (photos, people, unseen) = run.config, _counts(run)
    optim, loader, generator = config.get("optim", {}), config.get("loader", {}), config["generator"]
    encoder = run.data.get("encoder", {})
    size = f", {compact(run.parameters)} numbers" if run.parameters else ""
    rates = {key: optim[key] for key in ("lr", "beta1", "beta2") if key in optim}
    found = [
        ("images seen", f"{run.cur_nimg:,}" + (f" ({run.cur_nimg / photos:.1f} passes)" if photos else "")),
        ("training time", _hours(run.hours) if run.hours else "-"),
        ("preset", str(config.get("preset") or "none")),
        ("method", str(config.get("method", "gan"))),
        ("generator", f"{generator.get('kind', '?')}, {run.resolution}×{run.resolution}{size}"),
        ("loss", loss_words(config.get("loss", {}))),
        ("optimizer", "Adam" + "".join(f", {key} {value:g}" for key, value in rates.items())),
        ("batch", str(optim.get("batch", "-"))),
        ("average of the weights", f"half-life {optim['ema_nimg']:,} images" if "ema_nimg" in optim else "-"),
        ("training photos", f"{photos:,} of {people:,} people" + (", mirrored" if loader.get("mirror") else "")),
        ("people kept out", f"{unseen:,}"),
        ("embedding", f"{encoder.get('id', '?')}, {encoder.get('dim', '?')} numbers"),
        ("data (sha256)", str(run.data.get("content_sha256", "-"))[:12]),
        ("terms of the data", str(run.data.get("licence") or "none given")),
        ("seed", str(config.get("seed", "-"))),
    ]
    return found


def _machine(run: Run) -> list[tuple[str, str]]:
    speeds = [value for _, value in run.series("images_per_s")]
    found = []
    sessions = run.sessions
    if sessions:
        last = sessions[-1]
        hardware, versions, git = last.get("hardware") or {}, last.get("versions") or {}, last.get("git") or {}
        device = hardware.get("gpu") or hardware.get("cpu") or hardware.get("device", "?")
        cores = (
            f", {hardware['threads']} of {hardware['cores']} cores" if {"threads", "cores"} <= hardware.keys() else ""
        )
        memory = f", {hardware['memory_gib']} GiB" if "memory_gib" in hardware else ""
        found += [
            ("device", f"{device}{cores}{memory}"),
            ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or "-"),
            ("sessions", f"{len(sessions)}, the first began {str(sessions[0].get('began', '?')).replace('T', ' ')}"),
        ]
        if git.get("revision"):
            found.append(("code", f"{git['revision'][:12]}{' with changes' if git.get('dirty') else ''}"))
    found.append(("training time", _hours(run.hours) if run.hours else "-"))
    found.append(("dtype", str(run.config.get("dtype", "-"))))
    if speeds:
        found.append(("speed", f"{statistics.median(speeds):.3g} images a second (median)"))
    for key, words in (("peak_memory_mib", "most memory"), ("peak_gpu_memory_mib", "most GPU memory")):
        peaks = [value for _, value in run.series(key)]
        if peaks:
            found.append((words, f"{max(peaks):,.0f} MiB"))
    return found


def _commands(run: Run) -> str:
    """How to make this run again, and to measure it."""
    config, lines = run.config, []
    named = str(config.get("preset"))
    preset = named if named in PRESETS else next(iter(PRESETS))
    start = to_dict(PRESETS[preset])
    out = f"runs/{run.folder.resolve().name}"
    command = ["vultus", "train", "--preset", preset, "--data", "DATA", "--out", out]
    for key in differences(start, config):
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        # The resolution is that of the data, the length is given below, and what an older version called otherwise
        # cannot be set now.
        implied = key.endswith(".resolution") or key in ("preset", "epochs")
        if value is not None and not implied and _known(start, key):
            command += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
    command += ["--images", str(run.cur_nimg)]
    sha = str(run.data.get("content_sha256", "?"))[:12]
    lines.append(f"# DATA: the prepared data set whose content_sha256 begins with {sha}")
    lines.append(shlex.join(command))
    lines.append(shlex.join(["vultus", "evaluate", out, "--data", "DATA", "--out", f"{out}/{EVALUATION}"]))
    given = [session["command"] for session in run.sessions if isinstance(session.get("command"), list)]
    words = [shlex.join(["vultus" if n == 0 else str(word) for n, word in enumerate(command)]) for command in given]
    if words:
        lines.append("# As it was given:")
        lines += [f"# {text}" for text in dict.fromkeys(words)]
    return "\n".join(lines)


def _known(start: Mapping[str, Any], key: str) -> bool:
    value: Any = start
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True
