"""The two networks behind one surface: build one, encode a mesh for it, find with it, and store its tokens.

`smope-s` is the default network; `smope-paper` is the authors', for their checkpoints and for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smope.devices import float32_by_default
from smope.network_inputs import mesh_inputs, pad_to_multiple
from smope.networks import paper_find
from smope.networks.mesh_encoder import MeshTokens
from smope.networks.paper_find import PaperTokens
from smope.networks.smope_paper import SmopePaper, SmopePaperConfig
from smope.networks.smope_s import Found, SmopeS, SmopeSConfig
from smope.objects import ObjectModel
from smope.paper_surfaces import object_surfaces, raw_surfaces

Network = SmopeS | SmopePaper
NetworkConfig = SmopeSConfig | SmopePaperConfig
Tokens = MeshTokens | PaperTokens

# Photos are resized only where their area differs from the trained one by more than this, squared. The
# authors brought every photo to the trained size.
_SIZE_SLACK = {"smope-s": 1.25, "smope-paper": 1.0}


def build_network(config: NetworkConfig) -> Network:
    with float32_by_default():
        return SmopePaper(config) if isinstance(config, SmopePaperConfig) else SmopeS(config)


def architecture_of(config: NetworkConfig) -> str:
    """The name that config.json has for it."""
    return "smope-paper" if isinstance(config, SmopePaperConfig) else "smope-s"


def size_slack(config: NetworkConfig) -> float:
    return _SIZE_SLACK[architecture_of(config)]


@torch.no_grad()
def encode(network: Network, model: ObjectModel, source: Any = None) -> Tokens:
    """One mesh alone, so that its tokens do not depend on which others are registered.

    `source` is what `model` was made from, as `load_mesh` takes it; the authors' weights want it as it is.
    """
    device = next(network.parameters()).device
    if isinstance(network, SmopePaper) and network.config.listed_vertices and source is not None:
        surfaces = raw_surfaces([source], network.config.surface_points)
        return PaperTokens(network.encode_meshes(surfaces.to(device)), model.centre[None].to(device))
    return encode_objects(network, [model], device)


@torch.no_grad()
def encode_objects(network: Network, objects: Sequence[ObjectModel], device: torch.device) -> Tokens:
    """Of a network in evaluation mode, for which each mesh is encoded by itself."""
    if isinstance(network, SmopePaper):
        surfaces = object_surfaces(objects, network.config.surface_points)
        centres = torch.stack([model.centre for model in objects])
        return PaperTokens(network.encode_meshes(surfaces.to(device)), centres.to(device))
    inputs = mesh_inputs(objects, network.config.surface_points, network.config.anchors)
    return network.encode_meshes(inputs.to(device))


def join(tokens: Sequence[Tokens], device: torch.device) -> Tokens:
    """Those of several meshes, in their order."""
    default = [t.to(device) for t in tokens if isinstance(t, MeshTokens)]
    paper = [t.to(device) for t in tokens if isinstance(t, PaperTokens)]
    return MeshTokens.cat(default) if default else PaperTokens.cat(paper)


@torch.no_grad()
def find(
    network: Network, images: Tensor, K: Tensor, tokens: Tokens, top_k: int, lowest: float = 0.0
) -> tuple[Found, tuple[int, int]]:
    """images [B, 3, H, W] in 0..1, K [B, 3, 3] pixels -> what was found, and the (width, height) in pixels
    that its boxes count in. What scores below `lowest` may be missing."""
    if isinstance(network, SmopePaper):
        assert isinstance(tokens, PaperTokens)
        # Of any size: its paddings of 32 would count as image.
        found = paper_find.find(network, images, K, tokens, top_k)
    else:
        images = pad_to_multiple(images)
        found = network(images, K, tokens, top_k, lowest)
    return found, (images.shape[-1], images.shape[-2])


def tokens_to_tensors(tokens: Tokens) -> dict[str, Tensor]:
    """Of one mesh, for a safetensors file; what follows from the object's geometry is left out."""
    if isinstance(tokens, PaperTokens):
        return {"embedding": tokens.features[0]}
    return {"embedding": tokens.embedding[0], "local": tokens.local[0]}


def tokens_from_tensors(config: NetworkConfig, model: ObjectModel, tensors: Mapping[str, Tensor]) -> Tokens:
    """What `tokens_to_tensors` gave, in float32; a `KeyError` names what is missing."""
    embedding = tensors["embedding"].float()[None]
    if isinstance(config, SmopePaperConfig):
        return PaperTokens(embedding, model.centre[None])
    inputs = mesh_inputs([model], config.surface_points, config.anchors)
    return MeshTokens(embedding, tensors["local"].float()[None], inputs.diameters, inputs.anchors)
