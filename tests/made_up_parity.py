"""A parity fixture of another kind than the published one: nine meshes, other sizes, another salt.

Weights and inputs are drawn by the published fixture's own `make_inputs.py`; the expected outputs are ours,
as the authors' code is not at hand. So it says nothing about the arithmetic (the published one does), but
that the command takes every count, size and weight from the fixture, and sees every fault put into it.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from torch import Tensor

from smope.networks.paper_meshes import MeshSurfaces
from smope.tools.parity_forward import build, forward_values, traced
from smope.tools.parity_losses import loss_values, mesh_truth, mesh_values

MESHES, POINTS, VERTICES, QUERIES = 9, 35, 42, 11
IMAGES = [[3, 64, 96], [3, 96, 64], [3, 50, 70]]


def rule_of(published: Path) -> Any:
    """Its `make_inputs.py` as a module."""
    spec = importlib.util.spec_from_file_location("make_inputs", published / "make_inputs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def specification(published: Path) -> dict[str, Any]:
    given = json.loads((published / "spec.json").read_text(encoding="utf-8"))
    spec: dict[str, Any] = {
        "format": given["format"],
        "salt": "nine-meshes",
        "images": IMAGES,
        "meshes": {"count": MESHES, "points": POINTS},
        "variants": {},
        "criterion": copy.deepcopy(given["criterion"]),
        "slices": {name: {} for name in ("pose", "two_stage", "losses")},
    }
    for name in ("pose", "two_stage"):
        variant = copy.deepcopy(given["variants"][name])
        counts = {"num_queries": QUERIES, "enc_layers": 1, "model_class_num": MESHES}
        variant["args"].update(counts, dec_layers=2)
        variant["state"] = [
            [key, _shape(key, shape), *of] for key, shape, *of in variant["state"] if _kept(key)
        ]
        spec["variants"][name] = variant
    criterion = spec["criterion"]
    criterion["model_class_weights"] = [0.1 * (i + 1) for i in range(MESHES)]
    for key in criterion["weight_dict"]:
        if key.startswith("model3d_scales"):
            criterion["weight_dict"][key] = 120.0
    return spec


def _kept(key: str) -> bool:
    """One layer in the encoder, two in the decoder; heads of two layers, and in two stages a third."""
    heads = 2 if key.startswith("detr.") else 3
    index = re.search(r"(encoder\.layers|decoder\.layers|class_embed|bbox_embed)\.(\d+)\.", key)
    most = {"encoder.layers": 1, "decoder.layers": 2, "class_embed": heads, "bbox_embed": heads}
    return index is None or int(index[2]) < most[index[1]]


def _shape(key: str, shape: list[int]) -> list[int]:
    if key.endswith("query_embed.weight"):
        return [QUERIES, *shape[1:]]
    if re.search(r"subnet_(vert|normal)\.0\.weight$", key):
        return [shape[0], 3 * POINTS]
    few = {2562: VERTICES, 3 * 2562: 3 * VERTICES} if "subnet_decoder_samples" in key else {}
    return [few.get(size, size) for size in shape]


def write(folder: Path, published: Path) -> dict[str, Any]:
    """The fixture in `folder`; returns its specification."""
    rule, spec = rule_of(published), specification(published)
    folder.mkdir()
    points, normals = (torch.from_numpy(array).double() for array in rule.mesh_samples(spec))
    images = [torch.from_numpy(image).double() for image in rule.images(spec)]
    for variant in spec["variants"]:
        state = {key: torch.from_numpy(array) for key, array in rule.weights(spec, variant).items()}
        network = build(spec["variants"][variant]["args"], state, torch.float64)
        _store(folder, spec, variant, forward_values(network, images, MeshSurfaces(points, normals)), {})
    meshes = _meshes()
    tensors = {name: torch.from_numpy(array) for name, array in meshes.items()}
    made = {k: v for k, v in mesh_values(spec, tensors).items() if not re.search(r"verts\.[2-9]$", k)}
    _store(folder, spec, "meshes", made, meshes)
    given = {**_loss_inputs("main", (3, 0, 4), 2), **_loss_inputs("one_empty", (0, 2), 1)}
    inputs = {name: torch.from_numpy(array) for name, array in given.items()}
    losses: dict[str, Tensor] = {}
    for case in ("main", "one_empty"):
        losses.update(loss_values(spec, inputs, case, mesh_truth(spec, tensors)))
    left = r"one_empty\.(model3d|sampled)\.|sampled\.sample[2-9]"
    _store(folder, spec, "losses", {k: v for k, v in losses.items() if not re.search(left, k)}, given)
    shutil.copy(published / "ops.npz", folder / "ops.npz")
    spec["sums"] = rule.all_sums(spec)
    (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    return spec


def _store(
    folder: Path,
    spec: dict[str, Any],
    name: str,
    values: Mapping[str, Tensor],
    given: Mapping[str, np.ndarray],
) -> None:
    """Long arrays by every third of their last axis, with a line of statistics where the form asks for it."""
    stored = dict(given)
    for key, tensor in values.items():
        full = tensor.detach().numpy()
        strides = [*[1] * (full.ndim - 1), 3]
        if traced(key) or key.endswith("pred_model_points"):
            spec["slices"].setdefault(name, {})[key] = strides
            x = full.astype(np.float64)
            stored[f"stat.{key}"] = np.array([np.mean(x), np.std(x), np.min(x), np.max(x), np.mean(abs(x))])
            full = full[..., ::3]
        stored[key] = full.astype(np.float32) if full.dtype == np.float64 else full
    np.savez(folder / f"{name}.npz", **stored)


def _meshes() -> dict[str, np.ndarray]:
    """Nine ellipsoids beside their origins."""
    sphere, draw = trimesh.creation.icosphere(2), np.random.default_rng(1)
    made = {"faces": np.asarray(sphere.faces, np.int64)}
    for i in range(MESHES):
        vertices = sphere.vertices * draw.uniform(0.5, 2, 3) + draw.uniform(-1, 1, 3)
        made[f"verts.{i}"] = vertices.astype(np.float32)
    return made


def _loss_inputs(case: str, counts: tuple[int, ...], layers: int) -> dict[str, np.ndarray]:
    draw, images = np.random.default_rng(len(case)), len(counts)

    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape).astype(np.float32)

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    likely = np.exp(normal(images, QUERIES, MESHES))
    quaternions = unit(normal(images, QUERIES, MESHES, 4))
    made = {
        "in.pose_class": likely / likely.sum(-1, keepdims=True),
        "in.pose_6dof": np.concatenate([normal(images, QUERIES, MESHES, 3), quaternions], -1),
        "in.pred_model_scales": normal(MESHES, 1),
        "in.pred_model_centers": normal(MESHES, 3),
    }
    for prefix in [f"aux.{i}." for i in range(layers - 1)] + [""]:
        made[f"in.{prefix}pred_logits"] = normal(images, QUERIES, 2)
        made[f"in.{prefix}pred_boxes"] = draw.uniform(0.1, 0.4, (images, QUERIES, 4)).astype(np.float32)
    for i, count in enumerate(counts):
        target = f"target{i}."
        made[f"{target}labels"] = np.zeros(count, np.int64)
        made[f"{target}bboxes_2d"] = draw.uniform(0.1, 0.4, (count, 4)).astype(np.float32)
        made[f"{target}model_ids"] = draw.integers(0, MESHES, count)
        made[f"{target}T_matrix_c2o"] = normal(count, 3)
        made[f"{target}R_quaternion_c2o"] = unit(normal(count, 4))
    return {f"{case}.{name}": array for name, array in made.items()}
