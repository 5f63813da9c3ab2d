"""The command line: what it writes, what it says about errors, and that it is quick to start."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from scipy.spatial.transform import Rotation

from smope import cli, installation
from smope.camera import Camera, CameraError
from smope.poses import Poses

INTRINSICS = ["200", "210", "79.5", "59.5"]


def found(camera: Camera, count: int = 2) -> Poses:
    T = torch.eye(4).repeat(count, 1, 1)
    T[:, :3, :3] = torch.from_numpy(Rotation.random(count, random_state=0).as_matrix())
    T[:, :3, 3] = torch.tensor([0.01, -0.02, 0.5])
    return Poses(
        names=tuple(["duck", "holepuncher"][:count]),
        labels=torch.arange(count),
        scores=torch.tensor([0.93, 0.41][:count]),
        boxes_xyxy=torch.tensor([[40.0, 30.0, 80.0, 70.0]]).repeat(count, 1),
        T_CO=T,
        scale=torch.ones(count, 3),
        visibility=torch.tensor([0.87, 0.2][:count]),
        sigma=torch.ones(count, 2),
        camera=camera,
    )


class FakeModel:
    """Finds the same two objects in every picture, and remembers what it was asked."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.registered: list[tuple[Any, dict[str, Any]]] = []
        self.fault: BaseException | None = None

    def register_meshes(self, meshes: Any, **options: Any) -> None:
        self.registered.append((meshes, options))

    def predict(self, image: Path, K: Any = None, **options: Any) -> Poses:
        if self.fault is not None:
            raise self.fault
        self.asked.append({"image": image, "K": K, **options})
        with Image.open(image) as picture:
            return found(Camera(torch.as_tensor(K).float(), picture.size))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()
    monkeypatch.setattr(cli.common, "load_model", lambda name, device: fake)
    return fake


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (160, 120), "grey").save(path)
    return path


def test_predict_writes_poses_and_a_picture_an_image(
    model: FakeModel, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.png"
    Image.new("RGB", (160, 120), "navy").save(other)
    out = tmp_path / "new" / "results"
    options = ["--K", *INTRINSICS, "--threshold", "0.2", "--top-k", "7", "--dist", "-0.1", "0", "0", "0"]
    assert cli.main(["predict", str(photo), str(other), *options, "--out", str(out)]) == 0

    assert sorted(path.name for path in out.iterdir()) == [
        "other_poses.json", "other_poses.png", "photo_poses.json", "photo_poses.png",
    ]  # fmt: skip
    assert Poses.load(out / "photo_poses.json").names == ("duck", "holepuncher")
    with Image.open(out / "other_poses.png") as drawn:
        assert drawn.size == (160, 120)
        assert len(np.unique(np.asarray(drawn).reshape(-1, 3), axis=0)) > 5
    asked = model.asked[1]
    assert asked["image"] == other
    np.testing.assert_array_equal(asked["K"], [[200, 0, 79.5], [0, 210, 59.5], [0, 0, 1]])
    assert (asked["threshold"], asked["top_k"], asked["fov"]) == (0.2, 7, None)
    assert asked["dist"] == (-0.1, 0.0, 0.0, 0.0)
    assert "[2/2]" in capsys.readouterr().out


def test_predict_registers_files_and_folders_of_meshes(model: FakeModel, photo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "meshes"
    folder.mkdir()
    for name in ("cup.ply", "plate.STL", "notes.txt"):
        (folder / name).touch()
    spoon = tmp_path / "spoon.obj"
    spoon.touch()
    arguments = ["predict", str(photo), "--K", *INTRINSICS, "--out", str(tmp_path / "out")]
    assert (
        cli.main([*arguments, "--meshes", str(folder), str(spoon), "--units", "mm", "--symmetries", "auto"])
        == 0
    )
    assert cli.main([*arguments, "--objects", "duck", "can"]) == 0
    expected = {"cup": folder / "cup.ply", "plate": folder / "plate.STL", "spoon": spoon}
    assert model.registered == [
        (expected, {"units": "mm", "symmetries": "auto", "add": False}),
        (["duck", "can"], {}),
    ]


def test_the_table_says_millimetres_and_degrees() -> None:
    camera = Camera.from_fov(60, (160, 120))
    poses = found(camera)
    lines = cli.pose_table(poses).splitlines()
    assert len(lines) == 3
    words = lines[1].split()
    turn = Rotation.random(2, random_state=0)[0].as_rotvec(degrees=True)
    assert words[:2] == ["duck", "0.93"]
    assert [float(word) for word in words[2:5]] == [10.0, -20.0, 500.0]
    np.testing.assert_allclose([float(word) for word in words[5:8]], turn, atol=0.051)
    assert words[8:] == ["87", "%"]
    assert len({len(line.rstrip()) for line in lines[1:]}) == 1
    assert cli.pose_table(poses[[]]).count("\n") == 0


def test_demo_predicts_the_bundled_picture(
    model: FakeModel,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    camera = Camera.from_fov(50, (160, 120))
    found(camera).save(tmp_path / "demo.json")
    monkeypatch.setattr(cli.common, "bundled", lambda name: tmp_path / name if name == "demo.json" else photo)
    out = tmp_path / "overlay.png"
    assert cli.main(["demo", "--out", str(out)]) == 0
    assert torch.equal(model.asked[0]["K"], camera.K)
    with Image.open(out) as drawn:
        assert drawn.size == (160, 120)
    said = capsys.readouterr().out
    assert "holepuncher" in said
    assert "2 objects in 0." in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["predict"], "no image given"),
        (["predict", "missing.jpg"], "missing.jpg: no such image"),
        (["predict", "{photo}", "--fov", "60", "--K", *INTRINSICS], "pass one of them"),
        (["predict", "{photo}", "{photo}"], "the same name"),
        (["predict", "{photo}", "--meshes", "nowhere"], "nowhere: no such file or folder of meshes"),
        (["predict", "{photo}", "--meshes", "{empty}"], "no mesh in this folder"),
        (["scenes", "preview"], "--assets"),
        (["scenes", "prepare", "--meshes", "nowhere", "--units", "mm"], "nowhere: no such file"),
        (["evaluate", "nowhere", "--csv", "nowhere.csv"], "nowhere"),
        (["fit", "nowhere.toml"], "nowhere.toml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_the_user_can_put_right_is_said_in_one_line(
    arguments: list[str],
    said: str,
    model: FakeModel,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([a.format(photo=photo, empty=tmp_path / "empty") for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.startswith("smope: ")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def raised(code: str, module: str) -> Exception:
    """What `code` raises in a module of that name."""
    try:
        exec(compile(code, module, "exec"), {"__name__": module, "CameraError": CameraError})
    except Exception as error:
        return error
    raise AssertionError("nothing raised")


@pytest.mark.parametrize(
    ("code", "module", "message"),
    [
        ("raise CameraError('fx is\\n  wrong')", "elsewhere", "fx is wrong"),
        ("raise ValueError('units are missing')", "smope.model", "units are missing"),
        ("open('/no/such/file')", "elsewhere", "[Errno 2] No such file or directory: '/no/such/file'"),
        ("int('x')", "elsewhere", None),
        ("import numpy; numpy.zeros(3).reshape(2)", "elsewhere", None),
        ("raise ValueError('a fault elsewhere')", "smoperators", None),
        ("raise RuntimeError('a fault of ours')", "smope.model", None),
        (
            "import no_such_package",
            "smope.scenes",
            "needs the package 'no_such_package': pip install \".[all]\" in a clone of smope",
        ),
        ("import smope.no_such_part", "smope.cli", None),
    ],
)
def test_faults_of_the_program_keep_their_traceback(code: str, module: str, message: str | None) -> None:
    said = cli.user_message(raised(code, module))
    assert said is None if message is None else said is not None and said.endswith(message)


def test_a_fault_of_the_program_is_raised(model: FakeModel, photo: Path) -> None:
    model.fault = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        cli.main(["predict", str(photo), "--K", *INTRINSICS])


@pytest.mark.parametrize("while_saving", [False, True])
def test_an_interrupt_leaves_nothing_half_written(
    model: FakeModel, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, while_saving: bool
) -> None:
    def interrupt(self: Image.Image, path: Path) -> None:
        Path(path).write_bytes(b"half a picture")
        raise KeyboardInterrupt

    if while_saving:
        monkeypatch.setattr(Image.Image, "save", interrupt)
    else:
        model.fault = KeyboardInterrupt()
    out = tmp_path / "out"
    assert cli.main(["predict", str(photo), "--K", *INTRINSICS, "--out", str(out)]) == 130
    assert [path.name for path in out.glob("*")] == (["photo_poses.json"] if while_saving else [])
    if while_saving:
        json.loads((out / "photo_poses.json").read_text())


def test_meshes_need_units_and_names_of_their_own(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        trimesh.creation.box((0.1, 0.1, 0.1)).export(tmp_path / folder / "box.ply")
    with pytest.raises(cli.UsageError, match="--units"):
        cli.load_objects([tmp_path / "a"], None)
    with pytest.raises(cli.UsageError, match="the same name"):
        cli.load_objects([tmp_path / "a", tmp_path / "b"], "m")
    (box,) = cli.load_objects([tmp_path / "a" / "box.ply"], "m")
    assert box.name == "box"
    assert box.diameter == pytest.approx(0.1 * 3**0.5, rel=1e-4)
    assert cli.clutter_files(tmp_path) == [tmp_path / "a" / "box.ply", tmp_path / "b" / "box.ply"]
    assert cli.clutter_files(None) == []


def test_evaluate_and_fit_hand_their_options_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(result: Any) -> Any:
        return lambda *given, **options: calls.append((given, options)) or result

    run = SimpleNamespace(evaluate_dataset=record({"table": "the table"}))
    monkeypatch.setitem(sys.modules, "smope.evaluate.run", run)
    monkeypatch.setitem(sys.modules, "smope.train.fit", SimpleNamespace(fit=record(Path("run/model"))))
    assert cli.main(["evaluate", "set", "--model", "lmo", "--out", "scores", "--limit", "5"]) == 0
    assert cli.main(["fit", "lmo.toml", "--out", "run", "--max-minutes", "2.5", "--resume"]) == 0
    assert capsys.readouterr().out == "the table\nthe model is in run/model\n"
    (given, evaluate), (_, fit) = calls
    assert given == (Path("set"),)
    assert evaluate == {
        "format": "bop", "model": "lmo", "csv": None, "out": Path("scores"), "limit": 5, "batch": 1,
        "device": None, "split": None,
    }  # fmt: skip
    assert (fit["recipe"], fit["out"], fit["max_minutes"], fit["resume"]) == (
        Path("lmo.toml"),
        Path("run"),
        2.5,
        True,
    )


def test_fit_takes_every_option_that_the_command_hands_on() -> None:
    import dataclasses
    import inspect

    from smope.train.fit import fit
    from smope.train.recipe import RunConfig

    known = set(inspect.signature(fit).parameters) | {field.name for field in dataclasses.fields(RunConfig)}
    assert {field.name for field in dataclasses.fields(cli.Fit)} <= known


def test_info_names_versions_and_caches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cli.main(["info"]) == 0
    facts = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert facts["torch"].strip().startswith(torch.__version__)
    assert facts["g++"].strip() == "not found"
    assert "cpu" in facts["devices"]
    assert any(name.startswith("kernel") for name in facts)
    assert any("cache" in name for name in facts)
    assert f"numpy {np.__version__}" in installation.describe_installation()["packages"]


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_build_compiles_the_kernel_that_a_new_process_then_takes(tmp_path: Path) -> None:
    environment = {**os.environ, "SMOPE_CACHE": str(tmp_path), "SMOPE_MSDA": "auto"}
    done = subprocess.run(
        [sys.executable, "-m", "smope", "build"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    (library,) = tmp_path.rglob("*.so")
    assert done.stdout == f"the CPU kernel is in {library}\n"
    ready = "from smope.ops.build import cpu_kernel_ready; print(cpu_kernel_ready())"
    environment["CXX"] = "no-such-compiler"
    asked = subprocess.run(
        [sys.executable, "-c", ready], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert asked.stdout == "True\n"


def test_build_without_a_compiler_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("SMOPE_CACHE", str(tmp_path))
    assert cli.main(["build"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("smope: the CPU kernel could not be compiled ")
    assert "Remedy: a C++ compiler" in err
    assert err.count("\n") == 1


def test_help_imports_neither_torch_nor_trimesh() -> None:
    code = (
        "import sys\n"
        "from smope.cli import main\n"
        "try:\n    main(['predict', '--help'])\n"
        "except SystemExit as done:\n    assert done.code == 0, done.code\n"
        "print('heavy:', sorted({'torch', 'trimesh', 'numpy', 'PIL'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.endswith("heavy: []\n")
    assert "--fov" in done.stdout


def test_the_module_runs_as_the_command_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "smope", "predict", "missing.png"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "smope: missing.png: no such image\n"
