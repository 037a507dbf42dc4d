"""The faces of some people, each accepted by a judge, as rows of a shard.

A face is accepted if the judge takes it for the person on the face of the same embedding at noise 0, the average face:
the score of the two is above the threshold. The average face depends on no noise, so a face is not compared with a
mean that it is part of, and whether it is accepted depends on no other face.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vultus.evaluation.backbones.face_recognition import Judge
from vultus.evaluation.verification import row_scores
from vultus.images.io import to_pil, to_x
from vultus.images.watermark import mark_pixels
from vultus.images.xmp import Origin, encode_marked
from vultus.models.snapshot import Snapshot
from vultus.sampling.generate import STEP, model_of, render
from vultus.sampling.latents import Floats, noise
from vultus.synthesis.people import Person

TRIES = 4  # noises of a person, as a multiple of its faces
AT_ONCE = 16 * STEP  # faces in memory that are not encoded


@dataclass(frozen=True)
class Row:
    """An image of the data set.

    Attributes:
        image: PNG with the marks.
        identity: number of the random identity.
        noise: number of the noise: with the identity and the seed, it determines the face.
        score: of the judge; None without one.
        embedding: of the person [c_dim].
    """

    image: bytes
    identity: int
    noise: int
    score: float | None
    embedding: Floats


@dataclass
class Counts:
    """How many people were tried and kept, and how many faces were judged and accepted."""

    tried: int
    people: int = 0
    judged: int = 0
    accepted: int = 0


class Faces:
    """Generates and judges the faces of people.

    Args:
        snapshot: the generator.
        judge: that accepts faces; None: all are.
        threshold: the score above which it accepts a face.
        per_person: faces of each person.
        seed: of the noise.
        noise_strength: factor of the noise.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        judge: Judge | None,
        *,
        threshold: float | None,
        per_person: int,
        seed: int,
        noise_strength: float,
    ) -> None:
        self._snapshot, self._judge, self._threshold = snapshot, judge, threshold
        self._per_person, self._seed, self._strength = per_person, seed, noise_strength
        self._model = model_of(snapshot)

    def __call__(self, people: Sequence[Person]) -> tuple[list[Row], Counts]:
        """The first `per_person` accepted faces of each person, in the order of their noises.

        A person who has fewer among the first TRIES * per_person noises is left out.
        """
        counts = Counts(len(people))
        rows: dict[int, list[Row]] = {person.number: [] for person in people}
        references = self._references(people)
        tried = dict.fromkeys(rows, 0)
        while wanted := self._wanted(people, rows, tried):
            for start in range(0, len(wanted), AT_ONCE):
                self._add(wanted[start : start + AT_ONCE], references, rows, counts)
        kept = [row for each in rows.values() if len(each) == self._per_person for row in each]
        counts.people = len(kept) // self._per_person
        return kept, counts

    def _wanted(
        self, people: Sequence[Person], rows: dict[int, list[Row]], tried: dict[int, int]
    ) -> list[tuple[Person, int]]:
        """The next noises of the people who lack faces: as many as they lack."""
        wanted = []
        for person in people:
            first = tried[person.number]
            count = min(self._per_person - len(rows[person.number]), TRIES * self._per_person - first)
            tried[person.number] += count
            wanted += [(person, first + number) for number in range(count)]
        return wanted

    def _add(
        self,
        wanted: Sequence[tuple[Person, int]],
        references: dict[int, Tensor],
        rows: dict[int, list[Row]],
        counts: Counts,
    ) -> None:
        generator = self._snapshot.network
        z = torch.cat([noise(self._seed, person.number, 1, generator.z_dim, variant=k) for person, k in wanted])
        c = torch.stack([torch.from_numpy(person.c) for person, _ in wanted])
        images = render(generator, z * self._strength, c)
        marked = mark_pixels(images.numpy())
        scores: list[float | None] = [None] * len(wanted)
        if self._judge is not None:
            # The marked face is judged: it is the one that is written.
            found = self._judge.embed(to_x(torch.from_numpy(marked)))
            against = torch.stack([references[person.number] for person, _ in wanted])
            scores = row_scores(found, against, self._judge.similarity).tolist()
        counts.judged += len(wanted)
        for (person, k), image, score in zip(wanted, marked, scores, strict=True):
            if score is not None and self._threshold is not None and score <= self._threshold:
                continue
            counts.accepted += 1
            origin = Origin(self._model, self._seed, f"embedding {person.number}, noise {k}")
            data = encode_marked(to_pil(image), "PNG", origin, watermark=False)
            rows[person.number].append(Row(data, person.number, k, score, person.c))

    def _references(self, people: Sequence[Person]) -> dict[int, Tensor]:
        """The judge's embeddings [dim] of the average faces, by the numbers of the people."""
        if self._judge is None:
            return {}
        c = torch.stack([torch.from_numpy(person.c) for person in people])
        average = render(self._snapshot.network, torch.zeros(len(c), self._snapshot.network.z_dim), c)
        embeddings = self._judge.embed(to_x(average))
        return {person.number: row for person, row in zip(people, embeddings, strict=True)}
