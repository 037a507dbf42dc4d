"""Published figures of template inversion, to read beside those of an audit. None of them was measured here.

The figures are those of the abstracts, or of the authors' own page; "-": not stated there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Published:
    """A published result; the fields are the columns of its table, percentages as published."""

    source: str
    attack: str
    data: str
    encoder: str
    far: str
    type_1: str
    type_2: str


HEADINGS = ("source", "attack", "data", "attacked encoder", "FAR", "type I, %", "type II, %")
PUBLISHED = (
    Published(
        "Mai et al. 2018, arXiv:1703.00832", "NbNet, a deconvolutional network", "LFW", "-", "1e-3", "95.20", "58.05"
    ),
    Published(
        "Dong et al. 2021, BIOSIG, hdl:20.500.12116/37474",
        "regression to the latents of StyleGAN2",
        "-",
        "-",
        '"0.1", without a unit',
        "46.08",
        "18.30",
    ),
    Published(
        "Dong et al. 2022, doi:10.1016/j.cose.2022.103026",
        "genetic algorithm over the latents of a GAN",
        "LFW",
        "-",
        "1e-3",
        "99.33",
        "-",
    ),
    Published(
        "RBH24 2024, github.com/pi-null-mezon/rbh24",
        "adapter to InstantID",
        "1,143 people, own photos; 1,000 people of Glint",
        "InsightFace buffalo_l",
        "1e-6",
        "76.1; 43.3",
        "-",
    ),
)
# Published for protections, in other measures.
REMARKS = (
    "Protections by locality-sensitive hashing, type II: the TAR of faces from the protected templates is 0.3 to 1.4 % "
    "below that of the unprotected system, on data sets such as LFW (Paik et al. 2023, BMVC, paper 535).",
    "Any protection that keeps verification working, attacked through a running system that says only whether it "
    "accepts: faces pass in more than 98 % of cases (arXiv:2601.17620). This attack is not part of the audit.",
)


def cells() -> list[list[str]]:
    """The table of PUBLISHED, its head first."""
    return [list(HEADINGS), *([getattr(each, field.name) for field in fields(each)] for each in PUBLISHED)]
