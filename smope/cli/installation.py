"""`smope info`: what is installed here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Info:
    """Versions, devices, compilers, the state of the kernel, and where the caches are."""

    def run(self) -> None:
        from smope.installation import describe_installation

        facts = describe_installation()
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name:<{width}}  {value}")
