"""What all tests share: third-party data (never in this repository), no network, repeatable examples."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

# Set before anything imports huggingface_hub, which reads it once: no test may reach a real hub.
os.environ["HF_HUB_OFFLINE"] = "1"

# Where pytest-xdist runs files side by side, each of its processes, and those it starts, has one core.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# No deadline, as two slow cores are shared; the same examples each time, so that a failure can be seen again.
hypothesis.settings.register_profile("smope", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("smope")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of third-party data: lmo/, meshes/, backgrounds/ and so on."""
    if not os.environ.get("SMOPE_DATA"):
        pytest.skip("SMOPE_DATA is not set to the folder of third-party data")
    root = Path(os.environ["SMOPE_DATA"]).resolve()
    assert root.is_dir(), f"SMOPE_DATA={root} is no folder"
    return root


@pytest.fixture(scope="session")
def fixtures_root(data_root: Path) -> Path:
    """The folder of golden values too large for this repository: SMOPE_FIXTURES, or beside SMOPE_DATA."""
    root = Path(os.environ.get("SMOPE_FIXTURES", data_root.parent / "fixtures")).resolve()
    if not root.is_dir():
        pytest.skip(f"SMOPE_FIXTURES is not set and {root} (beside SMOPE_DATA) does not exist")
    return root


@pytest.fixture(scope="module")
def few_textures() -> Iterator[None]:
    """For the streams of scenes of a whole file."""
    import small_model

    with pytest.MonkeyPatch.context() as patch:
        small_model.few_textures(patch)
        yield


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """With SMOPE_REQUIRE_DATA=1, as in CI, a test skipped for want of data is a failure."""
    if os.environ.get("SMOPE_REQUIRE_DATA") != "1" or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if "SMOPE_DATA" in reason or "SMOPE_FIXTURES" in reason:
        report.outcome = "failed"
        report.longrepr = f"SMOPE_REQUIRE_DATA=1, yet skipped for want of data: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report
