"""Commands for those who work on smope; run them with `python -m smope.tools.NAME`."""
