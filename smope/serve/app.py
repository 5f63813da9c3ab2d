"""The routes: the page and its files, what the server is, and the poses of a photo."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

import smope
from smope.camera import Camera
from smope.serve.layers import draw_layers
from smope.serve.limits import Limits, Refused
from smope.serve.line import Line
from smope.serve.questions import Question, read_photo, read_question

if TYPE_CHECKING:
    from smope.model import SMOPE

log = logging.getLogger(__name__)

_PAGE = Path(__file__).parent / "page"
_DEMO = Path(smope.__file__).parent / "assets" / "demo.png"
_FILES = {
    "/": _PAGE / "index.html",
    "/page.css": _PAGE / "page.css",
    "/page.js": _PAGE / "page.js",
    "/demo.png": _DEMO,
}
_HEADERS = {
    # A browser may load nothing from elsewhere for this page, nor show it within another.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def create_app(model: SMOPE, limits: Limits | None = None, hosts: list[str] | None = None) -> Starlette:
    """The ASGI application around one loaded model, for uvicorn or any other server of such.

    `hosts` are the names that a request may call this server by, all where None: a loopback server says its
    own, so that no page from elsewhere reaches it under a name of that page's (DNS rebinding).
    """
    limits = limits or Limits()
    line = Line(limits)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        line.close()

    async def poses(request: Request) -> Response:
        question = read_question(request.query_params.multi_items())
        _check_kind(request.headers.get("content-type", ""))
        with line.place() as place:
            content = await _body(request, limits)
            answer = await place.run(partial(_answer, model, content, question, limits))
        return JSONResponse(answer, headers=_HEADERS)

    async def about(_: Request) -> Response:
        return JSONResponse(_about(model, limits), headers=_HEADERS)

    routes = [Route(path, partial(_file, file)) for path, file in _FILES.items()]
    return Starlette(
        routes=[*routes, Route("/about", about), Route("/poses", poses, methods=["POST"])],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts or ["*"], www_redirect=False)],
        exception_handlers={Refused: _refused, HTTPException: _no_route, Exception: _fault},
        lifespan=lifespan,
    )


def _answer(model: SMOPE, content: bytes, question: Question, limits: Limits) -> dict[str, Any]:
    """`Poses.to_dict()`, and what the page asks for beside it. Runs in the thread of the model."""
    photo = read_photo(content, limits)
    try:
        found = model.predict(photo, **question.options)
    except ValueError as error:  # the library's own: a camera or an option that cannot be meant
        raise Refused(422, " ".join(str(error).split())) from error
    answer: dict[str, Any] = found.to_dict()
    if question.layers:
        answer["layers"] = draw_layers(photo, found)
    return answer


def _about(model: SMOPE, limits: Limits) -> dict[str, Any]:
    config = model.config
    width, height = config.image_size
    return {
        "smope": smope.__version__,
        "architecture": config.architecture,
        "objects": list(model.objects),
        "fov": round(Camera(K=_tensor(config.K), size=(width, height)).fov_deg[0], 2),
        "limits": {
            "megabytes": limits.megabytes,
            "megapixels": limits.megapixels,
            "waiting": limits.waiting,
            "seconds": limits.seconds,
        },
    }


def _tensor(matrix: Any) -> Any:
    import torch

    return torch.tensor(matrix)


def _check_kind(kind: str) -> None:
    """A browser sends another site's form or script with these types only after asking, and we say no."""
    kind = kind.partition(";")[0].strip().lower()
    if not kind.startswith("image/") and kind != "application/octet-stream":
        raise Refused(
            415,
            f"content type {kind[:80]!r} given; send the photo's file as the body, with the header "
            "Content-Type: image/jpeg (or image/png, ..., or application/octet-stream)",
        )


async def _body(request: Request, limits: Limits) -> bytes:
    most = int(limits.megabytes * 1e6)
    told = request.headers.get("content-length", "0")
    too_large = Refused(413, f"the photo's file has more than {limits.megabytes:g} MB; make it smaller")
    if told.isdecimal() and int(told[:18]) > most:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.upload_seconds):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise Refused(
            408, f"the photo did not arrive within {limits.upload_seconds:g} s; send a smaller one"
        ) from None
    except ClientDisconnect:
        raise Refused(400, "the request ended before its photo did") from None
    return b"".join(parts)


async def _file(file: Path, _: Request) -> Response:
    return FileResponse(file, headers=_HEADERS)


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, {**_HEADERS, **(headers or {})})


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    after = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    # What a refused client still sends would be read as its next request.
    return _error(error.status, str(error), {**after, "Connection": "close"})


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        return _error(405, f"{request.method} given; photos go to /poses by POST", dict(error.headers or {}))
    return _error(error.status_code, "no such page; photos go to /poses by POST, / is the page to try it")


async def _fault(_: Request, error: Exception) -> Response:
    log.error("a request met a fault of the program", exc_info=error)
    return _error(500, f"a fault of the server ({type(error).__name__}); its log says more")
