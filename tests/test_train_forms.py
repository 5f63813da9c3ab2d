"""`fit` on each of the four forms of data, with both networks: five steps, and the model predicts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_forms import meshes_of, pose, write_all, write_labelimg3d
from PIL import Image
from small_model import TINY, quick_fits

from smope import SMOPE
from smope.config import ConfigError
from smope.data.readers import read_records
from smope.data.records import Annotation, to_batch
from smope.objects import ObjectModel
from smope.train import fit
from smope.train.curves import read_rows
from smope.train.recipe import DataConfig, Recipe, RunConfig
from smope.train.sources import record_source

RUN = RunConfig(
    max_steps=5,
    batch_size=1,
    workers=0,
    precision="fp32",
    log_every=1,
    eval_minutes=0.0,
    eval_images=1,
    tensorboard=False,
    progress_bar=False,
)
FORMS = ("bop", "linemod", "labelimg3d", "kitti")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("forms"))


@pytest.mark.parametrize("architecture", ["smope-s", "smope-paper"])
@pytest.mark.parametrize("form", FORMS)
def test_five_steps(
    roots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, architecture: str
) -> None:
    """The data set by its folder and form, as a recipe names it."""
    quick_fits(monkeypatch)
    meshes, units = meshes_of(form)
    recipe = Recipe(
        architecture=architecture,  # type: ignore[arg-type]
        data=DataConfig(dataset=str(roots[form]), format=form),  # type: ignore[arg-type]
        network=TINY[architecture],
        run=RUN,
    )
    folder = fit(meshes, units, out=tmp_path, recipe=recipe, device="cpu")
    losses = [float(row["loss"]) for row in read_rows(tmp_path / "curves.csv") if "loss" in row]
    assert len(losses) == 5
    assert np.isfinite(losses).all()
    model = SMOPE.from_pretrained(folder, device="cpu")
    assert model.config.architecture == architecture
    record = read_records(roots[form], form)[0]
    assert model.config.image_size == record.size
    np.testing.assert_allclose(model.config.K, record.K, rtol=1e-6)
    found = model.predict(record.image_path, K=torch.from_numpy(record.K).float(), threshold=0.0)
    assert set(found.names) <= set(meshes)
    assert torch.isfinite(found.T_CO).all()


def test_the_records_of_a_reader_do_as_well(
    roots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_fits(monkeypatch)
    meshes, units = meshes_of("bop")
    records = read_records(roots["bop"], "bop")
    recipe = Recipe(architecture="smope-paper", network=TINY["smope-paper"], run=replace(RUN, max_steps=1))
    folder = fit(meshes, units, dataset=records, out=tmp_path, recipe=recipe, device="cpu")
    assert SMOPE.from_pretrained(folder, device="cpu").config.image_size == records[0].size


def test_what_a_data_set_lacks_is_said(roots: dict[str, Path], tmp_path: Path) -> None:
    meshes, units = meshes_of("kitti")
    alone = Recipe(data=DataConfig(dataset=str(roots["kitti"])), run=RUN)
    with pytest.raises(ConfigError, match=r"data\.dataset and data\.format go together"):
        fit(meshes, units, out=tmp_path, recipe=alone, device="cpu")
    other = Recipe(data=DataConfig(dataset=str(roots["kitti"]), format="kitti"), run=RUN)
    with pytest.raises(ValueError, match="the data set has 0 images of Tram; at least 2"):
        fit({"Tram": meshes["Car"]}, units, out=tmp_path, recipe=other, device="cpu")


def test_frames_of_several_sizes_are_filled_up(roots: dict[str, Path], tmp_path: Path) -> None:
    """As KITTI has them; boxes, poses and K stay, as zeros stand at the right and at the bottom only."""
    records = read_records(roots["kitti"], "kitti")
    pixels = np.asarray(Image.open(records[0].image_path))
    Image.fromarray(pixels[:110, :300]).save(tmp_path / "cut.png")
    cut = replace(records[0], image_path=tmp_path / "cut.png")
    with pytest.raises(
        ValueError, match=r"one image size, or size=, expected, \[\(300, 110\), \(320, 120\)\]"
    ):
        to_batch([cut, records[1]], ["Car"])
    with pytest.raises(ValueError, match="do not fit into"):
        to_batch([cut, records[1]], ["Car"], size=(310, 120))
    batch = to_batch([cut, records[1]], ["Car", "Van"], size=(320, 120))
    assert batch.images.shape == (2, 3, 120, 320)
    assert (batch.images[0, :, :110, :300] > 0).all()
    assert not batch.images[0, :, 110:].any()
    assert not batch.images[0, :, :, 300:].any()
    whole = to_batch(records[:2], ["Car", "Van"])
    for name in ("K", "T_CO", "boxes_xyxy", "labels"):
        assert torch.equal(getattr(batch, name), getattr(whole, name))
    meshes, units = meshes_of("kitti")
    objects = [ObjectModel.from_mesh(name, mesh, units) for name, mesh in meshes.items()]
    several = [cut, *records[1:]]
    source = record_source(objects, several, replace(RUN, batch_size=2), torch.device("cpu"), rank=0)
    first = next(iter(source.stream(0)))
    assert first.images.shape == (2, 3, 128, 320)
    assert {tuple(batch.images.shape[-2:]) for batch in source.held_out} == {(128, 320)}


def test_a_training_whose_images_cannot_be_scored_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Streets are full of cars: which detection is meant for which is not asked during training."""
    quick_fits(monkeypatch)
    cars = [Annotation("Car", pose(-2.0, 12.0, 0.3)), Annotation("Car", pose(3.0, 9.0, -1.2))]
    root = write_labelimg3d(tmp_path / "streets", dict.fromkeys((3, 8), cars))
    meshes, units = meshes_of("labelimg3d")
    recipe = Recipe(architecture="smope-paper", network=TINY["smope-paper"], run=replace(RUN, max_steps=1))
    records = read_records(root, "labelimg3d")
    folder = fit(meshes, units, dataset=records, out=tmp_path / "out", recipe=recipe, device="cpu")
    assert list(SMOPE.from_pretrained(folder, device="cpu").objects) == ["Car", "Van"]
    assert json.loads((tmp_path / "out/held_out_scores.json").read_text())["held_out"] == {}
    assert "no scores: no held-out image" in caplog.text
