"""A generator as a model folder, on disk or on the Hugging Face hub. Nothing in it is a pickle.

config.json         the fields of GeneratorConfig (the arguments of build_generator), and under `vultus` the format
                    version, the metadata of the snapshot, and whether there is a population prior
model.safetensors   the weights
people.safetensors  the population prior, from which random identities are sampled (see sampling/population.py)
README.md           the model card; only `vultus publish` writes it
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

import safetensors.torch
import torch
from huggingface_hub import HfApi, ModelHubMixin, hf_hub_download
from torch import Tensor, nn

from vultus._download import HUB
from vultus._files import atomic_path, make_folder, read_json, write_json
from vultus._formats import VERSIONS, upgrade
from vultus.config import GeneratorConfig, from_dict, to_dict
from vultus.errors import UserError
from vultus.models.integrity import check_metadata, check_population, checked_network

CONFIG, MODEL, PEOPLE, CARD = "config.json", "model.safetensors", "people.safetensors", "README.md"
REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class HubMixin(ModelHubMixin):
    """save_pretrained and from_pretrained for a network that is built from the fields of GeneratorConfig.

    PyTorchModelHubMixin of huggingface_hub can fall back to pytorch_model.bin, a pickle, and knows one class per
    config. This class reads safetensors only and builds the class that the config names.

    Attributes:
        population: the population prior, or empty (see sampling/population.py).
        metadata: the metadata of the snapshot without `generator`.
        path: the file that the weights were read from, or None.
    """

    population: dict[str, Tensor]
    metadata: dict[str, Any]
    path: Path | None

    def settings(self) -> dict[str, Any]:
        """The fields of GeneratorConfig that this network was built with."""
        raise NotImplementedError

    @classmethod
    def build(cls, **settings: Any) -> Self:
        """The network with these settings and initial weights."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        map_location: str | torch.device = "cpu",
        **model_kwargs: Any,
    ) -> Self:
        """The network of a model folder, or of `user/name` or `hf://user/name` on the hub, in evaluation mode.

        The options are those of ModelHubMixin.from_pretrained. Raises UserError with one line if the model is missing,
        damaged or not accessible, and TypeError for `model_kwargs`: the config in the folder cannot be changed.
        """
        if model_kwargs:
            raise TypeError(f"from_pretrained takes no {', '.join(model_kwargs)}")
        folder = fetch(
            pretrained_model_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        stored = read_folder(folder)
        network: Self = checked_network(cls.build, stored.settings, stored.state, folder / MODEL)
        if not isinstance(network, cls):
            kinds = f"holds a {type(network).__name__}, not a {cls.__name__}"
            raise UserError(f"{folder}: {kinds}; load it with GeneratorNetwork.from_pretrained")
        assert isinstance(network, nn.Module)
        check_population(stored.population, stored.settings["c_dim"], folder / PEOPLE)
        network.population, network.metadata = stored.population, stored.metadata
        network.path = folder / MODEL
        network.to(map_location).eval()
        return network

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write config.json, model.safetensors and people.safetensors into a folder; no model card.

        Raises UserError for `push_to_hub=True` (see push_to_hub), and TypeError for any other option.
        """
        if options.pop("push_to_hub", False):
            self.push_to_hub()
        if options:
            raise TypeError(f"save_pretrained takes no {', '.join(options)}")
        write_folder(self, make_folder(save_directory))

    def push_to_hub(self, *_: Any, **__: Any) -> NoReturn:
        """Raises UserError: a model is published with its model card, which `vultus publish` writes."""
        raise UserError(
            "push_to_hub: publish with `vultus publish SNAPSHOT --repo user/name` or vultus.publish(...), which "
            "write the model card with the licence and the limits of the model"
        )


@dataclass(frozen=True)
class Stored:
    """The content of a model folder: `settings` are the fields of GeneratorConfig; floating tensors are float32."""

    settings: dict[str, Any]
    state: dict[str, Tensor]
    population: dict[str, Tensor]
    metadata: dict[str, Any]


def is_published(folder: Path) -> bool:
    """Whether a folder is a model folder, as save_pretrained and `vultus publish` write it."""
    return (folder / CONFIG).is_file() and (folder / MODEL).is_file()


def read_folder(folder: Path) -> Stored:
    """Read a model folder. Raises UserError that names the file that is missing, damaged or of another program."""
    path = folder / CONFIG
    config = read_json(path)
    about = config.get("vultus") if isinstance(config, dict) else None
    if not isinstance(about, dict) or "format" not in about:
        raise UserError(f"{path}: not the config of a vultus generator")
    config = upgrade("model folder", about["format"], config, path)
    about = config.pop("vultus")
    check_metadata(about, path)
    del about["format"]
    population = read_tensors(folder / PEOPLE) if about.pop("people", False) else {}
    settings = to_dict(from_dict(GeneratorConfig, config, str(path)))
    return Stored(settings, read_tensors(folder / MODEL), population, about)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, floating ones as float32. Raises UserError if it is missing or damaged."""
    try:
        tensors = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; copy or download the whole folder again") from None
    except Exception as error:  # safetensors has no public class for its errors
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: damaged or not a safetensors file ({reason}); copy or download it again") from None
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def write_folder(network: HubMixin, folder: Path, *, dtype: torch.dtype = torch.float32, people: bool = True) -> None:
    """Write config.json, model.safetensors and people.safetensors.

    `dtype` is that of the floating weights in the file. people.safetensors is left out, and removed if it exists, if
    `people` is False or the network has no population prior.
    """
    assert isinstance(network, nn.Module)
    _write_tensors(folder / MODEL, network.state_dict(), dtype)
    people = people and bool(network.population)
    if people:
        _write_tensors(folder / PEOPLE, network.population, torch.float32)
    else:
        (folder / PEOPLE).unlink(missing_ok=True)
    about = {"format": str(VERSIONS["model folder"]), "people": people} | network.metadata
    write_json(folder / CONFIG, network.settings() | {"vultus": about})  # last: then the folder is complete


def _write_tensors(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    stored = {
        key: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for key, value in tensors.items()
    }
    data = safetensors.torch.save(stored, metadata={"format": "pt"})  # the hub expects this entry
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


# --- the hub ----------------------------------------------------------------------------------------------------------


def fetch(name: str | Path, **options: Any) -> Path:
    """The local folder of a model: `name` itself if it is a folder, else `user/name` from the hub or its cache.

    `options` are those of hf_hub_download. Raises UserError if there is no such model, no access or no network.
    """
    text = str(name)
    repo = text.removeprefix(HUB)
    if not text.startswith(HUB) and Path(text).exists():
        return Path(text)
    check_repo(repo, text)
    token, revision = options.get("token"), options.get("revision")
    try:
        try:
            if not options.get("local_files_only"):
                # A single request first: without a network hf_hub_download would retry for minutes.
                HfApi().model_info(repo, revision=revision, timeout=20, token=token)
        except Exception as error:
            if getattr(error, "response", None) is not None:
                raise
            with contextlib.suppress(Exception):  # no network: use the cache, if the model is in it
                return _download(repo, options | {"local_files_only": True})
            raise
        return _download(repo, options)
    except UserError:
        raise
    except Exception as error:  # each layer below has its own exception classes
        raise UserError(f"{text}: {problem(error)}") from None


def _download(repo: str, options: dict[str, Any]) -> Path:
    """The folder of one commit in the cache of the hub, with all files of the model."""
    config = Path(hf_hub_download(repo, CONFIG, **options))
    options = options | {"revision": config.parent.name}  # the same commit for all files
    hf_hub_download(repo, MODEL, **options)
    values = read_json(config)
    about = values.get("vultus") if isinstance(values, dict) else None
    if isinstance(about, dict) and about.get("people"):
        hf_hub_download(repo, PEOPLE, **options)
    return config.parent


def check_repo(repo: str, shown: str) -> None:
    """Raise UserError, which shows `shown`, unless `repo` is a valid name of a model on the hub."""
    if not REPO.fullmatch(repo) or len(repo) > 96 or re.search(r"--|\.\.|[.-]/|[.-]$|\.git$", repo):
        raise UserError(f"{shown}: neither a local folder nor a name on the hub (user/name)")


def problem(error: Exception) -> str:
    """The cause of an error of huggingface_hub and the remedy, in one line."""
    from huggingface_hub import constants, errors

    address = constants.ENDPOINT
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return "access to it is restricted; request access on its page, then `hf auth login`"
    if isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return "not in the cache, and HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, errors.RepositoryNotFoundError) and status != 401:
        return f"no such model on {address}, or a private one; check the name, or `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{address} has no such revision of it"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "not in the cache"
    if isinstance(error, errors.EntryNotFoundError):
        return f"not a vultus model: it lacks {CONFIG} or {MODEL}"
    if status in (401, 403):
        return f"{address} refuses the token ({status}); `hf auth login` with one that may read, or write, this"
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
    if status is not None:
        return f"{address} answers {status} ({reason}); try again later"
    return f"{address} can't be reached ({reason}); check the network, then run the same command again"
