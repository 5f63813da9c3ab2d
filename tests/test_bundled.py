"""What must lie in the package: bundled models and the demo's picture. These fail where a file is missing."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from torch.nn import functional as F

from smope import SMOPE, Camera, Poses, hub
from smope.config import ModelConfig
from smope.images import load_image

ASSETS = Path(hub.__file__).parent / "assets"
LMO = ("ape", "can", "cat", "driller", "duck", "eggbox", "glue", "holepuncher")


@pytest.fixture(scope="module")
def lmo() -> Path:
    return hub.resolve("lmo")


def test_a_model_is_three_files_and_its_scores(lmo: Path) -> None:
    assert {path.name for path in lmo.iterdir()} == {*hub.MODEL_FILES, "scores.json"}


def test_the_weights_are_small_and_in_half_precision(lmo: Path) -> None:
    assert (lmo / hub.WEIGHTS_FILE).stat().st_size <= 32 * 2**20
    tensors = hub.load_weights(lmo)
    assert all(t.isfinite().all() for t in tensors.values())
    network = {name: t for name, t in tensors.items() if not name.startswith("objects.")}
    assert {t.dtype for t in network.values() if t.is_floating_point()} == {torch.float16}
    assert sum(t.numel() for t in network.values()) <= 16e6


def test_the_config_tells_what_the_model_is(lmo: Path) -> None:
    config = ModelConfig.load(lmo / hub.CONFIG_FILE)
    assert config.architecture == "smope-s"
    assert config.objects == LMO
    assert config.image_size == (640, 480)
    assert config.K[0][0] == pytest.approx(572.4114)
    low, high = config.diameters
    assert (low, high) == pytest.approx(
        (0.102099, 0.261472), rel=1e-3
    )  # ape, driller in BOP's models_info.json


def test_the_card_names_data_licence_and_recipe(lmo: Path) -> None:
    card = (lmo / hub.CARD_FILE).read_text(encoding="utf-8")
    for said in (
        "license:",
        "CC BY-SA 4.0",
        "Apache-2.0",
        "recipes/lmo.toml",
        "minutes",
        "<!-- table: scores -->",
    ):
        assert said in card


def test_the_scores_are_those_of_the_stored_file(lmo: Path) -> None:
    scores = json.loads((lmo / "scores.json").read_text())
    stored = (lmo / hub.WEIGHTS_FILE).read_bytes()
    assert scores["weights_sha256"] == hashlib.sha256(stored).hexdigest()


def test_the_scores_reach_what_was_promised(lmo: Path) -> None:
    scores = json.loads((lmo / "scores.json").read_text())
    assert (scores["dataset"], scores["images"]) == ("lmo", 60)
    assert scores["all"]["AR_MSSD"] >= 0.52
    assert scores["all"]["AR_MSPD"] >= 0.76
    assert scores["all"]["ADD(-S)"] >= 0.30


# The rest runs the model on the demo's picture, in which it finds all eight objects.


@pytest.fixture(scope="module")
def model(lmo: Path) -> SMOPE:
    """A test that registers meshes puts the eight back."""
    return SMOPE.from_pretrained(lmo, device="cpu")


@pytest.fixture(scope="module")
def truth() -> Poses:
    """What the picture was rendered with."""
    return Poses.load(ASSETS / "demo.json")


@pytest.fixture(scope="module")
def picture(truth: Poses) -> torch.Tensor:
    picture = load_image(ASSETS / "demo.png")
    assert tuple(picture.shape) == (3, truth.camera.size[1], truth.camera.size[0])
    return picture


@pytest.fixture(scope="module")
def found(model: SMOPE, picture: torch.Tensor, truth: Poses) -> Poses:
    found = model.predict(picture, K=truth.camera.K)
    assert len(found) >= 6
    return found


def row_of(poses: Poses, name: str, box: torch.Tensor) -> int:
    """The row with this name and box: one query gives the same box, whatever meshes are registered."""
    same = [i for i in range(len(poses)) if poses.names[i] == name and torch.equal(poses.boxes_xyxy[i], box)]
    assert len(same) == 1, f"{name}: {len(same)} of that box"
    return same[0]


def assert_close_poses(a: Poses, b: Poses, share: float) -> None:
    """The surest of each mesh in `a` is in `b` at a translation within `share` of its distance."""
    assert len(set(a.names)) >= 6
    for name in set(a.names):
        one, other = a.T_CO[a.names.index(name)], b.T_CO[b.names.index(name)]
        assert (one[:3, 3] - other[:3, 3]).norm() < share * one[2, 3], name


def test_the_poses_of_the_demo_are_right(found: Poses, truth: Poses) -> None:
    """Against the poses that the picture was rendered with, where an object is at least half seen."""
    best = dict(reversed(list(zip(found.names, found.T_CO, strict=True))))  # the first one is the surest
    seen = [i for i in range(len(truth)) if truth.visibility[i] >= 0.5]
    assert len(seen) >= 6
    right = 0
    for i in seen:
        true = truth.T_CO[i]
        pose = best.get(truth.names[i])
        if pose is not None:
            pixels = truth.camera.project(torch.stack([pose[:3, 3], true[:3, 3]]))
            right += bool((pixels[0] - pixels[1]).norm() < 8 and abs(pose[2, 3] / true[2, 3] - 1) < 0.1)
    assert right >= len(seen) - 1


def test_a_second_call_is_equal_to_the_bit_and_a_batch_nearly(
    model: SMOPE, picture: torch.Tensor, found: Poses
) -> None:
    K = found.camera.K
    again = model.predict(ASSETS / "demo.png", K=K)
    first, mirrored = model.predict([picture, picture.flip(2)], K=K)
    assert len(mirrored) > 0
    for column in ("scores", "boxes_xyxy", "T_CO", "visibility", "sigma"):
        assert torch.equal(getattr(again, column), getattr(found, column))
    order = [first.names.index(name) for name in found.names]
    assert len(first) == len(found) == len(set(found.names))
    for column in ("scores", "boxes_xyxy", "T_CO"):
        torch.testing.assert_close(
            getattr(first, column)[order], getattr(found, column), rtol=1e-4, atol=1e-4
        )


def test_load_save_load_gives_identical_tensors(model: SMOPE, lmo: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    stored, half = hub.load_weights(lmo), hub.load_weights(tmp_path / "half")
    assert stored.keys() == half.keys()
    for name in stored:
        assert half[name].dtype == stored[name].dtype, name
        assert torch.equal(half[name], stored[name]), name
    SMOPE.from_pretrained(tmp_path / "half", device="cpu").save_pretrained(tmp_path / "twice", torch.float16)
    twice = hub.load_weights(tmp_path / "twice")
    assert twice.keys() == half.keys()
    assert all(twice[name].dtype == t.dtype and torch.equal(twice[name], t) for name, t in half.items())
    model.save_pretrained(tmp_path / "whole")
    again = SMOPE.from_pretrained(tmp_path / "whole", device="cpu")
    state = again.network.state_dict()
    assert all(torch.equal(state[name], t) for name, t in model.network.state_dict().items())
    assert again.objects.keys() == model.objects.keys()


@pytest.mark.parametrize(
    "ninth",
    [
        trimesh.creation.torus(0.08, 0.02),
        trimesh.creation.box((0.1, 0.1, 0.1)),
        trimesh.creation.cylinder(0.005, 0.3),
    ],
    ids=["ring", "cube", "rod"],
)
def test_a_ninth_mesh_leaves_the_others_where_they_are(
    model: SMOPE, picture: torch.Tensor, found: Poses, ninth: trimesh.Trimesh
) -> None:
    model.register_meshes({"ninth": ninth}, "m", add=True)
    try:
        nine = model.predict(picture, K=found.camera.K)
    finally:
        model.register_meshes(list(LMO))
    for i, name in enumerate(found.names):
        row = row_of(nine, name, found.boxes_xyxy[i])
        torch.testing.assert_close(nine.T_CO[row], found.T_CO[i], rtol=0, atol=1e-5)
        torch.testing.assert_close(nine.scores[row], found.scores[i], rtol=0, atol=1e-5)


def test_swapping_two_names_swaps_only_labels(model: SMOPE, picture: torch.Tensor, found: Poses) -> None:
    swapped = list(LMO)
    swapped[0], swapped[4] = LMO[4], LMO[0]
    model.register_meshes(swapped)
    try:
        other = model.predict(picture, K=found.camera.K)
    finally:
        model.register_meshes(list(LMO))
    assert other.names == found.names
    assert other.labels.tolist() == [{0: 4, 4: 0}.get(label, label) for label in found.labels.tolist()]
    for column in ("scores", "boxes_xyxy", "T_CO", "visibility", "sigma"):
        torch.testing.assert_close(getattr(other, column), getattr(found, column), rtol=0, atol=1e-5)


def test_several_of_one_mesh_are_found_as_surely_as_one_alone() -> None:
    """On renders that training never showed, as `smope.tools.measure_parts` measured these weights."""
    scores = json.loads((hub.resolve("lmo") / "scores.json").read_text())
    part = scores["parts"]["several"]
    assert part["several"]["instances"] > 200
    assert part["several"]["found"] > 0.9
    assert part["several"]["found"] > 0.95 * part["alone"]["found"]


@pytest.mark.xfail(
    reason="one of the two copies scores 0.30 with these weights; those before found all three"
)
def test_several_of_one_mesh_are_all_found(model: SMOPE, picture: torch.Tensor, found: Poses) -> None:
    """The duck pasted twice more: moved by d pixels it looks nearly as if it stood d z / f beside."""
    box = found.boxes_xyxy[found.names.index("duck")].round().long()
    x0, y0, x1, y1 = (box + torch.tensor([-4, -4, 4, 4])).tolist()
    moves = [(-330, 70), (-80, 90)]
    crowd = picture.clone()
    for dx, dy in moves:
        crowd[:, y0 + dy : y1 + dy, x0 + dx : x1 + dx] = picture[:, y0:y1, x0:x1]
    ducks = model.predict(crowd, K=found.camera.K)
    ducks = ducks[[name == "duck" for name in ducks.names]]
    original = found.camera.project(found.T_CO[found.names.index("duck"), :3, 3])
    pixels = found.camera.project(ducks.T_CO[:, :3, 3])
    for move in [(0, 0), *moves]:
        distances = (pixels - original - torch.tensor(move)).norm(dim=-1)
        assert distances.min() < 12
        assert ducks.scores[distances.argmin()] > 0.5


@pytest.mark.parametrize("size", [(1280, 960), (720, 540), (400, 300)])
def test_another_size_with_its_own_K_gives_close_poses(
    model: SMOPE, picture: torch.Tensor, found: Poses, size: tuple[int, int]
) -> None:
    with Image.open(ASSETS / "demo.png") as opened:
        resized = opened.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    # Edges fall on edges, so the pixel centre u goes to (u + 0.5) s - 0.5.
    scale = size[0] / found.camera.size[0]
    K = found.camera.K.clone()
    K[:2, :2] *= scale
    K[:2, 2] = (K[:2, 2] + 0.5) * scale - 0.5
    other = model.predict(resized, K=K)
    assert_close_poses(found, other, 0.03)
    for name in set(found.names):
        expected = (found.boxes_xyxy[found.names.index(name)] + 0.5) * scale - 0.5
        assert (other.boxes_xyxy[other.names.index(name)] - expected).abs().max() < 6 * scale


def test_a_field_of_view_is_the_K_that_has_it(model: SMOPE, picture: torch.Tensor) -> None:
    focal = 320 / np.tan(np.radians(58.4) / 2)
    by_angle = model.predict(picture, fov=58.4)
    by_matrix = model.predict(picture, K=[[focal, 0, 319.5], [0, focal, 239.5], [0, 0, 1]])
    torch.testing.assert_close(by_angle.T_CO, by_matrix.T_CO, rtol=0, atol=1e-5)
    assert len(by_angle) >= 6


def test_through_a_lens_the_poses_stay_and_the_boxes_bend(
    model: SMOPE, picture: torch.Tensor, found: Poses
) -> None:
    """The picture bent by hand: each pixel of the photo looks up where the pinhole saw its ray."""
    k1, k2 = -0.25, 0.06
    K = found.camera.K.double()
    v, u = torch.meshgrid(torch.arange(480.0), torch.arange(640.0), indexing="ij")
    bent = torch.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1]], -1)  # double
    straight = bent.clone()
    for _ in range(30):  # fixed point of x = x' / (1 + k1 r^2 + k2 r^4)
        r2 = straight.square().sum(-1, keepdim=True)
        straight = bent / (1 + k1 * r2 + k2 * r2 * r2)
    source = straight * K.diagonal()[:2] + K[:2, 2]
    grid = (2 * source + 1) / torch.tensor([640.0, 480.0]) - 1
    photo = F.grid_sample(picture[None].float() / 255, grid[None].float(), align_corners=False)[0]
    through = model.predict(photo.clamp(0, 1), K=found.camera.K, dist=[k1, k2, 0, 0])
    assert through.camera.dist is not None
    assert_close_poses(found, through, 0.03)

    moved = []
    for name in set(found.names):
        box = found.boxes_xyxy[found.names.index(name)].double()
        middle = (box[:2] + box[2:]) / 2
        ray = (middle - K[:2, 2]) / K.diagonal()[:2]
        r2 = ray.square().sum()
        expected = ray * (1 + k1 * r2 + k2 * r2 * r2) * K.diagonal()[:2] + K[:2, 2]
        seen = through.boxes_xyxy[through.names.index(name)].double()
        assert ((seen[:2] + seen[2:]) / 2 - expected).norm() < 5, name
        moved.append((expected - middle).norm())
    assert max(moved) > 8

    # The same by hand: take the lens out of the photo first, and no lens is left to tell of.
    camera = Camera(found.camera.K, (640, 480), [k1, k2, 0, 0])
    undone = model.predict(camera.undistort_image(photo).clamp(0, 1), K=found.camera.K)
    assert_close_poses(through, undone, 0.005)


def test_memory_stays_small() -> None:
    """Resident in a process of its own after import and one prediction."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from smope import SMOPE\n"
        "assert len(SMOPE.from_pretrained('lmo', device='cpu').predict(sys.argv[1], fov=58))\n"
        "print(Path('/proc/self/status').read_text())\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("resident memory is read from /proc")
    done = subprocess.run(
        [sys.executable, "-c", code, str(ASSETS / "demo.png")],
        capture_output=True,
        text=True,
        timeout=110,
        check=True,
    )
    lines = dict(line.split(":", 1) for line in done.stdout.splitlines() if line)
    assert int(lines["VmRSS"].split()[0]) * 1024 < 1.2e9
