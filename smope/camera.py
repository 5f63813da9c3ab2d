"""A camera: intrinsics, image size and lens; what resize and crop make of them; points to pixels and back.

OpenCV frame (x right, y down, z forward). A pixel with whole coordinates is the centre of that pixel, so an
image of width w spans u = -0.5 .. w - 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

FOCAL_RATIO = (0.5, 2.0)  # fx / fy of a camera that can be meant
FIELD_OF_VIEW = (5.0, 150.0)  # degrees
DISTORTION_SIZES = (4, 5, 8)
_LONGER = (12, 14)  # OpenCV's with thin prisms and a tilted sensor, which it also writes where they are 0


class CameraError(ValueError):
    """A camera that cannot be meant."""


@dataclass(frozen=True, eq=False)
class Camera:
    """Pinhole intrinsics with an optional OpenCV lens.

    The constructor refuses what no real photo has (`CameraError`); what `resize` and `crop` make of a sound
    camera is not judged again, since a crop's principal point may rightly lie outside it.
    """

    K: Tensor  # [3, 3] float32, pixels
    size: tuple[int, int]  # (width, height), pixels
    dist: Tensor | None = None  # [4 | 5 | 8] k1 k2 p1 p2 [k3 [k4 k5 k6]], OpenCV's order

    def __post_init__(self) -> None:
        size = _checked_size(self.size)
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "K", _checked_intrinsics(self.K, size))
        if self.dist is not None:
            object.__setattr__(self, "dist", _checked_distortion(self.dist))
            self._refuse_fold()

    @classmethod
    def from_fov(cls, fov_deg: float, size: tuple[int, int], dist: Any = None) -> Camera:
        """Square pixels, the principal point in the middle, `fov_deg` from left edge to right edge."""
        width, height = _checked_size(size)
        low, high = FIELD_OF_VIEW
        if not low <= fov_deg <= high:
            raise CameraError(
                f"field of view {fov_deg:g} given, {low:g} to {high:g} degrees expected: "
                "pass the horizontal field of view in degrees"
            )
        focal = 0.5 * width / math.tan(math.radians(fov_deg) / 2)
        K = torch.tensor([[focal, 0.0, (width - 1) / 2], [0.0, focal, (height - 1) / 2], [0.0, 0.0, 1.0]])
        return cls(K, (width, height), dist)

    @property
    def fov_deg(self) -> tuple[float, float]:
        """(horizontal, vertical) degrees from edge to edge, of the pinhole without its lens."""
        return _field_of_view(self.K.tolist(), self.size)

    @property
    def pinhole(self) -> Camera:
        """The same camera without its lens: the one that belongs to `undistort_image`'s result."""
        return self._derive(self.K, self.size, None)

    def to(self, device: torch.device | str) -> Camera:
        return self._derive(self.K.to(device), self.size, None if self.dist is None else self.dist.to(device))

    def resize(self, size: tuple[int, int]) -> Camera:
        """The camera of this image resampled to `size` (width, height).

        u' = (u + 0.5) s - 0.5, so edges fall on edges, as in PIL and in torch with align_corners=False.
        """
        width, height = _checked_size(size)
        K = self.K.clone()
        for row, scale in enumerate((width / self.size[0], height / self.size[1])):
            K[row] = self.K[row] * scale
            K[row, 2] += 0.5 * scale - 0.5
        return self._derive(K, (width, height), self.dist)

    def crop(self, x0: int, y0: int, w: int, h: int) -> Camera:
        """The camera of the window whose top left pixel is (x0, y0); it may reach beyond the image."""
        size = _checked_size((w, h))
        K = self.K.clone()
        K[0, 2] -= x0
        K[1, 2] -= y0
        return self._derive(K, size, self.dist)

    def project(self, points_cam: Tensor) -> Tensor:
        """[..., 3] metres in the camera frame -> [..., 2] pixels in the photo, through its lens if any.

        Not finite at z = 0; the caller keeps points behind the camera out.
        """
        normalised = points_cam[..., :2] / points_cam[..., 2:]
        return self._to_pixels(self._through_lens(normalised))

    def backproject(self, uv: Tensor, z: Tensor) -> Tensor:
        """Pixels [..., 2] of the photo and their depths [...] along the optical axis -> [..., 3] metres."""
        normalised = self._without_lens(self._to_normalised(uv))
        return torch.cat([normalised * z[..., None], z[..., None]], dim=-1)

    def distort_points(self, uv: Tensor) -> Tensor:
        """Pixels [..., 2] of the ideal pinhole image -> pixels of the photo that the lens made."""
        return uv if self.dist is None else self._to_pixels(self._through_lens(self._to_normalised(uv)))

    def undistort_points(self, uv: Tensor) -> Tensor:
        """Pixels [..., 2] of the photo -> pixels of the ideal pinhole image with the same K."""
        return uv if self.dist is None else self._to_pixels(self._without_lens(self._to_normalised(uv)))

    def undistort_image(self, image: Tensor) -> Tensor:
        """[3, H, W] photo -> [3, H, W] as `pinhole` would have seen it; black where the photo has nothing."""
        width, height = self.size
        if image.ndim != 3 or tuple(image.shape[1:]) != (height, width):
            raise CameraError(
                f"image of shape {tuple(image.shape)} given to a camera of size {self.size}, "
                f"[C, {height}, {width}] expected"
            )
        if self.dist is None:
            return image
        v, u = torch.meshgrid(
            torch.arange(height, device=image.device, dtype=torch.float32),
            torch.arange(width, device=image.device, dtype=torch.float32),
            indexing="ij",
        )
        source = self.distort_points(torch.stack([u, v], dim=-1))  # [H, W, 2]
        grid = (2 * source + 1) / source.new_tensor(
            [width, height]
        ) - 1  # pixel centres to grid_sample's -1..1
        pixels = image if image.is_floating_point() else image.float()
        sampled = F.grid_sample(pixels[None], grid[None].to(pixels.dtype), align_corners=False)[0]
        return sampled if image.is_floating_point() else sampled.round().to(image.dtype)

    def __repr__(self) -> str:
        fx, fy, cx, cy = (float(self.K[i]) for i in ((0, 0), (1, 1), (0, 2), (1, 2)))
        lens = "" if self.dist is None else f", dist={[round(float(k), 6) for k in self.dist]}"
        return f"Camera(fx={fx:.2f}, fy={fy:.2f}, cx={cx:.2f}, cy={cy:.2f}, size={self.size}{lens})"

    @classmethod
    def _derive(cls, K: Tensor, size: tuple[int, int], dist: Tensor | None) -> Camera:
        camera = object.__new__(cls)
        for name, value in (("K", K), ("size", size), ("dist", dist)):
            object.__setattr__(camera, name, value)
        return camera

    def _refuse_fold(self) -> None:
        """A lens may fold back far outside its photo, but not between the middle and the nearest edges."""
        (fx, _, cx), (_, fy, cy), _ = self.K.tolist()
        width, height = self.size
        x, y = min(cx + 0.5, width - 0.5 - cx) / fx, min(cy + 0.5, height - 0.5 - cy) / fy
        reach = torch.linspace(0, min(x, y), 33, dtype=torch.float64, device="cpu")[:, None]
        directions = reach.new_tensor([[1, 0], [0, 1], [-1, 0], [0, -1]])
        assert self.dist is not None
        jacobian = _distort(reach[:, None] * directions, self.dist)[1]
        a, b, c = jacobian.unbind(-1)
        if not bool(((a * c - b * b > 0) & (a > 0)).all()):
            raise CameraError(
                f"dist {self.dist.tolist()} given, by which a photo folds back into itself before its edge: "
                "k1 k2 p1 p2 [k3 [k4 k5 k6]] in OpenCV's order expected, found with this very K; "
                "a fisheye model has other coefficients"
            )

    def _to_pixels(self, normalised: Tensor) -> Tensor:
        K = self.K.to(normalised)
        return normalised @ K[:2, :2].T + K[:2, 2]

    def _to_normalised(self, uv: Tensor) -> Tensor:
        K = self.K.to(uv)
        y = (uv[..., 1] - K[1, 2]) / K[1, 1]
        x = (uv[..., 0] - K[0, 2] - K[0, 1] * y) / K[0, 0]
        return torch.stack([x, y], dim=-1)

    def _through_lens(self, normalised: Tensor) -> Tensor:
        return normalised if self.dist is None else _distort(normalised, self.dist)[0]

    def _without_lens(self, normalised: Tensor) -> Tensor:
        return normalised if self.dist is None else _undistort(normalised, self.dist)


def _distort(normalised: Tensor, dist: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 2] through OpenCV's rational lens model -> ([..., 2], [..., 3] Jacobian xx, xy, yy).

    With r2 = x^2 + y^2, q = (1 + k1 r2 + k2 r2^2 + k3 r2^3) / (1 + k4 r2 + k5 r2^2 + k6 r2^3):
    x' = x q + 2 p1 x y + p2 (r2 + 2 x^2) and y' = y q + p1 (r2 + 2 y^2) + 2 p2 x y (OpenCV, calib3d).
    The Jacobian is symmetric.
    """
    k1, k2, p1, p2, k3, k4, k5, k6 = F.pad(dist.to(normalised), (0, 8 - len(dist)))
    x, y = normalised.unbind(-1)
    r2 = x * x + y * y
    above = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
    below = 1 + r2 * (k4 + r2 * (k5 + r2 * k6))
    q = above / below
    slope = (k1 + r2 * (2 * k2 + 3 * r2 * k3) - q * (k4 + r2 * (2 * k5 + 3 * r2 * k6))) / below  # dq / d r2
    bent = torch.stack(
        [x * q + 2 * p1 * x * y + p2 * (r2 + 2 * x * x), y * q + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y],
        dim=-1,
    )
    jacobian = torch.stack(
        [
            q + 2 * x * x * slope + 2 * p1 * y + 6 * p2 * x,
            2 * x * y * slope + 2 * p1 * x + 2 * p2 * y,
            q + 2 * y * y * slope + 6 * p1 * y + 2 * p2 * x,
        ],
        dim=-1,
    )
    return bent, jacobian


def _undistort(bent: Tensor, dist: Tensor, steps: int = 20) -> Tensor:
    """The inverse of `_distort` by Newton's method in double precision."""
    target = bent.double()
    point = target.clone()
    for _ in range(steps):
        reached, jacobian = _distort(point, dist)
        a, b, c = jacobian.unbind(-1)
        dx, dy = (target - reached).unbind(-1)
        determinant = a * c - b * b
        point = point + torch.stack([c * dx - b * dy, a * dy - b * dx], dim=-1) / determinant[..., None]
    return point.to(bent.dtype)


def _field_of_view(K: list[list[float]], size: tuple[int, int]) -> tuple[float, float]:
    angles = []
    for axis, length in enumerate(size):
        focal, middle = K[axis][axis], K[axis][2]
        angles.append(
            math.degrees(math.atan((middle + 0.5) / focal) + math.atan((length - 0.5 - middle) / focal))
        )
    return angles[0], angles[1]


def _as_tensor(value: Any, what: str) -> Tensor:
    try:
        if isinstance(value, Tensor):
            return value.detach().to(torch.float32)
        return torch.from_numpy(np.array(value, dtype=np.float32))
    except (TypeError, ValueError, RuntimeError) as error:
        raise CameraError(f"{what}: {type(value).__name__} given, numbers expected ({error})") from error


def _checked_size(size: Sequence[int]) -> tuple[int, int]:
    try:
        width, height = (int(length) for length in size)
    except (TypeError, ValueError) as error:
        raise CameraError(f"size {size!r} given, (width, height) in pixels expected") from error
    if width < 1 or height < 1:
        raise CameraError(f"size {(width, height)} given, (width, height) of at least 1 pixel expected")
    return width, height


def _checked_intrinsics(value: Any, size: tuple[int, int]) -> Tensor:
    K = _as_tensor(value, "K")
    if tuple(K.shape) != (3, 3):
        raise CameraError(
            f"K of shape {tuple(K.shape)} given, [3, 3] expected: [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]"
        )
    rows = K.tolist()  # once: each look at a tensor's number takes microseconds
    if not all(math.isfinite(value) for row in rows for value in row):
        raise CameraError(f"K holds a value that is not finite: {rows}")
    if rows[2] != [0.0, 0.0, 1.0]:
        hint = "; it looks transposed, pass K.T" if [row[2] for row in rows] == [0.0, 0.0, 1.0] else ""
        raise CameraError(f"K's last row is {rows[2]}, [0, 0, 1] expected{hint}")
    if rows[1][0] != 0:
        raise CameraError(f"K[1, 0] is {rows[1][0]:g}, 0 expected: [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]")
    (fx, _, cx), (_, fy, cy), _ = rows
    if fx <= 0 or fy <= 0:
        raise CameraError(f"focal lengths fx = {fx:g}, fy = {fy:g} given, pixels above 0 expected")
    low, high = FOCAL_RATIO
    if not low <= fx / fy <= high:
        raise CameraError(
            f"fx / fy = {fx / fy:.4g} (fx = {fx:g}, fy = {fy:g}) given, {low:g} to {high:g} expected: "
            "both are in pixels of this image"
        )
    width, height = size
    if not (-0.5 <= cx <= width - 0.5 and -0.5 <= cy <= height - 0.5):
        raise CameraError(
            f"the principal point ({cx:g}, {cy:g}) lies outside the image of {width} x {height} pixels: "
            "is this K of another resolution? Camera(K, its size).resize(size) adapts it"
        )
    across, down = _field_of_view(rows, size)
    low, high = FIELD_OF_VIEW
    if max(across, down) < low or max(across, down) > high:
        raise CameraError(
            f"a field of view of {across:.4g} x {down:.4g} degrees follows from fx = {fx:g}, fy = {fy:g} and "
            f"{width} x {height} pixels, {low:g} to {high:g} expected: K is in pixels of this image"
        )
    return K


def _checked_distortion(value: Any) -> Tensor:
    dist = _as_tensor(value, "dist").reshape(-1)
    if len(dist) in _LONGER:
        if dist[8:].any():
            raise CameraError(
                f"dist of {len(dist)} coefficients given, some after k6 not 0: thin prisms and tilted "
                "sensors are not known here; calibrate without them, or undistort the image first"
            )
        dist = dist[:8]
    if len(dist) not in DISTORTION_SIZES:
        raise CameraError(
            f"dist of {len(dist)} coefficients given, 4, 5 or 8 expected: k1 k2 p1 p2 [k3 [k4 k5 k6]] "
            "as in OpenCV"
        )
    if not torch.isfinite(dist).all():
        raise CameraError(f"dist holds a value that is not finite: {dist.tolist()}")
    return dist
