"""A generator as a folder, here or on the Hugging Face hub, by the hub's own mixin. Nothing in it is a pickle.

config.json         the fields of GeneratorConfig, which are the arguments of build_generator; beside them `vultus`:
                    what the snapshot says about itself (encoder, crop, licence, ...), and whether there are people
model.safetensors   the weights under their plain names
people.safetensors  the distribution of the training embeddings, to draw people who do not exist (see people.py)
README.md           the model card
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from huggingface_hub import HfApi, ModelCard, ModelHubMixin, hf_hub_download
from torch import Tensor, nn

from vultus._files import atomic_path, read_json, write_json
from vultus.config import GeneratorConfig, from_dict, to_dict
from vultus.errors import UserError

FORMAT = "1"
CONFIG, MODEL, PEOPLE, CARD = "config.json", "model.safetensors", "people.safetensors", "README.md"
PREFIX = "hf://"
REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class HubMixin(ModelHubMixin):
    """save_pretrained, from_pretrained and push_to_hub for a network that is built from the fields of GeneratorConfig.

    huggingface_hub's own mixin for PyTorch falls back to pytorch_model.bin, a pickle, and knows one class to a config;
    this one reads safetensors only, and gives the class that the config names.

    Attributes:
        people: the distribution of the training embeddings, or empty (see people.py).
        metadata: what the snapshot says about itself, without its `generator`.
    """

    population: dict[str, Tensor]
    metadata: dict[str, Any]

    def settings(self) -> dict[str, Any]:
        """The fields of GeneratorConfig that this network was built with."""
        raise NotImplementedError

    @classmethod
    def build(cls, **settings: Any) -> Self:
        """The network of these settings, with fresh weights."""
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
        """The network in a folder, or of `user/name` (or `hf://user/name`) on the hub, ready to run on map_location.

        The mixin's own would swallow some of the hub's errors and read config.json unchecked. Raises UserError in one
        line, and TypeError for `model_kwargs`: what the config says cannot be changed.
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
        network = cls.build(**stored.settings)
        if not isinstance(network, cls):
            raise UserError(f"{folder}: holds a {type(network).__name__}, not a {cls.__name__}; load it as Generator")
        assert isinstance(network, nn.Module)
        fill(network, stored.state, folder)
        network.population, network.metadata = stored.people, stored.metadata
        network.to(map_location).eval()
        return network

    def _save_pretrained(self, save_directory: Path) -> None:
        write_folder(self, save_directory)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload to `user/name`, with the card that `vultus publish` writes, though without pictures and figures."""
        options["model_card_kwargs"] = {"repo": repo_id} | (options.get("model_card_kwargs") or {})
        return super().push_to_hub(repo_id, **options)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card; keywords are those of card.model_card."""
        from vultus.export.model_card import model_card

        return ModelCard(model_card(self.metadata, self.settings(), population=bool(self.population), **kwargs))


@dataclass(frozen=True)
class Stored:
    """What a folder holds: settings are the fields of GeneratorConfig; all floating numbers are float32."""

    settings: dict[str, Any]
    state: dict[str, Tensor]
    people: dict[str, Tensor]
    metadata: dict[str, Any]


def is_published(folder: Path) -> bool:
    """Whether a folder is one that save_pretrained or `vultus publish` wrote."""
    return (folder / CONFIG).is_file() and (folder / MODEL).is_file()


def read_folder(folder: Path) -> Stored:
    """Raises UserError that names the file which is missing, damaged or of something else."""
    config = read_json(folder / CONFIG)
    about = config.pop("vultus", None) if isinstance(config, dict) else None
    if not isinstance(about, dict) or about.pop("format", None) != FORMAT:
        raise UserError(f"{folder / CONFIG}: not the config of a vultus generator of format {FORMAT}")
    people = read_tensors(folder / PEOPLE) if about.pop("people", False) else {}
    settings = to_dict(from_dict(GeneratorConfig, config, str(folder / CONFIG)))
    return Stored(settings, read_tensors(folder / MODEL), people, about)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file, floating numbers as float32."""
    try:
        tensors = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; copy or download the whole folder again") from None
    except Exception as error:  # the library has an exception of its own
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: damaged or not a safetensors file ({reason}); copy or download it again") from None
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def write_folder(network: HubMixin, folder: Path, *, dtype: torch.dtype = torch.float32, people: bool = True) -> None:
    """Write config.json, model.safetensors and, unless `people` is False or there are none, people.safetensors."""
    assert isinstance(network, nn.Module)
    _write_tensors(folder / MODEL, network.state_dict(), dtype)
    people = people and bool(network.population)
    if people:
        _write_tensors(folder / PEOPLE, network.population, torch.float32)
    else:
        (folder / PEOPLE).unlink(missing_ok=True)  # of an earlier call
    about = {"format": FORMAT, "people": people} | network.metadata
    write_json(folder / CONFIG, network.settings() | {"vultus": about})  # last: it says that the folder is whole


def _write_tensors(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    stored = {
        key: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for key, value in tensors.items()
    }
    data = safetensors.torch.save(stored, metadata={"format": "pt"})  # the hub's pages ask for this word
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def fill(network: nn.Module, state: dict[str, Tensor], where: str | Path) -> None:
    """Load all weights, float32. Raises UserError if they are not exactly those of the network."""
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(f"{where}: its weights do not fit its config ({' '.join(str(error).split())[:120]})") from None


# --- the hub ----------------------------------------------------------------------------------------------------------


def fetch(name: str | Path, **options: Any) -> Path:
    """The local folder of a name: a folder as it is, `user/name` from the hub's cache or the hub itself.

    `options` are those of hf_hub_download. Raises UserError in one line: nothing of that name, no access, no network.
    """
    text = str(name)
    repo = text.removeprefix(PREFIX)
    if not text.startswith(PREFIX) and Path(text).exists():
        return Path(text)
    check_repo(repo, text)
    token, revision = options.get("token"), options.get("revision")
    try:
        try:
            if not options.get("local_files_only"):
                # One plain request first, for hf_hub_download retries for minutes where there is no network.
                HfApi().model_info(repo, revision=revision, timeout=20, token=token)
        except Exception as error:
            if getattr(error, "response", None) is not None:
                raise
            with contextlib.suppress(Exception):  # no network: what an earlier call left in the cache will do
                return _download(repo, options | {"local_files_only": True})
            raise
        return _download(repo, options)
    except UserError:
        raise
    except Exception as error:  # no network, offline, private, not there: each layer has classes of its own
        raise UserError(f"{text}: {problem(error)}") from None


def _download(repo: str, options: dict[str, Any]) -> Path:
    """The folder of one commit in the hub's cache."""
    config = Path(hf_hub_download(repo, CONFIG, **options))
    options = options | {"revision": config.parent.name}  # of one commit, even if a new one comes meanwhile
    hf_hub_download(repo, MODEL, **options)
    values = read_json(config)
    about = values.get("vultus") if isinstance(values, dict) else None
    if isinstance(about, dict) and about.get("people"):
        hf_hub_download(repo, PEOPLE, **options)
    return config.parent


def check_repo(repo: str, shown: str) -> None:
    """Raise UserError unless `repo` can be the name of a model on the hub."""
    if not REPO.fullmatch(repo) or len(repo) > 96 or re.search(r"--|\.\.|[.-]/|[.-]$|\.git$", repo):
        raise UserError(f"{shown}: neither a folder here nor a name on the hub, which is like user/name")


def problem(error: Exception) -> str:
    """What went wrong with the hub, and the remedy, in one line."""
    from huggingface_hub import constants, errors

    address = constants.ENDPOINT
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return "access to it is restricted; ask for it on its page, then `hf auth login`"
    if isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return "not in the cache, and HF_HUB_OFFLINE forbids the network; unset it"
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
