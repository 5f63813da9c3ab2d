"""G-buffers, light views and silhouettes of whole batches, drawn by a CUDA kernel.

It draws what `rasterise.Rasteriser` draws with OpenGL, up to rounding: but a GPU gives OpenGL and CUDA turns
of time, so that scenes and training hold each other up, and OpenGL's pictures leave the GPU and come back.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from math import prod

import numpy as np
import torch
from torch import Tensor

from smope.ops.build import SOURCES, Advice, KernelUnavailable, architecture_flags, compiled_library
from smope.scenes.config import SceneConfig
from smope.scenes.layout import MAPS, scene_fields, scene_size
from smope.scenes.meshes import PreparedMesh
from smope.scenes.raster_table import table_shape
from smope.scenes.rasterise import TILE

log = logging.getLogger(__name__)
_QUEUE_ROOM = 1 << 20  # pieces of large triangles that wait for a warp; more are drawn at once, more slowly
_MOST_FACES, _MOST_DRAWS = 1 << 24, 1 << 8  # what 32 bits can name in an image
_ADVICE = Advice(
    effect="Training scenes are drawn with OpenGL, which takes turns with the training and slows it.",
    again="Delete that folder to try again.",
    hide="Set rasteriser='opengl' to hide this note.",
)
_told = False


class _Batch(ctypes.Structure):
    """`Batch` of smope/_ext/raster.h, word for word."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("fine_position", "fine_face", "fine_range")),
        *((name, ctypes.c_void_p) for name in ("coarse_position", "coarse_face", "coarse_range")),
        *((name, ctypes.c_void_p) for name in ("fine_normal", "fine_colour", "draws", "rows", "nearest")),
        *((name, ctypes.c_void_p) for name in ("light", "tiles", "albedo", "normal", "depth")),
        *((name, ctypes.c_void_p) for name in ("queue", "queued")),
        ("queue_room", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("images", "draws_an_image", "row_words")),
        *((name, ctypes.c_int32) for name in ("row_K", "row_boxes", "row_light")),
        *((name, ctypes.c_int32) for name in ("width", "height", "shadow", "targets")),
        ("near", ctypes.c_float),
        ("far", ctypes.c_float),
    )


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled kernel; raises KernelUnavailable where it cannot be had."""
    sources = [SOURCES / "raster.cu", SOURCES / "raster.h"]
    library = ctypes.CDLL(
        str(compiled_library("raster", sources, ["-O3", *architecture_flags()], advice=_ADVICE))
    )
    return declare(library)


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the types of the library's functions."""
    library.smope_raster.restype = ctypes.c_int
    library.smope_raster.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p]
    library.smope_raster_error.restype = ctypes.c_char_p
    library.smope_raster_error.argtypes = [ctypes.c_int]
    return library


def kernel_or_none() -> ctypes.CDLL | None:
    """The compiled kernel, or None, and then the reason is logged once."""
    global _told
    try:
        return load_library()
    except KernelUnavailable as error:
        if not _told:
            _told = True
            log.warning("%s", error)
        return None


class CudaRasteriser:
    """All meshes on the device, and the kernel; no call changes them, so any thread and stream may draw."""

    def __init__(
        self,
        meshes: Sequence[PreparedMesh],
        config: SceneConfig,
        device: torch.device,
        library: ctypes.CDLL | None = None,
        queue_room: int = _QUEUE_ROOM,
    ) -> None:
        if library is None and device.type != "cuda":
            raise ValueError(f"device = {device}: the CUDA rasteriser needs a CUDA device")
        self.config, self.device = config, device
        self._library = library or load_library()
        self._queue_room = queue_room
        if len(meshes) == 0 or max(len(mesh.faces) for mesh in meshes) >= _MOST_FACES:
            raise ValueError(f"meshes: at least one, each of fewer than {_MOST_FACES} faces, expected")
        if table_shape(config)[0] > _MOST_DRAWS:
            raise ValueError(f"SceneConfig.materials = {config.materials}: {_MOST_DRAWS} at most")
        fine = _joined([(mesh.vertices, mesh.faces) for mesh in meshes])
        coarse = _joined([(mesh.coarse_vertices, mesh.coarse_faces) for mesh in meshes])
        colours = np.zeros((len(fine[0]), 4), dtype=np.uint8)
        colours[:, :3] = np.concatenate([mesh.colors for mesh in meshes])
        normals = np.concatenate([mesh.normals for mesh in meshes]).astype(np.float32)
        names = [f"{kind}_{part}" for kind in ("fine", "coarse") for part in ("position", "face", "range")]
        arrays = dict(zip(names, [*fine, *coarse], strict=True))
        arrays |= {"fine_normal": normals, "fine_colour": colours}
        self._meshes = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        self._offsets, start = {}, 0
        for name, shape in scene_fields(config).items():
            self._offsets[name], start = start, start + prod(shape)
        if device.type == "cuda":  # other streams read them without asking
            torch.cuda.current_stream(device).synchronize()

    def draw(self, draws: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """The arrays that `SceneStream.finish` takes, queued on the current stream.

        draws [B, D, DRAW_WORDS] from `pack_draws` and rows [B, scene_size], float32, on the device.
        """
        c, device = self.config, self.device
        count = len(rows)
        expected = {"draws": (count, *table_shape(c)), "rows": (count, scene_size(c))}
        for name, tensor in (("draws", draws), ("rows", rows)):
            fits = tuple(tensor.shape) == expected[name] and tensor.dtype == torch.float32
            if not fits or tensor.device != device or not tensor.is_contiguous():
                raise ValueError(
                    f"{name}: contiguous float32 {expected[name]} on {device} expected, got {tensor.dtype} "
                    f"{tuple(tensor.shape)} on {tensor.device}"
                )
        image = (count, c.height, c.width)

        def empty(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=kind, device=device)

        drawn = {
            "albedo": empty((*image, 4), torch.uint8),
            "normal": empty((*image, 4), torch.uint8),
            "depth": empty(image, torch.float32),
            "light": torch.ones((count, MAPS, c.shadow_size, c.shadow_size), device=device),
            "tiles": torch.zeros((count, c.max_targets, TILE, TILE), dtype=torch.uint8, device=device),
        }
        scratch = {
            "nearest": empty(image, torch.int64),
            "queue": empty((max(self._queue_room, 1), 4), torch.int32),
            "queued": empty((1,), torch.int64),
        }
        tensors = {**self._meshes, **drawn, **scratch, "draws": draws, "rows": rows}
        batch = _Batch(
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
            queue_room=self._queue_room, images=count, draws_an_image=draws.shape[1], row_words=rows.shape[1],
            row_K=self._offsets["K"], row_boxes=self._offsets["boxes"], row_light=self._offsets["light_view"],
            width=c.width, height=c.height, shadow=c.shadow_size, targets=c.max_targets,
            near=c.near, far=c.far,
        )  # fmt: skip
        stream, index = None, -1
        if device.type == "cuda":
            stream, index = torch.cuda.current_stream(device).cuda_stream, device.index
        with torch.cuda.device(index) if device.type == "cuda" else nullcontext():
            error = self._library.smope_raster(ctypes.byref(batch), ctypes.sizeof(batch), index, stream)
        if error != 0:
            message = self._library.smope_raster_error(error).decode()
            raise RuntimeError(f"the CUDA rasteriser could not be launched: {message}")
        return {**drawn, "rows": rows}


def _joined(meshes: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Positions [V, 3], faces [F, 3] with indices into them, and each mesh's first face and count [M, 2]."""
    vertices = np.array([len(positions) for positions, _ in meshes])
    faces = np.array([len(triangles) for _, triangles in meshes])
    base, first = np.cumsum(vertices) - vertices, np.cumsum(faces) - faces
    return [
        np.concatenate([positions for positions, _ in meshes]).astype(np.float32),
        np.concatenate(
            [triangles + start for (_, triangles), start in zip(meshes, base, strict=True)]
        ).astype(np.int32),
        np.stack([first, faces], axis=1).astype(np.int32),
    ]
