"""The network with plain tensors in and out: what an exported file holds."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor, nn

from smope.geometry.stretch import size_factor
from smope.model import SMOPE
from smope.network_inputs import pad_to_multiple
from smope.networks.mesh_encoder import MeshTokens
from smope.networks.outputs import take
from smope.networks.pose_head import unit_to_pixels
from smope.networks.rivals import best_first
from smope.networks.smope_s import SmopeS

MESH_INPUTS = (*(field.name for field in fields(MeshTokens)), "centres")
OUTPUTS = ("scores", "labels", "boxes", "T_CO", "visibility", "sigma", "scale")


class ExportError(ValueError):
    """A model that cannot be exported as asked."""


class PlainNetwork(nn.Module):
    """Photos of one size, their cameras and the meshes' tokens -> the best pairs of query and mesh.

    Nothing is left out by score or as a double: files hold no decisions of `predict`.
    """

    def __init__(self, network: SmopeS, top_k: int) -> None:
        super().__init__()
        self.network = network
        self.top_k = top_k

    def forward(self, images: Tensor, K: Tensor, *meshes: Tensor) -> tuple[Tensor, ...]:
        """images uint8 [B, H, W, 3] RGB, K [B, 3, 3] pixels, meshes as `mesh_tensors` gives them ->

        scores [B, P] best first, labels [B, P] index of the mesh, boxes [B, P, 4] xyxy pixels, T_CO
        [B, P, 4, 4] mesh to camera in metres, visibility [B, P], sigma [B, P, 2] expected error in degrees
        and metres, scale [B, P, 3] of the mesh, 1 where the weights do not predict it.
        """
        tokens, centres = MeshTokens(*meshes[:-1]), meshes[-1]
        padded = pad_to_multiple(images.permute(0, 3, 1, 2).float() / 255.0)
        found = self.network(padded, K, tokens, self.top_k)
        middle, size = found.boxes[..., :2], found.boxes[..., 2:]
        frame = (padded.shape[-1], padded.shape[-2])
        corners = [unit_to_pixels(corner, frame) for corner in (middle - size / 2, middle + size / 2)]

        pose = found.pairs.poses[-1]
        scale = torch.ones_like(pose.translation) if pose.scale is None else pose.scale
        centre = centres[found.labels] * scale
        origin = pose.translation - (pose.rotation @ centre[..., None])[..., 0]
        last = torch.eye(4, device=K.device)[3].expand(*origin.shape[:2], 1, 4)
        T_CO = torch.cat([torch.cat([pose.rotation, origin[..., None]], -1), last], -2)
        expected = found.pairs.log_sigma.clamp(-6, 3).exp()
        sizes = tokens.diameters[found.labels] * size_factor(scale)
        sigma = torch.stack([torch.rad2deg(expected[..., 0]), expected[..., 1] * sizes], -1)
        visibility = found.pairs.visibility_logit.sigmoid()
        outputs = (found.scores, found.labels, torch.cat(corners, -1), T_CO, visibility, sigma, scale)
        if found.pairs.score_shift is None:
            return outputs
        order = best_first(found.scores)
        return tuple(take(output, order) for output in outputs)


def mesh_tensors(model: SMOPE) -> dict[str, Tensor]:
    """The inputs that say which objects to look for: the registered ones, in the order of the labels."""
    tokens = model._tokens
    if not isinstance(tokens, MeshTokens):
        raise ExportError("the default network (smope-s) with at least one registered mesh can be exported")
    centres = torch.stack([one.centre for one in model.objects.values()])
    return {**{name: getattr(tokens, name) for name in MESH_INPUTS[:-1]}, "centres": centres}
