"""The weights a run begins with: its own checkpoint's, those of a model or a file, or ImageNet's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from smope.checkpoints_authors import initialise_detector, load_pickle, read_checkpoint, table
from smope.config import ConfigError
from smope.model import SMOPE
from smope.networks.backbone import load_imagenet_weights
from smope.networks.smope_paper import SmopePaper
from smope.networks.smope_s import SmopeS
from smope.train.checkpoint import load_checkpoint, load_small, small_files
from smope.train.choice import detector_state
from smope.train.loop import CHECKPOINT, SMALL, Loop, LoopState

log = logging.getLogger(__name__)

_LATER = ("region_reader.blocks.", "rescorer.")  # what weights of an earlier form may lack


def begin(
    loop: Loop, init: str | Path | None, backbone: str | Path | None, resume: bool, continue_schedule: bool
) -> None:
    """Give the loop its first weights: of the run's own checkpoint, of `init`, or of ImageNet."""
    if resume and loop.resume():
        return
    if init is not None:
        weights, note = _weights_of(init, loop.model)
        spent = None
        if continue_schedule:
            if "step" not in note:
                raise ConfigError(
                    f"{init} does not say where its run stood; continue_schedule needs a small checkpoint"
                )
            spent = LoopState(step=int(note["step"]), seconds=float(note["seconds"]))
        try:
            loop.start_from(_deepened(weights, loop.model), spent)
        except RuntimeError as error:
            raise ConfigError(f"{init}: weights of another network than the recipe's: {error}") from None
    elif backbone is not None:
        network = loop.model
        if isinstance(network, SmopePaper):
            _load_resnet(network, Path(backbone))
        else:
            assert isinstance(network, SmopeS)
            load_imagenet_weights(network.backbone, Path(backbone))
        loop.start_from(network.state_dict())
    else:
        log.warning("no init and no backbone weights: training from random weights takes far longer")


def _weights_of(init: str | Path, network: nn.Module) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
    path = Path(init)
    if path.suffix == ".pth":
        return _pth_weights(path, network), {}
    if path.is_dir() and small_files(path / SMALL):
        path = path / SMALL
    elif path.is_dir() and (path / CHECKPOINT).is_file():
        path = path / CHECKPOINT
    if path.suffix == ".pt":
        return load_checkpoint(path)["ema"], {}
    if path.suffix == ".safetensors":
        return load_small(path)
    return SMOPE.from_pretrained(init, device="cpu").network.state_dict(), {}


def _deepened(weights: Mapping[str, Tensor], network: nn.Module) -> Mapping[str, Tensor]:
    """Weights of an earlier form too: further blocks of the region reader begin as nothing, and rescoring
    nearly so, so that the network begins with the poses it had."""
    own = network.state_dict()
    further = {key: own[key] for key in own.keys() - weights.keys() if key.startswith(_LATER)}
    if further:
        log.info("the weights lack parts that begin as nothing; added: %s", ", ".join(sorted(further)))
    return {**weights, **further}


def _pth_weights(path: Path, network: nn.Module) -> Mapping[str, Tensor]:
    """Those of the authors' trainer whole; of Deformable DETR what its detector has, all tensors accounted
    for in the log."""
    if not isinstance(network, SmopePaper):
        raise ConfigError(f'{path}: starts smope-paper only; set architecture = "smope-paper"')
    state = detector_state(path)
    if state is None:
        return read_checkpoint(path).state
    log.info("from %s:\n%s", path, table(initialise_detector(network, state)))
    return network.state_dict()


def _load_resnet(network: SmopePaper, path: Path) -> None:
    """ImageNet weights of a ResNet-50 under torchvision's names, its classifier left out."""
    content = load_pickle(path) if path.suffix == ".pth" else load_file(path)
    left_out = ("fc.", "num_batches_tracked")
    tensors = {
        key: tensor.float()
        for key, tensor in content.items()
        if isinstance(tensor, Tensor) and not key.startswith(left_out[0]) and not key.endswith(left_out[1])
    }
    try:
        network.detector.backbone.load_state_dict(tensors)
    except RuntimeError as error:
        raise ConfigError(f"{path}: not a ResNet-50 under torchvision's names: {error}") from None
