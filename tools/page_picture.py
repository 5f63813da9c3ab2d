"""The page of `smope serve` in headless Chromium: drop a photo on it, see what it shows, take its picture.

    python tools/page_picture.py --out docs/images/serve.png

Drops the bundled picture as a hand would, waits for the poses, and checks what stands there: overlays, the
table, the JSON to be downloaded, and that nothing was fetched from elsewhere. Needs `smope[serve]` and a
`chromium` on the path (Debian: apt-get install chromium), which is spoken to over its own DevTools protocol,
through pipes. The picture shown is CC BY-SA 4.0 (smope/assets/LICENSE.md).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import itertools
import json
import os
import select
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
DEMO = Path(__file__).parents[1] / "smope" / "assets" / "demo.png"


class Browser:
    """One page of a headless Chromium: commands and events are JSON with a zero byte after each."""

    def __init__(self, program: str, folder: str, seconds: float) -> None:
        self._seconds = seconds
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        command = [
            program, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
            "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder}",
        ]  # fmt: skip
        # Chromium reads commands from descriptor 3 and writes to 4.
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._rest, self._numbers, self._session = b"", itertools.count(1), ""
        self.events: list[dict[str, Any]] = []
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        attached = self.command("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session and not method.startswith("Browser."):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self._seconds
        while True:
            answer = self._read(deadline, method)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _read(self, deadline: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._in, 1 << 20) if ready else b""
            if not part:
                raise TimeoutError(f"{method}: no answer from Chromium within {self._seconds:g} s")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def evaluate(self, script: str) -> Any:
        """What a script in the page gives, awaited where it is a promise."""
        done = self.command("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise RuntimeError(json.dumps(done["exceptionDetails"])[:500])
        return done["result"].get("value")

    def wait_for(self, script: str) -> None:
        deadline = time.monotonic() + self._seconds
        while not self.evaluate(script):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{script}: not so within {self._seconds:g} s")
            time.sleep(0.05)

    def drop(self, file: Path, x: float, y: float) -> None:
        """As a hand that drags a file onto the page and lets it go."""
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.command("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def saved(self, file: Path) -> None:
        """Wait until a download is whole: it has its name only then."""
        deadline = time.monotonic() + self._seconds
        while not file.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{file.name}: not downloaded within {self._seconds:g} s")
            time.sleep(0.05)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.command("Browser.close")
        self.process.terminate()
        self.process.wait(20)
        os.close(self._in)
        os.close(self._out)


@contextlib.contextmanager
def opened(seconds: float = 60.0) -> Iterator[Browser]:
    """A browser that leaves nothing behind."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        raise FileNotFoundError(f"none of {', '.join(NAMES)} on the path (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(program, folder, seconds)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def served(model: Any, port: int = 0) -> Iterator[str]:
    """`smope serve` in a thread; its address."""
    import uvicorn

    from smope.serve import create_app

    server = uvicorn.Server(uvicorn.Config(create_app(model), log_level="warning", ws="none"))
    with socket.create_server(("127.0.0.1", port)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def set_value(browser: Browser, name: str, value: str) -> None:
    """As typed into one of the page's fields and left."""
    browser.evaluate(
        f"""(() => {{
            const field = document.getElementById({json.dumps(name)});
            field.value = {json.dumps(value)};
            field.dispatchEvent(new Event("change", {{ bubbles: true }}));
        }})()"""
    )


def play(browser: Browser, address: str, photo: Path, folder: Path, threshold: float = 0.3) -> dict[str, Any]:
    """Drop the photo, wait, download the JSON into `folder`, and say what the page shows then."""
    size = {"width": 1180, "height": 960, "deviceScaleFactor": 1, "mobile": False}
    browser.command("Emulation.setDeviceMetricsOverride", **size)
    for domain in ("Page", "Network", "Runtime", "Log"):
        browser.command(f"{domain}.enable")
    browser.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    browser.command("Page.navigate", url=address)
    browser.wait_for("document.body && document.body.dataset.ready === 'yes'")
    set_value(browser, "threshold", str(threshold))
    browser.drop(photo, 300, 300)
    browser.wait_for("/found in|given|cannot/.test(document.getElementById('status').textContent)")
    browser.wait_for("[...document.images].every((one) => one.complete)")
    shown = browser.evaluate(
        """(() => ({
            status: document.getElementById("status").textContent,
            wrong: document.getElementById("status").classList.contains("wrong"),
            rows: [...document.querySelectorAll("#found tbody tr")].map((row) =>
                [...row.cells].map((cell) => cell.textContent)),
            layers: Object.fromEntries([...document.querySelectorAll("#picture img")].map((one) =>
                [one.id, [one.naturalWidth, one.naturalHeight, one.checkVisibility()]])),
            file: document.getElementById("download").download,
        }))()"""
    )
    browser.evaluate("document.getElementById('download').click()")
    browser.saved(folder / shown["file"])
    asked = [
        one["params"]["request"]["url"]
        for one in browser.events
        if one["method"] == "Network.requestWillBeSent"
    ]
    shown["foreign"] = [url for url in asked if not url.startswith((address, "data:", "blob:" + address))]
    shown["complaints"] = [
        one for one in browser.events if one["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")
    ]
    result: dict[str, Any] = shown
    return result


def picture(browser: Browser) -> bytes:
    taken = browser.command("Page.captureScreenshot", format="png", captureBeyondViewport=True)
    return base64.b64decode(taken["data"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the PNG")
    parser.add_argument("--port", type=int, default=8080, help="as it stands on the picture")
    parser.add_argument("--model", default="lmo", help="a bundled name, a folder or a Hugging Face id")
    given = parser.parse_args()
    from PIL import Image

    from smope import SMOPE, Poses

    model = SMOPE.from_pretrained(given.model, device="cpu")
    with served(model, given.port) as address, opened() as browser, tempfile.TemporaryDirectory() as folder:
        shown = play(browser, address, DEMO, Path(folder))
        with Image.open(io.BytesIO(picture(browser))) as taken:
            taken.convert("RGB").save(given.out, optimize=True)
        found = Poses.load(Path(folder) / "demo_poses.json")
    print(json.dumps(shown, indent=1))
    assert not shown["wrong"], shown["status"]
    assert not shown["foreign"], shown["foreign"]
    assert not shown["complaints"], shown["complaints"]
    assert len(shown["rows"]) == len(found) > 0


if __name__ == "__main__":
    main()
