"""What one server takes at most, and the answers to what is beyond it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Those of one server; its memory is bounded by (waiting + 1) photos of the largest size."""

    megabytes: float = 20.0  # of a photo's file
    megapixels: float = 30.0  # of a photo
    waiting: int = 8  # photos that may wait while one is looked at
    seconds: float = 60.0  # from the whole photo to its poses, waiting included
    upload_seconds: float = 30.0  # for a photo to arrive

    def __post_init__(self) -> None:
        for name in ("megabytes", "megapixels", "seconds", "upload_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} {getattr(self, name)} given, a number above 0 expected")
        if self.waiting < 0:
            raise ValueError(f"waiting {self.waiting} given, 0 or more expected")


class Refused(Exception):
    """A request that gets no poses: the HTTP status, and one line that says why and what to do."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after  # seconds, where the same request may do later
