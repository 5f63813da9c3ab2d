"""`python -m smope`: the same as the `smope` command."""

from __future__ import annotations

import sys

from smope.cli import main

if __name__ == "__main__":
    sys.exit(main())
