"""Poses drawn over their image: shaded surfaces, boxes, axes, names and scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from smope.camera import Camera
from smope.images import load_image
from smope.software_raster import FloatArray, IntArray, Raster, barycentric, rasterise

if TYPE_CHECKING:
    from smope.objects import ObjectModel
    from smope.poses import Poses

NEAR = 0.01  # metres: nothing nearer is drawn
_LINE_PIECES = 24  # a straight edge in space is drawn in this many pieces, since a lens bends it
_LENS_PIECES = (
    12  # an edge of a face is at most this fraction of the object where there is a lens, for the same reason
)
_OWN_COLOUR = 0.55  # share of the mesh's own colour against the tint
_AXES = ((230, 40, 40), (40, 190, 40), (50, 90, 245))  # x red, y green, z blue
_TINTS = (
    (0, 158, 255), (255, 127, 14), (60, 200, 80), (235, 60, 70), (168, 110, 240), (250, 210, 40),
    (30, 205, 205), (240, 110, 200), (150, 200, 30), (255, 160, 130), (110, 130, 255), (190, 150, 100),
)  # fmt: skip
_BOX_EDGES = ((0, 1), (2, 3), (4, 5), (6, 7), (0, 2), (1, 3), (4, 6), (5, 7), (0, 4), (1, 5), (2, 6), (3, 7))


class DrawError(ValueError):
    """An image that the poses do not belong to, or a way of drawing that there is not."""


@dataclass(frozen=True, eq=False)
class Surface:
    """Triangles in an object's own frame."""

    vertices: FloatArray  # [V, 3] metres
    faces: IntArray  # [F, 3]
    colors: FloatArray | None  # [V, 3] sRGB 0..1


def draw_poses(
    image: Any,
    poses: Poses,
    *,
    surfaces: bool = True,
    boxes: bool = True,
    boxes_3d: bool = False,
    axes: bool = True,
    labels: bool = True,
    opacity: float = 0.6,
) -> Image.Image:
    """Draw over `image` (any form `predict` takes) and return a new RGB picture of the same size.

    An object's registered mesh is drawn, else discs at its surface points; an object that `poses.objects`
    lacks gets its box, axes and name only.
    """
    if not 0 <= opacity <= 1:
        raise DrawError(f"opacity {opacity} given, 0 to 1 expected")
    poses = poses.to("cpu")
    pixels = load_image(image).cpu().permute(1, 2, 0).numpy()  # [H, W, 3] uint8
    size = (pixels.shape[1], pixels.shape[0])
    if size != tuple(poses.camera.size):
        raise DrawError(
            f"image of {size[0]} x {size[1]} pixels given, {poses.camera.size[0]} x {poses.camera.size[1]} "
            "expected: draw on the image that was given to predict"
        )
    if surfaces:
        pixels = _overlay(pixels, poses, opacity)
    picture = Image.fromarray(pixels)
    pen = ImageDraw.Draw(picture)
    line_width = max(1, round(min(size) / 300))
    far_to_near = torch.argsort(poses.T_CO[:, 2, 3], descending=True).tolist()
    for i in far_to_near:
        tint = tint_of(int(poses.labels[i]))
        if boxes:
            pen.rectangle(_rectangle(poses.boxes_xyxy[i], size), outline=tint, width=line_width)
        if boxes_3d and (model := poses.objects.get(poses.names[i])) is not None:
            _draw_box_3d(pen, poses, i, model, tint, line_width)
        if axes:
            _draw_axes(pen, poses, i, 2 * line_width)
    if labels:
        _draw_labels(pen, poses, far_to_near[::-1], size)
    return picture


def tint_of(label: int) -> tuple[int, int, int]:
    """The colour (R, G, B) that stands for a label."""
    return _TINTS[label % len(_TINTS)]


def surface_of(model: ObjectModel) -> Surface:
    """The mesh that the user registered, else discs at the surface points."""
    if model.mesh is None:
        return _discs(model)
    mesh = model.mesh
    visual: Any = mesh.visual
    colors = np.asarray(visual.vertex_colors)[:, :3] / 255.0 if visual.kind == "vertex" else None
    return Surface(
        np.asarray(mesh.vertices, dtype=np.float64), np.asarray(mesh.faces, dtype=np.int64), colors
    )


def render(
    surfaces: list[Surface], T_CO: FloatArray, camera: Camera
) -> tuple[Raster, IntArray, FloatArray, FloatArray]:
    """Surfaces with their poses [N, 4, 4] -> (raster, owner, albedo, light), of one shared z-buffer.

    owner [H, W] is the index of the surface seen, -1 where there is none; albedo [H, W, 3] its own colour,
    white where it has none; light [H, W] its brightness. Both are 0 where there is no surface.
    """
    if camera.dist is not None:
        surfaces = [_with_short_edges(surface) for surface in surfaces]
    points = [s.vertices @ T[:3, :3].T + T[:3, 3] for s, T in zip(surfaces, T_CO, strict=True)]
    vertices = np.concatenate(points)  # [V, 3] camera frame
    starts = np.cumsum([0] + [len(p) for p in points])
    faces = np.concatenate([s.faces + start for s, start in zip(surfaces, starts[:-1], strict=True)])
    owners = np.repeat(np.arange(len(surfaces)), [len(s.faces) for s in surfaces])
    colors = np.concatenate([np.ones_like(s.vertices) if s.colors is None else s.colors for s in surfaces])

    uv = _project(vertices, camera)
    raster = rasterise(uv, vertices[:, 2], faces, camera.size, near=NEAR)
    owner = np.where(raster.mask, owners[raster.face], -1)
    v, u = np.nonzero(raster.mask)
    seen = faces[raster.face[v, u]]  # [P, 3] vertices of the face behind each covered pixel
    corners = vertices[seen]  # [P, 3, 3]
    weights = barycentric(np.stack([u, v], axis=1).astype(np.float64), uv[seen], corners[..., 2])
    albedo, light = np.zeros((*owner.shape, 3)), np.zeros(owner.shape)
    albedo[v, u] = np.einsum("pk,pkc->pc", weights, colors[seen])
    light[v, u] = _headlight(corners)
    return raster, owner, albedo, light


def _overlay(pixels: NDArray[np.uint8], poses: Poses, opacity: float) -> NDArray[np.uint8]:
    drawn = [
        i for i, name in enumerate(poses.names) if name in poses.objects and float(poses.T_CO[i, 2, 3]) > NEAR
    ]
    if not drawn:
        return pixels
    surfaces = {name: surface_of(poses.objects[name]) for name in {poses.names[i] for i in drawn}}
    scaled = poses.T_CO.double().numpy().copy()
    scaled[:, :3, :3] *= poses.scale.double().numpy()[
        :, None, :
    ]  # R diag(s): the mesh is scaled in its own frame
    _, owner, albedo, light = render([surfaces[poses.names[i]] for i in drawn], scaled[drawn], poses.camera)

    tints = np.array([tint_of(int(poses.labels[i])) for i in drawn]) / 255.0
    coloured = np.array([surfaces[poses.names[i]].colors is not None for i in drawn])
    own_share = np.where(coloured, _OWN_COLOUR, 0.0)[owner][..., None]
    painted = light[..., None] * (own_share * albedo + (1 - own_share) * tints[owner])
    outline = _outline(owner)
    alpha = np.where(owner >= 0, opacity, 0.0)[..., None]
    blended = (1 - alpha) * (pixels / 255.0) + alpha * painted
    blended[outline] = tints[owner[outline]]
    return np.rint(255.0 * blended).astype(np.uint8)


def _outline(owner: IntArray) -> NDArray[np.bool_]:
    """Covered pixels beside, above or below one that belongs to another object or to none."""
    padded = np.pad(owner, 1, mode="edge")
    height, width = owner.shape
    edge = np.zeros(owner.shape, dtype=bool)
    for dy, dx in ((0, 1), (2, 1), (1, 0), (1, 2)):
        edge |= padded[dy : dy + height, dx : dx + width] != owner
    return edge & (owner >= 0)


def _headlight(corners: FloatArray) -> FloatArray:
    """Brightness [P] of flat faces with corners [P, 3, 3] in the camera frame, lit from beside the camera."""
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)
    middle = corners.mean(axis=1)
    normals *= np.where((normals * middle).sum(axis=1, keepdims=True) > 0, -1.0, 1.0)  # towards the camera
    light = np.array([-0.35, -0.5, -0.8])  # from above and left, so that faces seen at one angle still differ
    lambert = np.clip(normals @ (light / np.linalg.norm(light)), 0.0, 1.0)
    brightness: FloatArray = 0.4 + 0.6 * lambert
    return brightness


def _discs(model: ObjectModel) -> Surface:
    """A hexagon in the tangent plane of each surface point, so large that neighbours close the surface."""
    points = model.points.double().cpu()
    normals = torch.nn.functional.normalize(model.normals.double().cpu(), dim=1)
    # Points come in farthest-point order, so the first ones stand for all.
    distances = torch.cdist(points[:256], points)
    distances.fill_diagonal_(torch.inf)
    radius = 1.1 * distances.min(dim=1).values.median()

    reference = torch.eye(3, dtype=torch.float64)[
        normals.abs().argmin(dim=1)
    ]  # the axis least along the normal
    across = torch.nn.functional.normalize(torch.linalg.cross(normals, reference), dim=1)
    up = torch.linalg.cross(normals, across)
    angles = torch.arange(6, dtype=torch.float64) * (torch.pi / 3)
    rim = torch.cos(angles)[:, None] * across[:, None] + torch.sin(angles)[:, None] * up[:, None]  # [P, 6, 3]
    vertices = (points[:, None] + radius * rim).reshape(-1, 3)
    fan = torch.tensor([[0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5]])
    faces = (6 * torch.arange(len(points))[:, None, None] + fan).reshape(-1, 3)
    colors = None if model.colors is None else model.colors.double().cpu().repeat_interleave(6, dim=0).numpy()
    return Surface(vertices.numpy(), faces.numpy(), colors)


def _with_short_edges(surface: Surface) -> Surface:
    """Faces halved until no edge is long, so that a lens bends them."""
    longest = float(np.ptp(surface.vertices, axis=0).max()) / _LENS_PIECES
    vertices, faces, colors = surface.vertices, surface.faces, surface.colors
    while True:
        corners = vertices[faces]  # [F, 3, 3]
        lengths = np.linalg.norm(np.roll(corners, -1, axis=1) - corners, axis=2)  # [F, 3] edge k to k + 1
        long = lengths.max(axis=1) > longest
        if not long.any():
            return Surface(vertices, faces, colors)
        # The longest edge (a, b) of each such face gets a middle m: (a, b, c) becomes (a, m, c), (m, b, c).
        turn = (lengths[long].argmax(axis=1)[:, None] + np.arange(3)) % 3
        a, b, c = np.take_along_axis(faces[long], turn, axis=1).T
        m = len(vertices) + np.arange(len(a))
        vertices = np.concatenate([vertices, (vertices[a] + vertices[b]) / 2])
        colors = None if colors is None else np.concatenate([colors, (colors[a] + colors[b]) / 2])
        halves = np.concatenate([np.stack([a, m, c], axis=1), np.stack([m, b, c], axis=1)])
        faces = np.concatenate([faces[~long], halves])


def _project(points: FloatArray, camera: Camera) -> FloatArray:
    """[V, 3] camera frame -> [V, 2] pixels, NaN where a lens cannot see.

    Far outside the image a distortion polynomial folds back into it, so what is half an image out is cut.
    """
    tensor = torch.from_numpy(points)
    uv = camera.project(tensor).numpy()
    if camera.dist is not None:
        extent = np.array(camera.size)
        ideal = camera.pinhole.project(tensor).numpy()
        uv[((ideal < -0.5 * extent) | (ideal > 1.5 * extent)).any(axis=1)] = np.nan
    return uv


def _polyline(start: FloatArray, end: FloatArray, camera: Camera) -> list[tuple[float, float]]:
    """A straight edge in space [3], [3] as seen through the lens; the part behind the camera is left out."""
    along = np.linspace(0.0, 1.0, _LINE_PIECES + 1)[:, None]
    points = (1 - along) * start + along * end
    uv = _project(points[points[:, 2] > NEAR], camera)
    return [(float(u), float(v)) for u, v in uv if np.isfinite(u) and np.isfinite(v)]


def _draw_axes(pen: ImageDraw.ImageDraw, poses: Poses, i: int, width: int) -> None:
    T = poses.T_CO[i].double().numpy()
    length = _axis_length(poses, i)
    columns = sorted(range(3), key=lambda axis: -T[2, axis])  # the axis that points away first
    for axis in columns:
        line = _polyline(T[:3, 3], T[:3, 3] + length * T[:3, axis], poses.camera)
        if len(line) > 1:
            pen.line(line, fill=_AXES[axis], width=width, joint="curve")


def _axis_length(poses: Poses, i: int) -> float:
    """Metres: half the object's diameter, or what half its 2D box measures at its distance."""
    model = poses.objects.get(poses.names[i])
    if model is not None:
        return 0.5 * model.diameter * float(poses.scale[i].mean())
    x0, y0, x1, y1 = poses.boxes_xyxy[i].tolist()
    return 0.5 * max(x1 - x0, y1 - y0) * abs(float(poses.T_CO[i, 2, 3])) / float(poses.camera.K[0, 0])


def _draw_box_3d(
    pen: ImageDraw.ImageDraw, poses: Poses, i: int, model: ObjectModel, tint: tuple[int, int, int], width: int
) -> None:
    signs = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
    corners = model.centre.double().cpu().numpy() + signs * model.extents.double().cpu().numpy()
    T = poses.T_CO[i].double().numpy()
    corners = (corners * poses.scale[i].double().numpy()) @ T[:3, :3].T + T[:3, 3]
    for a, b in _BOX_EDGES:
        line = _polyline(corners[a], corners[b], poses.camera)
        if len(line) > 1:
            pen.line(line, fill=tint, width=width)


def _rectangle(box: torch.Tensor, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box with its sides in order, cut one image beyond the image, where PIL can still count pixels."""
    x0, y0, x1, y1 = box.tolist()
    x0, x1 = (min(max(x, -size[0]), 2.0 * size[0]) for x in (min(x0, x1), max(x0, x1)))
    y0, y1 = (min(max(y, -size[1]), 2.0 * size[1]) for y in (min(y0, y1), max(y0, y1)))
    return x0, y0, x1, y1


def _draw_labels(
    pen: ImageDraw.ImageDraw, poses: Poses, near_to_far: list[int], size: tuple[int, int]
) -> None:
    """Name and score at each box's top left, moved down where another label stands already."""
    font = ImageFont.load_default(size=max(11, round(size[1] / 40)))
    taken: list[tuple[float, float, float, float]] = []
    for i in near_to_far:
        text = f"{poses.names[i]} {float(poses.scores[i]):.2f}"
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        width, height = right - left + 6, bottom - top + 6
        x0, y0, _, _ = _rectangle(poses.boxes_xyxy[i], size)
        x = min(max(x0, 0), max(size[0] - width, 0))
        y = min(max(y0 - height, 0), max(size[1] - height, 0))
        while y + height < size[1] and any(
            x < b[2] and b[0] < x + width and y < b[3] and b[1] < y + height for b in taken
        ):
            y += height / 2
        taken.append((x, y, x + width, y + height))
        tint = tint_of(int(poses.labels[i]))
        dark_text = 0.299 * tint[0] + 0.587 * tint[1] + 0.114 * tint[2] > 140
        pen.rectangle(taken[-1], fill=tint)
        pen.text(
            (x + 3 - left, y + 3 - top), text, font=font, fill=(0, 0, 0) if dark_text else (255, 255, 255)
        )
