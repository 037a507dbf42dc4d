"""The data card: what a user of the data set needs to know, and the metadata that the hub and `datasets` read.

Its text is assets/data_card.md.jinja. The licence follows the terms of the photos that the generator was trained on.
"""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from vultus._files import write_text
from vultus.export.model_card import licence_of
from vultus.synthesis.folder import CARD
from vultus.synthesis.shards import SUFFIXES

TAGS = ["face", "face-recognition", "synthetic", "vultus"]
# The hub's size categories: 1K<n<10K.
_SIZES = ("", "K", "M", "B")


def write_card(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the card of the data set with this manifest into its folder."""
    options, counts = manifest["options"], manifest["counts"]
    licence = licence_of(manifest["snapshot"]["licence"])
    files = f"train-*{SUFFIXES[options['format']]}"
    data = DatasetCardData(
        license=licence.id,
        license_name=licence.name,
        task_categories=["image-classification"],
        tags=TAGS,
        size_categories=[_size(counts["rows"])],
        pretty_name=f"{counts['people']} people who do not exist",
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": files}]}],
    )
    terms = manifest["snapshot"]["licence"] or "not recorded"
    template = importlib.resources.files("vultus") / "assets" / "data_card.md.jinja"
    card = DatasetCard.from_template(data, template_str=template.read_text(encoding="utf-8"), terms=terms, **manifest)
    write_text(folder / CARD, str(card))


def _size(count: int) -> str:
    if count < 1000:
        return "n<1K"
    power = int(math.log10(count))
    low, high = (f"{10 ** (each % 3)}{_SIZES[each // 3]}" for each in (power, power + 1))
    return f"{low}<n<{high}"
