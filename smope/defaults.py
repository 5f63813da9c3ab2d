"""What `predict` does unless told otherwise. Imports nothing: the command line shows help without torch."""

from __future__ import annotations

# The lowest score that is reported. On held-out renders F1 is best from 0.5 to 0.6, to a percent
# (`python -m smope.tools.threshold lmo`).
LOWEST_SCORE = 0.5
TOP_K = 32  # at most so many objects in an image
