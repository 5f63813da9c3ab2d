"""Training images from CAD: sample a scene, rasterise it, light it, photograph it."""

from smope.scenes.assets import AssetError, SceneAssets, build_assets, prepare_assets
from smope.scenes.config import SceneConfig
from smope.scenes.preview import preview_sheet
from smope.scenes.rasterise import MissingEGLError
from smope.scenes.stream import SceneStream
from smope.scenes.workers import WorkerError

__all__ = [
    "AssetError",
    "MissingEGLError",
    "SceneAssets",
    "SceneConfig",
    "SceneStream",
    "WorkerError",
    "build_assets",
    "prepare_assets",
    "preview_sheet",
]
