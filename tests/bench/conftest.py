"""The session's data, the record of figures, and the table at the end.

`python -m pytest tests/bench -m bench -s` measures everything in under 10 minutes.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))  # for bench_data and bench_measure: tests are no package

from bench_data import BenchData, build
from bench_measure import Ratio, machine


@dataclass
class Figures:
    """What was measured, in order; `add` prints a line for people and one of JSON."""

    lines: list[dict[str, Any]] = field(default_factory=list)

    def add(self, what: str, value: Ratio | float, target: str, *, against: str, unit: str = "x", **more: Any) -> None:
        """Records a figure.

        Args:
            what: was measured.
            value: a ratio with its quartiles, or a number.
            target: from the table of figures to reach, "-" for none.
            against: what stands on the other side.
            unit: of the value.
            **more: for the JSON line.
        """
        spread = asdict(value) if isinstance(value, Ratio) else {"median": value}
        line = {"what": what, "target": target, "against": against, "unit": unit, **spread, **more}
        self.lines.append(line)
        print(f"\n{what}: {shown(line)} (target {target}) against {against}")
        print(json.dumps({**line, "machine": machine()}))


def shown(line: dict[str, Any]) -> str:
    """A figure with its quartiles."""
    middle = f"{line['median']:.3g} {line['unit']}"
    return middle if "low" not in line else f"{middle} [{line['low']:.3g} to {line['high']:.3g}]"


_FIGURES = pytest.StashKey[Figures]()


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Figures:
    return pytestconfig.stash.setdefault(_FIGURES, Figures())


@pytest.fixture(scope="session")
def bench_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where data is made: `KDCACHE_BENCH_DIR`, which stays, or a temporary folder."""
    kept = os.environ.get("KDCACHE_BENCH_DIR")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("bench")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def data(bench_folder: Path) -> BenchData:
    return build(bench_folder)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table for docs/log.md."""
    figures = config.stash.get(_FIGURES, None)
    if figures is None:
        return
    described = machine()
    terminalreporter.section("figures")
    terminalreporter.line(", ".join(f"{name} {value}" for name, value in described.items()))
    terminalreporter.line("")
    terminalreporter.line("| what | measured [quartiles] | target | against |")
    terminalreporter.line("|---|---|---|---|")
    for line in figures.lines:
        terminalreporter.line(f"| {line['what']} | {shown(line)} | {line['target']} | {line['against']} |")
