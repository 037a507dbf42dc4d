import json

import pytest

from vultus.config import TrainConfig, differences, from_dict, to_dict
from vultus.errors import UserError
from vultus.presets import PRESETS, fitted, get_preset


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_round_trip(preset: str) -> None:
    config = get_preset(preset)
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config))), "test") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"lrr": 1.0}}, r"file\.yaml: unknown key optim\.lrr; known are .*lr"),
        ({"optim": {"lr": "fast"}}, r"optim\.lr must be of type float"),
        ({"optim": {"batch": 1.5}}, r"optim\.batch must be of type int"),
        ({"optim": 3}, r"optim must be an object"),
        ({"generator": {"kind": "vae"}}, r"generator\.kind must be one of dcgan, conditional-norm"),
        ({"loader": {"mirror": 1}}, r"loader\.mirror must be of type bool"),
    ],
)
def test_strict(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(TrainConfig, values, "file.yaml")


def test_differences_are_dotted_keys() -> None:
    a, b = to_dict(get_preset("reference-mse")), to_dict(get_preset("reference-dcgan"))
    assert "optim.batch" in differences(a, b)
    assert differences(a, a) == []


def test_resolution_follows_the_data() -> None:
    config = fitted(get_preset("tiny"), 64)
    assert (config.generator.resolution, config.discriminator.resolution) == (64, 64)


def test_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(UserError, match="reference-dcgan, reference-mse"):
        get_preset("reference")
