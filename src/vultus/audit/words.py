"""The text of the page of an audit, for readers who are no experts; both forms of the page have it."""

from __future__ import annotations

INTRODUCTION = (
    "A face recognition system stores a list of numbers for each person, the template. If templates leak, an attacker "
    "can turn them into faces and show these to a recognition system. This page says how often such a face is accepted "
    "as the person, and what a protection of the templates changes."
)
TERMS = {
    "Protection": "what the system stores instead of the plain template. Each is attacked by a mapping that was "
    "trained on it, with people other than those who are measured.",
    "FAR": "the false accept rate: how often the system accepts two different people. 0.001 is one pair in a thousand. "
    "The lower it is set, the stricter the system.",
    "Type I": "the attack succeeds against the photo that the template came from.",
    "Type II": "the attack succeeds against another photo of that person. This is the harder test, and the one that "
    "counts for a person who is photographed anew.",
    "TAR": "the true accept rate: how often two protected templates of one person are accepted at a FAR of 0.001. It "
    "is what the protection leaves for the honest use.",
    "Real photos": "the first row of the table has them in place of the faces, so it is what type II could reach.",
    "Range": "two numbers beside a value are its 95 % interval: how far it would vary with other people of that kind.",
}
IN_LOSS = (
    "An encoder is marked (in the loss) if the training of the generator contained it. Faces are made to please it, so "
    "its figures are too high to stand for systems in general; those of the other encoders are the fair ones."
)
PLOT = (
    "Each point is a protection, its bars are the 95 % intervals over people. A good protection is at the top left: "
    "templates still verify, and the attack fails. The dashed line is what real photos of the people reach in place of "
    "the generated faces. Where points coincide, the last one is on top."
)
KEYS = (
    "Protections with a secret key for each person verify two things at once, key and face. If everybody has a key of "
    "their own, the key alone tells people apart. If impostors use the stolen key of the person whom they claim to be, "
    "only the face is left. Where the attacker has the keys, the second figure is the one to set beside the attack."
)
GROUPS = (
    "FAR 0.001, with the same thresholds for all groups, as in a system that has one threshold. Intervals that overlap "
    "widely show no difference. Those of few people are too short, most of all at 0 and 100, and a group of one person "
    "has no value."
)
NO_GROUPS = "No labels of groups were given (--groups), so differences between groups of people have not been measured."
FACES = (
    "Random identities: these people do not exist. The first row is generated from their embeddings, each other row "
    "from their protected templates after the attack."
)
PUBLISHED = (
    "As published, on other data, with other encoders and generators; not measured here, and not to be compared digit "
    'by digit. "-": the abstract does not state it.'
)
LIMITS = (
    "The figures hold for this data set, this encoder, this generator and this attack of a fixed budget. A stronger "
    "attack may succeed more often: a low success is no proof of security.",
    "rotation and biohash-unknown assume that the attacker has neither the key nor templates of known photos under it. "
    "rotation-pairs and biohash-known show what is left when that is not so.",
    "The attacker has the templates and, where it is said, keys or known photos; nobody queries a running system.",
    "Noise is drawn anew for every template, and both templates of a pair have it.",
    "Intervals cover the choice of people only, not the thresholds, the keys, the noise or the training of the attack.",
    "Whether a face is accepted by a machine is measured, not whether a human being would recognise the person.",
)
