"""Options, markers and the environment that all tests share."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is imported anywhere: xdist already uses the cores, and child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [name for name in os.environ if name.startswith("KDCACHE_")]:
    if not name.startswith(("KDCACHE_CI_", "KDCACHE_BENCH_")):
        del os.environ[name]  # an option set in somebody's shell must not reach a test

settings.register_profile("kdcache", deadline=None, print_blob=True)  # no wall-clock asserts
settings.load_profile("kdcache")

STRICT_INTEROP = os.environ.get("KDCACHE_CI_INTEROP") == "1"
NO_BROWSER = os.environ.get("KDCACHE_CI_NO_BROWSER") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests that take minutes or a second environment")
    parser.addoption("--bench", action="store_true", help="run the measurements in tests/bench")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--bench") and config.option.markexpr != "bench":
        measurements = [item for item in items if item.get_closest_marker("bench")]
        config.hook.pytest_deselected(items=measurements)
        items[:] = [item for item in items if item not in measurements]
    for item in items:
        if item.get_closest_marker("long") and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="runs with --long"))
        if item.get_closest_marker("interop"):
            # Foreign packages warn about their own affairs; our own warnings stay errors in all other tests.
            item.add_marker(pytest.mark.filterwarnings("default"), append=False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here: `@pytest.mark.interop("datasets", "zarr")` names the packages a test needs."""
    missing = [
        str(package)
        for marker in item.iter_markers("interop")
        for package in marker.args
        if importlib.util.find_spec(str(package)) is None
    ]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install -c constraints.txt -e '.[interop]'")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """`count(30, 300)`: how often a proof repeats itself, by default and with `--long`."""
    return lambda short, full: full if request.config.getoption("--long") else short


@pytest.fixture
def proved(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """`proved("R1", kills=300)`: what a proof of docs/reliability.md has counted, for the table at the end of a run."""

    def record(promise: str, **counts: object) -> None:
        found = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in counts.items())
        record_property("proved", f"{promise}: {found}")

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = sorted(
        f"{value}  ({report.duration:.0f} s, {report.nodeid.partition('::')[2]})"
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == "proved"
    )
    if lines and terminalreporter.config.getoption("--long"):
        terminalreporter.section("what was proved")
        for line in lines:
            terminalreporter.line(line)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Where CI has installed the extra, a skipped interop test is a failure."""
    report = (yield).get_result()
    waits = item.get_closest_marker("long") and not item.config.getoption("--long")
    waits = waits or (NO_BROWSER and item.path.name == "test_report_browser.py")
    if STRICT_INTEROP and report.skipped and item.get_closest_marker("interop") and not waits:
        report.outcome = "failed"
        report.longrepr = f"skipped although the extra `interop` is installed: {report.longrepr}"


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """The same for `pytest.importorskip` at the top of a module."""
    report = (yield).get_result()
    if STRICT_INTEROP and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped although the extra `interop` is installed: {report.longrepr}"


def _define_torchvision_operators() -> object | None:
    """Let torchvision's wheel, which is built for CUDA, import beside the CPU build of torch.

    Its library of compiled operators does not load there, and registering the shapes of two of them then fails. Two
    empty definitions are enough: no test calls them. Returned, because a `Library` that is collected takes its
    definitions along.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return None
    import torch

    try:
        for library in Path(spec.submodule_search_locations[0]).glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:
        stubs = torch.library.Library("torchvision", "FRAGMENT")
        stubs.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        stubs.define(
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        )
        return stubs
    return None


_TORCHVISION_STUBS = _define_torchvision_operators()
