"""SMOPE: photo + camera + meshes in, poses out. The whole way on one page.

images -> `image_input`: RGB tensors of a size near the trained one, each with its changed camera
       -> `Engine`: runs the network, on a GPU as a CUDA graph (smope/inference); what it runs is `find`:
          queries, which mesh each one is, and where that mesh stands (smope/networks/smope_s.py)
       -> `read_table`: boxes back to the photo's pixels, poses back to each mesh's own frame -> `Poses`
"""

from __future__ import annotations

import logging
import operator
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import smope
from smope import hub
from smope.architectures import (
    Network,
    Tokens,
    build_network,
    encode,
    join,
    size_slack,
    tokens_from_tensors,
    tokens_to_tensors,
)
from smope.authors_models import read_authors_model
from smope.camera_arguments import cameras_from
from smope.config import ModelConfig
from smope.defaults import LOWEST_SCORE, TOP_K
from smope.devices import device_from, plain_torch
from smope.files import write_atomically
from smope.images import load_image, load_images
from smope.inference.engine import Engine
from smope.network_inputs import image_input
from smope.networks.smope_paper import SmopePaper
from smope.objects import ObjectModel
from smope.poses import Poses
from smope.results import read_table
from smope.stream import Streamed, stream

log = logging.getLogger(__name__)


class SMOPE:
    """A network with its weights and the meshes registered with it."""

    def __init__(
        self,
        network: Network,
        config: ModelConfig,
        trained: Mapping[str, ObjectModel],
        tokens: Mapping[str, Tokens] | None = None,
        card: str = "",
    ) -> None:
        """`trained` is what the weights have seen; `tokens` are its encodings, made anew where not given."""
        self.network = network.eval()
        self._engine = Engine(self.network)
        self.config = config
        self.card = card
        self.trained = dict(trained)
        self._trained_tokens = dict(
            tokens or {name: encode(network, model) for name, model in self.trained.items()}
        )
        self.objects: dict[str, ObjectModel] = {}  # what is looked for now; the order is that of the labels
        self._token_of: dict[str, Tokens] = {}  # of each of those
        self._tokens: Tokens | None = None  # of all together, on the device
        if self.trained:
            self._replace_objects(self.trained, self._trained_tokens)

    # -- weights --------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: torch.device | str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        meshes: Mapping[str, Any] | None = None,
        units: str | None = None,
    ) -> SMOPE:
        """A bundled name such as "lmo", a folder, or a Hugging Face id; `fast` says how it computes.

        A `.pth` file of the authors' trainer is read too. It holds no meshes: `meshes` and `units` give
        those it was trained on, as for `register_meshes`. Elsewhere they are registered at once.
        """
        device = device_from(device)
        with plain_torch(device):
            if Path(name_or_path).suffix == ".pth":
                return cls(*read_authors_model(name_or_path, device, meshes, units))
            folder = hub.resolve(name_or_path, revision, cache_dir, local_files_only)
            config = ModelConfig.load(folder / hub.CONFIG_FILE)
            weights, objects, tokens = _split_objects(hub.load_weights(folder), config)
            network = build_network(config.network)
            try:
                network.load_state_dict(weights, strict=True)
            except RuntimeError as error:
                raise hub.WeightsError(f"{folder}: the weights do not fit config.json: {error}") from None
            card = folder / hub.CARD_FILE
            text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
            model = cls(network.to(device), config, objects, tokens, text)
        if meshes is not None:
            model.register_meshes(meshes, units)
        return model

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json, model.safetensors and the card.

        `dtype` is that of the network's weights in the file, by default as they are; geometry stays float32.
        """
        if dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"dtype={dtype!r} given; torch.float16, bfloat16, float32 or float64 expected")
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        state = self.network.state_dict()
        tensors = {key: t.to(dtype) if dtype and t.is_floating_point() else t for key, t in state.items()}
        for name, model in self.trained.items():
            described = {**model.to_tensors(), **tokens_to_tensors(self._trained_tokens[name])}
            tensors.update({f"objects.{name}.{key}": tensor for key, tensor in described.items()})
        hub.save_weights(folder, tensors)
        replace(self.config, smope_version=smope.__version__).save(folder / hub.CONFIG_FILE)
        if self.card:
            write_atomically(folder / hub.CARD_FILE, self.card.encode())

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save and upload to the Hugging Face hub, options as for `smope.hub.push`; gives the address."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.push(folder, repo_id, **options)

    def to(self, device: torch.device | str) -> SMOPE:
        device = device_from(device)
        self.network.to(device)
        self._engine.forget()
        if self._tokens is not None:
            self._tokens = self._tokens.to(device)
        return self

    @property
    def fast(self) -> bool:
        """Whether `predict` records the network once for each shape of images (some seconds, which the log
        tells), and from then on replays it, on a GPU as a CUDA graph in float16: the default there. False
        computes in float32, operator by operator: the default elsewhere."""
        return self.device.type == "cuda" if self._engine.fast is None else self._engine.fast

    @fast.setter
    def fast(self, value: bool) -> None:
        self._engine.fast = value

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def __repr__(self) -> str:
        width, height = self.config.image_size
        return (
            f"SMOPE({self.config.architecture} for {width} x {height} pixels on {self.device}, looks for "
            f"{', '.join(self.objects) or 'nothing yet'})"
        )

    # -- meshes ---------------------------------------------------------------------------------------------

    def register_meshes(
        self,
        meshes: Mapping[str, Any] | Sequence[str],
        units: str | None = None,
        symmetries: Mapping[str, Any] | str | None = None,
        add: bool = False,
        force: bool = False,
    ) -> None:
        """Say which objects to look for; replaces the set unless `add`.

        `meshes` is {name: mesh}, where a mesh is a path (OBJ, PLY, STL, GLB), a trimesh, (vertices, faces) or
        pytorch3d Meshes, all in `units` ("m", "cm", "mm", "in"); or a list of names that the weights know.
        `symmetries` is None (a trained name keeps the ones it was trained with, if its mesh fills the same
        box), "auto", or {name: BOP form}.
        """
        if not isinstance(meshes, (Mapping, list, tuple)):
            raise ValueError(
                f"meshes={meshes!r} given; a dict of name: mesh, or a list of trained names, expected"
            )
        if bad := [name for name in meshes if not isinstance(name, str) or not name.strip()]:
            raise ValueError(f"name {bad[0]!r} given; a text that is not empty expected")
        if bad := [name for name in meshes if not name.isprintable()]:
            raise ValueError(
                f"name {bad[0]!r} given; one without line breaks and control characters expected"
            )
        if isinstance(symmetries, Mapping) and (unknown := [n for n in symmetries if n not in meshes]):
            raise ValueError(f"symmetries given for {unknown[0]!r}, which is not among the meshes")
        if isinstance(meshes, Mapping):
            with plain_torch(self.device), _evaluating(self.network):
                found = {
                    name: self._from_mesh(name, source, units, symmetries, force)
                    for name, source in meshes.items()
                }
                tokens = {name: encode(self.network, model, meshes[name]) for name, model in found.items()}
        else:
            if symmetries:
                raise ValueError(
                    f"symmetries={symmetries!r} given without meshes: trained objects keep those they were "
                    "trained with; pass {name: mesh} to say others"
                )
            found = {name: self._trained(name) for name in meshes}
            tokens = {name: self._trained_tokens[name] for name in found}
        if not found and not add:
            raise ValueError("no meshes given; register at least one")
        strangers = [name for name, model in found.items() if not model.trained]
        if strangers:
            log.warning(
                "%s: these weights (trained on %s) have not seen %s; expect weak or no poses "
                "until you fine-tune with smope.train.fit",
                ", ".join(strangers),
                ", ".join(self.config.objects),
                "this mesh" if len(strangers) == 1 else "these meshes",
            )
        if (
            isinstance(self.network, SmopePaper)
            and found.keys() | (self.objects if add else {}) != self.trained.keys()
        ):
            log.warning(
                "smope-paper looks at all registered meshes at once: with others than all of %s it was not "
                "trained, and every pose is another",
                ", ".join(self.trained),
            )
        if add:
            found, tokens = {**self.objects, **found}, {**self._token_of, **tokens}
        self._replace_objects(found, tokens)

    def _trained(self, name: str) -> ObjectModel:
        if name not in self.trained:
            raise ValueError(
                f"{name!r} given without a mesh, but the weights know only {', '.join(self.trained)}; "
                "pass {name: mesh} with units"
            )
        return self.trained[name]

    def _from_mesh(
        self,
        name: str,
        source: Any,
        units: str | None,
        symmetries: Mapping[str, Any] | str | None,
        force: bool,
    ) -> ObjectModel:
        if units is None:
            raise ValueError(f'{name}: a mesh needs its units: pass units="m", "cm", "mm" or "in"')
        chosen = symmetries.get(name) if isinstance(symmetries, Mapping) else symmetries
        model = ObjectModel.from_mesh(name, source, units, chosen, force)
        low, high = self.config.diameters
        if not low / 10 <= model.diameter <= high * 10:
            log.warning(
                "%s: diameter %.4g m with units=%r; the weights were trained on %.3g to %.3g m. "
                "Are the units right?",
                name,
                model.diameter,
                units,
                low,
                high,
            )
        known = self.trained.get(name)
        if known is None:
            return model
        if abs(model.diameter / known.diameter - 1) > 0.05:
            log.warning(
                "%s: diameter %.4g m with units=%r, but the weights were trained on %.4g m; "
                "another mesh, or wrong units?",
                name,
                model.diameter,
                units,
                known.diameter,
            )
        if chosen is None and model.fills_the_box_of(known):
            model = replace(model, symmetries=known.symmetries)
        return replace(model, trained=True)

    def _replace_objects(self, objects: Mapping[str, ObjectModel], tokens: Mapping[str, Tokens]) -> None:
        self.objects, self._token_of = dict(objects), dict(tokens)
        self._tokens = join(list(tokens.values()), self.device) if tokens else None
        self._engine.forget()

    # -- images ---------------------------------------------------------------------------------------------

    def predict(
        self,
        image: Any,
        K: Any = None,
        fov: Any = None,
        dist: Any = None,
        threshold: float = LOWEST_SCORE,
        top_k: int = TOP_K,
    ) -> Any:
        """Find the registered objects: one image gives one `Poses`, a list gives a list.

        `image` is a path, a PIL image, a uint8 array [H, W, 3] or a float tensor [3, H, W] in 0..1. `K`
        [3, 3] in pixels of that image, or `fov`, the horizontal field of view in degrees; one for all or one
        an image. `dist` are OpenCV's distortion coefficients. Without K and fov the checkpoint's own camera
        serves, if the image has its size. Detections below `threshold` are left out, and all but the best
        `top_k`.
        """
        threshold, top_k = _checked_options(threshold, top_k)
        with plain_torch(self.device), _evaluating(self.network):
            return self._predict(image, K, fov, dist, threshold, top_k)

    def _predict(self, image: Any, K: Any, fov: Any, dist: Any, threshold: float, top_k: int) -> Any:
        tokens = self._ready()
        many = isinstance(image, (list, tuple))
        device = self.device
        # Read before this returns, so none is copied.
        pictures = load_images(image, device, False) if many else [load_image(image, device, False)]
        cameras = cameras_from(pictures, K, fov, dist, self.config)
        results: list[Poses | None] = [None] * len(pictures)
        trained, slack = self.config.image_size, size_slack(self.network.config)
        prepared = [image_input(p, c, trained, slack, device) for p, c in zip(pictures, cameras, strict=True)]
        by_shape: dict[tuple[Any, ...], list[int]] = {}
        for i, (tensor, _) in enumerate(prepared):
            by_shape.setdefault((*tensor.shape, tensor.dtype), []).append(i)
        for indices in by_shape.values():
            images = [prepared[i][0] for i in indices]
            intrinsics = torch.stack([prepared[i][1].K for i in indices])
            table = self._engine(images, intrinsics, tokens, top_k, threshold)
            scaled, own = [prepared[i][1] for i in indices], [cameras[i] for i in indices]
            for i, found in zip(
                indices, read_table(table, scaled, own, self.objects, threshold), strict=True
            ):
                results[i] = found
        poses = [p for p in results if p is not None]
        return poses if many else poses[0]

    def _ready(self) -> Tokens:
        """The meshes to look for, by a network that can predict."""
        if self._tokens is None:
            raise ValueError("no meshes are registered; call register_meshes first")
        dtype = next(self.network.parameters()).dtype
        if dtype != torch.float32:
            raise ValueError(
                f"a network in {dtype} given, torch.float32 expected: call model.network.float(); "
                "the fast pass (model.fast) computes in 16 bits on a GPU"
            )
        return self._tokens

    def stream(self, images: Iterable[Any], **options: Any) -> Generator[Streamed, None, None]:
        """`predict` for any number of images, decoded ahead, in bounded memory: see `smope.stream.stream`."""
        return stream(self, images, **options)


@contextmanager
def _evaluating(network: Network) -> Iterator[None]:
    """In evaluation mode, and back as it was: somebody's training may go on after a look."""
    if not network.training:  # the usual case: to set every module costs as much as a kernel
        yield
        return
    network.eval()
    try:
        yield
    finally:
        network.train()


def _checked_options(threshold: Any, top_k: Any) -> tuple[float, int]:
    """NumPy's and PyTorch's numbers serve as well; True passes for a number in Python, but is not meant."""
    try:
        if isinstance(threshold, (bool, str)) or isinstance(top_k, bool):
            raise TypeError
        lowest, most = float(threshold), operator.index(top_k)
    except (TypeError, ValueError, RuntimeError):
        lowest, most = -1.0, 0
    if not 0 <= lowest <= 1 or most < 1:
        raise ValueError(
            f"threshold {threshold!r} and top_k {top_k!r} given; 0..1 and a whole number expected (1 or more)"
        )
    return lowest, most


def _split_objects(
    tensors: Mapping[str, Tensor], config: ModelConfig
) -> tuple[dict[str, Tensor], dict[str, ObjectModel], dict[str, Tokens]]:
    """A checkpoint's tensors -> the network's in float32, the trained objects in order, and their tokens."""
    network = {
        key: t.float() if t.is_floating_point() else t
        for key, t in tensors.items()
        if not key.startswith("objects.")
    }
    objects, tokens = {}, {}
    for name in config.objects:
        prefix = f"objects.{name}."
        own = {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        try:
            objects[name] = model = ObjectModel.from_tensors(name, own)
            tokens[name] = tokens_from_tensors(config.network, model, own)
        except KeyError as error:
            raise hub.WeightsError(
                f"the weights lack {prefix}{error.args[0]}, though config.json names {name!r}"
            ) from None
    return network, objects, tokens
