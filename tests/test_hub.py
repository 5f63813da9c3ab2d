"""hub.py: models from the package, from folders and from a hub; damaged files are refused by name."""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import trimesh
from fake_hub import TOKEN, FakeHub, Repository, serve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from smope import SMOPE, ObjectModel, hub
from smope.config import ModelConfig
from smope.hub import WeightsError, WeightsNotFoundError
from smope.networks.smope_s import SmopeS, SmopeSConfig


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4, 6, generator=generator)
    return {
        "half": torch.randn(3, 5, generator=generator).half(),
        "view": shared.t(),  # not contiguous, and shares its memory
        "shared": shared,
        "labels": torch.arange(7),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder = tmp_path / "model"
    hub.save_weights(folder, tensors)
    (folder / hub.CONFIG_FILE).write_text('{"format": 1}')
    (folder / hub.CARD_FILE).write_text("# A card\n")
    return folder


def test_weights_come_back_identical(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    loaded = hub.load_weights(folder)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_the_file_is_a_function_of_the_tensors(
    folder: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    again = hub.save_weights(tmp_path / "again", dict(reversed(tensors.items())))
    assert again.read_bytes() == (folder / hub.WEIGHTS_FILE).read_bytes()


def test_a_failed_save_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / hub.WEIGHTS_FILE).read_bytes()

    def half_written(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "save_file", half_written)
    with pytest.raises(KeyboardInterrupt):
        hub.save_weights(folder, {"a": torch.zeros(1)})
    assert (folder / hub.WEIGHTS_FILE).read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == sorted(hub.MODEL_FILES)


def test_who_may_read_the_files_follows_the_umask(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    before = os.umask(0o027)
    try:
        path = hub.save_weights(tmp_path / "model", tensors)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_changed_values_are_refused(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """One bit anywhere among the values, and zeros where a copy was cut short: safetensors sees neither."""
    path = folder / hub.WEIGHTS_FILE
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for at in range(start, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(WeightsError, match="not those that were saved"):
            hub.load_weights(folder)
    path.write_bytes(whole[:start] + bytes(len(whole) - start))
    with pytest.raises(WeightsError, match="not those that were saved"):
        hub.load_weights(folder)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    assert hub.load_weights(folder).keys() == tensors.keys()  # a file of others, without a checksum


def test_weights_that_are_not_finite_are_refused(folder: Path) -> None:
    for bad in (float("nan"), float("inf")):
        hub.save_weights(folder, {"a": torch.zeros(2), "b.weight": torch.tensor([0.0, bad]).half()})
        with pytest.raises(WeightsError, match=r"b\.weight holds values that are not finite"):
            hub.load_weights(folder)


def pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer)
    return buffer.getvalue()


class Trap:
    """Opening this pickle would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes that are no whole safetensors file"),
        (b"\x00" * 100, "no whole safetensors file"),
        (b'{"a": 1}', "no whole safetensors file"),
        (pickled(), "a zip archive, as torch.save writes, not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "a Git LFS pointer"),
    ],
)
def test_what_is_no_safetensors_file_is_named(folder: Path, content: bytes, message: str) -> None:
    (folder / hub.WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        hub.load_weights(folder)
    assert str(folder / hub.WEIGHTS_FILE) in str(caught.value)


def test_a_pickle_is_not_opened(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "made-by-the-pickle"
    (folder / hub.WEIGHTS_FILE).write_bytes(pickle.dumps(Trap(made)))
    with pytest.raises(WeightsError, match="a Python pickle, not a safetensors file"):
        hub.load_weights(folder)
    assert not made.exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short_is_refused(folder: Path, share: float) -> None:
    path = folder / hub.WEIGHTS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    try:
        with pytest.raises(WeightsError, match="damaged or cut short"):
            hub.load_weights(folder)
    finally:
        path.write_bytes(whole)


def test_a_bundled_name_is_found_before_a_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hub, "BUNDLED", folder.parent)
    assert hub.bundled_names() == ["model"]
    assert hub.resolve("model") == folder
    assert not caplog.records
    monkeypatch.chdir(folder.parent)
    hub.resolve("model")
    assert "both a bundled model and a folder" in caplog.text


def test_a_folder_is_taken_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.resolve(folder) == folder
    assert hub.resolve(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    assert hub.resolve("./model").resolve() == folder.resolve()


def test_unknown_names_say_what_is_known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "BUNDLED", folder.parent)
    with pytest.raises(
        WeightsNotFoundError, match=r"no model 'lmoo': neither bundled \(model\) nor a folder"
    ):
        hub.resolve("lmoo")
    with pytest.raises(WeightsNotFoundError, match="no model '/no/such/place'"):
        hub.resolve("/no/such/place")
    with pytest.raises(WeightsNotFoundError, match=r"no model '\./a/b'"):
        hub.resolve("./a/b")
    with pytest.raises(WeightsNotFoundError, match=r"config\.json: a file given, the folder expected"):
        hub.resolve(folder / hub.CONFIG_FILE)
    with pytest.raises(ValueError, match=r"revision='v1' given for .*model, which has none"):
        hub.resolve(folder, revision="v1")


def test_a_folder_without_the_files_is_no_model(folder: Path) -> None:
    (folder / hub.WEIGHTS_FILE).unlink()
    with pytest.raises(WeightsNotFoundError, match=r"no model\.safetensors in it"):
        hub.resolve(folder)
    with pytest.raises(WeightsNotFoundError, match="no such file"):
        hub.load_weights(folder)


# The hub. huggingface_hub reads HF_ENDPOINT when it is imported, hence processes of their own.

DEAD = "http://127.0.0.1:9"  # nobody listens there


@pytest.fixture
def loopback() -> Iterator[FakeHub]:
    with serve() as running:
        yield running


def in_a_process(*calls: str, address: str, home: Path, token: str | None = TOKEN) -> list[str]:
    """Evaluate calls of `hub` in a process whose cache is `home`: their results or errors, as texts."""
    program = "import json\nimport smope\nfrom smope import hub\nresults = []\n" + "".join(
        f"try:\n    results.append(str({call}))\n"
        "except hub.WeightsNotFoundError as error:\n    results.append(str(error))\n"
        for call in calls
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    environment |= dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"), "1")
    if token is not None:
        environment["HF_TOKEN"] = token
    done = subprocess.run(
        [sys.executable, "-c", program + "print('RESULTS', json.dumps(results))"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    results: list[str] = json.loads(done.stdout.rpartition("RESULTS ")[2])
    return results


def contents(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_push_then_load_then_load_offline(loopback: FakeHub, folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    push, load = f"hub.push({str(folder)!r}, 'us/model')", "hub.resolve('us/model')"
    url, fetched = in_a_process(push, load, address=loopback.address, home=home)
    assert url.startswith(f"{loopback.address}/us/model/commit/")
    repository = loopback.repositories["us/model"]
    stored = repository.commits[repository.branches["main"]]
    card = (folder / hub.CARD_FILE).read_bytes()
    assert stored == {**contents(folder), "README.md": card, ".gitattributes": stored[".gitattributes"]}
    assert any(request.startswith("PUT /lfs-store/") for request in loopback.requests)
    assert Path(fetched).is_relative_to(home)
    assert contents(fetched) == contents(folder)

    # Offline by choice: not one request. Offline by a dead connection: the cache serves as well.
    count = len(loopback.requests)
    local = "hub.resolve('us/model', local_files_only=True)"
    assert in_a_process(local, address=loopback.address, home=home, token=None) == [fetched]
    assert len(loopback.requests) == count
    assert in_a_process(load, address=DEAD, home=home, token=None) == [fetched]


def test_a_model_goes_to_the_hub_and_comes_back_offline(loopback: FakeHub, tmp_path: Path) -> None:
    ball = trimesh.creation.icosphere(subdivisions=2, radius=0.05)
    objects = {"ball": ObjectModel.from_mesh("ball", ball, "m")}
    network = SmopeSConfig(width=32, heads=2, encoder_layers=1, decoder_layers=1, queries=4)
    config = ModelConfig(
        architecture="smope-s",
        network=network,
        objects=("ball",),
        image_size=(64, 48),
        K=((60.0, 0.0, 31.5), (0.0, 60.0, 23.5), (0.0, 0.0, 1.0)),
        diameters=(0.1, 0.1),
    )
    made = tmp_path / "made"
    SMOPE(SmopeS(network), config, objects, card="# Ball\n").save_pretrained(made)

    load = "smope.SMOPE.from_pretrained({!r}, device='cpu').{}"
    push = load.format(str(made), "push_to_hub('us/ball')")
    places = {step: tmp_path / step for step in ("online", "offline")}
    online, offline = (load.format("us/ball", f"save_pretrained({str(p)!r})") for p in places.values())
    in_a_process(push, online, address=loopback.address, home=tmp_path / "home")
    in_a_process(offline, address=DEAD, home=tmp_path / "home", token=None)
    assert contents(places["online"]) == contents(made)
    assert contents(places["offline"]) == contents(made)


def test_private_repositories_revisions_and_the_cache_folder(
    loopback: FakeHub, folder: Path, tmp_path: Path
) -> None:
    place = str(tmp_path / "elsewhere")
    fetched, wrong = in_a_process(
        f"hub.push({str(folder)!r}, 'us/own', private=True) and "
        f"hub.resolve('us/own', revision='main', cache_dir={place!r})",
        "hub.resolve('us/own', revision='v9')",
        address=loopback.address,
        home=tmp_path / "a",
    )
    assert fetched.startswith(place)
    assert contents(fetched) == contents(folder)
    assert wrong == "'us/own' on the Hugging Face hub at revision 'v9': no such revision"
    assert loopback.repositories["us/own"].private


def test_errors_of_the_hub_are_one_clear_line(loopback: FakeHub, folder: Path, tmp_path: Path) -> None:
    loopback.repositories["us/own"] = Repository(private=True)
    loopback.repositories["us/other"] = Repository()
    loopback.repositories["us/other"].commit("main", {"pytorch_model.bin": b""})
    unknown, private, other, local = in_a_process(
        "hub.resolve('us/none')",
        "hub.resolve('us/own')",
        "hub.resolve('us/other')",
        "hub.resolve('us/none', local_files_only=True)",
        address=loopback.address,
        home=tmp_path,
        token=None,
    )
    assert unknown.startswith("'us/none' on the Hugging Face hub: no such repository, or it is private")
    assert private == unknown.replace("us/none", "us/own")
    assert "no config.json and no model.safetensors in it, so it holds no smope model" in other
    assert "not in the local cache and local_files_only was asked for" in local
    [offline] = in_a_process("hub.resolve('us/none')", address=DEAD, home=tmp_path)
    assert "not in the local cache and the hub cannot be reached" in offline
