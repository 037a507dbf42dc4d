"""The methods by name. A new one is a subclass of Method here and a config class in vultus.config.CONFIGS."""

from __future__ import annotations

from typing import Any

from vultus.training.cvae_gan import CVAEGAN
from vultus.training.gan import GAN
from vultus.training.step import Method

METHODS: dict[str, type[Method[Any, Any]]] = {"gan": GAN, "cvae-gan": CVAEGAN}
