"""vultus: faces from face embeddings, with a conditional GAN trained from scratch.

Examples:
    >>> import vultus
    >>> generator = vultus.load("default")
    >>> c = generator.sample_identities(4, seed=0)  # or vultus.embed(["me.jpg"])
    >>> faces = generator.sample(c, num=8, seed=0)  # uint8 [4, 8, 3, 128, 128]
    >>> vultus.save_images(faces, "faces/", generator=generator, seed=0)

The names of this module are imported when they are first used, so `import vultus` is fast and loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vultus.audit.probe import probe
    from vultus.data.prepare import prepare
    from vultus.errors import UserError
    from vultus.evaluation.compare import evaluate_snapshots as evaluate
    from vultus.export.onnx_export import export_onnx
    from vultus.export.publish import publish
    from vultus.images.detect import examine as detect
    from vultus.reporting.html import report
    from vultus.sampling.generate import save_images
    from vultus.sampling.generator import Generator, load
    from vultus.sampling.photo_embeddings import embed_photos
    from vultus.sampling.photos import embed
    from vultus.synthesis.synthesize import synthesize
    from vultus.training.launch import train

    __version__: str

__all__ = [
    "Generator",
    "UserError",
    "__version__",
    "detect",
    "embed",
    "embed_photos",
    "evaluate",
    "export_onnx",
    "load",
    "prepare",
    "probe",
    "publish",
    "report",
    "save_images",
    "synthesize",
    "train",
]

_SOURCES = {  # public name: module, name in it
    "Generator": ("vultus.sampling.generator", "Generator"),
    "UserError": ("vultus.errors", "UserError"),
    "detect": ("vultus.images.detect", "examine"),
    "embed": ("vultus.sampling.photos", "embed"),
    "embed_photos": ("vultus.sampling.photo_embeddings", "embed_photos"),
    "evaluate": ("vultus.evaluation.compare", "evaluate_snapshots"),
    "export_onnx": ("vultus.export.onnx_export", "export_onnx"),
    "load": ("vultus.sampling.generator", "load"),
    "prepare": ("vultus.data.prepare", "prepare"),
    "probe": ("vultus.audit.probe", "probe"),
    "publish": ("vultus.export.publish", "publish"),
    "report": ("vultus.reporting.html", "report"),
    "save_images": ("vultus.sampling.generate", "save_images"),
    "synthesize": ("vultus.synthesis.synthesize", "synthesize"),
    "train": ("vultus.training.launch", "train"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("vultus")
    elif name in _SOURCES:
        module, attribute = _SOURCES[name]
        value = getattr(importlib.import_module(module), attribute)
    else:
        raise AttributeError(f"module 'vultus' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
