"""The audit of a snapshot: load, attack, measure, write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vultus._device import resolve_device
from vultus._files import make_folder
from vultus._ranges import Count, Limit, Seed, checks_arguments
from vultus.audit.page import FILES, write_page
from vultus.audit.protections import DEFAULT, load_protection
from vultus.audit.protocol import attack, audit_people
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.evaluation.backbones.face_recognition import load_judge
from vultus.evaluation.matching import check_match
from vultus.models.encoders import load_condition_encoder
from vultus.models.facenet import load_facenet
from vultus.sampling.generator import load


@checks_arguments
def audit(
    snapshot: str | Path = "default",
    *,
    data: str | Path,
    protections: Sequence[str] | None = None,
    judges: Sequence[str] = ("dlib",),
    limit: Limit | None = None,
    out: str | Path | None = None,
    seed: Seed = 0,
    batch: Count = 32,
    device: str = "auto",
) -> dict[str, Any]:
    """Measure how often faces from leaked templates are accepted, for each protection; see `audit_people`.

    Args:
        snapshot: the generator that the attacker has.
        data: prepared data set. Mappings are trained on its training split and measured on its test split.
        protections: names, see `load_protection`; None takes a selection of all.
        judges: other face encoders that the faces are compared by.
        limit: photos of the test split, evenly spread.
        out: new folder for the page and the result.
        seed: of keys, noise, mapping, faces and resampled people.
        batch: photos at a time.
        device: "auto", "cuda", "mps" or "cpu".

    Raises UserError for a wrong name, an existing result in `out`, or parts that do not fit together.
    """
    names = list(dict.fromkeys(protections or DEFAULT))
    loaded = {name: load_protection(name) for name in names}
    if out is not None:
        for name in FILES:
            if (make_folder(out) / name).exists():
                raise UserError(f"{Path(out) / name}: exists already; choose another --out")
    device = resolve_device(device)
    test = PreparedDataset(data, "test")
    generator = load(snapshot, device=device)
    encoder = load_condition_encoder(generator.metadata, generator.path or "the snapshot", device=device)
    check_match(generator, test, load_facenet(device=device) if "facenet" in test.manifest else encoder)
    training = test.with_split("train")
    attacks = {name: attack(name, each, training, seed=seed) for name, each in loaded.items()}
    result = audit_people(
        attacks,
        generator,
        test,
        encoder=encoder,
        judges=[load_judge(judge, device=device) for judge in judges],
        limit=limit,
        seed=seed,
        batch=batch,
        device=device,
    )
    if out is not None:
        write_page(result, attacks, generator, Path(out))
    return result
