"""What `doctor` finds, and that a broken thing is reported instead of raised."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

from kdcache.stages.doctor import BROKEN, NOTE, examine


def status_of(report: dict, name: str) -> str:
    return next(check["status"] for check in report["checks"] if check["name"] == name)


def refusing(error: Exception):
    def refuse(*_: object, **__: object) -> None:
        raise error

    return refuse


def test_a_package_whose_library_does_not_load_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load = importlib.import_module

    def import_module(name: str, package: str | None = None):
        if name == "h5py":
            raise OSError("libhdf5.so: cannot open shared object file")
        return load(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    report = examine(tmp_path)
    assert not report["ok"]
    assert status_of(report, "h5py") == BROKEN


def test_a_file_system_without_links_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "link", refusing(OSError(95, "Operation not supported")))
    report = examine(tmp_path)
    assert report["ok"]
    assert status_of(report, "hard links") == NOTE


def test_a_file_system_without_fsync_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "fsync", refusing(OSError(22, "Invalid argument")))
    report = examine(tmp_path)
    assert not report["ok"]
    assert status_of(report, "fsync") == BROKEN


def test_every_limit_or_fault_comes_with_advice(tmp_path: Path) -> None:
    checks = examine(tmp_path)["checks"] + examine(tmp_path / "absent")["checks"]
    assert all(check["advice"] for check in checks if check["status"] != "ok")
