"""One run in words: what was trained on which data, on which machine, and the commands that repeat it."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vultus.config import ADVERSARIAL, differences, to_dict
from vultus.data.stream.options import option_name
from vultus.evaluation.plots import compact
from vultus.presets import PRESETS
from vultus.reporting.run_folder import Run

# Weights of a loss that are one term each: (field, words). Which fields there are depends on method and version.
TERMS = (
    ("perceptual_weight", "FaceNet features"),
    ("feature_weight", "feature discriminator"),
    ("kl_weight", "KL"),
)


@dataclass(frozen=True)
class RunSummary:
    """One run in words.

    Attributes:
        state: in progress, diverged or without snapshot; else empty.
        description: what was trained, in a sentence.
        evaluated_on: whose faces and scores the report shows, in a sentence.
        facts, machine: (name, value).
        commands: a shell script that repeats the run.
        remarks: of the reader of the run folder.
    """

    run: Run
    state: str
    description: str
    evaluated_on: str
    facts: list[tuple[str, str]]
    machine: list[tuple[str, str]]
    commands: str
    remarks: list[str]


def summarize_run(run: Run) -> RunSummary:
    """This run in words."""
    return RunSummary(
        run=run,
        state=_state(run),
        description=_description(run),
        evaluated_on=_evaluated_on(run),
        facts=_facts(run),
        machine=_machine(run),
        commands=_commands(run),
        remarks=run.remarks,
    )


def _state(run: Run) -> str:
    if run.running:
        return f"in progress: statistics up to {run.cur_nimg:,} images"
    if run.diverged:
        return f"stopped: diverged at {run.diverged.get('cur_nimg', '?')} images"
    return "" if run.snapshot else "no snapshot yet"


def _counts(run: Run) -> tuple[int, int, int]:
    """(training photos used, training people, held-out people); 0 where unknown."""
    splits = run.data.get("counts", {}).get("splits", {})
    train, test = splits.get("train", {}), splits.get("test", {})
    photos = run.snapshot.get("data", {}).get("images") or train.get("images", 0)
    limit = run.config.get("loader", {}).get("max_images", 0)
    return min(photos, limit) if limit and photos else photos, train.get("people", 0), test.get("people", 0)


def _description(run: Run) -> str:
    photos, people, _ = _counts(run)
    device = dict(_machine(run)).get("device", "").split(",")[0]
    tense = "is being trained" if run.running else "was trained"
    text = f"A generator of {run.resolution}×{run.resolution} faces {tense} on {photos:,} photos"
    subset = bool(run.config.get("loader", {}).get("max_images"))
    text += f" (a subset of the photos of {people:,} people)" if subset else f" of {people:,} people"
    text += f": {run.cur_nimg:,} images seen"
    if run.hours:
        text += f" in {_duration(run.hours)}"
    return text + (f" on {device}." if device else ".")


def _evaluated_on(run: Run) -> str:
    unseen = _counts(run)[2]
    if unseen:
        return f"Faces and scores below are of {unseen:,} people not seen in training, unless they say otherwise."
    return "The data have no held-out people: faces and scores below are of training people."


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 0.995 else f"{hours:.2f} h"


def describe_loss(loss: Mapping[str, Any], method: str) -> str:
    """The generator's loss, term by term. Which fields there are depends on the method and the version of the run."""
    parts = []
    weight = loss.get("adversarial_weight", 1.0)
    if weight:
        name = str(loss.get("adversarial") or ADVERSARIAL.get(method, "adversarial"))
        parts.append(("" if weight == 1 else f"{weight:g}·") + (name.upper() if name == "bce" else name))
    if loss.get("mse_weight"):
        term = f"{loss['mse_weight']:g}·MSE"
        if loss.get("mse_nimg"):
            term += f" (decays to a tenth over {loss['mse_nimg']:,} images)"
        parts.append(term)
    if loss.get("identity_weight"):
        term = f"{loss['identity_weight']:g}·identity by FaceNet"
        if loss.get("identity_nimg"):
            term += f" (rises from {loss.get('identity_start', 0):g} over {loss['identity_nimg']:,} images)"
        parts.append(term)
    parts += [f"{loss[key]:g}·{words}" for key, words in TERMS if loss.get(key)]
    if loss.get("gamma"):
        parts.append(f"R1 + R2 with γ = {loss['gamma']:g}")
    return " + ".join(parts) or "none"


def _facts(run: Run) -> list[tuple[str, str]]:
    config, (photos, people, unseen) = run.config, _counts(run)
    optim, loader, generator = config.get("optim", {}), config.get("loader", {}), config["generator"]
    encoder = run.data.get("encoder", {})
    size = f", {compact(run.parameters)} parameters" if run.parameters else ""
    rates = {key: optim[key] for key in ("lr", "beta1", "beta2") if key in optim}
    return [
        ("images seen", f"{run.cur_nimg:,}" + (f" ({run.cur_nimg / photos:.1f} epochs)" if photos else "")),
        ("training time", _duration(run.hours) if run.hours else "-"),
        ("preset", str(config.get("preset") or "none")),
        ("method", str(config.get("method", "gan"))),
        ("generator", f"{generator.get('kind', '?')}, {run.resolution}×{run.resolution}{size}"),
        ("loss", describe_loss(config.get("loss", {}), str(config.get("method", "gan")))),
        ("optimizer", "Adam" + "".join(f", {key} {value:g}" for key, value in rates.items())),
        ("batch size", str(optim.get("batch", "-"))),
        ("weight average (EMA)", f"half-life {optim['ema_nimg']:,} images" if "ema_nimg" in optim else "-"),
        ("training photos", f"{photos:,} of {people:,} people" + (", mirrored" if loader.get("mirror") else "")),
        ("held-out people", f"{unseen:,}"),
        *([("identities", str(run.data["identities"]))] if run.data.get("identities") else []),
        ("embedding", f"{encoder.get('id', '?')}, {encoder.get('dim', '?')} numbers"),
        ("data (sha256)", str(run.data.get("content_sha256", "-"))[:12]),
        ("terms of the data", str(run.data.get("licence") or "not recorded")),
        ("seed", str(config.get("seed", "-"))),
    ]


def _machine(run: Run) -> list[tuple[str, str]]:
    speeds = [value for _, value in run.series("images_per_s")]
    rows = []
    sessions = run.sessions
    if sessions:
        last = sessions[-1]
        hardware, versions, git = last.get("hardware") or {}, last.get("versions") or {}, last.get("git") or {}
        device = hardware.get("gpu") or hardware.get("cpu") or hardware.get("device", "?")
        cores = (
            f", {hardware['threads']} of {hardware['cores']} cores" if {"threads", "cores"} <= hardware.keys() else ""
        )
        memory = f", {hardware['memory_gib']} GiB" if "memory_gib" in hardware else ""
        rows += [
            ("device", f"{device}{cores}{memory}"),
            ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or "-"),
            ("sessions", f"{len(sessions)}, the first began {str(sessions[0].get('began', '?')).replace('T', ' ')}"),
        ]
        if git.get("revision"):
            rows.append(("code", f"{git['revision'][:12]}{' with changes' if git.get('dirty') else ''}"))
    rows.append(("training time", _duration(run.hours) if run.hours else "-"))
    rows.append(("dtype", str(run.config.get("dtype", "-"))))
    if speeds:
        rows.append(("speed", f"{statistics.median(speeds):.3g} images/s (median)"))
    for key, words in (("peak_memory_mib", "peak memory"), ("peak_gpu_memory_mib", "peak GPU memory")):
        peaks = [value for _, value in run.series(key)]
        if peaks:
            rows.append((words, f"{max(peaks):,.0f} MiB"))
    return rows


def _typed(value: Any) -> str:
    """The value of an option as the user types it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _commands(run: Run) -> str:
    """The commands that train this run again and evaluate it."""
    preset = str(run.config.get("preset"))
    preset = preset if preset in PRESETS else next(iter(PRESETS))
    defaults = to_dict(PRESETS[preset])
    out = f"runs/{run.folder.resolve().name}"
    stream = run.data.get("stream") or {}
    data = str(stream.get("source", "DATA"))
    if stream.get("revision") and "@" not in data:
        data += f"@{stream['revision']}"
    command = ["vultus", "train", "--preset", preset, "--data", data, "--out", out]
    for key in differences(defaults, run.config):
        value: Any = run.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        # The resolution follows from the data, the length from --images below. Options of older versions that no
        # longer exist cannot be given.
        implied = key.endswith(".resolution") or key in ("preset", "epochs")
        if value is not None and not implied and _known(defaults, key):
            command += [f"--{key}", _typed(value)]
    command += ["--images", str(run.cur_nimg)]
    for key, value in (stream.get("options") or {}).items():
        if value not in (None, False):
            command += [option_name(key), _typed(value)]
    sha256 = str(run.data.get("content_sha256", "?"))[:12]
    lines = [
        "# DATA: a data set of the same photos, made by `vultus prepare`"
        if stream
        else f"# DATA: the prepared data set whose content_sha256 begins with {sha256}",
        shlex.join(command),
        shlex.join(["vultus", "evaluate", out, "--data", "DATA"]),
    ]
    given = [session["command"] for session in run.sessions if isinstance(session.get("command"), list)]
    texts = [shlex.join(["vultus" if n == 0 else str(word) for n, word in enumerate(words)]) for words in given]
    if texts:
        lines.append("# Original commands:")
        lines += [f"# {text}" for text in dict.fromkeys(texts)]
    return "\n".join(lines)


def _known(values: Mapping[str, Any], key: str) -> bool:
    value: Any = values
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True
