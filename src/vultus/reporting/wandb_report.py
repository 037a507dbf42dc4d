"""`vultus report --wandb`: the same story as a report on Weights & Biases.

The report is always built and written to OUT/wandb-report.json first, which needs no network. With a key it is then
saved on the server, where the runs must have arrived; saved again, it replaces itself, because the file keeps its id.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from vultus._files import make_folder, read_json, write_text
from vultus.errors import UserError
from vultus.evaluation.tables import format_table, markdown
from vultus.reporting.content import CURVES, PersonScores, ReportContent
from vultus.reporting.run_folder import Run
from vultus.training.run_log import MEASURED
from vultus.training.trackers import wandb_key

FILE = "wandb-report.json"
PROJECT = "vultus"  # of runs that no tracker knows
OFFLINE = ("offline", "dryrun", "disabled")
PHOTOS = "samples and progress show real photos in W&B"
PLOT = (8, 6)  # width and height; a row is 24 wide


class Server(Protocol):
    """What is asked of Weights & Biases. Every failure is an exception."""

    def entity(self) -> str:
        """Who is logged in, or their team."""

    def has(self, project: str, id: str) -> bool:
        """Whether the server knows this run."""

    def save(self, report: Any) -> str:
        """Save the report; return its address."""

    def share(self, report: Any) -> str:
        """Let everybody who has the link see the report; return the link."""


def write_wandb_report(
    story: ReportContent,
    out: str | Path,
    *,
    public: bool = False,
    with_photos: bool = False,
    server: Server | None = None,
) -> list[str]:
    """Write the report as JSON and, with a key, publish it. Returns what to tell the user, a line each.

    Args:
        story: what to tell.
        out: folder for the JSON.
        public: make a link for everybody; the runs' projects become readable through it.
        with_photos: show the sample sheets even then.
        server: default is the real one, where there is a key and WANDB_MODE is not offline.

    Raises UserError where the library is not installed, the server refuses, or a run has not arrived there.
    """
    path = make_folder(out) / FILE
    known = str(read_json(path).get("id") or "") if path.is_file() else ""
    samples = with_photos or not public
    report = build_report(story, samples=samples)
    report.id = known
    _write(report, path)
    lines = [str(path)]
    if not samples:
        lines.append(f"the sample browser is left out of the public report, because {PHOTOS}; --with-photos shows it")
    if server is None and (os.environ.get("WANDB_MODE") in OFFLINE or not wandb_key()):
        return lines + _offline(story, report, public)
    try:
        server = server or _WandB()
        entity = server.entity()
    except Exception as error:
        raise UserError(
            f"W&B cannot be reached or refuses the key ({_short(error)}); the report is in {path}; "
            "try again, or set WANDB_MODE=offline"
        ) from None
    for each in story.runs:
        _refuse_absent(each.run, server)
    report = build_report(story, samples=samples, entity=entity)
    report.id = known
    try:
        lines.append(server.save(report))
    except Exception as error:
        raise UserError(f"W&B did not save the report ({_short(error)}); it is in {path}; try again") from None
    _write(build_report(story, samples=samples), path, report.id)
    return lines + _shared(report, server, public)


def _shared(report: Any, server: Server, public: bool) -> list[str]:
    place = f"{report.entity}/{report.project}"
    if not public:
        return [f"seen by those who may see {place}; --public makes a link for everybody"]
    try:
        return [f"for everybody: {server.share(report)}"]
    except Exception as error:
        return [
            f"saved, but not public: {place} is private or your team forbids links ({_short(error)}); in W&B open the "
            f"project {place}, click the padlock beside its name and choose Public, or in the report choose Share, "
            "then 'Anyone with the link can view'"
        ]


def _offline(story: ReportContent, report: Any, public: bool) -> list[str]:
    kinds = [type(block).__name__ for block in report.blocks]
    panels = sum(len(block.panels) for block in report.blocks if hasattr(block, "panels"))
    lines = [
        f"not published: no W&B key, or WANDB_MODE is offline. It would be the report '{report.title}' in project "
        f"{report.project}: {kinds.count('H2')} sections, {panels} panels, of {', '.join(story.names)}"
        + (", with a link for everybody" if public else "")
    ]
    for each in story.runs:
        lines += _unsent(each.run)
    return [*lines, "to publish it: wandb login, then the same command again"]


def _unsent(run: Run) -> list[str]:
    """What has to be done before the server knows this run, as far as the folder tells."""
    id = _id(run)
    if id is None:
        return [f"{run.name}: {_UNTRACKED}"]
    waiting = [
        folder
        for folder in sorted((run.folder / "wandb").glob(f"offline-run-*-{id}"))
        if not any(folder.glob("*.wandb.synced"))
    ]
    return [f"{run.name} is not on W&B yet: {_sync(run, id)}"] if waiting else []


_UNTRACKED = "W&B was not told of this run; train it on with --track wandb, which sends what it missed too"


def _sync(run: Run, id: str) -> str:
    return f"wandb sync {run.folder}/wandb/offline-run-*-{id}"


def _refuse_absent(run: Run, server: Server) -> None:
    id = _id(run)
    if id is None:
        raise UserError(f"{run.folder}: {_UNTRACKED}")
    try:
        there = server.has(_project(run), id)
    except Exception as error:
        raise UserError(f"W&B cannot be asked for {run.name} ({_short(error)}); try again") from None
    if not there:
        raise UserError(f"{run.folder}: not on W&B yet; run {_sync(run, id)} and try again")


def _id(run: Run) -> str | None:
    entry = run.trackers.get("wandb")
    return str(entry["id"]) if isinstance(entry, dict) and entry.get("id") else None


def _project(run: Run) -> str:
    entry = run.trackers.get("wandb")
    return str(entry.get("project") or PROJECT) if isinstance(entry, dict) else PROJECT


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _write(report: Any, path: Path, id: str | None = None) -> None:
    """Write the JSON, once the library has read it back whole."""
    internal: Any = importlib.import_module("wandb_workspaces.reports.v2.internal")
    model = report._to_model()
    if id is not None:
        model.id = id
    text = model.model_dump_json(by_alias=True, exclude_none=True)
    again = type(report)._from_model(internal.ReportViewspec.model_validate_json(text))
    if [type(block) for block in again.blocks] != [type(block) for block in report.blocks]:
        raise UserError(f"{path}: the library does not read its own report; install another wandb-workspaces")
    write_text(path, json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n")


# --- the report -------------------------------------------------------------------------------------------------------


def build_report(story: ReportContent, *, samples: bool = True, entity: str = "") -> Any:
    """A wandb_workspaces Report. Without `entity` its run sets name no project, so that it needs no server."""
    try:
        wr: Any = importlib.import_module("wandb_workspaces.reports.v2")
    except ImportError:
        raise UserError("--wandb: wandb-workspaces is not installed; run pip install 'vultus[track]'") from None
    runs = [each.run for each in story.runs]
    blocks: list[Any] = [wr.TableOfContents()]
    for each in story.runs:
        state = f" **{each.state.capitalize()}.**" if each.state else ""
        blocks.append(wr.MarkdownBlock(text=f"**{markdown(each.run.name)}**: {markdown(each.lead)}{state}"))
    blocks += [wr.MarkdownBlock(text=markdown(text)) for text in story.whom]
    if story.summary:
        head = ["", *story.names, "real photos"]
        rows = [[figure.words, *(cell or "-" for cell in figure.cells), figure.real] for figure in story.summary]
        blocks += [wr.H2("How good is it?"), wr.MarkdownBlock(text=_table(head, rows))]
    blocks += [wr.MarkdownBlock(text=markdown(line)) for line in story.remarks]
    if samples and any(run.sheets for run in runs):
        browsers = [
            wr.MediaBrowser(
                title=title, media_keys=[key], num_columns=max(len(runs), 2), layout=wr.Layout(x=x, w=12, h=14)
            )
            for x, (key, title) in zip((0, 12), (("samples", "Samples"), ("progress", "Faces over time")), strict=True)
        ]
        blocks += [wr.H2("How it looks"), _grid(wr, runs, browsers, entity)]
    plots = [
        wr.LinePlot(title=title, x="Step", y=names, title_x="images seen", layout=_place(wr, number))
        for number, (title, names) in enumerate(_plotted(runs))
    ]
    if plots:
        blocks += [wr.H2("Training curves"), _grid(wr, runs, plots, entity)]
    blocks.append(wr.H2("Evaluation"))
    columns = story.evaluation.columns
    if columns:
        blocks.append(wr.P("Cells: the figure, and its 95 % interval over people."))
        blocks.append(wr.MarkdownBlock(text=format_table(columns)))
    else:
        blocks.append(wr.P("Not measured yet."))
    for group in story.people:
        title = f"Best and worst people: {group.column}, by {group.judge}"
        blocks += [wr.H3(title), wr.MarkdownBlock(text=_people(group))]
    for title, key in (("Method", "facts"), ("Compute", "machine")):
        rows = [[name, *cells] for name, cells in story.compared(key)]
        blocks += [wr.H2(title), wr.MarkdownBlock(text=_table(["", *story.names], rows))]
    compute = [
        wr.LinePlot(title=title, x="Step", y=[f"{MEASURED}/{key}"], title_x="images seen", layout=_place(wr, number))
        for number, (title, key) in enumerate(
            (
                ("Images a second", "images_per_s"),
                ("Peak memory, MiB", "peak_memory_mib"),
                ("Share of waiting for data", "data_wait"),
            )
        )
        if any(run.series(key) for run in runs)
    ]
    comparer = wr.RunComparer(diff_only="split" if len(runs) > 1 else None, layout=wr.Layout(x=0, y=6, w=24, h=12))
    blocks.append(_grid(wr, runs, [*compute, comparer], entity))
    blocks.append(wr.H2("Do it again"))
    blocks += [wr.CodeBlock(code=each.commands, language=None) for each in story.runs]
    return wr.Report(
        entity=entity,
        project=_project(runs[0]),
        title=story.title[:128],
        description="Written by vultus report from the run folders.",
        blocks=blocks,
        width="fluid",
    )


def _plotted(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(title, names as the tracker logs them) of the charts that some run has figures for."""
    found = []
    for title, _, keys in CURVES:
        names = [f"{evaluator or MEASURED}/{key}" for evaluator, key, _ in keys if _any(runs, key, evaluator)]
        if names and title != "Speed":
            found.append((title, names))
    return found


def _any(runs: Sequence[Run], key: str, evaluator: str | None) -> bool:
    return any(run.series(key, evaluator) for run in runs)


def _place(wr: Any, number: int) -> Any:
    width, height = PLOT
    return wr.Layout(x=number % 3 * width, y=number // 3 * height, w=width, h=height)


def _grid(wr: Any, runs: Sequence[Run], panels: list[Any], entity: str) -> Any:
    """Panels over these runs: a run set for each project that they are in."""
    projects: dict[str, list[Run]] = {}
    for run in runs:
        projects.setdefault(_project(run), []).append(run)
    sets = []
    for project, members in projects.items():
        ids = [id for id in map(_id, members) if id]
        place = {"entity": entity, "project": project} if entity else {}
        key, values = ("ID", ids) if len(ids) == len(members) else ("Name", [run.name for run in members])
        sets.append(wr.Runset(name=project, filters=f"Metric('{key}') in {values!r}", **place))
    return wr.PanelGrid(runsets=sets, panels=panels)


def _people(group: PersonScores) -> str:
    ends = (("best", group.best), ("worst", group.worst))
    rows = [[end, name, f"{score:.3f}", str(count)] for end, people in ends for name, score, count, _ in people]
    return _table(["", "person", "score", "photos"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    escaped = [[cell if cell == "---" else markdown(cell) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


class _WandB:
    """The real server."""

    def __init__(self) -> None:
        import wandb

        self._api = wandb.Api(timeout=20)

    def entity(self) -> str:
        return str(os.environ.get("WANDB_ENTITY") or self._api.default_entity)

    def has(self, project: str, id: str) -> bool:
        import wandb

        try:
            self._api.run(f"{self.entity()}/{project}/{id}")
        except (ValueError, wandb.errors.CommError) as error:
            if "could not find" in str(error).lower() or "not found" in str(error).lower():
                return False
            raise
        return True

    def save(self, report: Any) -> str:
        return str(report.save().url)

    def share(self, report: Any) -> str:
        return str(report.enable_share_link())
