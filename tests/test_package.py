"""The package as a stranger gets it: what the wheel holds, what building and importing cost."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import smope

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "smope"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def source_files() -> list[Path]:
    """Every file of the package that is no left-over of running it."""
    return [
        path.relative_to(ROOT)
        for path in sorted(PACKAGE.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    ]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel, built where importing torch or calling a compiler fails."""
    place = tmp_path_factory.mktemp("build")
    source = place / "source"
    for path in [*source_files(), *(Path(n) for n in ("pyproject.toml", "setup.py", "README.md", "LICENSE"))]:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, source / path)
    no_torch = place / "no_torch" / "torch" / "__init__.py"
    no_torch.parent.mkdir(parents=True)
    no_torch.write_text("raise ImportError('building must not need torch')")
    environment = {**os.environ, "PYTHONPATH": str(place / "no_torch"), "CC": "false", "CXX": "false"}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "-w", str(place), str(source)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = place.glob("smope-*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_the_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == {path.as_posix() for path in source_files()}


def test_the_wheel_holds_every_source_of_the_kernels(wheel: zipfile.ZipFile) -> None:
    sources = {path.name for path in (ROOT / "smope" / "_ext").iterdir() if path.is_file()}
    assert {"binding.cpp", "ms_deform_attn.cu", "ms_deform_attn_cpu.cpp"} <= sources
    assert {f"smope/_ext/{name}" for name in sources} <= set(wheel.namelist())


def test_the_metadata_says_what_pyproject_says(wheel: zipfile.ZipFile) -> None:
    folder = f"smope-{smope.__version__}.dist-info"
    metadata = wheel.read(f"{folder}/METADATA").decode()
    assert f"\nVersion: {smope.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "Apache License" in wheel.read(f"{folder}/licenses/LICENSE").decode()
    assert "smope = smope.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    assert "Root-Is-Purelib: true" in wheel.read(f"{folder}/WHEEL").decode()


def test_setup_is_a_shim() -> None:
    lines = [line for line in (ROOT / "setup.py").read_text().splitlines() if line]
    assert lines == ["from setuptools import setup", "setup()"]


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_smope_is_cheap_and_starts_nothing() -> None:
    told = run_python(
        """
import sys, time, torch
before, start = set(sys.modules), time.process_time()
def hook(event, arguments):
    if event in ("subprocess.Popen", "os.posix_spawn", "os.system", "os.fork", "socket.connect"):
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(hook)
import smope
bare = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
import_seconds = time.process_time() - start
smope.SMOPE, smope.Poses, smope.Camera, smope.ObjectModel
print(bare == ["smope"], import_seconds < 2, time.process_time() - start)
print(*sorted(sys.modules))
"""
    )
    first, names = told.split("\n")[:2]
    assert first.startswith("True True"), told
    loaded = set(names.split())
    assert "smope.model" in loaded
    for unwanted in (
        "smope.train", "smope.scenes", "smope.evaluate", "smope.cli", "moderngl", "glcontext", "tensorboard",
        "matplotlib", "huggingface_hub", "tyro", "torch.utils.cpp_extension", "torch.utils.tensorboard",
    ):  # fmt: skip
        assert unwanted not in loaded, f"`from smope import SMOPE` loads {unwanted}"


def test_nothing_sends_to_a_package_index_where_smope_is_not() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.py"), *PACKAGE.rglob("*.py")]
    sent = [page.name for page in pages if re.search(r"pip install ['\"]?smope", page.read_text("utf-8"))]
    assert not sent


def test_the_public_names_are_listed() -> None:
    assert {"SMOPE", "Camera", "ObjectModel", "Poses", "__version__"} == set(dir(smope))
    with pytest.raises(AttributeError, match="has no attribute 'Pose'"):
        smope.Pose


def requirements(*extras: str) -> set[str]:
    """Top-level modules of what pyproject.toml asks for."""
    wanted = [*PROJECT["dependencies"], *(r for e in extras for r in PROJECT["optional-dependencies"][e])]
    names = {re.split(r"[\[>=<~! ;]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    of_distribution: dict[str, set[str]] = {}
    for module, distributions in importlib.metadata.packages_distributions().items():
        for distribution in distributions:
            of_distribution.setdefault(distribution.lower().replace("_", "-"), set()).add(module)
    return {module for name in names for module in of_distribution.get(name, {name})}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every absolute import of a file, and whether it runs when the file is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in late
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, id(node) not in late
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) not in late


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_what_is_imported_is_required() -> None:
    triton = {"triton"}  # comes with PyTorch for CUDA; what imports it is imported where it is there
    core, train = requirements(), requirements("train") | triton
    late = requirements("train", "export", "serve") | triton
    # Only what one asks for by name may need an extra as soon as it is imported.
    at_import = {"train": train, "scenes": train, "export": core, "serve": requirements("serve")}
    for path in MODULES:
        folder = path.relative_to(PACKAGE).parts[0]
        for name, at_once in imports(path):
            module = name.partition(".")[0]
            if module == "smope" or module in sys.stdlib_module_names:
                continue
            allowed = at_import.get(folder, core) if at_once else late
            assert module in allowed, (
                f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not ask for"
            )


# Imports run one way: folder -> what it must not know. `train` and `scenes` are for the command line alone.
MUST_NOT_KNOW = {
    "networks": ("objects", "meshes", "camera", "images", "data", "train", "scenes", "evaluate", "model"),
    "ops": ("networks", "objects", "data", "train", "scenes", "evaluate", "model"),
    "geometry": ("networks", "objects", "data", "train", "scenes", "evaluate", "model"),
    "serve": ("networks", "data", "train", "scenes", "evaluate", "export", "cli"),
    "data": ("networks", "train", "scenes", "evaluate", "model"),
    "scenes": ("networks", "train", "evaluate", "model"),
    "evaluate": ("networks", "train", "scenes"),
    "": ("train", "scenes", "evaluate"),
}  # fmt: skip


@pytest.mark.parametrize("folder", MUST_NOT_KNOW)
def test_imports_run_one_way(folder: str) -> None:
    files = [path for path in MODULES if path.parent == PACKAGE / folder and path.name != "cli.py"]
    assert files
    for path in files:
        for name, at_once in imports(path):
            parts = name.split(".")
            known = at_once and parts[0] == "smope" and len(parts) > 1 and parts[1] in MUST_NOT_KNOW[folder]
            assert not known, f"{path.relative_to(ROOT)} imports {name}"


def test_a_skip_for_want_of_data_fails_where_data_is_required(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SMOPE_DATA", raising=False)
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile(
        test_data="def test_photo(data_root): pass",
        test_gpu="import pytest\ndef test_kernel(): pytest.skip('no GPU here')",
        test_module="import pytest\npytest.skip('SMOPE_DATA is not set', allow_module_level=True)",
    )
    quiet = ("-p", "no:cacheprovider")
    monkeypatch.setenv("SMOPE_REQUIRE_DATA", "0")
    pytester.runpytest_inprocess(*quiet).assert_outcomes(skipped=3)
    monkeypatch.setenv("SMOPE_REQUIRE_DATA", "1")
    result = pytester.runpytest_inprocess(*quiet, "--continue-on-collection-errors")
    result.assert_outcomes(skipped=1, errors=2)
    result.stdout.fnmatch_lines(["*skipped for want of data: *SMOPE_DATA is not set*"])
