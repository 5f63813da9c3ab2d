"""The G-buffer of a scene, its light views and silhouettes, drawn with OpenGL over EGL."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smope.scenes.config import SceneConfig
from smope.scenes.layout import MAPS, Draw, Scene
from smope.scenes.meshes import PreparedMesh

TILE = 64  # side of a silhouette tile, pixels
Floats = NDArray[np.float64]

_VERTEX = """
#version 330
uniform mat4 projection;   // camera point to clip
uniform vec4 draw[8];      // 0-2: model to camera; 3: id / 255, grain amplitude, waves a metre, phase;
                           // 4-6: affine colour map; 7: gamma, strength of marks, their waves a metre
in vec3 position;
in vec3 normal;
in vec3 color;
out vec3 albedo;
out vec3 direction;
out float depth;
float waves_at(float waves, float phase) {
    vec3 wave = sin(position.yzx * waves + phase + 2.0 * sin(position.zxy * waves * 0.37));
    return wave.x + wave.y * wave.z;
}
void main() {
    vec4 p = vec4(position, 1.0);
    vec3 c = vec3(dot(draw[0], p), dot(draw[1], p), dot(draw[2], p));
    direction = vec3(dot(draw[0].xyz, normal), dot(draw[1].xyz, normal), dot(draw[2].xyz, normal));
    vec4 rgb = vec4(color, 1.0);
    vec3 mapped = clamp(vec3(dot(draw[4], rgb), dot(draw[5], rgb), dot(draw[6], rgb)), 0.0, 1.0);
    vec3 plain = pow(mapped, vec3(draw[7].x)) * (1.0 + draw[3].y * waves_at(draw[3].z, draw[3].w));
    float mark = clamp((waves_at(draw[7].z, -draw[3].w) - 0.8) * 3.0, 0.0, 1.0);
    albedo = mix(plain, vec3(draw[7].y < 0.0 ? 1.0 : 0.0), mark * abs(draw[7].y));
    depth = c.z;
    gl_Position = projection * vec4(c, 1.0);
}
"""
_FRAGMENT = """
#version 330
uniform vec4 draw[8];
in vec3 albedo;
in vec3 direction;
in float depth;
layout(location = 0) out vec4 out_albedo;
layout(location = 1) out vec4 out_normal;
layout(location = 2) out float out_depth;
void main() {
    // Single sheets are seen from behind too; the winding decides, so silhouettes keep their smooth normals.
    vec3 n = normalize(direction) * (gl_FrontFacing ? 1.0 : -1.0);
    out_albedo = vec4(clamp(albedo, 0.0, 1.0), draw[3].x);
    out_normal = vec4(n * 0.5 + 0.5, 1.0);
    out_depth = depth;
}
"""
_PLAIN_VERTEX = """
#version 330
uniform mat4 projection;
uniform vec4 draw[3];
in vec3 position;
void main() {
    vec4 p = vec4(position, 1.0);
    gl_Position = projection * vec4(dot(draw[0], p), dot(draw[1], p), dot(draw[2], p), 1.0);
}
"""
_PLAIN_FRAGMENT = """
#version 330
layout(location = 0) out float covered;
void main() { covered = 1.0; }
"""


class MissingEGLError(RuntimeError):
    """No OpenGL context could be had."""


@dataclass(frozen=True, eq=False)
class GBuffer:
    """Arrays that one image is drawn into (a slot of shared memory, say)."""

    albedo: NDArray[np.uint8]  # [H, W, 4] sRGB and the material id, 0 where nothing was drawn
    normal: NDArray[np.uint8]  # [H, W, 4] camera-frame normal * 0.5 + 0.5
    depth: NDArray[np.float32]  # [H, W] metres
    light: NDArray[np.float32]  # [MAPS, S, S] depth 0..1 in the light views, 1 where empty
    tiles: NDArray[np.uint8]  # [N, 64, 64] silhouettes within the boxes, 0 or 255

    @staticmethod
    def shapes(config: SceneConfig) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        image, size = (config.height, config.width), config.shadow_size
        return {
            "albedo": ((*image, 4), np.uint8),
            "normal": ((*image, 4), np.uint8),
            "depth": (image, np.float32),
            "light": ((MAPS, size, size), np.float32),
            "tiles": ((config.max_targets, TILE, TILE), np.uint8),
        }

    @classmethod
    def empty(cls, config: SceneConfig) -> GBuffer:
        return cls(**{name: np.zeros(shape, kind) for name, (shape, kind) in cls.shapes(config).items()})


def create_context(device_index: int | None = None) -> Any:
    """A moderngl context without a window; `device_index` picks among several GPUs where EGL numbers them."""
    try:
        import moderngl
    except ImportError as error:
        raise MissingEGLError(
            'rendering needs moderngl: pip install ".[train]" in a clone of smope'
        ) from error
    create: Any = moderngl.create_standalone_context
    options = [{"device_index": device_index}, {}] if device_index else [{}]
    for option in options:
        try:
            return create(backend="egl", **option)
        except Exception as error:  # glcontext raises bare Exception
            cause = error
    raise MissingEGLError(
        f"no OpenGL context over EGL ({cause}). On Debian or Ubuntu: apt-get install libegl1 libgl1-mesa-dri "
        "(Mesa draws in software where there is no GPU; on an NVIDIA GPU the driver's own EGL is used, in a "
        "container set NVIDIA_DRIVER_CAPABILITIES=all)"
    ) from cause


class Rasteriser:
    """One OpenGL context that holds all meshes and draws scenes. Use it from the thread that made it."""

    def __init__(
        self, meshes: Sequence[PreparedMesh], config: SceneConfig, device_index: int | None = None
    ) -> None:
        os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa in software: workers are the parallelism
        self.config = config
        self.context = context = create_context(device_index)
        context.enable_only(context.DEPTH_TEST)
        # Image rows run down from GL's lowest row, which mirrors the picture and with it the winding.
        context.front_face = "cw"
        self._fine = context.program(vertex_shader=_VERTEX, fragment_shader=_FRAGMENT)
        self._plain = context.program(vertex_shader=_PLAIN_VERTEX, fragment_shader=_PLAIN_FRAGMENT)
        self._upload(meshes)
        size = (config.width, config.height)
        self._image = context.framebuffer(
            [
                context.renderbuffer(size, 4),
                context.renderbuffer(size, 4),
                context.renderbuffer(size, 1, dtype="f4"),
            ],
            context.depth_renderbuffer(size),
        )
        shadow = config.shadow_size
        self._light = context.framebuffer([], context.depth_texture((shadow, shadow * MAPS)))
        self._tiles = context.framebuffer([context.renderbuffer((TILE, TILE * config.max_targets), 1)])

    def release(self) -> None:
        self.context.release()

    def draw(self, scene: Scene, out: GBuffer) -> None:
        """Draw one scene into `out`."""
        uniforms = [_uniform(draw) for draw in scene.draws]
        with self.context:  # another rasteriser of this thread may have made its own context the current one
            self._draw_image(scene, uniforms, out)
            self._draw_light(scene, uniforms, out)
            self._draw_tiles(scene, uniforms, out)

    def _upload(self, meshes: Sequence[PreparedMesh]) -> None:
        """All meshes in two vertex arrays; each is a range of indices."""
        context = self.context
        vertices, indices, self._ranges, base, start = [], [], [], 0, 0
        for mesh in meshes:
            packed = np.zeros(
                len(mesh.vertices), dtype=[("position", "f4", 3), ("normal", "f4", 3), ("color", "u1", 4)]
            )
            packed["position"], packed["normal"] = mesh.vertices, mesh.normals
            packed["color"][:, :3] = mesh.colors
            vertices.append(packed)
            indices.append(mesh.faces.reshape(-1) + base)
            self._ranges.append((start, mesh.faces.size))
            base, start = base + len(mesh.vertices), start + mesh.faces.size
        self._fine_array = context.vertex_array(
            self._fine,
            [(context.buffer(np.concatenate(vertices)), "3f 3f 3f1 1x1", "position", "normal", "color")],
            context.buffer(np.concatenate(indices).astype(np.int32)),
        )
        coarse, indices, self._coarse_ranges, base, start = [], [], [], 0, 0
        for mesh in meshes:
            coarse.append(mesh.coarse_vertices)
            indices.append(mesh.coarse_faces.reshape(-1) + base)
            self._coarse_ranges.append((start, mesh.coarse_faces.size))
            base, start = base + len(mesh.coarse_vertices), start + mesh.coarse_faces.size
        self._coarse_array = context.vertex_array(
            self._plain,
            [(context.buffer(np.concatenate(coarse).astype(np.float32)), "3f", "position")],
            context.buffer(np.concatenate(indices).astype(np.int32)),
        )

    def _draw_image(self, scene: Scene, uniforms: list[NDArray[np.float32]], out: GBuffer) -> None:
        c = self.config
        self._image.use()
        self._image.clear(0.0, 0.0, 0.0, 0.0, depth=1.0)
        window = (-0.5, -0.5, c.width - 0.5, c.height - 0.5)  # pixel centres are whole numbers
        self._fine["projection"].write(_clip_matrix(scene.fields["K"], window, c.near, c.far))
        for draw, uniform in zip(scene.draws, uniforms, strict=True):
            self._fine["draw"].write(uniform)
            first, count = self._ranges[draw.mesh]
            self._fine_array.render(vertices=count, first=first)
        self._image.read_into(out.albedo, components=4, attachment=0)
        self._image.read_into(out.normal, components=4, attachment=1)
        self._image.read_into(out.depth, components=1, attachment=2, dtype="f4")

    def _draw_light(self, scene: Scene, uniforms: list[NDArray[np.float32]], out: GBuffer) -> None:
        size = self.config.shadow_size
        self._light.use()
        self._light.viewport = (0, 0, size, size * MAPS)
        self._light.clear(depth=1.0)
        for k in range(MAPS):
            self._light.viewport = (0, k * size, size, size)
            matrix = np.vstack([scene.fields["light_view"][k], [0, 0, 0, 1]]).astype(np.float32)
            self._plain["projection"].write(np.ascontiguousarray(matrix.T))
            for draw, uniform in zip(scene.draws, uniforms, strict=True):
                self._render_coarse(draw.mesh, uniform)
        whole = (0, 0, size, size * MAPS)
        self._light.read_into(out.light, viewport=whole, components=1, attachment=-1, dtype="f4")

    def _draw_tiles(self, scene: Scene, uniforms: list[NDArray[np.float32]], out: GBuffer) -> None:
        c = self.config
        whole = (0, 0, TILE, TILE * c.max_targets)
        self._tiles.use()
        self._tiles.viewport = whole
        self._tiles.clear()
        for draw, uniform in zip(scene.draws, uniforms, strict=True):
            if draw.material > c.max_targets:
                continue
            slot = draw.material - 1
            self._tiles.viewport = (0, slot * TILE, TILE, TILE)
            box = tuple(float(x) for x in scene.fields["boxes"][slot])
            self._plain["projection"].write(_clip_matrix(scene.fields["K"], box, c.near, c.far))
            self._render_coarse(draw.mesh, uniform)
        self._tiles.read_into(out.tiles, viewport=whole, components=1)

    def _render_coarse(self, mesh: int, uniform: NDArray[np.float32]) -> None:
        self._plain["draw"].write(np.ascontiguousarray(uniform[:3]))
        first, count = self._coarse_ranges[mesh]
        self._coarse_array.render(vertices=count, first=first)


def _uniform(draw: Draw) -> NDArray[np.float32]:
    rows = np.zeros((8, 4), dtype=np.float32)
    rows[:3] = draw.T_CM
    rows[3] = (draw.material / 255.0, *draw.grain)
    rows[4:7] = draw.colour
    rows[7, :3] = (draw.gamma, *draw.marks)
    return rows


def _clip_matrix(K: NDArray[Any], window: tuple[float, ...], near: float, far: float) -> NDArray[np.float32]:
    """OpenCV camera point to clip coordinates, column-major as GL wants it.

    `window` (u0, v0, u1, v1) in pixels is what fills the viewport; v grows with GL's rows, so that reading
    from the lowest row upward gives the picture from its top.
    """
    u0, v0, u1, v1 = window
    width, height = max(u1 - u0, 1e-6), max(v1 - v0, 1e-6)
    matrix = np.zeros((4, 4))
    matrix[0, 0], matrix[0, 1] = 2 * K[0, 0] / width, 2 * K[0, 1] / width
    matrix[0, 2] = 2 * (K[0, 2] - u0) / width - 1
    matrix[1, 1] = 2 * K[1, 1] / height
    matrix[1, 2] = 2 * (K[1, 2] - v0) / height - 1
    matrix[2, 2] = (far + near) / (far - near)
    matrix[2, 3] = -2 * far * near / (far - near)
    matrix[3, 2] = 1
    return np.ascontiguousarray(matrix.T, dtype=np.float32)
