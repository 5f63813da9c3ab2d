"""The authors' network through the public surface: their checkpoints, `smope convert`, and `fit`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from scipy.spatial.transform import Rotation
from small_model import TINY_PAPER, ThinResNet, quick_fits
from test_paper_checkpoints import NAMES, Hostile, layout, made_up
from test_paper_deformable_detr import published, reference

from smope import SMOPE, Poses, cli
from smope.architectures import build_network
from smope.checkpoints_authors import AuthorsCheckpoint, CheckpointError, read_checkpoint
from smope.config import ConfigError, ModelConfig
from smope.data.bop import LINEMOD_NAMES
from smope.data.records import Annotation, Record
from smope.networks.smope_paper import SmopePaperConfig, normalise
from smope.paper_surfaces import raw_surfaces
from smope.train import fit
from smope.train.choice import make_objective, network_config, paper_weights
from smope.train.curves import read_rows
from smope.train.recipe import OptimConfig, Recipe, RunConfig
from smope.train.start import begin

__all__ = ["layout"]  # a fixture

POINTS = 600  # of each mesh's surface


@pytest.fixture(scope="module", autouse=True)
def thin() -> Iterator[None]:
    """A small backbone in all tests here; test_paper_checkpoints and test_paper_parity have the whole one."""
    with pytest.MonkeyPatch.context() as patch:
        quick_fits(patch)
        yield


@pytest.fixture(scope="module")
def authors_file(layout: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the trainer writes it, but of fewer layers, channels, surface points and vertices; random weights
    answer differently from query to query."""
    content = made_up(layout)
    body = ThinResNet().state_dict()
    few = {2562: 42, 3 * 2562: 3 * 42}
    for key, tensor in list(content["model"].items()):
        _, in_body, rest = key.partition("backbone.0.body.")
        sizes = list(tensor.shape)
        if in_body and rest in body:
            sizes = list(body[rest].shape)
        elif level := re.search(r"input_proj\.(\d)\.0\.weight$", key):
            sizes[1] = ThinResNet.channels[min(int(level[1]), 2)]
        elif re.search(r"subnet_(vert|normal)\.0\.weight$", key):
            sizes[1] = 3 * POINTS
        elif "subnet_decoder_samples." in key:
            sizes = [few.get(size, size) for size in sizes]
        content["model"][key] = tensor[tuple(map(slice, sizes))]
        if re.search(r"encoder\.layers\.[1-5]\.|decoder\.layers\.[2-5]\.", key) or (
            in_body and rest not in body
        ):
            del content["model"][key]
    draw = torch.Generator().manual_seed(0)
    drawn: dict[int, torch.Tensor] = {}
    for key, tensor in content["model"].items():
        if not tensor.is_floating_point():
            continue
        mark = tensor.data_ptr()
        if mark not in drawn:
            if key.endswith(("running_var", "norm.weight")) or ".bn" in key or "downsample.1" in key:
                value = float(key.endswith(("weight", "running_var")))
                drawn[mark] = torch.full(tensor.shape, value)
            else:
                inputs = tensor[0].numel() if tensor.dim() > 1 else 16
                # Queries look at places of their own, so that boxes differ.
                spread = 8.0 if "reference_points" in key or "query_embed" in key else 1.5
                drawn[mark] = torch.randn(tensor.shape, generator=draw) * (spread / inputs**0.5)
        content["model"][key] = drawn[mark]
    path = tmp_path_factory.mktemp("authors") / "checkpoint0123.pth"
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def mesh_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Boxes that stand on their origin, in metres; one corner is listed four times, as in their files."""
    folder = tmp_path_factory.mktemp("meshes")
    for i, name in enumerate(NAMES):
        box = trimesh.creation.box((1.5 + 0.2 * i, 3.0, 1.0 + 0.3 * i))
        vertices = box.vertices + np.array([0, 0, 0.5 + 0.15 * i])
        lines = [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in [*vertices, *[vertices[0]] * 3]]
        lines += [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in box.faces]
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def checkpoint(authors_file: Path) -> AuthorsCheckpoint:
    return read_checkpoint(authors_file)


@pytest.fixture(scope="module")
def model(authors_file: Path, mesh_folder: Path) -> SMOPE:
    meshes = {name.split("_")[0]: mesh_folder / name for name in sorted(NAMES)}  # not their order
    return SMOPE.from_pretrained(authors_file, device="cpu", meshes=meshes, units="m")


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 255, (10, 30, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((1225, 370), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def poses(model: SMOPE, photo: np.ndarray) -> Poses:
    found: Poses = model.predict(photo, threshold=0.0, top_k=6)  # of the trained size: no camera is needed
    return found


def test_a_checkpoint_becomes_a_model(model: SMOPE) -> None:
    assert list(model.objects) == ["tram", "car", "truck", "van", "pedestrian"]
    assert model.config.architecture == "smope-paper"
    assert model.config.image_size == (1225, 370)
    assert model.config.K[0][0] == pytest.approx(0.52 * 1225)
    assert model.objects["car"].trained
    assert model.objects["car"].centre.tolist() == pytest.approx([0, 0, 0.65], abs=1e-6)


def test_predict_is_what_the_network_says(
    checkpoint: AuthorsCheckpoint, poses: Poses, photo: np.ndarray, mesh_folder: Path
) -> None:
    """Metres, quaternions read scalar last, boxes and depth put right by what the annotations were off by."""
    network = checkpoint.network()
    images = normalise(torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float() / 255)
    with torch.no_grad():
        surfaces = raw_surfaces([mesh_folder / name for name in NAMES], POINTS)
        outputs = network(images, torch.zeros(1, 370, 1225, dtype=torch.bool), surfaces)
    assert outputs.poses is not None
    scores = outputs.detections.logits[-1][0].softmax(-1)[:, 0]
    of_score = {round(float(s), 5): q for q, s in enumerate(scores)}
    assert len(poses) > 1
    assert poses.scores.tolist() == sorted(poses.scores.tolist(), reverse=True)
    for i in range(len(poses)):
        query = of_score[round(float(poses.scores[i]), 5)]
        label = int(outputs.poses.class_logits[0, query].argmax())
        raw = outputs.poses.raw[0, query, label].double().numpy()
        assert int(poses.labels[i]) == label
        assert poses.T_CO[i, :3, 3].numpy() == pytest.approx(raw[:3] + np.array([0, 0, 0.01]), abs=2e-4)
        assert poses.T_CO[i, :3, :3].numpy() == pytest.approx(
            Rotation.from_quat(raw[3:]).as_matrix(), abs=2e-3
        )
        cx, cy, w, h = outputs.detections.boxes[-1][0, query].tolist()
        box = [1225 * (cx - w / 2), 370 * (cy - h / 2), 1225 * (cx + w / 2), 370 * (cy + h / 2)]
        assert poses.boxes_xyxy[i].tolist() == pytest.approx(box, abs=0.05)
    assert poses.scale.unique().tolist() == [1.0]


def test_it_converts_and_predicts_the_same(
    authors_file: Path, mesh_folder: Path, poses: Poses, photo: np.ndarray, tmp_path: Path
) -> None:
    out = tmp_path / "converted"
    assert (
        cli.main(["convert", str(authors_file), str(out), "--meshes", str(mesh_folder), "--units", "m"]) == 0
    )
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    config = ModelConfig.load(out / "config.json")
    assert config.objects == tuple(name.removesuffix(".obj") for name in NAMES)
    again = SMOPE.from_pretrained(out, device="cpu").predict(photo, threshold=0.0, top_k=6)
    assert torch.equal(again.T_CO, poses.T_CO)
    assert torch.equal(again.scores, poses.scores)
    assert torch.equal(again.boxes_xyxy, poses.boxes_xyxy)
    assert torch.equal(again.labels, poses.labels)


def test_the_same_meshes_registered_anew_change_nothing(
    model: SMOPE, mesh_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = model._tokens
    again = {name: mesh_folder / f"{name}_001.obj" for name in model.objects}
    with caplog.at_level(logging.WARNING):
        model.register_meshes(again, "m")
    assert not caplog.records
    assert before is not None
    assert model._tokens is not None
    torch.testing.assert_close(model._tokens.features, before.features, atol=1e-5, rtol=0)  # type: ignore[union-attr]
    with caplog.at_level(logging.WARNING):
        model.register_meshes(["car", "van"])
    assert "every pose is another" in caplog.text
    model.register_meshes(list(model.trained))


def test_a_linemod_checkpoint_takes_nine_meshes_in_millimetres(authors_file: Path, tmp_path: Path) -> None:
    content = torch.load(authors_file, weights_only=False)
    names = [LINEMOD_NAMES[i] for i in (1, 2, 5, 6, 8, 9, 10, 11, 12)]
    for name, value in {
        "dataset_name": "Linemod_preprocessed",
        "model_name": [f"{name}.obj" for name in names],
        "model_class_num": 9,
    }.items():
        setattr(content["args"], name, value)
    torch.save(content, tmp_path / "checkpoint.pth")
    boxes = {name: trimesh.creation.box((40.0 + 5 * i, 60.0, 80.0)) for i, name in enumerate(names)}
    model = SMOPE.from_pretrained(tmp_path / "checkpoint.pth", device="cpu", meshes=boxes, units="mm")
    assert list(model.objects) == names
    assert model.objects["ape"].diameter == pytest.approx(
        0.001 * np.linalg.norm((40.0, 60.0, 80.0)), rel=1e-5
    )
    assert np.diag(model.config.K).tolist() == pytest.approx([572.4114, 573.57043, 1])
    found = model.predict(np.full((480, 640, 3), 90, np.uint8), threshold=0.0, top_k=4)
    assert len(found)
    assert set(found.names) <= set(names)
    # Nothing is to be put right here: z is what the network says.
    network = read_checkpoint(tmp_path / "checkpoint.pth").network()
    with torch.no_grad():
        images = normalise(torch.full((1, 3, 480, 640), 90 / 255))
        padding = torch.zeros(1, 480, 640, dtype=torch.bool)
        raw = network.find(images, padding, model._tokens.features, top_k=4)  # type: ignore[union-attr]
    seen = raw.translation[0, :, 2].tolist()
    assert all(min(abs(z - s) for s in seen) < 1e-4 for z in found.T_CO[:, 2, 3].tolist())


def test_what_a_checkpoint_lacks_is_asked_for(authors_file: Path, mesh_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pass meshes=\{name: mesh\} and units for tram_001.obj"):
        SMOPE.from_pretrained(authors_file)
    four = {name: mesh_folder / name for name in NAMES[:4]}
    with pytest.raises(CheckpointError, match=r"missing: pedestrian_001.obj; surplus: none"):
        SMOPE.from_pretrained(authors_file, meshes=four, units="m")


def test_a_hostile_pickle_is_refused_in_one_line(
    mesh_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, path, out = tmp_path / "made_by_the_file", tmp_path / "checkpoint.pth", tmp_path / "out"
    torch.save({"model": {}, "args": Hostile(target)}, path)
    assert cli.main(["convert", str(path), str(out), "--meshes", str(mesh_folder), "--units", "m"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "refused" in said[0]
    assert not target.exists()
    assert not out.exists()
    assert cli.main(["convert", str(tmp_path), str(out)]) == 2
    assert ".pth file of the authors' trainer expected" in capsys.readouterr().err


# -- training -----------------------------------------------------------------------------------------------

RUN = RunConfig(
    max_steps=5,
    batch_size=2,
    workers=0,
    precision="fp32",
    log_every=1,
    eval_minutes=0.0,
    eval_images=2,
    tensorboard=False,
    progress_bar=False,
)


@pytest.fixture
def meshes() -> dict[str, trimesh.Trimesh]:
    return {
        "brick": trimesh.creation.box((0.12, 0.07, 0.05)),
        "can": trimesh.creation.cylinder(0.04, 0.11, sections=24),
    }


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    found = []
    for index in range(8):
        file = tmp_path / f"{index:06d}.png"
        Image.fromarray(np.full((96, 130, 3), 25 * index, np.uint8)).save(file)
        pose = np.eye(4)
        pose[:3, 3] = 0.0, 0.0, 0.8
        box = np.array([40.0, 30.0, 80.0, 60.0])
        names = ["brick", "can"][: 1 + index % 2]
        K = np.array([[120.0, 0, 64.5], [0, 120.0, 47.5], [0, 0, 1]])
        found.append(Record(str(index), file, K, tuple(Annotation(name, pose, box) for name in names)))
    return found


@pytest.mark.parametrize(("objective", "steps"), [("paper", 5), ("paper-verbatim", 1)])
def test_steps_of_the_authors_network(
    meshes: dict[str, trimesh.Trimesh],
    records: list[Record],
    tmp_path: Path,
    objective: str,
    steps: int,
) -> None:
    recipe = Recipe(network=TINY_PAPER, run=replace(RUN, max_steps=steps), architecture="smope-paper")
    out = tmp_path / "out"
    folder = fit(meshes, "m", dataset=records, out=out, recipe=recipe, objective=objective, device="cpu")
    model = SMOPE.from_pretrained(folder, device="cpu")
    assert model.config.architecture == "smope-paper"
    assert not model.config.network.listed_vertices
    found = model.predict(np.zeros((96, 130, 3), np.uint8), threshold=0.0)
    assert len(found)
    assert torch.isfinite(found.T_CO).all()
    rows = [row for row in read_rows(out / "curves.csv") if "loss" in row]
    assert len(rows) == steps
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    assert {"loss/loss_bbox", "loss/pose_6dof_rotation", "loss/model3d_points"} <= rows[0].keys()


def test_a_detector_starts_from_deformable_detr(
    meshes: dict[str, trimesh.Trimesh],
    records: list[Record],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = published(reference(thin=True, with_box_refine=True))
    path = tmp_path / "r50_deformable_detr.pth"
    torch.save({"model": state}, path)
    recipe = Recipe(
        network={"surface_points": 50, "template_vertices": 42},
        run=replace(RUN, max_steps=1),
        optim=OptimConfig(lr=0.0, warmup_steps=0, weight_decay=0.0),
        architecture="smope-paper",
    )
    with caplog.at_level(logging.INFO, logger="smope"):
        folder = fit(meshes, "m", dataset=records, out=tmp_path / "o", recipe=recipe, init=path, device="cpu")
    told = next(r.getMessage() for r in caplog.records if str(path) in r.getMessage())
    assert all(key in told for key in state), "every key is accounted for"
    fitted = SMOPE.from_pretrained(folder, device="cpu").network.state_dict()
    key = "transformer.encoder.layers.1.linear1.weight"
    torch.testing.assert_close(
        fitted["detector.encoder.1.feed_forward.linear1.weight"], state[key], atol=1e-3, rtol=1e-3
    )
    with pytest.raises(ConfigError, match="set architecture"):
        fit(meshes, "m", dataset=records, out=tmp_path / "s", recipe=Recipe(run=RUN), init=path, device="cpu")


def test_the_authors_checkpoint_says_how_large_the_network_is(
    authors_file: Path, checkpoint: AuthorsCheckpoint
) -> None:
    plan = Recipe(architecture="smope-paper", network={"dropout": 0.0})
    plain = {"depth_shift": 0.0, "box_shift": 0.0, "listed_vertices": False, "dropout": 0.0}
    assert network_config(plan, authors_file) == replace(checkpoint.config, **plain)


def test_the_authors_weights_start_a_training(authors_file: Path, checkpoint: AuthorsCheckpoint) -> None:
    config = network_config(Recipe(architecture="smope-paper"), authors_file)
    network = build_network(config)
    begin(started(network), authors_file, None, resume=False, continue_schedule=False)
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, checkpoint.state[key])


def started(network: torch.nn.Module) -> Any:
    """What `begin` needs of a loop."""
    return SimpleNamespace(
        model=network, start_from=lambda weights, spent=None: network.load_state_dict(weights)
    )


def test_a_backbone_under_torchvisions_names(tmp_path: Path) -> None:
    network = build_network(SmopePaperConfig(**TINY_PAPER))
    shapes = {key: tensor.shape for key, tensor in network.detector.backbone.state_dict().items()}
    state = {key: torch.randn(shape) for key, shape in shapes.items()}
    rest = {"fc.weight": torch.zeros(10, 128), "bn1.num_batches_tracked": torch.zeros((), dtype=torch.int64)}
    torch.save({**state, **rest}, tmp_path / "resnet.pth")
    begin(started(network), None, tmp_path / "resnet.pth", resume=False, continue_schedule=False)
    for key, tensor in network.detector.backbone.state_dict().items():
        assert torch.equal(tensor, state[key])
    torch.save(rest, tmp_path / "none.pth")
    with pytest.raises(ConfigError, match=r"none\.pth: not a ResNet-50 under torchvision's names"):
        begin(started(network), None, tmp_path / "none.pth", resume=False, continue_schedule=False)


def test_what_does_not_go_together(meshes: dict[str, trimesh.Trimesh]) -> None:
    plan = Recipe(objective="paper")
    with pytest.raises(ConfigError, match='trains architecture = "smope-paper" only'):
        make_objective(plan, [], network_config(plan))
    with pytest.raises(ConfigError, match=r"loss.preset: 'coco' given, one of kitti3d, linemod expected"):
        paper_weights({"preset": "coco"})
    with pytest.raises(ConfigError, match=r"architecture: one of \['smope-s', 'smope-paper'\] expected"):
        fit(meshes, "m", architecture="detr", max_steps=1)
    weights = paper_weights({"preset": "linemod", "loss_ce": 2.0})
    assert (weights.model3d_scales, weights.pose_6dof_add, weights.loss_ce) == (120.0, 10.0, 2.0)
    assert paper_weights({"preset": "kitti3d"}).meshes == (0.567, 0.008, 0.284, 0.114, 0.027)
