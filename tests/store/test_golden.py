"""What was written when format 1 was new still opens, verifies and gives the same rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from kdcache.store import cache as caches
from kdcache.store.cache import Cache
from kdcache.store.verify import verify

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "format1"
ROOTS = json.loads((GOLDEN / "roots.json").read_text())


def load_maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_golden", Path(__file__).with_name("make_golden.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = load_maker()


def check_rows(folder: Cache, one_file: Cache) -> None:
    exact = MAKER.logits()
    clamped = exact.copy()
    clamped[5, 2] = exact[5].max() - 65504
    rows = folder.gather(folder.rows(np.arange(10) + 100))
    np.testing.assert_array_equal(rows.dense(), clamped)
    np.testing.assert_array_equal(rows.label, MAKER.labels())
    np.testing.assert_array_equal(rows.input_digest, np.arange(10, dtype=np.uint64) + 2**63)
    assert folder.classes == ("cat", "dög", "owl")
    rows = one_file.gather(one_file.rows([f"image {n}" for n in range(10)]))
    np.testing.assert_array_equal(rows.dense(), exact)
    assert rows.label is None
    assert one_file.sample_ids.dtype == np.dtype("S12")
    for cache in (folder, one_file):
        assert cache.provenance["teacher"] == {"spec": "golden"}


@pytest.mark.parametrize("name", sorted(ROOTS))
def test_the_golden_caches_verify_and_have_the_recorded_root(name: str) -> None:
    report = verify(GOLDEN / name, expect_root=ROOTS[name])
    assert report.problems == ()
    assert report.rows == 10


@pytest.mark.parametrize("access", ["mmap", "pread"])
def test_the_golden_caches_give_their_rows(access: str) -> None:
    check_rows(*(caches.open(GOLDEN / n, access=access) for n in ("folder", "file.h5")))


def test_a_cache_made_today_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MAKER.main(tmp_path)  # its bytes differ by the versions in its provenance, its rows do not
    check_rows(caches.open(tmp_path / "folder"), caches.open(tmp_path / "file.h5"))
