"""What our losses, mesh terms and small operations make of a parity fixture's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from smope.geometry.boxes import cxcywh_to_xyxy, paired_giou
from smope.networks.deformable import inverse_sigmoid
from smope.networks.paper_meshes import DecodedMeshes
from smope.networks.paper_pose import PaperPoses
from smope.networks.position import sine_embedding, unpadded_centres
from smope.ops import ms_deform_attn_core
from smope.paper_surfaces import normalised, surface_points
from smope.tools.parity_inputs import loss_offsets, loss_sample
from smope.train.matcher import MatchCosts
from smope.train.paper_losses import (
    ImageTruth,
    MeshTruth,
    PaperCriterion,
    PaperWeights,
    Predictions,
    rotation_matrix,
    transformed,
)
from smope.train.paper_matcher import matching_cost
from smope.train.paper_meshes import icosphere, key_points

Values = dict[str, Tensor]
Spec = Mapping[str, Any]
Stored = Mapping[str, Tensor]

_SURFACE_TERMS = {
    "chamfer": "chamfer_distance",
    "edge": "mesh_edge_loss",
    "normal": "mesh_normal_consistency",
    "laplacian": "mesh_laplacian_smoothing",
}


def template_level(spec: Spec) -> int:
    """Level of the icosphere that the 3D decoder deforms, from the shape of its last weight."""
    for variant in spec["variants"].values():
        for key, shape, *_ in variant["state"]:
            if key.endswith("subnet_decoder_samples.2.bias"):
                return next(level for level in range(9) if 3 * (10 * 4**level + 2) == shape[0])
    raise ValueError("spec.json: no variant has a 3D decoder, whose icosphere the losses need")


def mesh_truth(spec: Spec, stored: Stored) -> MeshTruth:
    count = spec["meshes"]["count"]
    vertices = [stored[f"verts.{i}"] for i in range(count)]
    return MeshTruth.of(vertices, [stored["faces"]] * count, _key_point_count(spec))


def mesh_values(spec: Spec, stored: Stored) -> Values:
    """Every array of meshes.npz."""
    vertices = [stored[f"verts.{i}"] for i in range(spec["meshes"]["count"])]
    moved, scales, centres = zip(*(normalised(v) for v in vertices), strict=True)
    sphere = icosphere(template_level(spec))
    return {
        "out.scale_list": torch.stack(scales),
        "out.center_list": torch.stack(centres),
        "out.fps_points": torch.stack([key_points(v, _key_point_count(spec)) for v in vertices]),
        **{f"out.normalised_verts.{i}": v for i, v in enumerate(moved)},
        f"ico{template_level(spec)}.faces": sphere.faces,
        f"ico{template_level(spec)}.verts": sphere.vertices,
    }


def _key_point_count(spec: Spec) -> int:
    return int(next(iter(spec["variants"].values()))["args"]["model_fps_num"])


def weights_of(spec: Spec) -> PaperWeights:
    given = spec["criterion"]
    names = given["weight_dict"]
    for name, value in names.items():
        stem, _, layer = name.rpartition("_")
        if layer.isdigit() and names.get(stem) != value:
            raise ValueError(f"spec.json: weight of {name} differs from that of {stem}; one for all expected")
    matcher = given["matcher"]
    known = PaperWeights.__dataclass_fields__
    return PaperWeights(
        **{name: value for name, value in names.items() if name in known},
        **{name: given["model3d_weights"][f"model3d_{name}_weight"] for name in _SURFACE_TERMS},
        match=MatchCosts(label=matcher["cost_class"], l1=matcher["cost_bbox"], giou=matcher["cost_giou"]),
        focal_alpha=given["focal_alpha"],
        focal_gamma=given["focal_gamma"],
        meshes=tuple(given.get("model_class_weights") or ()),
    )


def loss_cases(stored: Stored) -> list[str]:
    return sorted({name.split(".in.")[0] for name in stored if ".in." in name})


def loss_values(spec: Spec, stored: Stored, case: str, meshes: MeshTruth) -> Values:
    """Matchings, losses, gradients and surface terms of one case of losses.npz."""
    given = {name.removeprefix(f"{case}."): value for name, value in stored.items()}
    leaves = {
        name.removeprefix("in."): value.clone().requires_grad_()
        for name, value in given.items()
        if name.startswith("in.")
    }
    template = icosphere(template_level(spec))
    offsets = loss_offsets(spec, case, len(template.vertices)).requires_grad_()
    leaves["pred_model_points"] = offsets
    layers = sum(name.endswith("pred_logits") for name in leaves)
    names = [f"aux.{i}." for i in range(layers - 1)] + [""]
    found = Predictions(
        torch.stack([leaves[f"{name}pred_logits"] for name in names]),
        torch.stack([leaves[f"{name}pred_boxes"] for name in names]),
        DecodedMeshes(offsets, leaves["pred_model_scales"], leaves["pred_model_centers"]),
        PaperPoses(
            leaves["pose_class"].log(), leaves["pose_class"], leaves["pose_6dof"], leaves["pose_6dof"]
        ),
    )
    truth = [_image_truth(given, image) for image in range(found.logits.shape[1])]
    criterion = PaperCriterion(meshes, weights_of(spec), "paper-verbatim")
    values: Values = {}

    def sampler(mesh: int, which: str, vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
        sample = loss_sample(spec, case, mesh, which, len(faces))
        values[f"sampled.sample{mesh}.{which}"] = surface_points(vertices, faces, *sample).detach()
        return sample

    total, parts = criterion(found, truth, sampler)
    total.backward()
    values.update({f"out.{name}": part.detach().reshape(1) for name, part in parts.items()})
    values["out.total"] = total.detach().reshape(1)
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        values[f"grad.{name}"] = leaf.grad
    assert found.meshes is not None
    with torch.no_grad():
        for name, value in criterion.mesh_terms(found.meshes, sampler).items():
            values[f"model3d.{_SURFACE_TERMS[name]}"] = value
        for layer, name in enumerate(names):
            match = criterion.match(found.logits[layer], found.boxes[layer], truth)
            for image, (query, target) in enumerate(match):
                prefix = f"match.{name or 'last.'}{image}"
                image_truth = truth[image]
                values[f"{prefix}.cost"] = matching_cost(
                    found.logits[layer, image],
                    found.boxes[layer, image],
                    image_truth.labels,
                    image_truth.boxes,
                    criterion.weights.match,
                )
                values[f"{prefix}.query"], values[f"{prefix}.target"] = query, target
    return {f"{case}.{name}": value for name, value in values.items()}


def _image_truth(given: Stored, image: int) -> ImageTruth:
    names = ("labels", "bboxes_2d", "model_ids", "T_matrix_c2o", "R_quaternion_c2o")
    return ImageTruth(*(given[f"target{image}.{name}"] for name in names))


def ops_values(stored: Stored) -> Values:
    """Every array of ops.npz."""
    value, locations, weights = (
        stored[f"msda.{name}"].clone().requires_grad_() for name in ("value", "locations", "weights")
    )
    shapes = tuple((int(h), int(w)) for h, w in stored["msda.spatial_shapes"])
    attended = ms_deform_attn_core(value, shapes, locations, weights)
    attended.backward(stored["msda.grad_output"])
    assert value.grad is not None
    assert locations.grad is not None
    assert weights.grad is not None

    padding, channels = stored["pos.mask"], stored["pos.output"].shape[1]
    positions = sine_embedding(unpadded_centres(padding).flip(-1), channels // 2)  # [B, h * w, C]
    first, second = (cxcywh_to_xyxy(stored[f"giou.boxes{i}_cxcywh"]) for i in (1, 2))
    quaternion, shift, points = (stored[f"tgm.{name}"] for name in ("quaternion", "t", "points"))
    matrix = torch.eye(4).repeat(len(quaternion), 1, 1)
    matrix[:, :3, :3] = rotation_matrix(quaternion, verbatim=True)
    matrix[:, :3, 3] = shift
    return {
        "msda.output": attended.detach(),
        "msda.grad_value": value.grad,
        "msda.grad_locations": locations.grad,
        "msda.grad_weights": weights.grad,
        "pos.output": positions.transpose(1, 2).unflatten(-1, padding.shape[1:]),
        "inverse_sigmoid.output": inverse_sigmoid(stored["inverse_sigmoid.x"]),
        "giou.output": paired_giou(first[:, None], second[None]),
        "tgm.matrix": matrix,
        "tgm.transformed": transformed(points, quaternion, shift, verbatim=True),
    }
