"""`vultus report --wandb`: the same content as a report on Weights & Biases.

The report is first written to OUT/wandb-report.json, which needs no network. With an API key it is then saved on the
server, which must have the runs already. The file keeps the report's id: the next call replaces the report.
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
from vultus.reporting.content import CURVES, PersonScores, ReportContent, read_content
from vultus.reporting.html import print_remarks
from vultus.reporting.run_folder import Run
from vultus.training.run_log import MEASURED
from vultus.training.trackers import wandb_key

FILE = "wandb-report.json"
PROJECT = "vultus"  # of runs without tracking.json
OFFLINE = ("offline", "dryrun", "disabled")
PHOTOS = "the images `samples` and `progress` on W&B contain real photos"
PLOT = (8, 6)  # width and height; a row is 24 wide


class Server(Protocol):
    """The calls to Weights & Biases. Every failure is an exception."""

    def entity(self) -> str:
        """The user who is logged in, or their team."""

    def has(self, project: str, id: str) -> bool:
        """Whether the server has this run."""

    def save(self, report: Any) -> str:
        """Save the report; return its URL."""

    def share(self, report: Any) -> str:
        """Make the report readable for everybody who has the link; return the link."""


def report_to_wandb(
    runs: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    evaluation: str | Path | Sequence[str | Path] = (),
    public: bool = False,
    with_photos: bool = False,
) -> list[str]:
    """Write a report about run folders for Weights & Biases. See `html.report` and `write_wandb_report`."""
    content = read_content(runs, evaluation)
    print_remarks(content)
    return write_wandb_report(content, content.folder if out is None else out, public=public, with_photos=with_photos)


def write_wandb_report(
    content: ReportContent,
    out: str | Path,
    *,
    public: bool = False,
    with_photos: bool = False,
    server: Server | None = None,
) -> list[str]:
    """Write the report as JSON and, with an API key, publish it. Returns lines for the user.

    Args:
        content: of the report.
        out: folder for the JSON.
        public: create a public link; it makes the projects of the runs readable.
        with_photos: show the sample sheets in a public report too.
        server: default: the real one, if there is an API key and WANDB_MODE is not offline.

    Raises UserError where the library is not installed, the server refuses, or a run is not on the server.
    """
    path = make_folder(out) / FILE
    id = str(read_json(path).get("id") or "") if path.is_file() else ""
    samples = with_photos or not public
    report = build_report(content, samples=samples)
    report.id = id
    _write(report, path)
    lines = [str(path)]
    if not samples:
        lines.append(f"the sample browser is left out of the public report because {PHOTOS}; --with-photos shows it")
    if server is None and (os.environ.get("WANDB_MODE") in OFFLINE or not wandb_key()):
        return lines + _offline(content, report, public)
    try:
        server = server or _WandB()
        entity = server.entity()
    except Exception as error:
        raise UserError(
            f"W&B cannot be reached or refuses the API key ({_short(error)}); the report is in {path}; "
            "try again, or set WANDB_MODE=offline"
        ) from None
    for one in content.runs:
        _refuse_absent(one.run, server)
    report = build_report(content, samples=samples, entity=entity)
    report.id = id
    try:
        lines.append(server.save(report))
    except Exception as error:
        raise UserError(f"W&B did not save the report ({_short(error)}); it is in {path}; try again") from None
    _write(build_report(content, samples=samples), path, report.id)
    return lines + _shared(report, server, public)


def _shared(report: Any, server: Server, public: bool) -> list[str]:
    project = f"{report.entity}/{report.project}"
    if not public:
        return [f"visible to members of {project}; --public creates a public link"]
    try:
        return [f"public link: {server.share(report)}"]
    except Exception as error:
        return [
            f"saved, but not public: {project} is private or your team forbids links ({_short(error)}); in W&B open "
            f"the project {project}, click the padlock beside its name and choose Public, or in the report choose "
            "Share, then 'Anyone with the link can view'"
        ]


def _offline(content: ReportContent, report: Any, public: bool) -> list[str]:
    kinds = [type(block).__name__ for block in report.blocks]
    panels = sum(len(block.panels) for block in report.blocks if hasattr(block, "panels"))
    lines = [
        f"not published: no W&B API key, or WANDB_MODE is offline. It would be the report '{report.title}' in project "
        f"{report.project}: {kinds.count('H2')} sections, {panels} panels, of {', '.join(content.names)}"
        + (", with a public link" if public else "")
    ]
    for one in content.runs:
        lines += _unsent(one.run)
    return [*lines, "to publish it: wandb login, then run the same command again"]


def _unsent(run: Run) -> list[str]:
    """What has to be done before the server has this run, according to its folder; [] if nothing."""
    id = _id(run)
    if id is None:
        return [f"{run.name}: {_UNTRACKED}"]
    waiting = [
        folder
        for folder in sorted((run.folder / "wandb").glob(f"offline-run-*-{id}"))
        if not any(folder.glob("*.wandb.synced"))
    ]
    return [f"{run.name} is not on W&B yet: {_sync(run, id)}"] if waiting else []


_UNTRACKED = "this run is not tracked by W&B; resume it with --track wandb, which sends the earlier steps too"


def _sync(run: Run, id: str) -> str:
    return f"wandb sync {run.folder}/wandb/offline-run-*-{id}"


def _refuse_absent(run: Run, server: Server) -> None:
    id = _id(run)
    if id is None:
        raise UserError(f"{run.folder}: {_UNTRACKED}")
    try:
        known = server.has(_project(run), id)
    except Exception as error:
        raise UserError(
            f"{run.folder}: W&B does not answer whether it has this run ({_short(error)}); try again"
        ) from None
    if not known:
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
    """Write the JSON after the library has read it back with the same blocks."""
    internal: Any = importlib.import_module("wandb_workspaces.reports.v2.internal")
    model = report._to_model()
    if id is not None:
        model.id = id
    text = model.model_dump_json(by_alias=True, exclude_none=True)
    again = type(report)._from_model(internal.ReportViewspec.model_validate_json(text))
    if [type(block) for block in again.blocks] != [type(block) for block in report.blocks]:
        raise UserError(f"{path}: wandb-workspaces cannot read its own report; install another version of it")
    write_text(path, json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n")


# --- the report -------------------------------------------------------------------------------------------------------


def build_report(content: ReportContent, *, samples: bool = True, entity: str = "") -> Any:
    """A wandb_workspaces Report. Without `entity` its run sets name no project, and it needs no server."""
    try:
        wr: Any = importlib.import_module("wandb_workspaces.reports.v2")
    except ImportError:
        raise UserError("--wandb: wandb-workspaces is not installed; run pip install 'vultus[track]'") from None
    runs = [one.run for one in content.runs]
    blocks: list[Any] = [
        wr.MarkdownBlock(text=f"**Alarm: {markdown(names)}**: {markdown(text)}") for names, text in content.alarms
    ]
    blocks += [wr.MarkdownBlock(text=markdown(line)) for line in content.remarks]
    blocks.append(wr.TableOfContents())
    for one in content.runs:
        state = f" **{one.state.capitalize()}.**" if one.state else ""
        blocks.append(wr.MarkdownBlock(text=f"**{markdown(one.run.name)}**: {markdown(one.description)}{state}"))
    blocks += [wr.MarkdownBlock(text=markdown(text)) for text in content.evaluated_on]
    if content.headlines:
        head = ["", *content.names, "real photos"]
        rows = [[row.label, *(cell or "-" for cell in row.cells), row.real] for row in content.headlines]
        blocks += [wr.H2("How good is it?"), wr.MarkdownBlock(text=_table(head, rows))]
    if samples and any(run.samples for run in runs):
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
    columns = content.evaluation.columns
    if columns:
        blocks.append(wr.P("Cells: the value and its 95 % interval, people resampled."))
        blocks.append(wr.MarkdownBlock(text=format_table(columns)))
    else:
        blocks.append(wr.P("Not measured yet."))
    for group in content.people:
        title = f"Best and worst people: {group.column}, by {group.judge}"
        blocks += [wr.H3(title), wr.MarkdownBlock(text=_people(group))]
    for title, key in (("Method and data", "facts"), ("Machine and time", "machine")):
        rows = [[name, *cells] for name, cells in content.compared(key)]
        blocks += [wr.H2(title), wr.MarkdownBlock(text=_table(["", *content.names], rows))]
    compute = [
        wr.LinePlot(title=title, x="Step", y=[f"{MEASURED}/{key}"], title_x="images seen", layout=_place(wr, number))
        for number, (title, key) in enumerate(
            (
                ("Images per second", "images_per_s"),
                ("Peak memory, MiB", "peak_memory_mib"),
                ("Share of time waiting for data", "data_wait"),
            )
        )
        if any(run.series(key) for run in runs)
    ]
    comparer = wr.RunComparer(diff_only="split" if len(runs) > 1 else None, layout=wr.Layout(x=0, y=6, w=24, h=12))
    blocks.append(_grid(wr, runs, [*compute, comparer], entity))
    blocks.append(wr.H2("Commands to repeat it"))
    blocks += [wr.CodeBlock(code=one.commands, language=None) for one in content.runs]
    return wr.Report(
        entity=entity,
        project=_project(runs[0]),
        title=content.title[:128],
        description="Written by vultus report from the run folders.",
        blocks=blocks,
        width="fluid",
    )


def _plotted(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(title, names as the tracker logs them) of the charts for which some run has values."""
    charts = []
    for title, _, keys in CURVES:
        names = [f"{evaluator or MEASURED}/{key}" for evaluator, key, _ in keys if _any(runs, key, evaluator)]
        if names and title != "Speed":
            charts.append((title, names))
    return charts


def _any(runs: Sequence[Run], key: str, evaluator: str | None) -> bool:
    return any(run.series(key, evaluator) for run in runs)


def _place(wr: Any, number: int) -> Any:
    width, height = PLOT
    return wr.Layout(x=number % 3 * width, y=number // 3 * height, w=width, h=height)


def _grid(wr: Any, runs: Sequence[Run], panels: list[Any], entity: str) -> Any:
    """Panels over these runs, with a run set for each of their projects."""
    projects: dict[str, list[Run]] = {}
    for run in runs:
        projects.setdefault(_project(run), []).append(run)
    sets = []
    for project, members in projects.items():
        ids = [id for id in map(_id, members) if id]
        names = {"entity": entity, "project": project} if entity else {}
        key, values = ("ID", ids) if len(ids) == len(members) else ("Name", [run.name for run in members])
        sets.append(wr.Runset(name=project, filters=f"Metric('{key}') in {values!r}", **names))
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
