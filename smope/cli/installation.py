"""`smope info`, `smope build`: what is installed here, and the kernel for this machine's processor."""

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


@dataclass(frozen=True)
class Build:
    """Compile the kernel for this machine's processor, once; every prediction on the CPU takes it then."""

    def run(self) -> None:
        from smope.ops.build import build_cpu

        print(f"the CPU kernel is in {build_cpu()}")
