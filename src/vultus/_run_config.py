"""config.json of a run folder, and how those of earlier versions are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vultus._files import read_json
from vultus._formats import upgrade, upgrades
from vultus.config import ADVERSARIAL, ALIASES, CONFIGS, REMOVED, loss_keys
from vultus.errors import UserError


def read_run_config(path: str | Path) -> dict[str, Any]:
    """The config.json of a run folder as the current version has it: `format`, `config` (nested settings of a
    TrainConfig) and `data` (the data set it belongs to).

    Raises UserError that names the file if it is missing, not a run's config, or of a run with a setting that this
    version no longer has.
    """
    record = read_json(path)
    if not _is_run_config(record):
        raise UserError(f"{path}: not the config of a run; give the --out of vultus train")
    try:
        result: dict[str, Any] = upgrade("run config", record.get("format", 1), record, path)
    except _NoLonger as error:
        raise UserError(f"{path}: {error}") from None
    return result


def _is_run_config(record: Any) -> bool:
    """Whether the parts that all versions have are of their kinds."""
    if not isinstance(record, dict) or not all(isinstance(record.get(key), dict) for key in ("config", "data")):
        return False
    config = record["config"]
    sections = [config.get(key, {}) for key in ("loss", "optim")]
    return all(isinstance(section, dict) for section in sections) and isinstance(config.get("method", "gan"), str)


class _NoLonger(UserError):
    """A setting that was removed is in use. The message does not name the file."""


@upgrades("run config", 1)
def _upgrade_from_1(record: dict[str, Any]) -> dict[str, Any]:
    """Method `coded` is called `cvae-gan` now; a method has its own loss settings only."""
    config = dict(record["config"])
    given_method: str = config.get("method", "gan")
    method: str = ALIASES.get(given_method, given_method)
    config["method"] = method
    for section in ("loss", "optim"):
        if section in config:
            config[section] = dict(config[section])
    inactive = REMOVED | {"loss.adversarial": ADVERSARIAL.get(method)}
    for key, value in inactive.items():
        section, name = key.split(".")
        if name not in config.get(section, {}):
            continue
        given = config[section].pop(name)
        if value is not None and given != value:
            raise _NoLonger(f"{key} is {given}, a setting that this version no longer has; train again in a new --out")
    if method in CONFIGS and "loss" in config:
        # Earlier versions wrote the settings of the other method too, with their defaults.
        foreign = set().union(*(loss_keys(cls) for cls in CONFIGS.values())) - loss_keys(CONFIGS[method])
        config["loss"] = {name: value for name, value in config["loss"].items() if f"loss.{name}" not in foreign}
    return record | {"format": 2, "config": config}
