"""The detector against Deformable DETR as `transformers` has it, and weights from its checkpoints."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from smope.checkpoints_authors import (
    CheckpointError,
    config_from_args,
    detector_config,
    initialise_detector,
    our_state,
    table,
)
from smope.networks.smope_paper import SmopePaper

CLASSES = 3
# Names in transformers -> in the checkpoints of Deformable DETR.
RENAMED = (
    (r"^model\.backbone\.model\.embedder\.embedder\.convolution", "backbone.0.body.conv1"),
    (r"^model\.backbone\.model\.embedder\.embedder\.normalization", "backbone.0.body.bn1"),
    (r"^model\.query_position_embeddings", "query_embed"),
    (r"^model\.input_proj", "input_proj"),
    (r"^model\.(class_embed|bbox_embed)", r"transformer.decoder.\1"),
    (r"^model\.", "transformer."),
    (r"encoder\.(layers\.\d+)\.self_attn_layer_norm", r"encoder.\1.norm1"),
    (r"(transformer\.encoder\.layers\.\d+)\.final_layer_norm", r"\1.norm2"),
    (r"(transformer\.decoder\.layers\.\d+)\.self_attn_layer_norm", r"\1.norm2"),
    (r"\.encoder_attn_layer_norm", ".norm1"),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"(transformer\.decoder\.layers\.\d+)\.final_layer_norm", r"\1.norm3"),
    (r"\.mlp\.fc([12])", r".linear\1"),
    (r"\.fc([12])\.", r".linear\1."),
    (r"self_attn\.o(?:ut)?_proj", "self_attn.out_proj"),
)


def reference(thin: bool = False, **settings: Any) -> Any:
    """`thin`: with the backbone of `small_model.ThinResNet` in place of a ResNet-50."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not transformers.utils.is_torch_available():
        pytest.skip(f"transformers {transformers.__version__} asks for a later torch")
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [16, 32, 64, 128], "depths": [1] * 4} if thin else {}
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"], **sizes),
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=7,
        two_stage_num_proposals=7,
        num_labels=CLASSES,
        **settings,
    )
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sampling_offsets" in name or "bbox_embed" in name or "reference" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.add_(0.2 * torch.rand_like(buffer))
    return model


def published(model: Any) -> dict[str, Tensor]:
    """The state dict under the names of the published checkpoints."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if stage := re.match(r"model\.backbone\.model\.encoder\.stages\.(\d+)\.layers\.(\d+)\.(.*)", name):
            level, block, rest = int(stage[1]) + 1, stage[2], stage[3]
            rest = re.sub(r"layer\.(\d)\.convolution", lambda m: f"conv{int(m[1]) + 1}", rest)
            rest = re.sub(r"layer\.(\d)\.normalization", lambda m: f"bn{int(m[1]) + 1}", rest)
            rest = rest.replace("shortcut.convolution", "downsample.0")
            rest = rest.replace("shortcut.normalization", "downsample.1")
            state[f"backbone.0.body.layer{level}.{block}.{rest}"] = tensor
            continue
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    for kind in ("weight", "bias"):
        for name in [key for key in state if key.endswith(f".self_attn.q_proj.{kind}")]:
            parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            state[name.replace(f"q_proj.{kind}", f"in_proj_{kind}")] = torch.cat(parts)
    if not model.config.with_box_refine:
        state = {key: tensor for key, tensor in state.items() if "transformer.decoder.bbox_embed" not in key}
    return state


def batch() -> tuple[Tensor, Tensor]:
    """Two images, the second one padded at the right and at the bottom"""
    images = torch.randn(2, 3, 128, 160, generator=torch.Generator().manual_seed(1))
    padding = torch.zeros(2, 128, 160, dtype=torch.bool)
    padding[1, 96:], padding[1, :, 120:] = True, True
    return images.masked_fill(padding[:, None], 0.0), padding


VARIANTS = [{}, {"with_box_refine": True}, {"with_box_refine": True, "two_stage": True}]
ARGUMENTS = {"nheads": 8, "dropout": 0.1, "dilation": False, "num_queries": 7}


@pytest.mark.parametrize("settings", VARIANTS, ids=["plain", "refined", "two-stage"])
@pytest.mark.filterwarnings("default")  # 2026-11: those of transformers are not ours to keep
def test_boxes_and_classes_are_those_of_transformers(settings: dict[str, Any]) -> None:
    model = reference(**settings)
    state = published(model)
    config = config_from_args(ARGUMENTS, state)
    assert (config.box_refine, config.two_stage) == (bool(settings), "two_stage" in settings)
    network = SmopePaper(config).eval()
    network.load_state_dict(our_state(state, network))
    images, padding = batch()
    with torch.no_grad():
        theirs = model(pixel_values=images, pixel_mask=(~padding).long())
        ours = network(images, padding).detections
    torch.testing.assert_close(ours.logits[-1], theirs.logits, atol=2e-4, rtol=0)
    torch.testing.assert_close(ours.boxes[-1], theirs.pred_boxes, atol=2e-5, rtol=0)
    assert theirs.pred_boxes.std(1).min() > 1e-3  # queries differ, so the comparison says something


@pytest.mark.parametrize("settings", VARIANTS, ids=["plain", "refined", "two-stage"])
@pytest.mark.filterwarnings("default")  # 2026-11: those of transformers are not ours to keep
def test_a_detector_starts_from_a_published_checkpoint(settings: dict[str, Any]) -> None:
    state = published(reference(**settings))
    config = detector_config(state, queries=7, surface_points=20, template_vertices=42)
    assert (config.classes, config.poses) == (1, True)
    network = SmopePaper(config)
    rows = initialise_detector(network, state)
    assert {row.key for row in rows} >= set(state)
    left = [row.key for row in rows if row.outcome.startswith("left")]
    assert left
    assert all("class_embed" in key for key in left)
    fresh = [row.key for row in rows if row.outcome == "as initialised"]
    assert fresh
    assert all("class_heads" in key for key in fresh)
    copied = sum(row.outcome.startswith("->") for row in rows)
    detector = [key for key in network.state_dict() if key.startswith("detector.")]
    assert copied + len(fresh) == len(detector)
    torch.testing.assert_close(
        network.detector.level_embed.detach(), state["transformer.level_embed"], rtol=0, atol=0
    )
    printed = table(rows).splitlines()
    assert len(printed) == len(rows)
    assert any("transformer.level_embed" in line and "4x64" in line for line in printed)


@pytest.mark.filterwarnings("default")  # 2026-11: those of transformers are not ours to keep
def test_a_refined_checkpoint_does_not_fit_a_plain_network() -> None:
    state = published(reference(with_box_refine=True))
    config = detector_config(state, queries=7, surface_points=20, template_vertices=42, box_refine=False)
    with pytest.raises(CheckpointError, match="differs from the other tensor"):
        initialise_detector(SmopePaper(config), state)


def test_what_is_no_deformable_detr() -> None:
    with pytest.raises(CheckpointError, match="is this a checkpoint"):
        detector_config({"fc.weight": torch.zeros(2, 2)})
