"""A request -> what is asked of the model. Whatever cannot be meant is one `Refused`."""

from __future__ import annotations

import difflib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError

from smope.defaults import LOWEST_SCORE, TOP_K
from smope.images import ImageError, load_image
from smope.serve.limits import Limits, Refused

FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no other of PIL's readers sees foreign bytes
PARAMETERS = ("fov", "K", "dist", "threshold", "top_k", "layers")
_MOST = 1000  # objects in one photo


@dataclass(frozen=True)
class Question:
    """Of one photo: the options of `SMOPE.predict`, and whether the page's layers are wanted."""

    options: Mapping[str, Any]
    layers: bool


def read_question(pairs: Sequence[tuple[str, str]]) -> Question:
    """The query string's names and values."""
    given: dict[str, str] = {}
    for name, value in pairs:
        if name not in PARAMETERS:
            near = difflib.get_close_matches(name, PARAMETERS, 1)
            hint = f"; did you mean {near[0]!r}" if near else ""
            raise Refused(
                422, f"parameter {name[:40]!r} given, one of {', '.join(PARAMETERS)} expected{hint}"
            )
        if name in given:
            raise Refused(422, f"parameter {name!r} given twice; give it once")
        given[name] = value
    options: dict[str, Any] = {"threshold": LOWEST_SCORE, "top_k": TOP_K}
    if "fov" in given:
        [options["fov"]] = _numbers("fov", given["fov"], (1,))
    if "K" in given:
        fx, fy, cx, cy = _numbers("K", given["K"], (4,))
        options["K"] = [[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]]
    if "dist" in given:
        options["dist"] = _numbers("dist", given["dist"], (4, 5, 8))
    if "threshold" in given:
        [options["threshold"]] = _numbers("threshold", given["threshold"], (1,))
    if "top_k" in given:
        text = given["top_k"]
        if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= _MOST):
            raise Refused(422, f"top_k={text[:40]!r} given, a whole number from 1 to {_MOST} expected")
        options["top_k"] = int(text)
    layers = given.get("layers", "0")
    if layers not in ("0", "1"):
        raise Refused(422, f"layers={layers[:40]!r} given, 0 or 1 expected")
    return Question(options, layers == "1")


def _numbers(name: str, text: str, counts: tuple[int, ...]) -> list[float]:
    words = text.split(",")
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) not in counts or not all(map(math.isfinite, numbers)):
        many = " or ".join(map(str, counts))
        wanted = "a number" if counts == (1,) else f"{many} numbers with commas between"
        raise Refused(422, f"{name}={text[:80]!r} given, {wanted} expected")
    return numbers


def read_photo(content: bytes, limits: Limits) -> Any:
    """The body of a request -> uint8 [3, H, W]; its size is looked at before it is decoded."""
    if not content:
        raise Refused(422, "an empty body given; send the photo's file as the body")
    try:
        opened = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise Refused(
            415, f"no photo that can be read; send one of {', '.join(FORMATS)} as the body"
        ) from None
    except Image.DecompressionBombError:
        raise Refused(413, _too_large("more than PIL opens", limits)) from None
    except Exception as error:  # damaged files make the decoders raise whatever they stumble over
        raise Refused(422, f"the photo is damaged ({_line(error)}); save it anew") from None
    with opened:
        if opened.width * opened.height > limits.megapixels * 1e6:
            raise Refused(413, _too_large(f"{opened.width}x{opened.height}", limits))
        try:
            return load_image(opened)
        except ImageError as error:
            raise Refused(422, _line(error)) from None
        except Exception as error:
            raise Refused(422, f"the photo is damaged ({_line(error)}); save it anew") from None


def _too_large(size: str, limits: Limits) -> str:
    return (
        f"a photo of {size} pixels given, at most {limits.megapixels:g} million are taken; make it smaller "
        "(fov stays as it is, K scales with it)"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
