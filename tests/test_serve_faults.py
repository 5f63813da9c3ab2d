"""`smope serve` over a real socket: whatever bytes come, it answers or closes, and goes on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_model import noise, small_model
from test_faults import encoded, mutations

from smope import Poses

pytest.importorskip("uvicorn", reason="needs smope[serve]")

import uvicorn

from smope.serve import Limits, create_app

LIMITS = Limits(megabytes=0.1, megapixels=0.2, waiting=4, seconds=20, upload_seconds=0.4)
EXPECTED = {200, 400, 404, 405, 408, 413, 415, 422, 503}


class Quick:
    """Looks at the camera as `predict` does, and finds nothing."""

    def __init__(self) -> None:
        model = small_model()
        self.config, self.objects = model.config, model.objects

    def predict(self, photo: torch.Tensor, K: Any = None, fov: Any = None, **_: Any) -> Poses:
        from smope.camera_arguments import cameras_from

        assert photo.dtype == torch.uint8
        [camera] = cameras_from([photo], K, fov, None, self.config)
        empty = {name: torch.zeros(0, *rest) for name, rest in SHAPES.items()}
        return Poses(names=(), labels=torch.zeros(0, dtype=torch.int64), camera=camera, **empty)


SHAPES: dict[str, tuple[int, ...]] = {
    "scores": (), "boxes_xyxy": (4,), "T_CO": (4, 4), "scale": (3,), "visibility": (), "sigma": (2,),
}  # fmt: skip


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    config = uvicorn.Config(create_app(Quick(), LIMITS), log_level="critical", ws="none", lifespan="on")  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def exchange(port: int, sent: bytes, patience: float = 20.0) -> bytes:
    """All that comes back; after `patience` seconds without an answer the connection is given up."""
    parts = []
    with socket.create_connection(("127.0.0.1", port), timeout=patience) as connection:
        with contextlib.suppress(
            BrokenPipeError, ConnectionResetError
        ):  # it may close before it has read all
            connection.sendall(sent)
        with contextlib.suppress(ConnectionResetError, TimeoutError):
            while part := connection.recv(65536):
                parts.append(part)
    return b"".join(parts)


def request(body: bytes, query: bytes = b"fov=60", headers: bytes = b"Content-Type: image/png\r\n") -> bytes:
    head = b"POST /poses?" + query + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n" + headers
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def check(answer: bytes) -> int:
    """One whole answer; those that are refused say why, in JSON."""
    code = status(answer)
    assert code in EXPECTED, answer[:300]
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"application/json" in head:
        told = json.loads(body)
        assert ("error" in told) == (code != 200)
        assert code == 200 or told["error"]
    return code


def still_well(port: int) -> None:
    assert check(exchange(port, request(encoded("PNG")))) == 200


def test_a_thousand_mutated_requests(port: int) -> None:
    """Photos, query strings and whole requests; in between and after, a good one is answered."""
    still_well(port)
    told: dict[int, int] = {}

    def send(sent: bytes, patience: float = 20.0) -> None:
        answer = exchange(port, sent, patience)
        if answer:  # none to a request whose head has no end
            code = check(answer)
            told[code] = told.get(code, 0) + 1

    for form in ("PNG", "JPEG", "WEBP"):
        for content in mutations(encoded(form), 150, seed=len(form)):
            send(request(content))
    after_photos = sum(told.values())
    assert after_photos == 450
    assert told.keys() <= {200, 413, 415, 422}
    assert told[422] > 20
    still_well(port)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    small = encoded("PNG")
    query = b"K=90,90,19.5,14.5&dist=0.1,0,0,0&threshold=0.3&top_k=3&layers=1"
    for changed in mutations(query, 250, seed=1):
        send(request(small, query=changed))
    still_well(port)
    with ThreadPoolExecutor(16) as clients:  # many are waited for in vain
        whole = mutations(request(small), 300, seed=2)
        for done in [clients.submit(send, changed, 1.5) for changed in whole]:
            done.result()
    still_well(port)
    assert told[422] > 200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


def test_a_photo_that_does_not_arrive_is_given_up(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        start = time.monotonic()
        connection.sendall(request(bytes(5000))[:-2000])
        answer = connection.recv(65536)
        assert 0.3 < time.monotonic() - start < 15
        while b"\r\n\r\n{" not in answer and (more := connection.recv(65536)):
            answer += more  # head and body may come apart
    assert status(answer) == 408
    assert b"did not arrive within 0.4 s" in answer
    still_well(port)


def test_clients_that_leave_hold_nothing(port: int) -> None:
    for _ in range(3 * (LIMITS.waiting + 1)):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(request(bytes(5000))[:-2000])
    deadline = time.monotonic() + 20
    while status(exchange(port, request(encoded("PNG")))) == 503:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not hasattr(signal, "SIGINT"), reason="no signals")
def test_the_command_serves_and_ends(tmp_path: Path) -> None:
    """From weights in a folder to poses over HTTP; Ctrl-C ends it."""
    model = small_model()
    model.save_pretrained(tmp_path / "weights")
    command = [sys.executable, "-m", "smope", "serve", "--model", str(tmp_path / "weights"), "--port", "0"]
    buffer = io.BytesIO()
    Image.fromarray(noise(0).permute(1, 2, 0).numpy()).save(buffer, "PNG")
    # Where tests run in the background SIGINT is ignored, and a process started then would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        [*command, "--objects", "brick", "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        signal.signal(signal.SIGINT, before)
        try:
            assert process.stdout is not None
            address = process.stdout.readline().partition(" ")[0]
            assert address.startswith("http://127.0.0.1:"), process.stderr
            asked = urllib.request.Request(
                f"{address}/poses?threshold=0&top_k=2",
                data=buffer.getvalue(),
                headers={"Content-Type": "image/png"},
            )
            with urllib.request.urlopen(asked, timeout=60) as answer:
                found = Poses.from_dict(json.load(answer))
            assert set(found.names) == {"brick"}
            with urllib.request.urlopen(address, timeout=60) as answer:
                assert b"Drop a photo" in answer.read()
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert told == "smope: interrupted\n"
    model.register_meshes(["brick"])
    expected = model.predict(noise(0), threshold=0.0, top_k=2)
    torch.testing.assert_close(found.T_CO, expected.T_CO, rtol=1e-4, atol=1e-5)
