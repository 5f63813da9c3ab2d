"""The authors' loss as a training objective for smope-paper: network + batch -> one number and its parts."""

from __future__ import annotations

from collections.abc import Sequence

import roma
import torch
from torch import Tensor

from smope.data.items import Batch
from smope.geometry.boxes import xyxy_to_cxcywh
from smope.networks.smope_paper import SmopePaper, normalise
from smope.objects import ObjectModel
from smope.paper_surfaces import draw_surfaces, mesh_tensors
from smope.train.paper_losses import (
    ImageTruth,
    MeshTruth,
    PaperCriterion,
    PaperObjectiveName,
    PaperWeights,
    Predictions,
    random_sampler,
)


class PaperObjective:
    """Called with the network and a batch; returns the total loss and its parts, all on the device.

    In training mode the mesh encoder normalises over the meshes, so two objects at least are needed.
    """

    def __init__(
        self,
        objects: Sequence[ObjectModel],
        weights: PaperWeights | None = None,
        objective: PaperObjectiveName = "paper",
        samples: int = 6000,
    ) -> None:
        if len(objects) < 2:
            raise ValueError(
                f"{len(objects)} object(s) given, two at least expected: the authors' mesh encoder takes its "
                "statistics over the meshes"
            )
        meshes = [mesh_tensors(model) for model in objects]
        truth = MeshTruth.of([v for v, _ in meshes], [f for _, f in meshes])
        self.criterion = PaperCriterion(truth, weights or PaperWeights(), objective)
        self.sampler = random_sampler(samples)

    def __call__(self, network: SmopePaper, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        meshes = self.criterion.meshes
        if meshes.scales.device != batch.images.device:
            self.criterion.meshes = meshes = meshes.to(batch.images.device)
        # New points in every step, as the authors drew them: each is another view of the same surface.
        surfaces = draw_surfaces(meshes.vertices, meshes.faces, network.config.surface_points)
        padding = torch.zeros_like(batch.images[:, 0], dtype=torch.bool)
        outputs = network(normalise(batch.images), padding, surfaces)
        with torch.autocast(batch.images.device.type, enabled=False):
            total, parts = self.criterion(Predictions.of(outputs).float(), image_truths(batch), self.sampler)
        return total, {name: value.detach() for name, value in parts.items()}


def image_truths(batch: Batch) -> list[ImageTruth]:
    """The objects of each image; the detector knows one class, so every label is 0."""
    height, width = batch.images.shape[-2:]
    scale = batch.images.new_tensor([width, height, width, height])
    # Pixel centres stand at whole numbers, so the image spans -0.5 to size - 0.5.
    boxes = xyxy_to_cxcywh((batch.boxes_xyxy + 0.5) / scale)
    quaternions = roma.rotmat_to_unitquat(batch.T_CO[..., :3, :3])
    truths = []
    for i, present in enumerate(batch.present):
        meshes = batch.labels[i, present]
        truths.append(
            ImageTruth(
                torch.zeros_like(meshes),
                boxes[i, present],
                meshes,
                batch.T_CO[i, present, :3, 3],
                quaternions[i, present],
            )
        )
    return truths
