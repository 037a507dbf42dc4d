"""Groups of photos by labels of their people, for differences between groups.

The file of groups is a JSON object {group: [names]}. A name is the key of a photo in the data set, with or without its
suffix, or a person. Groups may overlap. The list `seen`, if there is one, names the photos that were labelled at all;
those of them that are in no group become the group REST. Without `seen`, all photos count as labelled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vultus._files import read_json
from vultus.errors import UserError

SEEN = "seen"
REST = "none of these"

Groups = dict[str, list[str]]


def read_groups(path: str | Path) -> Groups:
    """The content of a file of groups. Raises UserError that names the file unless it is as above."""
    value = read_json(path)
    lists = isinstance(value, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in value.values()
    )
    if not lists or not set(value) - {SEEN}:
        raise UserError(f"{path}: groups must be an object {{group: [names of photos or people]}}, the names in quotes")
    if REST in value:
        raise UserError(f"{path}: {REST!r} is the name of the photos in no group; choose another")
    groups: Groups = value
    return groups


def group_rows(
    groups: Mapping[str, Sequence[str]], keys: Sequence[str], people: Sequence[str]
) -> dict[str, np.ndarray]:
    """{group: rows int64} among photos with these keys and people; a group may have none.

    Raises UserError if no photo is in any group.
    """
    places: dict[str, list[int]] = {}
    for names in (people, [str(Path(key).with_suffix("")) for key in keys], keys):  # the later ones take precedence
        new: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            new.setdefault(name, []).append(row)
        places |= new
    rows = {title: {row for name in names for row in places.get(name, ())} for title, names in groups.items()}
    labelled = rows.pop(SEEN, set(range(len(keys))))
    listed = set().union(*rows.values())
    if not listed:
        raise UserError(
            f"--groups: none of the {len(keys)} photos that are measured is in a group; names must be keys of photos, "
            f"such as {keys[0]}, or people, such as {people[0]}. With --limit few photos are measured"
        )
    rows[REST] = labelled - listed
    return {title: np.array(sorted(found), dtype=np.int64) for title, found in rows.items()}
