"""smope-paper, the authors' network (SMOPE-Net): Deformable DETR, a 3D encoder and decoder for the meshes,
and a pose for every pair of query and mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import roma
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smope.networks.outputs import take
from smope.networks.paper_detector import PaperDetections, PaperDetector, SmopePaperConfig
from smope.networks.paper_meshes import DecodedMeshes, MeshSurfaces, PaperMeshDecoder, PaperMeshEncoder
from smope.networks.paper_pose import AttentionMap, PaperPoseHead, PaperPoses

__all__ = ["PaperFound", "PaperOutputs", "SmopePaper", "SmopePaperConfig", "normalise", "pad_batch"]

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


@dataclass(frozen=True, eq=False)
class PaperOutputs:
    """All that the losses look at."""

    detections: PaperDetections
    features: Tensor | None = None  # [M, C] of the meshes
    meshes: DecodedMeshes | None = None
    attention: Tensor | None = None  # [B, Q, H, M]
    poses: PaperPoses | None = None


@dataclass(frozen=True, eq=False)
class PaperFound:
    """The best queries of each image, best first, each with its most likely mesh."""

    scores: Tensor  # [B, P] 0..1
    labels: Tensor  # [B, P] index of the mesh
    boxes: Tensor  # [B, P, 4] cxcywh in 0..1 of the padded image
    rotation: Tensor  # [B, P, 3, 3] of the mesh's own frame to the camera
    translation: Tensor  # [B, P, 3] metres


class SmopePaper(nn.Module):
    def __init__(self, config: SmopePaperConfig) -> None:
        super().__init__()
        self.config = config
        self.detector = PaperDetector(config)
        if config.poses:
            self.mesh_encoder = PaperMeshEncoder(config.width, config.surface_points)
            self.mesh_decoder = PaperMeshDecoder(config.width, config.template_vertices)
            self.attention = AttentionMap(config.width, config.heads)
            self.pose_head = PaperPoseHead(config.width, config.heads)

    def encode_meshes(self, surfaces: MeshSurfaces) -> Tensor:
        """-> [M, C] features. In evaluation mode once a set of meshes is enough; in training mode the meshes
        are normalised together, two of them at least."""
        return self.mesh_encoder(surfaces)

    def forward(self, images: Tensor, padding: Tensor, surfaces: MeshSurfaces | None = None) -> PaperOutputs:
        """images [B, 3, H, W] normalised, padding [B, H, W] bool, True on padding; all that training needs"""
        detections = self.detector(images, padding)
        if not self.config.poses:
            return PaperOutputs(detections)
        if surfaces is None:
            raise ValueError("no surfaces given; a network with poses needs the samples of its meshes")
        features = self.encode_meshes(surfaces)
        attention, poses = self.estimate_poses(detections.queries[-1], features)
        return PaperOutputs(detections, features, self.mesh_decoder(features), attention, poses)

    def estimate_poses(self, queries: Tensor, features: Tensor) -> tuple[Tensor, PaperPoses]:
        """queries [B, Q, C], features [M, C] -> attention [B, Q, H, M] and poses"""
        attention = self.attention(queries, features)
        return attention, self.pose_head(attention, features)

    @torch.no_grad()
    def find(self, images: Tensor, padding: Tensor, features: Tensor, top_k: int = 32) -> PaperFound:
        """images and padding as in `forward`, features [M, C] of `encode_meshes`"""
        detections = self.detector(images, padding)
        scores = detections.logits[-1].softmax(-1)[..., :-1].amax(-1)  # [B, Q]
        _, poses = self.estimate_poses(detections.queries[-1], features)
        scores, best = scores.topk(min(top_k, scores.shape[1]), dim=1)
        labels = take(poses.probabilities.argmax(-1), best)
        pose = take(poses.poses, best).gather(2, labels[..., None, None].expand(-1, -1, 1, 7))[:, :, 0]
        rotation = roma.unitquat_to_rotmat(F.normalize(pose[..., 3:], dim=-1))
        return PaperFound(scores, labels, take(detections.boxes[-1], best), rotation, pose[..., :3])


def normalise(images: Tensor) -> Tensor:
    """[..., 3, H, W] in 0..1 -> by ImageNet's mean and deviation"""
    mean = images.new_tensor(IMAGE_MEAN)[:, None, None]
    return (images - mean) / images.new_tensor(IMAGE_STD)[:, None, None]


def pad_batch(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[3, H, W] each -> [B, 3, H', W'] with zeros at the right and bottom, and where they are, [B, H', W']"""
    height = max(image.shape[-2] for image in images)
    width = max(image.shape[-1] for image in images)
    batch = images[0].new_zeros(len(images), 3, height, width)
    padding = torch.ones(len(images), height, width, dtype=torch.bool, device=batch.device)
    for i, image in enumerate(images):
        batch[i, :, : image.shape[-2], : image.shape[-1]] = image
        padding[i, : image.shape[-2], : image.shape[-1]] = False
    return batch, padding
