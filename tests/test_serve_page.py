"""The page in headless Chromium: a photo dropped on it, what it shows, and what it asks for."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from small_model import noise, small_model

from smope import Poses

TOOL = Path(__file__).parents[1] / "tools" / "page_picture.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    pytest.importorskip("uvicorn", reason="needs smope[serve]")
    spec = importlib.util.spec_from_file_location("page_picture", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not any(map(shutil.which, module.NAMES)):
        pytest.skip("no Chromium on the path (Debian: apt-get install chromium)")
    return module


def test_a_photo_is_dropped_and_its_poses_are_seen(tool: ModuleType, tmp_path: Path) -> None:
    model, photo = small_model(), tmp_path / "a & b.png"
    Image.fromarray(noise(0).permute(1, 2, 0).numpy()).save(photo)
    with tool.served(model) as address, tool.opened() as browser:
        shown = tool.play(browser, address, photo, tmp_path, threshold=0.0)
        assert not shown["wrong"], shown["status"]
        assert not shown["foreign"]
        assert not shown["complaints"]
        found = Poses.load(tmp_path / "a & b_poses.json")
        fov = float(browser.evaluate("document.getElementById('fov').value"))
        expected = model.predict(photo, fov=fov, threshold=0.0)
        assert found.T_CO.equal(expected.T_CO)
        assert [row[0] for row in shown["rows"]] == list(expected.names)
        millimetres = [[float(cell) for cell in row[2:5]] for row in shown["rows"]]
        assert millimetres == pytest.approx(1000 * expected.T_CO[:, :3, 3].numpy(), abs=0.051)
        assert shown["layers"] == {key: [96, 64, True] for key in ("photo", "surfaces", "boxes", "axes")}

        browser.evaluate("document.querySelector('[data-layer=axes]').click()")
        assert not browser.evaluate("document.getElementById('axes').checkVisibility()")
        tool.set_value(browser, "fov", "200")  # the page itself refuses
        assert not browser.evaluate("document.getElementById('controls').checkValidity()")
        tool.set_value(browser, "fov", "100")
        wider = model.predict(photo, fov=100.0, threshold=0.0).T_CO[0, 2, 3]
        browser.wait_for(
            f"document.querySelector('#found td:nth-child(5)').textContent === '{1000 * wider:.1f}'"
        )

        (tmp_path / "bad.png").write_bytes(b"no photo")
        browser.drop(tmp_path / "bad.png", 300, 300)
        browser.wait_for("document.getElementById('status').classList.contains('wrong')")
        assert "no photo that can be read" in browser.evaluate(
            "document.getElementById('status').textContent"
        )
