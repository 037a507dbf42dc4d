"""The help texts of the settings of a training, read from the docstrings of the config classes."""

from __future__ import annotations

import functools
import inspect
import re
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from vultus.config import CONFIGS

# Sections of the settings, in the order of the help, with their titles.
SECTIONS = {
    "": "length and record of the run",
    "optim": "optimizer",
    "loader": "data",
    "loss": "losses",
    "generator": "generator",
    "discriminator": "discriminator",
}


@functools.cache
def setting_help() -> dict[str, str]:
    """The text of every setting of all methods, by dotted key."""
    texts: dict[str, str] = {}
    for config in CONFIGS.values():
        texts |= attribute_texts(config)
        for section, hint in get_type_hints(config).items():
            if is_dataclass(hint):
                texts |= {f"{section}.{name}": text for name, text in attribute_texts(hint).items()}
    shared = {key.removeprefix("generator."): text for key, text in texts.items() if key.startswith("generator.")}
    return {f"discriminator.{name}": text for name, text in shared.items()} | texts


def attribute_texts(cls: Any) -> dict[str, str]:
    """What the sections `Attributes` of the docstrings of a class and its bases say about each attribute."""
    texts: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        _, _, attributes = inspect.cleandoc(each.__dict__.get("__doc__") or "").partition("\nAttributes:\n")
        for names, text in re.findall(r"^    ([\w, ]+): (.*(?:\n     .*)*)", attributes, re.M):
            for name in names.split(", "):
                texts[name] = " ".join(text.split()).removesuffix(".")
    return texts
