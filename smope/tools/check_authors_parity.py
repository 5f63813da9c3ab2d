"""Compare our network, losses and mesh terms with what the authors' code computed, array by array.

    python -m smope.tools.check_authors_parity DIR

DIR is a parity fixture: spec.json and the .npz files it speaks of. Weights and inputs are drawn by the
fixture's rule. Exits 1 beyond the bounds, at a missing or an unknown array, and where drawn inputs differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smope.networks.paper_meshes import MeshSurfaces
from smope.tools import parity_inputs as inputs
from smope.tools.parity_forward import build, forward_values, traced
from smope.tools.parity_losses import loss_cases, loss_values, mesh_truth, mesh_values, ops_values

Array = NDArray[Any]
Arrays = dict[str, Array]

FORMAT = "smope-parity/1"
FORWARD_BOUND = (1e-4, 0.0)  # absolute, relative
OTHER_BOUND = (1e-6, 1e-5)


class FixtureError(ValueError):
    """A fixture that cannot be read or is not whole."""


@dataclass(frozen=True)
class Line:
    """The outcome of one array."""

    name: str
    difference: float
    fault: str = ""  # empty where it agrees


def compare(name: str, ours: Array, theirs: Array, bound: tuple[float, float]) -> Line:
    """`bound` is absolute and relative to the stored value; whole numbers must be equal, infinities agree in
    place and sign, and any NaN is a fault."""
    if ours.shape != theirs.shape:
        return Line(name, np.inf, f"shape {ours.shape}, stored {theirs.shape}")
    if theirs.dtype.kind in "biu":
        if ours.dtype.kind not in "biu":
            return Line(name, np.inf, f"type {ours.dtype}, stored {theirs.dtype}")
        wrong = int((ours != theirs).sum())
        return Line(name, float(wrong), f"{wrong} of {ours.size} whole numbers differ" if wrong else "")
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    if np.isnan(a).any() or np.isnan(b).any():
        return Line(name, np.inf, f"{np.isnan(a).sum()} NaN, stored {np.isnan(b).sum()}")
    finite = np.isfinite(b)
    if not np.array_equal(finite, np.isfinite(a)) or not np.array_equal(a[~finite], b[~finite]):
        return Line(name, np.inf, "infinities in other places")
    difference = np.abs(a[finite] - b[finite])
    if not difference.size:
        return Line(name, 0.0)
    excess = difference - (bound[0] + bound[1] * np.abs(b[finite]))
    beyond = int((excess > 0).sum())
    fault = f"{beyond} of {ours.size} beyond {bound[0]:g} + {bound[1]:g} |value|" if beyond else ""
    return Line(name, float(difference.max()), fault)


def check_file(
    file: str,
    stored: Arrays,
    ours: Mapping[str, Tensor],
    slices: Mapping[str, Sequence[int]],
    bound: tuple[float, float],
    read: Callable[[str], bool] = lambda name: False,
    may_lack: Callable[[str], bool] = lambda name: False,
    described: Callable[[str], bool] = lambda name: False,
) -> Iterator[Line]:
    """Every array of one file. `read` tells inputs, which are not compared; `may_lack` what the file need not
    hold; `described` what it must hold statistics of where it holds a part."""
    values = {name: tensor.detach().cpu().numpy() for name, tensor in ours.items()}
    for name, full in list(values.items()):
        strides = slices.get(name)
        values[name] = full if strides is None else full[tuple(slice(None, None, s) for s in strides)]
        # An array that is stored whole needs no description.
        if f"stat.{name}" in stored or (strides is not None and described(name)):
            values[f"stat.{name}"] = statistics(full)
    for name in [*stored, *(name for name in values if name not in stored)]:
        if name not in stored:
            if not may_lack(name):
                yield Line(f"{file}/{name}", np.inf, "missing in the fixture")
        elif name in values:
            yield compare(f"{file}/{name}", values[name], stored[name], bound)
        elif not read(name):
            yield Line(f"{file}/{name}", np.inf, "unknown: nothing of ours belongs to it")


def statistics(full: Array) -> NDArray[np.float64]:
    x = full.astype(np.float64)
    return np.array([x.mean(), x.std(), x.min(), x.max(), np.abs(x).mean()])


def check_fixture(folder: Path, dtype: torch.dtype = torch.float64) -> Iterator[Line]:
    """Every array of a fixture, file by file."""
    spec = _read_spec(folder)
    pictures, (points, normals) = inputs.images(spec), inputs.mesh_samples(spec)
    sums = spec.get("sums", {})
    yield from _check_sum("images", {str(i): a for i, a in enumerate(pictures)}, sums)
    yield from _check_sum("mesh_samples", {"points": points, "normals": normals}, sums)
    images = [torch.from_numpy(picture).to(dtype) for picture in pictures]
    surfaces = MeshSurfaces(torch.from_numpy(points).to(dtype), torch.from_numpy(normals).to(dtype))

    for variant, description in spec["variants"].items():
        weights = inputs.weights(spec, variant)
        yield from _check_sum(f"weights.{variant}", weights, sums)
        state = {name: torch.from_numpy(array) for name, array in weights.items()}
        network = build(description["args"], state, dtype)
        values = forward_values(network, images, surfaces)
        slices = spec["slices"].get(variant, {})
        stored = _read_arrays(folder, variant)
        yield from check_file(variant, stored, values, slices, FORWARD_BOUND, described=traced)
        del network, weights, state
    yield from _check_rest(folder, spec)


def _check_rest(folder: Path, spec: inputs.Spec) -> Iterator[Line]:
    """Meshes, losses and small operations, in float32 as the authors' code ran them."""
    stored = _read_arrays(folder, "meshes")
    tensors = _tensors(stored)
    yield from check_file(
        "meshes",
        stored,
        mesh_values(spec, tensors),
        spec["slices"].get("meshes", {}),
        OTHER_BOUND,
        read=lambda name: name == "faces" or name.startswith("verts."),
        may_lack=lambda name: _index(name, "out.normalised_verts.") > 1,
    )
    meshes = mesh_truth(spec, tensors)
    stored = _read_arrays(folder, "losses")
    tensors = _tensors(stored)
    values: dict[str, Tensor] = {}
    cases = sorted({*loss_cases(tensors), "main", "one_empty"})
    for case in cases:
        values.update(loss_values(spec, tensors, case, meshes))

    def may_lack(name: str) -> bool:
        case, _, rest = name.partition(".")
        if case != "main":
            return rest.startswith(("model3d.", "sampled."))
        return _index(rest, "sampled.sample") > 1

    yield from check_file(
        "losses",
        stored,
        values,
        spec["slices"].get("losses", {}),
        OTHER_BOUND,
        read=lambda name: ".in." in name or name.partition(".")[2].startswith("target"),
        may_lack=may_lack,
    )
    stored = _read_arrays(folder, "ops")
    values = ops_values(_tensors(stored))
    slices = spec["slices"].get("ops", {})
    known = (
        *(f"msda.{name}" for name in ("value", "spatial_shapes", "locations", "weights", "grad_output")),
        *("pos.mask", "inverse_sigmoid.x", "giou.boxes1_cxcywh", "giou.boxes2_cxcywh"),
        *(f"tgm.{name}" for name in ("quaternion", "t", "points")),
    )
    yield from check_file("ops", stored, values, slices, OTHER_BOUND, read=lambda name: name in known)


def _index(name: str, prefix: str) -> int:
    """The number right behind `prefix`; -1 where the name begins otherwise."""
    return int(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else -1


def _check_sum(name: str, arrays: Mapping[str, Array], sums: Mapping[str, str]) -> Iterator[Line]:
    """Where the drawn inputs differ, every array after them is another network's."""
    if name in sums and inputs.sum_of(arrays) != sums[name]:
        yield Line(f"spec/sums.{name}", np.inf, "what we draw has another sha256 than spec.json says")


def _read_spec(folder: Path) -> inputs.Spec:
    path = folder / "spec.json"
    if not path.is_file():
        raise FixtureError(f"{folder}: no spec.json; the folder of a parity fixture expected")
    try:
        spec: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FixtureError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(spec, dict) or spec.get("format") != FORMAT:
        raise FixtureError(f"{path}: a specification of format {FORMAT!r} expected, {spec!r:.60} given")
    return spec


def _read_arrays(folder: Path, name: str) -> Arrays:
    path = folder / f"{name}.npz"
    if not path.is_file():
        raise FixtureError(f"{path}: missing")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (ValueError, OSError, BadZipFile) as error:
        raise FixtureError(f"{path}: cannot be read ({error})") from None


class _Stored(dict[str, Tensor]):
    def __missing__(self, key: str) -> Tensor:
        raise FixtureError(f"{key}: an input that the fixture lacks")


def _tensors(stored: Arrays) -> dict[str, Tensor]:
    return _Stored({name: torch.from_numpy(array) for name, array in stored.items()})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m smope.tools.check_authors_parity",
        description="Compare this library with what the authors' code computed, array by array.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a parity fixture")
    parser.add_argument(
        "--dtype", choices=("float32", "float64"), default="float64", help="of the forward passes"
    )
    options = parser.parse_args(arguments)
    count, faults, worst = 0, 0, Line("nothing", 0.0)
    try:
        for line in check_fixture(options.folder, getattr(torch, options.dtype)):
            count += 1
            faults += bool(line.fault)
            worst = max(worst, line, key=lambda one: one.difference)
            fault = f"   FAULT: {line.fault}" if line.fault else ""
            sys.stdout.write(f"{line.difference:10.3e}  {line.name}{fault}\n")
    except (ValueError, RuntimeError) as error:  # sizes that do not fit together, an unreadable file
        sys.stdout.write(f"FAULT: {error}\n")
        return 1
    except KeyError as error:
        sys.stdout.write(f"FAULT: {options.folder}: {error.args[0]!r} is missing\n")
        return 1
    sys.stdout.write(
        f"{count} arrays compared, largest difference {worst.difference:.3e} in {worst.name}\n"
        f"{f'{faults} faults' if faults else 'all within the bounds'}\n"
    )
    return 1 if faults or not count else 0


if __name__ == "__main__":
    sys.exit(main())
