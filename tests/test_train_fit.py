"""`fit` from meshes to a model folder, on small scenes of two made-up objects."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from small_model import TINY_S as NETWORK
from small_model import quick_fits
from torch import Tensor

from smope import SMOPE
from smope.config import ConfigError
from smope.data.items import Batch
from smope.data.records import Annotation, Record
from smope.networks.outputs import PairOutputs, PoseEstimate
from smope.networks.smope_s import Found
from smope.objects import ObjectModel, Symmetries
from smope.scenes import SceneConfig
from smope.train import fit
from smope.train.checkpoint import load_latest
from smope.train.curves import read_rows
from smope.train.distributed import pick_device
from smope.train.fit import objects_of
from smope.train.held_out import HeldOut
from smope.train.loop import opened
from smope.train.recipe import DataConfig, Recipe, RunConfig
from smope.train.sources import padded, record_source

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("few_textures")

RUN = RunConfig(
    max_steps=4,
    batch_size=2,
    workers=0,
    precision="fp32",
    log_every=2,
    eval_minutes=0.0,
    eval_images=4,
    tensorboard=True,
    progress_bar=False,
)
SCENES = SceneConfig(
    width=160,
    height=120,
    fx=143.0,
    fy=143.0,
    cx=79.5,
    cy=59.5,
    clutter=(0, 0),
    far_clutter=(0, 0),
    targets=(1, 2),
)


def coloured(mesh: trimesh.Trimesh, seed: int) -> trimesh.Trimesh:
    colours = np.random.default_rng(seed).integers(0, 255, (len(mesh.vertices), 4), dtype=np.uint8)
    colours[:, 3] = 255
    mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=colours)
    return mesh


def make_meshes() -> dict[str, trimesh.Trimesh]:
    return {
        "brick": coloured(trimesh.creation.box((0.12, 0.07, 0.05)).subdivide(), 0),
        "can": coloured(trimesh.creation.cylinder(0.04, 0.11, sections=24).subdivide(), 1),
    }


@pytest.fixture(scope="module")
def meshes() -> dict[str, trimesh.Trimesh]:
    return make_meshes()


@pytest.fixture(scope="module")
def fitted(meshes: dict[str, trimesh.Trimesh], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fit")
    folder = fit(meshes, "m", SCENES, out=out, recipe=Recipe(network=NETWORK, run=RUN), device="cpu")
    assert folder == out / "model"
    return out


ENDLESS = """
import sys
sys.path.insert(0, {tests!r})
import pytest
from dataclasses import replace
from small_model import few_textures, quick_fits
from smope.train import fit
from test_train_fit import NETWORK, RUN, SCENES, make_meshes
patch = pytest.MonkeyPatch()
quick_fits(patch)
few_textures(patch)
from smope.train.recipe import Recipe
run = replace(RUN, max_steps=100000, save_seconds=0.5, tensorboard=False)
fit(make_meshes(), "m", SCENES, out={out!r}, recipe=Recipe(network=NETWORK, run=run), device="cpu")
"""


def test_a_killed_fit_goes_on(
    meshes: dict[str, trimesh.Trimesh], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the middle of rendering and learning; what is on the disk is whole, and `resume` goes on."""
    quick_fits(monkeypatch)
    out = tmp_path / "killed"
    code = ENDLESS.format(tests=str(Path(__file__).parent), out=str(out))
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 90
        while not (out / "checkpoint.previous.pt").exists():
            assert process.poll() is None, process.communicate()[1].decode()
            assert time.monotonic() < deadline, "no second checkpoint within 90 s"
            time.sleep(0.05)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    before = load_latest(out / "checkpoint.pt")
    assert before is not None
    reached = before["state"]["step"]
    assert 0 < reached < 100000

    run = replace(RUN, max_steps=reached + 2, tensorboard=False)
    folder = fit(
        meshes, "m", SCENES, out=out, recipe=Recipe(network=NETWORK, run=run), resume=True, device="cpu"
    )
    after = load_latest(out / "checkpoint.pt")
    assert after is not None
    assert after["state"]["step"] == reached + 2
    assert list(SMOPE.from_pretrained(folder).objects) == ["brick", "can"]


def test_fit_leaves_a_model_that_predicts_and_all_its_records(fitted: Path) -> None:
    model = SMOPE.from_pretrained(fitted / "model")
    assert list(model.objects) == ["brick", "can"]
    assert model.config.image_size == (160, 120)
    poses = model.predict(np.zeros((120, 160, 3), np.uint8), threshold=0.0)
    assert torch.isfinite(poses.T_CO).all()
    record = json.loads((fitted / "run.json").read_text())
    assert record["about"]["objects"] == ["brick", "can"]
    assert record["about"]["recipe"]["scenes"]["width"] == 160
    assert record["pieces"][0]["images"] == 8
    rows = read_rows(fitted / "curves.csv")
    assert {"loss", "loss/label", "score/AR_MSSD"} <= {name for row in rows for name in row}
    stored = json.loads((fitted / "held_out_scores.json").read_text())
    assert stored["images"] == 4
    assert 0 <= stored["held_out"]["AR"] <= 1
    with Image.open(fitted / "first_batch.jpg") as sheet:
        assert sheet.size == (320, 128)
    assert list((fitted / "tensorboard").glob("events*"))


def test_a_small_checkpoint_and_the_recipe_give_the_model_of_the_run(
    meshes: dict[str, trimesh.Trimesh], fitted: Path, tmp_path: Path
) -> None:
    """tools/model_of_run.py; the run's own model is the oracle, to the bit."""
    for name, mesh in meshes.items():
        mesh.export(tmp_path / f"{name}.ply")
    lines = [
        '[data]\nunits = "m"',
        "[data.meshes]",
        *(f'{name} = "{tmp_path / name}.ply"' for name in meshes),
        "[network]",
        *(f"{key} = {json.dumps(value)}" for key, value in NETWORK.items()),
        "[scenes]",
        *(f"{key} = {getattr(SCENES, key)}" for key in ("width", "height", "fx", "fy", "cx", "cy")),
    ]
    recipe = tmp_path / "parts.toml"
    recipe.write_text("\n".join(lines))
    model_of_run = runpy.run_path(str(ROOT / "tools" / "model_of_run.py"))["model_of_run"]
    made, own = model_of_run(recipe, fitted), SMOPE.from_pretrained(fitted / "model")
    assert made.config.network == own.config.network
    assert (made.config.objects, made.config.image_size, made.config.K) == (
        own.config.objects,
        own.config.image_size,
        own.config.K,
    )
    weights, expected = made.network.state_dict(), own.network.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_a_longer_run_resumes_and_a_small_checkpoint_starts_another(
    fitted: Path, meshes: dict[str, trimesh.Trimesh], tmp_path: Path
) -> None:
    recipe = Recipe(network=NETWORK, run=replace(RUN, max_steps=6, tensorboard=False))
    fit(meshes, "m", SCENES, out=fitted, recipe=recipe, resume=True, device="cpu")
    pieces = json.loads((fitted / "run.json").read_text())["pieces"]
    assert [piece["first_step"] for piece in pieces] == [0, 4]
    small = fitted / "small.safetensors"
    fit(
        meshes,
        "m",
        SCENES,
        out=tmp_path,
        recipe=recipe,
        init=small,
        continue_schedule=True,
        max_steps=7,
        device="cpu",
    )
    assert json.loads((tmp_path / "run.json").read_text())["pieces"][0]["first_step"] == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_without_a_gpu_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert pick_device("cpu").type == "cpu"
    assert not caplog.records  # it was asked for
    assert pick_device(None).type == "cpu"
    assert "the CPU trains" in caplog.text


def test_messages_for_what_a_run_lacks(meshes: dict[str, trimesh.Trimesh], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs an end"):
        fit(meshes, "m", out=tmp_path)
    with pytest.raises(ConfigError, match="need their units"):
        fit(meshes, out=tmp_path, max_steps=1)
    with pytest.raises(ConfigError, match="no meshes"):
        fit(out=tmp_path, max_steps=1)
    with pytest.raises(ConfigError, match=r"run.batch_sise: unknown key; did you mean 'batch_size'"):
        fit(meshes, "m", out=tmp_path, max_steps=1, batch_sise=3)
    with pytest.raises(ConfigError, match=r"models_info\.json"):
        objects_of(None, None, None, DataConfig(meshes={"a": "a.ply"}, symmetries="none.json"))


def made_up(labels: list[int], poses: Tensor) -> Batch:
    count = len(labels)
    return Batch(
        images=torch.zeros(1, 3, 480, 640),
        K=torch.tensor([[[600.0, 0, 320], [0, 600.0, 240], [0, 0, 1]]]),
        labels=torch.tensor([labels]),
        T_CO=poses[None],
        boxes_xyxy=torch.tensor([100.0, 100.0, 200.0, 200.0]).expand(1, count, 4),
        visibility=torch.full((1, count), 0.8),
    )


class Oracle(torch.nn.Module):
    """Finds object 0 with a known error, whatever it is shown."""

    class config:
        surface_points, anchors = 64, 16

    def __init__(self, rotation: Tensor, centre: Tensor) -> None:
        super().__init__()
        self.rotation, self.centre = rotation, centre

    def encode_meshes(self, inputs: object) -> None:
        return None

    def forward(self, images: Tensor, K: Tensor, tokens: None, top_k: int, lowest: float) -> Found:
        pose = PoseEstimate(self.rotation[None, None], self.centre[None, None], torch.zeros(1, 1, 2))
        half = torch.tensor([[[150.5 / 640, 150.5 / 480, 100 / 640, 100 / 480]]])
        pairs = PairOutputs((pose,), torch.zeros(1, 1), torch.zeros(1, 1, 2))
        return Found(torch.full((1, 1), 0.9), torch.zeros(1, 1, dtype=torch.int64), half, pairs)


def test_held_out_scores_of_known_errors(meshes: dict[str, trimesh.Trimesh]) -> None:
    half_turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0]))[None]
    moved = meshes["brick"].copy()
    moved.apply_translation((0.3, 0, 0))  # an origin far from the middle
    symmetry = torch.eye(4)[None].clone()
    symmetry[0, :3, :3] = half_turn[0, :3, :3]
    symmetry[0, 0, 3] = 0.6
    brick = ObjectModel.from_mesh("brick", moved, "m", Symmetries(symmetry))
    pose = torch.eye(4)
    pose[:3, 3] = torch.tensor([-0.3, 0.0, 1.0])
    # 10 mm nearer than the truth, and turned by the symmetry: MSSD is 10 mm of a diameter of 147.6 mm.
    oracle = Oracle(half_turn[0, :3, :3], torch.tensor([0.0, 0.0, 0.99]))
    scores = HeldOut([brick], [made_up([0, -1], torch.stack([pose, pose]))]).scores(oracle)  # type: ignore[arg-type]
    share = 0.01 / float(np.linalg.norm((0.12, 0.07, 0.05)))
    assert scores["AR_MSSD"] == pytest.approx(sum(share < 0.05 * k for k in range(1, 11)) / 10)
    # By hand: the corner at (60, 35, -25) mm moves most in the image, by 0.44 px.
    assert scores["AR_MSPD"] == 1.0
    assert scores["box_IoU"] == pytest.approx(1.0, abs=1e-3)
    assert scores["depth_error"] == pytest.approx(0.01, abs=1e-5)
    assert scores["visibility_error"] == pytest.approx(0.3)
    assert scores["found"] == 1.0


def test_held_out_counts_a_missed_object_as_wrong(meshes: dict[str, trimesh.Trimesh]) -> None:
    objects = [ObjectModel.from_mesh(name, mesh, "m") for name, mesh in meshes.items()]
    pose = torch.eye(4)
    pose[2, 3] = 1.0
    oracle = Oracle(torch.eye(3), torch.tensor([0.0, 0.0, 1.0]))
    scores = HeldOut(objects, [made_up([0, 1], torch.stack([pose, pose]))]).scores(oracle)  # type: ignore[arg-type]
    assert scores["AR_MSSD"] == scores["AR_MSPD"] == scores["found"] == 0.5


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    """Twelve pictures, each of one grey that tells which it is, with one or two objects."""
    found = []
    for index in range(12):
        file = tmp_path / f"{index:06d}.png"
        Image.fromarray(np.full((96, 130, 3), 20 * index, np.uint8)).save(file)
        pose = np.eye(4)
        pose[:3, 3] = 0.0, 0.0, 0.8
        box = np.array([40.0, 30.0, 80.0, 60.0])
        names = ["brick", "can", "unknown"][: 1 + index % 3]
        annotations = tuple(Annotation(name, pose, box) for name in names)
        K = np.array([[120.0, 0, 64.5], [0, 120.0, 47.5], [0, 0, 1]])
        found.append(Record(str(index), file, K, annotations))
    return found


def shown(batch: Batch) -> list[int]:
    return [round(float(image[0, 0, 0]) * 255 / 20) for image in batch.images]


def test_data_set_has_one_order_from_any_start_and_holds_some_out(
    meshes: dict[str, trimesh.Trimesh], records: list[Record]
) -> None:
    objects = [ObjectModel.from_mesh(name, mesh, "m") for name, mesh in meshes.items()]
    run = replace(RUN, batch_size=3, workers=2)
    source = record_source(objects, records, run, torch.device("cpu"), rank=0)
    with opened(source.stream(0)) as batches:
        from_start = [shown(next(batches)) for _ in range(9)]
    with opened(source.stream(4)) as batches:
        from_fourth = [shown(next(batches)) for _ in range(5)]
    assert from_fourth == from_start[4:]
    held_out = [index for batch in source.held_out for index in shown(batch)]
    trained = [index for batch in from_start for index in batch]
    assert len(held_out) == 1
    assert sorted(trained[:11] + held_out) == list(range(12)), "an epoch shows each image once"
    assert sorted(trained[11:22] + held_out) == list(range(12))
    assert trained[:11] != trained[11:22]
    other = record_source(objects, records, run, torch.device("cpu"), rank=1)
    with opened(other.stream(0)) as batches:
        assert shown(next(batches)) != from_start[0]
    assert other.held_out == ()
    with pytest.raises(ValueError, match="has 1 images of brick, can"):
        record_source(objects, records[:1], run, torch.device("cpu"), rank=0)


def test_fit_learns_from_a_data_set(
    meshes: dict[str, trimesh.Trimesh],
    records: list[Record],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quick_fits(monkeypatch)
    run = replace(RUN, max_steps=1, tensorboard=False)
    out = tmp_path / "out"
    folder = fit(meshes, "m", dataset=records, out=out, recipe=Recipe(network=NETWORK, run=run), device="cpu")
    assert SMOPE.from_pretrained(folder).config.image_size == (130, 96)
    with pytest.raises(ConfigError, match="both scenes and dataset"):
        fit(meshes, "m", SCENES, dataset=records, out=out, max_steps=1)


def test_padding_keeps_what_was_there() -> None:
    batch = made_up([0], torch.eye(4)[None])
    batch = replace(batch, images=torch.rand(1, 3, 370, 633))
    wide = padded(batch, 4)
    assert wide.images.shape == (1, 3, 384, 640)
    assert torch.equal(wide.images[..., :370, :633], batch.images)
    assert wide.labels.tolist() == [[0, -1, -1, -1]]
    assert wide.T_CO.shape == (1, 4, 4, 4)
