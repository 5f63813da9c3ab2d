"""Among the poses that a symmetric object cannot be told apart in, the one nearest to a prediction."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from smope.geometry.poses import compose


def pad_symmetries(sets: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[T_m, 4, 4] of M objects -> ([M, T, 4, 4], mask [M, T]), filled with the identity to the longest T."""
    longest = max(len(transforms) for transforms in sets)
    padded = torch.eye(4).to(sets[0]).repeat(len(sets), longest, 1, 1)
    mask = torch.zeros(len(sets), longest, dtype=torch.bool, device=sets[0].device)
    for index, transforms in enumerate(sets):
        padded[index, : len(transforms)] = transforms
        mask[index, : len(transforms)] = True
    return padded, mask


def closest_symmetric(
    R_pred: Tensor, t_pred: Tensor, T_gt: Tensor, sym_transforms: Tensor, sym_mask: Tensor, points: Tensor
) -> Tensor:
    """The pose [N, 4, 4] among T_gt @ S nearest to the prediction by mean squared model-point distance.

    R_pred [N, 3, 3], t_pred [N, 3], T_gt [N, 4, 4], sym_transforms [N, T, 4, 4], sym_mask [N, T] (True where
    a transform counts), points [N, P, 3] in the object's frame. A choice: no gradient passes through.

    The points enter by their mean and second moments alone, so memory does not grow with T times P: with
    D = [R_pred - R_k | t_pred - t_k] and homogeneous x, mean |D x|^2 = trace(D (mean x x^T) D^T).
    """
    with torch.no_grad(), torch.autocast(device_type=T_gt.device.type, enabled=False):
        candidates = T_gt[:, None].double() @ sym_transforms.double()  # [N, T, 4, 4]
        predicted = compose(R_pred.double(), t_pred.double())
        homogeneous = F.pad(points.double(), (0, 1), value=1.0)  # [N, P, 4]
        moments = homogeneous.transpose(-1, -2) @ homogeneous / points.shape[-2]  # [N, 4, 4]
        gap = (predicted[:, None] - candidates)[..., :3, :]  # [N, T, 3, 4]
        cost = ((gap @ moments[:, None]) * gap).sum(dim=(-2, -1))
        best = cost.masked_fill(~sym_mask, torch.inf).argmin(dim=1)
        rows = torch.arange(len(best), device=best.device)
        return candidates[rows, best].to(T_gt.dtype)
