"""A page to try a model on, and the same poses over HTTP for other programs: extra `[serve]`."""

from smope.serve.app import create_app
from smope.serve.limits import Limits

__all__ = ["Limits", "create_app"]
