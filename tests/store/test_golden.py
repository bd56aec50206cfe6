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


def check_small_rows(root: Path) -> None:
    exact = MAKER.many_logits()
    for name, step in (("int8.h5", 254), ("int4.h5", 14)):
        rows = caches.open(root / name).gather(np.arange(10))
        finite = np.isfinite(exact)
        np.testing.assert_array_equal(np.isfinite(rows.dense()), finite)
        error = np.abs(np.where(finite, rows.dense(), 0) - np.where(finite, exact, 0))
        assert error.max() <= 32 / step / 2 + 1e-3
        assert rows.arrays["top_classes"][3].tolist() == list(range(8))
    rows = caches.open(root / "topk").gather(np.arange(10))
    order = np.argsort(-exact, axis=1, kind="stable")[:, :3]
    np.testing.assert_array_equal(rows.arrays["topk_classes"], order)
    shifted = exact - exact.max(axis=1, keepdims=True)
    np.testing.assert_array_equal(rows.arrays["topk_logits"], np.take_along_axis(shifted, order, axis=1))
    labels = MAKER.labels()
    np.testing.assert_array_equal(rows.label, labels)
    own = np.where(labels >= 0, shifted[np.arange(10), labels], -np.inf)
    np.testing.assert_array_equal(rows.arrays["label_logits"][:, 0], own)
    for row, label in enumerate(labels):
        tail = np.delete(shifted[row], np.unique([*order[row], *([label] if label >= 0 else [])]))
        std = rows.arrays["logit_std"][row]
        assert std == pytest.approx(shifted[row][np.isfinite(shifted[row])].std(), rel=1e-6)
        with np.errstate(divide="ignore"):
            sums = [np.log(np.exp(tail / t).sum()) for t in (1, 2.5, max(2 * std, 1e-37))]
        np.testing.assert_allclose(rows.arrays["tail_logsumexp"][row], sums, rtol=1e-6)
        assert rows.arrays["tail_mean"][row] == pytest.approx(tail.mean(), rel=1e-6)


def check_factored(path: Path) -> None:
    weight, bias = MAKER.last_layer()
    with caches.open(path) as cache:
        rows = cache.gather(np.arange(10))
    exact = MAKER.inputs().astype(np.float64)
    stored = rows.arrays["features"].astype(np.float64) * rows.arrays["row_scale"][:, None]
    np.testing.assert_array_equal(stored, exact)  # a power of two loses nothing
    np.testing.assert_array_equal(np.frexp(rows.arrays["row_scale"])[0], 0.5)
    np.testing.assert_array_equal(rows.dense(), exact @ weight.T + bias)  # few bits: float32 rounds nothing here
    np.testing.assert_array_equal(rows.label, MAKER.labels())


def check_soft_targets(root: Path) -> None:
    shares = MAKER.shares()
    with caches.open(root / "soft_targets") as cache:
        rows = cache.gather(np.arange(10))
    assert cache.encoding.to_json()["temperature"] == 2.5
    np.testing.assert_allclose(np.exp(rows.arrays["log_probs"].astype(np.float64)), shares, rtol=1e-3)
    with caches.open(root / "soft_rest") as cache:
        rows = cache.gather(np.arange(10))
    np.testing.assert_allclose(np.exp(rows.arrays["log_probs"]), shares[:, :4], rtol=1e-6)
    np.testing.assert_allclose(np.exp(rows.arrays["log_rest"]), shares[:, 4], rtol=1e-6)
    assert rows.arrays["kept_classes"][0].tolist() == [0, 5, 10, 15]
    assert rows.arrays["kept_classes"][4].tolist() == [12, 12, 12, 12]


@pytest.mark.parametrize("name", sorted(ROOTS))
def test_the_golden_caches_verify_and_have_the_recorded_root(name: str) -> None:
    report = verify(GOLDEN / name, expect_root=ROOTS[name])
    assert report.problems == ()
    assert report.rows == 10


@pytest.mark.parametrize("access", ["mmap", "pread"])
def test_the_golden_caches_give_their_rows(access: str) -> None:
    check_rows(*(caches.open(GOLDEN / n, access=access) for n in ("folder", "file.h5")))


def test_the_golden_caches_of_small_rows_give_what_they_were_made_of() -> None:
    check_small_rows(GOLDEN)


def test_the_golden_factored_cache_gives_the_logits_of_its_layer() -> None:
    check_factored(GOLDEN / "factored")


def test_the_golden_soft_targets_give_their_probabilities() -> None:
    check_soft_targets(GOLDEN)


def test_a_cache_made_today_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MAKER.main(tmp_path)  # its bytes differ by the versions in its provenance, its rows do not
    check_rows(caches.open(tmp_path / "folder"), caches.open(tmp_path / "file.h5"))
    check_small_rows(tmp_path)
    check_factored(tmp_path / "factored")
    check_soft_targets(tmp_path)
