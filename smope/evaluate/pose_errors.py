"""Errors between an estimated and a true pose, as the BOP benchmark and its forerunners define them.

Poses are model-to-camera [N, 4, 4] (or one [4, 4]); lengths are in any one unit, in which the result comes
out; pixels for projections; float64. Symmetries are [S, 4, 4] with the identity first: a point p of the
object may as well lie at S p. References: Hodan et al., "BOP Challenge 2020 on 6D Object Localization"
(MSSD, MSPD, VSD); Hinterstoisser et al., ACCV 2012 (ADD, ADI); Brachmann et al., CVPR 2016 (projection
error); Shotton et al., CVPR 2013 (5 cm, 5 degrees).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

_IDENTITY = np.eye(4)[None]
_ELEMENTS = 20_000_000  # floats held at once; symmetries are taken in parts beyond that


def symmetry_transforms(info: Mapping[str, Any], max_step: float = 0.01, unit: float = 1.0) -> FloatArray:
    """[S, 4, 4] all symmetry transformations of an entry of models_info.json, identity first.

    A continuous symmetry becomes ceil(pi / max_step) turns, so that no vertex lies further than `max_step`
    diameters from a discretised one (BOP 2020, section 2.2). `unit` multiplies translations (0.001: mm to m).
    """
    discrete = [np.eye(4)]
    for flat in info.get("symmetries_discrete", []):
        discrete.append(np.asarray(flat, np.float64).reshape(4, 4))

    turns: list[FloatArray] = []
    for entry in info.get("symmetries_continuous", []):
        count = int(np.ceil(np.pi / max_step))
        offset = np.asarray(entry["offset"], np.float64)
        for step in range(count):
            turn = np.eye(4)
            turn[:3, :3] = axis_rotation(np.asarray(entry["axis"], np.float64), 2 * np.pi * step / count)
            turn[:3, 3] = offset - turn[:3, :3] @ offset
            turns.append(turn)

    out = np.stack([turn @ flip for flip in discrete for turn in (turns or [np.eye(4)])])
    out[:, :3, 3] *= unit
    return out


def axis_rotation(axis: FloatArray, angle: float) -> FloatArray:
    """[3, 3] rotation about `axis` by `angle` in radians (Rodrigues)."""
    x, y, z = axis / np.linalg.norm(axis)
    skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * skew + (1 - np.cos(angle)) * (skew @ skew)


def mssd(
    T_est: ArrayLike, T_gt: ArrayLike, points: FloatArray, symmetries: FloatArray = _IDENTITY
) -> FloatArray:
    """[N] maximum symmetry-aware surface distance: min over S of max over p of |T_est p - T_gt S p|."""
    homogeneous = _homogeneous(points)  # [4, V]

    def one(est: FloatArray, gt: FloatArray) -> float:
        worst = [
            np.linalg.norm((est - gt @ part)[:, :3] @ homogeneous, axis=1).max(axis=1)
            for part in _parts(symmetries, len(points))
        ]
        return float(np.concatenate(worst).min())

    return _each(one, T_est, T_gt)


def mspd(
    T_est: ArrayLike, T_gt: ArrayLike, K: FloatArray, points: FloatArray, symmetries: FloatArray = _IDENTITY
) -> FloatArray:
    """[N] maximum symmetry-aware projection distance in pixels."""

    def one(est: FloatArray, gt: FloatArray) -> float:
        return float(_projection_distances(est, gt, K, points, symmetries, np.max).min())

    return _each(one, T_est, T_gt)


def projection_error(
    T_est: ArrayLike, T_gt: ArrayLike, K: FloatArray, points: FloatArray, symmetries: FloatArray = _IDENTITY
) -> FloatArray:
    """[N] mean distance of projected points in pixels, the smallest over the symmetries."""

    def one(est: FloatArray, gt: FloatArray) -> float:
        return float(_projection_distances(est, gt, K, points, symmetries, np.mean).min())

    return _each(one, T_est, T_gt)


def add(T_est: ArrayLike, T_gt: ArrayLike, points: FloatArray) -> FloatArray:
    """[N] mean distance of corresponding points."""
    homogeneous = _homogeneous(points)
    return _each(lambda e, g: float(np.linalg.norm((e - g)[:3] @ homogeneous, axis=0).mean()), T_est, T_gt)


def adi(T_est: ArrayLike, T_gt: ArrayLike, points: FloatArray) -> FloatArray:
    """[N] mean distance from each true point to the nearest estimated one."""
    try:
        from scipy.spatial import KDTree
    except ImportError as error:
        raise ImportError(
            'ADI needs scipy for its nearest points: pip install ".[train]" in a clone of smope'
        ) from error

    def one(est: FloatArray, gt: FloatArray) -> float:
        distances, _ = KDTree(transform(est, points)).query(transform(gt, points))
        return float(distances.mean())

    return _each(one, T_est, T_gt)


def add_s(T_est: ArrayLike, T_gt: ArrayLike, points: FloatArray, symmetric: bool) -> FloatArray:
    """[N] ADD(-S): ADI for an object with symmetries, ADD for one without."""
    return adi(T_est, T_gt, points) if symmetric else add(T_est, T_gt, points)


def rotation_error(T_est: ArrayLike, T_gt: ArrayLike, symmetries: FloatArray = _IDENTITY) -> FloatArray:
    """[N] angle between the rotations in degrees, the smallest over the symmetries."""
    return _nearest_turn(T_est, T_gt, symmetries)[0]


def translation_error(T_est: ArrayLike, T_gt: ArrayLike, symmetries: FloatArray = _IDENTITY) -> FloatArray:
    """[N] distance of the origins, at that symmetry whose rotation is nearest."""
    return _nearest_turn(T_est, T_gt, symmetries)[1]


def within_5cm_5deg(
    T_est: ArrayLike, T_gt: ArrayLike, symmetries: FloatArray = _IDENTITY, unit: float = 1.0
) -> NDArray[np.bool_]:
    """[N] whether both errors are below 5 cm and 5 degrees; `unit` is one metre in the poses' unit."""
    angle, distance = _nearest_turn(T_est, T_gt, symmetries)
    return (angle < 5) & (distance < 0.05 * unit)


def vsd(
    depth_est: ArrayLike,
    depth_gt: ArrayLike,
    depth_test: ArrayLike,
    K: FloatArray,
    delta: float,
    taus: ArrayLike,
    diameter: float,
) -> FloatArray:
    """[taus] visible surface discrepancy from three depth images [H, W], 0 = nothing there.

    `depth_est` and `depth_gt` are renderings of the object, `depth_test` is the scene's. `delta` is the
    occlusion tolerance in the images' unit, `taus` are shares of `diameter`. Step cost; where the sensor has
    no reading a rendered surface counts as visible (BOP 2019 and later).
    """
    distance_est, distance_gt, distance_test = (_ray_lengths(d, K) for d in (depth_est, depth_gt, depth_test))
    visible_gt = _visible(distance_gt, distance_test, delta)
    # What is visible of the truth is so of the estimate too: an estimate just behind it is not "occluded".
    visible_est = _visible(distance_est, distance_test, delta) | (visible_gt & (distance_est > 0))
    both, either = visible_gt & visible_est, visible_gt | visible_est
    if not either.any():
        return np.ones(np.size(taus))
    apart = np.abs(distance_gt[both] - distance_est[both]) / diameter
    wrong = (apart[None, :] >= np.asarray(taus)[:, None]).sum(axis=1)  # [taus]
    return (wrong + either.sum() - both.sum()) / either.sum()


def transform(T: FloatArray, points: FloatArray) -> FloatArray:
    """[V, 3] points moved by one pose."""
    return points @ T[:3, :3].T + T[:3, 3]


def project(K: FloatArray, points: FloatArray) -> FloatArray:
    """[..., 2] pixels of camera points [..., 3]; a point in the camera's plane goes to infinity."""
    pixels = points @ K.T
    with np.errstate(divide="ignore", invalid="ignore"):
        flat = pixels[..., :2] / pixels[..., 2:]
    return np.nan_to_num(flat, nan=np.inf, posinf=np.inf, neginf=-np.inf)


def _each(one: Any, T_est: ArrayLike, T_gt: ArrayLike) -> FloatArray:
    """`one(est, gt)` over the broadcast pairs of poses; one pair gives an array without dimensions."""
    est, gt = np.broadcast_arrays(np.asarray(T_est, np.float64), np.asarray(T_gt, np.float64))
    if est.shape[-2:] != (4, 4):
        raise ValueError(f"poses [N, 4, 4] expected, shape {est.shape} given")
    flat = zip(est.reshape(-1, 4, 4), gt.reshape(-1, 4, 4), strict=True)
    return np.array([one(e, g) for e, g in flat], np.float64).reshape(est.shape[:-2])


def _homogeneous(points: FloatArray) -> FloatArray:
    return np.concatenate([points.T, np.ones((1, len(points)))])  # [4, V]


def _parts(symmetries: FloatArray, n_points: int) -> list[FloatArray]:
    step = max(1, _ELEMENTS // (3 * n_points))
    return [symmetries[i : i + step] for i in range(0, len(symmetries), step)]


def _projection_distances(
    est: FloatArray,
    gt: FloatArray,
    K: FloatArray,
    points: FloatArray,
    symmetries: FloatArray,
    over_points: Any,
) -> FloatArray:
    """[S] maximum or mean over the points of their distances in the image."""
    at = project(K, transform(est, points))  # [V, 2]
    homogeneous = _homogeneous(points)
    found = []
    for part in _parts(symmetries, len(points)):
        true = project(K, np.swapaxes((gt @ part)[:, :3] @ homogeneous, 1, 2))  # [S, V, 2]
        with np.errstate(invalid="ignore"):
            apart = np.linalg.norm(true - at, axis=2)
        found.append(over_points(np.nan_to_num(apart, nan=np.inf, posinf=np.inf), axis=1))
    return np.concatenate(found)


def _nearest_turn(T_est: ArrayLike, T_gt: ArrayLike, symmetries: FloatArray) -> tuple[FloatArray, FloatArray]:
    """[N] degrees and [N] lengths at the symmetry of the smallest angle."""
    est, gt = np.broadcast_arrays(np.asarray(T_est, np.float64), np.asarray(T_gt, np.float64))
    turned = gt[..., None, :, :] @ symmetries  # [..., S, 4, 4]
    angles = rotation_angle(est[..., None, :3, :3], turned[..., :3, :3])
    distances = np.linalg.norm(est[..., None, :3, 3] - turned[..., :3, 3], axis=-1)
    nearest = angles.argmin(axis=-1)[..., None]
    return (
        np.take_along_axis(angles, nearest, -1)[..., 0],
        np.take_along_axis(distances, nearest, -1)[..., 0],
    )


def rotation_angle(R_a: FloatArray, R_b: FloatArray) -> FloatArray:
    """[...] angle between rotations [..., 3, 3] in degrees, as exact near 0 as near 180."""
    turn = R_a @ np.swapaxes(R_b, -1, -2)
    skew = turn - np.swapaxes(turn, -1, -2)
    sine = np.linalg.norm(np.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], -1), axis=-1) / 2
    cosine = (np.trace(turn, axis1=-2, axis2=-1) - 1) / 2
    return np.degrees(np.arctan2(sine, cosine))


def _ray_lengths(depth_image: ArrayLike, K: FloatArray) -> FloatArray:
    """[H, W] distance from the camera's centre, from depth along the optical axis."""
    depth = np.asarray(depth_image, np.float64)
    v, u = np.mgrid[: depth.shape[0], : depth.shape[1]]
    x, y = (u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1]
    return depth * np.sqrt(x**2 + y**2 + 1)


def _visible(surface: FloatArray, scene: FloatArray, delta: float) -> NDArray[np.bool_]:
    return (surface > 0) & ((surface - scene <= delta) | (scene == 0))
