"""Photo, camera and CAD meshes in; class, box, 6-DoF pose and visibility of every known object out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smope.camera import Camera
    from smope.model import SMOPE
    from smope.objects import ObjectModel
    from smope.poses import Poses

__version__ = "0.1.0"
__all__ = ["SMOPE", "Camera", "ObjectModel", "Poses", "__version__"]

_HOMES = {
    "SMOPE": "smope.model",
    "Camera": "smope.camera",
    "ObjectModel": "smope.objects",
    "Poses": "smope.poses",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `import smope` loads no training code, no GL and no compiler.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'smope' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
