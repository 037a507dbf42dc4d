"""Whether a snapshot, a prepared data set and an encoder fit together."""

from __future__ import annotations

import json

from vultus.data.dataset import PreparedDataset
from vultus.errors import UserError
from vultus.models.encoders import same_weights
from vultus.models.facenet import Encoder
from vultus.models.snapshot import Snapshot


def trained_on(snapshot: Snapshot, dataset: PreparedDataset) -> bool | None:
    """Whether the snapshot was trained on this data set, by the hash that it records; None if it records none."""
    trained = (snapshot.metadata.get("data") or {}).get("content_sha256")
    earlier = [state["content_sha256"] for state in dataset.manifest.get("earlier", [])]  # before photos were added
    return None if trained is None else trained in (dataset.manifest["content_sha256"], *earlier)


def check_match(snapshot: Snapshot, dataset: PreparedDataset, encoder: Encoder) -> None:
    """Raise UserError that names both sides unless snapshot, data set and encoder fit together."""
    theirs, ours = snapshot.metadata.get("encoder") or {}, dataset.manifest["encoder"]
    measured = dataset.facenet_entry
    model, data = f"{snapshot.path or 'the snapshot'}", f"{dataset.folder}"
    for key, shown in (("id", "encoder"), ("dim", "embedding length"), ("weights_sha256", "encoder weights")):
        if same_weights(theirs.get(key)) != same_weights(ours.get(key)):
            raise UserError(
                f"{model} has {shown} {theirs.get(key)}, {data} has {ours.get(key)}; prepare the data set with the "
                f"encoder that the snapshot was trained with"
            )
    if measured["id"] != encoder.id:
        raise UserError(
            f"{data} holds embeddings of {measured['id']} only, and faces are compared by {encoder.id}; prepare it "
            f"again without --no-facenet"
        )
    if same_weights(measured.get("weights_sha256")) != same_weights(encoder.weights_sha256):
        raise UserError(
            f"{data} was prepared with {measured['id']} ({measured.get('weights_sha256')}), the encoder that was "
            f"loaded is {encoder.id} ({encoder.weights_sha256}); set VULTUS_WEIGHTS to the weights it was prepared with"
        )
    crops = snapshot.metadata.get("crop"), dataset.manifest["crop"]
    if crops[0] != crops[1]:
        raise UserError(
            f"{model} was trained on crop {json.dumps(crops[0])}, {data} has {json.dumps(crops[1])}; prepare the data "
            f"set with the same crop"
        )
    if snapshot.network.resolution != dataset.resolution:
        side, size = dataset.resolution, snapshot.network.resolution
        raise UserError(
            f"{model} generates {size}x{size} images, {data} has {side}x{side}; prepare with --resolution {size}"
        )
