"""`smope serve`: a page to try a model on, and its poses over HTTP."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smope.cli import common
from smope.cli.common import Units, UsageError

log = logging.getLogger(__name__)

_LOOPBACK = {"127.0.0.1": "127.0.0.1", "localhost": "localhost", "::1": "[::1]"}  # as requests write them


@dataclass(frozen=True)
class Serve:
    """A page to drop photos on and see poses, and the same by POST /poses (see docs/deploy.md)."""

    model: str = "lmo"
    """A bundled name, a folder, or a Hugging Face id."""
    objects: tuple[str, ...] | None = None
    """Look for these trained objects only."""
    meshes: tuple[Path, ...] | None = None
    """Look for these meshes: files, or folders of them. A file's name is the object's."""
    units: Units | None = None
    """Of the meshes; required with them."""
    symmetries: Literal["auto"] | None = None
    """auto: find those of the meshes from their geometry."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; a GPU where there is one."""
    host: str = "127.0.0.1"
    """The address to listen at. Any but 127.0.0.1 lets others in: there is no password."""
    port: int = 8080
    """0 takes a free one."""
    megabytes: float = 20.0
    """The largest file of a photo."""
    megapixels: float = 30.0
    """The largest photo."""
    waiting: int = 8
    """Photos that may wait while one is looked at; more are sent away (503)."""
    seconds: float = 60.0
    """Until a photo is given up (503), waiting included."""

    def run(self) -> None:
        import uvicorn

        from smope.serve import Limits, create_app

        limits = Limits(self.megabytes, self.megapixels, self.waiting, self.seconds)
        with self._listen() as listening:
            model = common.open_model(
                self.model, self.device, self.objects, self.meshes, self.units, self.symmetries
            )
            alone = self.host in _LOOPBACK
            app = create_app(model, limits, hosts=list(_LOOPBACK.values()) if alone else None)
            if not alone:
                log.warning("whoever reaches %s may use this server: there is no password", self.host)
            name = f"[{self.host}]" if ":" in self.host else self.host
            print(f"http://{name}:{listening.getsockname()[1]} (Ctrl-C ends)", flush=True)
            # More connections at once than places in the line: the page itself and refusals need some too.
            most = 4 * (self.waiting + 1) + 32
            config = uvicorn.Config(
                app,
                log_level="warning",
                limit_concurrency=most,
                ws="none",
                server_header=False,
                lifespan="on",
            )
            uvicorn.Server(config).run(sockets=[listening])

    def _listen(self) -> socket.socket:
        """Before the model is loaded, so that a port that is taken is said at once."""
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port {self.port} given, 0 to 65535 expected")
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            return socket.create_server((self.host, self.port), family=family)
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(
                f"cannot listen at {self.host}, port {self.port} ({reason}); --port 0 takes a free one"
            ) from None
