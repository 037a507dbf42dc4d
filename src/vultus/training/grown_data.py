"""A run goes on with the photos that it began with, also where `vultus prepare` has added photos to its data set."""

from __future__ import annotations

from pathlib import Path

from vultus._progress import message
from vultus._run_config import read_run_config
from vultus.data.dataset import PreparedDataset
from vultus.data.stream.dataset import StreamedDataset


def begun_with(out: str | Path, dataset: PreparedDataset) -> PreparedDataset:
    """`dataset` as it was when the run in `out` began, so that the resumed run sees the same photos in the same order.

    A note tells the user. Where no run is in `out`, or it began on another data set, `dataset` is returned as it is,
    and the run's own check refuses it. Raises UserError for a stream that is not the one that the run began with.
    """
    path = Path(out) / "config.json"
    if not path.is_file():
        return dataset
    if isinstance(dataset, StreamedDataset):
        dataset.check_begun(Path(out))
        return dataset
    content = read_run_config(path)["data"].get("content_sha256")
    if content not in [state["content_sha256"] for state in dataset.manifest.get("earlier", [])]:
        return dataset
    earlier = dataset.as_of(content)
    before, now = (each.manifest["counts"]["images"] for each in (earlier, dataset))
    message(
        f"note: {dataset.folder} has grown from {before} to {now} images since this run began; it goes on with those "
        f"{before}. To train on all of them, begin a new run in another --out, or with --fresh"
    )
    return earlier
