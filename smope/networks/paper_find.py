"""smope-paper in use: photos, cameras and encoded meshes in, what `SmopeS` returns for them out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smope.geometry.projection import project
from smope.networks.outputs import PairOutputs, PoseEstimate
from smope.networks.smope_paper import SmopePaper, normalise
from smope.networks.smope_s import Found

# The network says nothing of visibility or of its own error: what is found counts as visible, and its error
# as that of a guess (the mean angle between two random rotations; one diameter).
SURE_LOGIT = 20.0
GUESS_LOG_SIGMA = (math.log(math.pi / 2 + 2 / math.pi), 0.0)


@dataclass(frozen=True, eq=False)
class PaperTokens:
    """Encoded meshes. Evaluation encodes each alone, but their poses depend on which others stand beside."""

    features: Tensor  # [M, C]
    centres: Tensor  # [M, 3] of the bounding boxes in the own frames, metres

    def __len__(self) -> int:
        return self.features.shape[0]

    @staticmethod
    def cat(tokens: Sequence[PaperTokens]) -> PaperTokens:
        return PaperTokens(torch.cat([t.features for t in tokens]), torch.cat([t.centres for t in tokens]))

    def to(self, device: torch.device | str) -> PaperTokens:
        return PaperTokens(self.features.to(device), self.centres.to(device))


@torch.no_grad()
def find(network: SmopePaper, images: Tensor, K: Tensor, tokens: PaperTokens, top_k: int = 32) -> Found:
    """images [B, 3, H, W] in 0..1 of any size, K [B, 3, 3] pixels; the poses do not depend on K, as the
    network knows one camera only: the one it was trained with."""
    config = network.config
    padding = torch.zeros_like(images[:, 0], dtype=torch.bool)
    found = network.find(normalise(images), padding, tokens.features, top_k)
    height, width = images.shape[-2:]
    shift = config.box_shift
    boxes = found.boxes + found.boxes.new_tensor([shift / width, shift / height, 0.0, 0.0])
    translation = found.translation + found.translation.new_tensor([0.0, 0.0, config.depth_shift])
    # `Found` holds poses of meshes that are centred on their bounding boxes.
    centre = translation + (found.rotation @ tokens.centres[found.labels][..., None])[..., 0]
    pose = PoseEstimate(found.rotation, centre, project(centre, K))
    log_sigma = found.scores.new_tensor(GUESS_LOG_SIGMA).expand(*found.scores.shape, 2)
    pairs = PairOutputs((pose,), torch.full_like(found.scores, SURE_LOGIT), log_sigma)
    return Found(found.scores, found.labels, boxes, pairs)
