"""timm networks that take pixels in [0, 1], from timm, a folder or the Hub, and back to plain timm.

`pixel_model` makes and loads them, `source` resolves names, `untrusted` rejects dangerous configurations,
`cifar_nets` registers the networks of the CIFAR literature, `export` writes files that timm loads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ham_hf.imports import names_on_demand

if TYPE_CHECKING:
    from ham_hf.models.pixel_model import (
        LoadedModel,
        PixelModel,
        Preprocessing,
        create_backbone,
        input_defaults,
        load_pixel_model,
        new_model,
    )

__all__ = [
    "LoadedModel",
    "PixelModel",
    "Preprocessing",
    "create_backbone",
    "input_defaults",
    "load_pixel_model",
    "new_model",
]

__getattr__ = names_on_demand(__name__, {"ham_hf.models.pixel_model": __all__})
