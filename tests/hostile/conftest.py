"""What the tests of hostile files share: their modules by name, and the server that tries doors in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session")
def knock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, Any]]]:
    """`knock(path, ["open", ...])`: tries doors in one fresh child process (hostile_doors.py says what comes back)."""
    if not sys.platform.startswith("linux"):
        pytest.skip("children are limited and watched through Linux's /proc")
    plugins, work = tmp_path_factory.mktemp("plugins"), tmp_path_factory.mktemp("work")
    os.mkfifo(plugins / "libevil.so")  # whoever looks for a filter here waits for ever
    command = [sys.executable, "-W", "error", str(HERE / "hostile_doors.py")]
    variables = {**os.environ, "HDF5_PLUGIN_PATH": str(plugins), "SOURCE_DATE_EPOCH": "1700000000"}
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)
    assert server.stdin is not None
    assert server.stdout is not None

    def ask(path: Path, doors: list[str], seconds: int = 30) -> dict[str, Any]:
        request = {"path": str(path), "doors": doors, "work": str(work), "seconds": seconds}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer: dict[str, Any] = json.loads(server.stdout.readline())
        return answer

    yield ask
    server.stdin.write("\n")
    server.stdin.close()
    assert server.wait(60) == 0
    server.stdout.close()
