"""The page's server: its poses are those of `predict`, and what it cannot take is one clear error."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_model import SIZE, noise, small_model

pytest.importorskip("starlette", reason="needs smope[serve]")

from starlette.testclient import TestClient

from smope import SMOPE, Poses, cli
from smope.serve import Limits, create_app
from smope.serve.layers import LONGEST

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "smope" / "serve" / "page"
LIMITS = Limits(megabytes=0.2, megapixels=0.3, waiting=1, seconds=60)


@pytest.fixture(scope="module")
def model() -> SMOPE:
    return small_model()


@pytest.fixture(scope="module")
def client(model: SMOPE) -> Iterator[TestClient]:
    with TestClient(create_app(model, LIMITS)) as opened:
        yield opened


def picture(seed: int = 0, width: int = SIZE[0], height: int = SIZE[1]) -> Image.Image:
    return Image.fromarray(noise(seed, width, height).permute(1, 2, 0).numpy())


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def ask(client: TestClient, content: Any, query: str = "", kind: str = "image/png") -> Any:
    return client.post(f"/poses?{query}", content=content, headers={"Content-Type": kind})


def same(answer: Any, expected: Poses) -> None:
    assert answer.status_code == 200, answer.text
    found = Poses.from_dict(answer.json())
    assert found.names == expected.names
    assert len(found) > 0
    for column in ("scores", "boxes_xyxy", "T_CO", "visibility", "sigma"):
        assert torch.equal(getattr(found, column), getattr(expected, column)), column
    assert torch.equal(found.camera.K, expected.camera.K)


@pytest.mark.parametrize(("form", "kind"), [("PNG", "image/png"), ("JPEG", "application/octet-stream")])
def test_the_route_gives_what_predict_gives(client: TestClient, model: SMOPE, form: str, kind: str) -> None:
    content = encoded(picture(), form)
    with Image.open(io.BytesIO(content)) as opened:
        expected = model.predict(opened, fov=55.0, threshold=0.0, top_k=3)
    same(ask(client, content, "fov=55&threshold=0&top_k=3", kind), expected)


def test_every_option_of_predict_is_a_parameter(client: TestClient, model: SMOPE) -> None:
    photo = picture(1, 80, 60)
    K = [[90.0, 0, 41], [0, 92.0, 30], [0, 0, 1]]
    expected = model.predict(photo, K=K, dist=[-0.1, 0.01, 0, 0], threshold=0.01, top_k=5)
    query = "K=90,92,41,30&dist=-0.1,0.01,0,0&threshold=0.01&top_k=5"
    same(ask(client, encoded(photo), query), expected)
    # Without a camera that of the weights serves, as in predict.
    same(ask(client, encoded(picture()), "threshold=0"), model.predict(picture(), threshold=0.0))


def test_an_upright_phone_photo_is_seen_upright(client: TestClient, model: SMOPE) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter to the right
    content = encoded(picture(), "PNG", exif=exif)
    answer = ask(client, content, "fov=40&threshold=0").json()
    assert answer["camera"]["size"] == [SIZE[1], SIZE[0]]


def layer(answer: dict[str, Any], name: str) -> np.ndarray:
    head, _, body = answer["layers"][name].partition(";base64,")
    assert head in ("data:image/png", "data:image/jpeg")
    with Image.open(io.BytesIO(base64.b64decode(body))) as opened:
        assert opened.mode == ("RGB" if name == "photo" else "RGBA")
        return np.asarray(opened)


def test_layers_over_the_photo_are_what_is_drawn(client: TestClient, model: SMOPE) -> None:
    photo = picture()
    found = model.predict(photo, fov=55.0, threshold=0.0, top_k=2)
    answer = ask(client, encoded(photo), "fov=55&threshold=0&top_k=2&layers=1").json()
    assert "layers" not in ask(client, encoded(photo), "fov=55").json()
    assert list(answer["layers"]) == ["photo", "surfaces", "boxes", "axes"]
    with Image.open(io.BytesIO(encoded(photo, "JPEG", quality=90))) as opened:
        np.testing.assert_array_equal(layer(answer, "photo"), np.asarray(opened))
    for name, others in (
        ("surfaces", ("boxes", "labels", "axes")),
        ("axes", ("boxes", "labels", "surfaces")),
    ):
        drawn = np.asarray(found.draw(photo, **dict.fromkeys(others, False)))
        over = layer(answer, name)
        seen = np.where(over[..., 3:] > 0, over[..., :3], np.asarray(photo))
        np.testing.assert_array_equal(seen, drawn)
        assert set(np.unique(over[..., 3])) == {0, 255}


def test_layers_of_a_large_photo_are_as_large_as_a_page(model: SMOPE) -> None:
    photo = picture(2, 2000, 900)
    with TestClient(create_app(model)) as client:
        answer = ask(client, encoded(photo), "fov=60&threshold=0&top_k=1&layers=1").json()
    box = np.array(answer["poses"][0]["box_xyxy"])
    scale = LONGEST / 2000
    over = layer(answer, "boxes")
    assert over.shape == (576, LONGEST, 4)
    left, top, right, bottom = (box + 0.5) * scale - 0.5
    v, u = np.nonzero(over[..., 3])
    if 20 < left < right < LONGEST - 20:
        assert abs(u.min() - left) < 3
        assert abs(u.max() - max(right, u.max())) < 3
    if 40 < top < bottom < 556:
        assert abs(v.max() - bottom) < 3


def chunks(size: int) -> Iterator[bytes]:
    """A body whose length is not told."""
    for _ in range(size // 1000):
        yield bytes(1000)


TOO_WIDE = encoded(Image.new("L", (800, 600)))


@pytest.mark.parametrize(
    ("content", "query", "kind", "status", "said"),
    [
        (bytes(200_001), "fov=60", "image/png", 413, "more than 0.2 MB"),
        (chunks(300_000), "fov=60", "image/png", 413, "more than 0.2 MB"),
        (TOO_WIDE, "fov=60", "image/png", 413, "800x600 pixels given, at most 0.3 million"),
        (b"x", "fov=60", "text/plain", 415, "content type 'text/plain' given"),
        (b"x", "fov=60", "multipart/form-data; boundary=x", 415, "the header Content-Type: image/jpeg"),
        (b"x", "fov=60", "", 415, "content type '' given"),
        (b"no photo", "fov=60", "image/png", 415, "no photo that can be read; send one of BMP, JPEG"),
        (encoded(picture(), "GIF"), "fov=60", "image/gif", 415, "no photo that can be read"),
        (b"", "fov=60", "image/png", 422, "an empty body"),
        (encoded(picture())[:5000], "fov=60", "image/png", 422, "damaged"),
        (encoded(picture()), "fov=200", "image/png", 422, "5 to 150 degrees expected"),
        (encoded(picture()), "fov=wide", "image/png", 422, "fov='wide' given, a number expected"),
        (encoded(picture()), "fov=nan", "image/png", 422, "fov='nan' given"),
        (encoded(picture()), "fov=60&fov=70", "image/png", 422, "'fov' given twice"),
        (encoded(picture()), "fof=60", "image/png", 422, "did you mean 'fov'"),
        (encoded(picture()), "fov=60&K=90,90,47,31", "image/png", 422, "both K and fov given"),
        (encoded(picture()), "K=90,90,47", "image/png", 422, "4 numbers with commas between expected"),
        (encoded(picture()), "K=90,90,400,31", "image/png", 422, "principal point"),
        (encoded(picture()), "dist=1,2", "image/png", 422, "4 or 5 or 8 numbers"),
        (encoded(picture()), "threshold=7", "image/png", 422, "threshold 7.0"),
        (encoded(picture()), "top_k=0", "image/png", 422, "top_k='0' given, a whole number from 1"),
        (encoded(picture()), "top_k=" + "9" * 400, "image/png", 422, "a whole number from 1"),
        (encoded(picture()), "layers=yes", "image/png", 422, "layers='yes' given, 0 or 1"),
        (encoded(picture(0, 50, 40)), "", "image/png", 422, "no camera given for an image of 50x40"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, str | int) else "",
)
def test_what_cannot_be_taken_is_one_error(
    client: TestClient, content: Any, query: str, kind: str, status: int, said: str
) -> None:
    answer = ask(client, content, query, kind)
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error"}
    assert said in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_other_ways_and_places_are_told_the_right_one(client: TestClient) -> None:
    for method, path, status in (("GET", "/poses", 405), ("PUT", "/poses", 405), ("GET", "/etc/passwd", 404)):
        answer = client.request(method, path)
        assert answer.status_code == status
        assert "to /poses by POST" in answer.json()["error"]
    assert client.get("/../pyproject.toml").status_code == 404
    assert client.get("/%2e%2e/app.py").status_code == 404


class Waiting:
    """A model that is looked at until it may go on."""

    def __init__(self, model: SMOPE) -> None:
        self.config, self.objects = model.config, model.objects
        self.go_on = threading.Event()
        self.asked: list[int] = []  # the top_k of each
        self._poses = model.predict(noise(0), threshold=0.0, top_k=1)

    def predict(self, _: Any, top_k: int, **__: Any) -> Poses:
        self.asked.append(top_k)
        assert self.go_on.wait(60)
        return self._poses


def test_a_full_line_is_told_at_once_and_moves_on(model: SMOPE) -> None:
    slow = Waiting(model)
    content = encoded(picture())
    with TestClient(create_app(slow, LIMITS)) as client, ThreadPoolExecutor(3) as others:  # type: ignore[arg-type]
        try:
            jobs = [others.submit(ask, client, content) for _ in range(3)]
            done, _ = wait(jobs, timeout=50, return_when=FIRST_COMPLETED)
            [refused] = [job.result() for job in done]  # one is looked at, one waits, and one finds no place
            assert refused.status_code == 503
            assert refused.json()["error"] == "2 photos are in the line already; send it again later"
            assert int(refused.headers["Retry-After"]) > 0
            assert client.get("/about").status_code == 200  # all else goes on
        finally:
            slow.go_on.set()
        assert sorted(job.result().status_code for job in jobs) == [200, 200, 503]
        assert len(slow.asked) == 2
        assert ask(client, content).status_code == 200


def test_what_takes_too_long_is_given_up_and_holds_its_place(model: SMOPE) -> None:
    slow = Waiting(model)
    content = encoded(picture())
    limits = dataclasses.replace(LIMITS, seconds=0.3)
    with TestClient(create_app(slow, limits)) as client, ThreadPoolExecutor(2) as others:  # type: ignore[arg-type]
        try:
            late = [others.submit(ask, client, content, f"top_k={k}") for k in (1, 2)]
            for answer in (job.result(timeout=60) for job in late):
                assert answer.status_code == 503
                assert "no poses within 0.3 s" in answer.json()["error"]
            assert "in the line already" in ask(client, content).json()["error"]  # the thread is at it still
        finally:
            slow.go_on.set()
        deadline = time.monotonic() + 60
        while ask(client, content, "top_k=3").status_code == 503:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert len({1, 2} & set(slow.asked)) == 1  # the one that waited was never looked at
    assert slow.asked[1:] == [3] * len(slow.asked[1:])


def test_a_fault_of_the_program_is_said_and_ends_nothing(
    model: SMOPE, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TestClient(create_app(model), raise_server_exceptions=False) as client:
        with monkeypatch.context() as patch:
            patch.setattr(model, "predict", lambda *_, **__: 1 / 0)
            answer = ask(client, encoded(picture()), "fov=60")
        assert answer.status_code == 500
        assert answer.json() == {"error": "a fault of the server (ZeroDivisionError); its log says more"}
        assert "division by zero" in caplog.text
        assert ask(client, encoded(picture()), "fov=60").status_code == 200


def test_only_its_own_names_reach_a_loopback_server(model: SMOPE) -> None:
    app = create_app(model, hosts=["127.0.0.1", "localhost", "[::1]"])
    for name, status in (
        ("evil.example", 400),
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("localhost", 200),
    ):
        with TestClient(app) as client:
            assert client.get("/about", headers={"Host": name}).status_code == status, name


def test_the_server_says_what_it_is(client: TestClient, model: SMOPE) -> None:
    about = client.get("/about").json()
    assert about["objects"] == ["ball", "brick"]
    assert about["fov"] == pytest.approx(2 * np.degrees(np.arctan(48 / 90)), abs=0.01)
    assert about["limits"]["megapixels"] == 0.3


def test_the_page_needs_nothing_from_elsewhere(client: TestClient) -> None:
    kinds = {
        "/": "text/html",
        "/page.css": "text/css",
        "/page.js": "text/javascript",
        "/demo.png": "image/png",
    }
    for path, kind in kinds.items():
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers["Content-Type"].partition(";")[0] in (kind, "application/javascript")
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "http" not in policy
    for file in PAGE.iterdir():
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text.replace("// the", "")), file
    page = client.get("/").text
    named = set(re.findall(r'(?:src|href)="([^"]+)"', page))
    assert named == {"page.css", "page.js", "data:,"}
    script = (PAGE / "page.js").read_text(encoding="utf-8")
    used = set(re.findall(r'part\("(\w+)"\)', script)) | {"photo", "surfaces", "boxes", "axes"}
    assert used <= set(re.findall(r'id="(\w+)"', page))


@pytest.mark.parametrize("limit", ["megabytes", "megapixels", "seconds", "upload_seconds"])
def test_a_limit_that_is_none_is_refused(limit: str) -> None:
    for value in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"{limit} .* given, a number above 0 expected"):
            Limits(**{limit: value})
    with pytest.raises(ValueError, match="waiting -1 given"):
        Limits(waiting=-1)


def test_a_port_that_is_taken_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--port", str(port)]) == 2
    told = capsys.readouterr().err
    assert f"cannot listen at 127.0.0.1, port {port}" in told
    assert "--port 0 takes a free one" in told
    assert told.count("\n") == 1
    assert cli.main(["serve", "--port", "70000"]) == 2
    assert cli.main(["serve", "--port", "0", "--waiting", "-1"]) == 2
