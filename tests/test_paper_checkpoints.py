"""Files of the authors' trainer: what is read from them, and what is refused."""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any

import pytest
import torch
import trimesh
from torch import Tensor

from smope.checkpoints_authors import (
    AuthorsCheckpoint,
    CheckpointError,
    load_pickle,
    order_meshes,
    our_key,
    read_checkpoint,
)
from smope.networks.paper_find import PaperTokens, find
from smope.networks.smope_paper import normalise
from smope.objects import ObjectModel
from smope.paper_surfaces import object_surfaces

NAMES = ("tram_001.obj", "car_001.obj", "truck_001.obj", "van_001.obj", "pedestrian_001.obj")


@pytest.fixture(scope="module")
def layout(fixtures_root: Path) -> dict[str, Any]:
    text = (fixtures_root / "authors_parity" / "checkpoint_layout.json").read_text(encoding="utf-8")
    layout: dict[str, Any] = json.loads(text)
    return layout


def made_up(layout: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """A file as the trainer writes it, all 624 tensors with one value each so that it stays small."""
    shared = layout["model"]["shared"]
    model: collections.OrderedDict[str, Tensor] = collections.OrderedDict()
    for number, (key, shape, kind) in enumerate(layout["model"]["entries"]):
        value = torch.tensor(number / 1000).to(getattr(torch, kind))
        model[key] = model[shared[key]] if key in shared else value.expand(shape)
    fields = {name: field["default"] for name, field in layout["args"]["fields"].items()}
    types = {name: field["type"] for name, field in layout["args"]["fields"].items()}
    paths = [name for name, kind in types.items() if kind == "PosixPath"]
    fields.update({name: PosixPath(fields[name] or "board") for name in paths})
    fields.update(arguments)
    groups = [dict(group, params=list(range(3))) for group in layout["optimizer"]["param_groups"]]
    zeros = torch.zeros(())
    state = {i: {"step": zeros, "exp_avg": zeros.expand(4), "exp_avg_sq": zeros.expand(4)} for i in range(3)}
    return {
        "model": model,
        "optimizer": {"state": state, "param_groups": groups},
        "lr_scheduler": layout["lr_scheduler"]["state"],
        "epoch": 123,
        "args": argparse.Namespace(**fields),
    }


@pytest.fixture(scope="module")
def checkpoint(layout: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> AuthorsCheckpoint:
    path = tmp_path_factory.mktemp("authors") / "checkpoint0123.pth"
    torch.save(made_up(layout), path)
    return read_checkpoint(path)


def test_sizes_names_and_settings_are_read(checkpoint: AuthorsCheckpoint) -> None:
    config = checkpoint.config
    assert (config.classes, config.queries, config.levels, config.width, config.heads) == (1, 300, 4, 256, 8)
    assert (config.encoder_layers, config.decoder_layers, config.hidden) == (6, 6, 1024)
    assert (config.surface_points, config.template_vertices) == (6000, 2562)
    assert not config.box_refine
    assert not config.two_stage
    assert checkpoint.mesh_names == NAMES
    assert checkpoint.epoch == 123
    assert checkpoint.dataset == "KITTI3D"
    assert (config.depth_shift, config.box_shift) == (0.01, 0.5)


def test_every_tensor_arrives(checkpoint: AuthorsCheckpoint, layout: dict[str, Any]) -> None:
    state = checkpoint.network().state_dict()
    shared = layout["model"]["shared"]
    seen = set()
    for number, (key, shape, _) in enumerate(layout["model"]["entries"]):
        if key in shared:
            continue
        ours = our_key(key)
        assert ours is not None
        assert tuple(state[ours].shape) == tuple(shape)
        wanted = 0 if key.endswith("num_batches_tracked") else number / 1000
        assert state[ours].unique().tolist() == pytest.approx([wanted])
        seen.add(ours)
    assert seen == set(state)


def test_the_network_finds_with_registered_meshes(checkpoint: AuthorsCheckpoint) -> None:
    objects = [
        ObjectModel.from_mesh(f"box{i}", trimesh.creation.box((0.1, 0.2, 0.1 + 0.1 * i)), "m")
        for i in range(2)
    ]
    surfaces = object_surfaces(objects, checkpoint.config.surface_points)
    again = object_surfaces(objects, checkpoint.config.surface_points)
    assert torch.equal(surfaces.points, again.points)
    network = checkpoint.network()
    with torch.no_grad():
        for parameter in network.parameters():  # constant weights make every query alike
            parameter.uniform_(-0.05, 0.05, generator=torch.Generator().manual_seed(parameter.numel()))
        features = network.encode_meshes(surfaces)
    images = torch.rand(2, 3, 64, 96)
    raw = network.find(normalise(images), torch.zeros(2, 64, 96, dtype=torch.bool), features, top_k=5)
    assert raw.scores.shape == (2, 5)
    assert (raw.scores.diff() <= 0).all()
    identity = raw.rotation @ raw.rotation.mT
    torch.testing.assert_close(identity, torch.eye(3).expand_as(identity), atol=1e-5, rtol=0)
    assert torch.linalg.det(raw.rotation).flatten().tolist() == pytest.approx([1.0] * 10, abs=1e-5)

    # Both meshes are centred, so `Found` has the network's own translations; off-centre ones move by R c.
    K = torch.tensor([[100.0, 0, 48], [0, 100, 32], [0, 0, 1]]).expand(2, 3, 3)
    centred = find(network, images, K, PaperTokens(features, torch.zeros(2, 3)), top_k=5)
    moved = find(network, images, K, PaperTokens(features, torch.tensor([[0.1, 0, 0]] * 2)), top_k=5)
    pose = centred.pairs.poses[-1]
    torch.testing.assert_close(pose.translation - raw.translation, torch.tensor([0, 0, 0.01]).expand(2, 5, 3))
    torch.testing.assert_close(
        moved.pairs.poses[-1].translation - pose.translation, 0.1 * raw.rotation[..., 0]
    )
    torch.testing.assert_close((centred.boxes - raw.boxes)[..., 0] * 96, torch.full((2, 5), 0.5))
    torch.testing.assert_close((centred.boxes - raw.boxes)[..., 1] * 64, torch.full((2, 5), 0.5))
    torch.testing.assert_close(centred.boxes[..., 2:], raw.boxes[..., 2:])


def test_linemod_needs_no_shift(layout: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    names = [f"ape_0{i}.obj" for i in range(9)]
    torch.save(
        made_up(layout, dataset_name="Linemod_preprocessed", model_name=names, model_class_num=9), path
    )
    checkpoint = read_checkpoint(path)
    assert (checkpoint.config.depth_shift, checkpoint.config.box_shift) == (0, 0)
    assert checkpoint.mesh_names == tuple(names)


class Hostile:
    """Runs a command when it is unpickled by a reader that lets it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("where", ["top", "args", "inside"])
def test_a_hostile_file_is_refused_and_not_run(layout: dict[str, Any], tmp_path: Path, where: str) -> None:
    target, path = tmp_path / "made_by_the_file", tmp_path / "checkpoint.pth"
    content: Any = made_up(layout)
    if where == "top":
        content = Hostile(target)
    elif where == "args":
        content["args"] = Hostile(target)
    else:
        content["args"].device = Hostile(target)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="refused"):
        read_checkpoint(path)
    assert not target.exists()


@pytest.mark.parametrize("other", [torch.nn.Linear(2, 2), PurePosixPath("x"), re.compile("x")])
def test_other_classes_are_refused(tmp_path: Path, other: Any) -> None:
    torch.save({"args": other}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="refused"):
        load_pickle(tmp_path / "x.pth")


def test_what_is_no_checkpoint(layout: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="refused"):
        read_checkpoint(tmp_path / "text.pth")
    path = tmp_path / "x.pth"
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="a list in it"):
        read_checkpoint(path)
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match="no 'args'"):
        read_checkpoint(path)
    torch.save({"model": {"a": 1}, "args": argparse.Namespace()}, path)
    with pytest.raises(CheckpointError, match="not a dict of tensors"):
        read_checkpoint(path)
    torch.save({"model": {"a": torch.zeros(1)}, "args": argparse.Namespace(nheads=8)}, path)
    with pytest.raises(CheckpointError, match="is this a checkpoint of the authors' network"):
        read_checkpoint(path)


def test_damaged_content_is_named(layout: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.pth"

    def refused(message: str, content: dict[str, Any]) -> None:
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path)

    content = made_up(layout)
    del content["model"]["pose_head.l5.bias"]
    refused("1 tensors are missing.*pose_head.pose_out.bias", content)
    content = made_up(layout)
    content["model"]["pose_head.l9.bias"] = torch.zeros(3)
    refused("pose_head.l9.bias: not a part", content)
    content = made_up(layout)
    content["model"]["pose_head.l5.bias"] = torch.zeros(6)
    refused(r"pose_head.l5.bias: shape \(6,\) given, \(7,\) expected", content)
    content = made_up(layout)
    content["model"]["detr.class_embed.3.bias"] = torch.ones(2)
    refused("detr.class_embed.3.bias: differs from the tensor it shares", content)
    content = made_up(layout, model_class_num=6)
    refused("args name 5 meshes.*model_class_num 6", content)
    content = made_up(layout)
    del content["args"].model_name
    refused("args lack 'model_name'", content)


def test_meshes_are_put_in_the_checkpoints_order() -> None:
    given = {"Pedestrian": 1, "van_001": 2, "truck": 3, "car": 4, "tram_001.obj": 5}
    assert list(order_meshes(NAMES, given).items()) == [
        ("tram_001.obj", 5),
        ("car", 4),
        ("truck", 3),
        ("van_001", 2),
        ("Pedestrian", 1),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["tram", "car", "truck", "van"], "missing: pedestrian_001.obj; surplus: none"),
        (["tram", "car", "truck", "van", "pedestrian", "bus"], "missing: none; surplus: bus"),
        (["tram", "car", "truck", "van", "person"], "missing: pedestrian_001.obj; surplus: person"),
        (["tram", "tram_001", "car", "truck", "van", "pedestrian"], r"tram_001.obj \(given as"),
    ],
)
def test_a_missing_or_surplus_mesh_is_an_error(given: list[str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        order_meshes(NAMES, dict.fromkeys(given, 0))
