"""The audit of a snapshot: load, attack, measure, write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vultus._device import resolve_device
from vultus._outputs import check_absent
from vultus._ranges import Count, Limit, Seed, checks_arguments
from vultus.audit.groups import group_rows, read_groups
from vultus.audit.page import FILES, write_page
from vultus.audit.protections import DEFAULT, canonical, load_protection
from vultus.audit.protocol import attack, audit_people, short_name
from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.evaluation.backbones.face_recognition import Judge, load_judge
from vultus.evaluation.matching import check_match
from vultus.evaluation.scores import spread
from vultus.models.encoders import load_condition_encoder
from vultus.models.facenet import load_facenet
from vultus.sampling.conditioning import check_population
from vultus.sampling.generator import load


@checks_arguments
def audit(
    snapshot: str | Path = "default",
    *,
    data: str | Path,
    protections: Sequence[str] | None = None,
    judges: Sequence[str] = ("dlib",),
    groups: str | Path | None = None,
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
        protections: names, see `load_protection`; None takes a selection of all. What is named twice counts once.
        judges: other face encoders that the faces are compared by; what is named twice counts once.
        groups: JSON file of groups of photos or people, for differences between them; see groups.py.
        limit: photos of the test split, evenly spread.
        out: new folder for the page and the result.
        seed: of keys, noise, mapping, faces and resampled people.
        batch: photos at a time.
        device: "auto", "cuda", "mps" or "cpu".

    Raises UserError for a wrong name, an existing result in `out`, a snapshot without a population prior if there is an
    `out`, or parts that do not fit together.
    """
    names = list(dict.fromkeys(canonical(name) for name in protections or DEFAULT))
    loaded = {name: load_protection(name) for name in names}
    labelled = None if groups is None else read_groups(groups)
    if out is not None:
        check_absent(out, FILES)
    device = resolve_device(device)
    test = PreparedDataset(data, "test")
    generator = load(snapshot, device=device)
    if out is not None:
        check_population(generator)  # the page shows random identities
    encoder = load_condition_encoder(generator.metadata, generator.path or "the snapshot", device=device)
    check_match(generator, test, load_facenet(device=device) if "facenet" in test.manifest else encoder)
    others = [load_judge(judge, device=device) for judge in dict.fromkeys(judges)]
    _check_names(short_name(encoder), others)
    if labelled is not None:  # names that fit no photo are found before the attacks are trained
        rows = spread(len(test), limit)
        group_rows(labelled, [test.keys[row] for row in rows], [test.identities[row] for row in rows])
    training = test.with_split("train")
    attacks = {name: attack(name, each, training, seed=seed) for name, each in loaded.items()}
    result = audit_people(
        attacks,
        generator,
        test,
        encoder=encoder,
        judges=others,
        limit=limit,
        seed=seed,
        batch=batch,
        device=device,
        groups=labelled,
    )
    if out is not None:
        write_page(result, attacks, generator, Path(out))
    return result


def _check_names(attacked: str, judges: Sequence[Judge]) -> None:
    """Raise UserError if two encoders have one name in the tables."""
    names = [attacked]
    for judge in judges:
        if judge.short == attacked:
            raise UserError(f"--judge {judge.short}: is the attacked encoder, which is measured anyway; leave it out")
        if judge.short in names:
            raise UserError(f"--judge: two of the encoders have the name {judge.short}; rename the file of one of them")
        names.append(judge.short)
