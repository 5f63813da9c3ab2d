"""A checkpoint of the authors' trainer and the meshes it was trained on -> what a `SMOPE` is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from smope.architectures import Tokens, encode
from smope.checkpoints_authors import CheckpointError, order_meshes, read_checkpoint
from smope.config import ModelConfig
from smope.data.labelimg3d import intrinsics
from smope.networks.smope_paper import SmopePaper
from smope.objects import ObjectModel

# Size that their loaders bring every photo to, and the camera that goes with it, the only one ever learned.
_CAMERAS = {
    "KITTI3D": ((1225, 370), intrinsics((1225, 370)).tolist()),
    "Linemod_preprocessed": (
        (640, 480),
        [[572.4114, 0.0, 325.2611], [0.0, 573.57043, 242.04899], [0.0, 0.0, 1.0]],
    ),
}


def read_authors_model(
    path: str | Path,
    device: torch.device | str,
    meshes: Mapping[str, Any] | None,
    units: str | None,
) -> tuple[SmopePaper, ModelConfig, dict[str, ObjectModel], dict[str, Tokens]]:
    """Network, config, objects and their tokens; `meshes` in `units`, one for each that the file names."""
    checkpoint = read_checkpoint(path)
    if not checkpoint.config.poses:
        raise CheckpointError(f"{path}: a detector without poses; it can only start a training (init)")
    if checkpoint.dataset not in _CAMERAS:
        raise CheckpointError(
            f"{path}: trained on {checkpoint.dataset!r}, whose camera is not known; "
            f"{' or '.join(_CAMERAS)} expected"
        )
    if meshes is None or units is None:
        raise CheckpointError(
            f"{path}: a checkpoint holds no meshes; pass meshes={{name: mesh}} and units for "
            f"{', '.join(checkpoint.mesh_names)}"
        )
    sources = order_meshes(checkpoint.mesh_names, meshes)
    objects = {
        name: replace(ObjectModel.from_mesh(name, source, units), trained=True)
        for name, source in sources.items()
    }
    network = checkpoint.network().to(device)
    tokens = {name: encode(network, objects[name], source) for name, source in sources.items()}
    size, K = _CAMERAS[checkpoint.dataset]
    diameters = [model.diameter for model in objects.values()]
    config = ModelConfig(
        architecture="smope-paper",
        network=checkpoint.config,
        objects=tuple(objects),
        image_size=size,
        K=(tuple(K[0]), tuple(K[1]), tuple(K[2])),
        diameters=(min(diameters), max(diameters)),
    )
    return network, config, objects, tokens
