"""What top-k rows leave out, against the dense rows that they came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.format.topk import TopK
from kdcache.store.cache import open as open_cache
from kdcache.store.quality import captured, of_logits, of_rows
from kdcache.store.rows import TeacherRows
from kdcache.store.writer import Writer


def dense_and_bucketed(logits: np.ndarray, kept: np.ndarray, temperature: float) -> tuple[float, float, float]:
    """Captured mass, mean KL to uniform, mean bucketed KL, in float64 from all logits."""
    scaled = logits.astype(np.float64) / temperature
    log_p = scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True)
    p, classes = np.exp(log_p), logits.shape[1]
    each = np.where(p > 0, p * (np.where(p > 0, log_p, 0) + np.log(classes)), 0)
    tail, left = (p * ~kept).sum(axis=1), (~kept).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        bucket = np.where(tail > 0, tail * np.log(tail * classes / left), 0)
    return (p * kept).sum(axis=1).mean(), each.sum(axis=1).mean(), ((each * kept).sum(axis=1) + bucket).mean()


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.integers(2, 60),
    k=st.integers(1, 60),
    temperatures=st.sampled_from([(1.0,), (1.0, 2.0, 4.0), (0.5, 1.0, 1.5, 3.0, 8.0), (1.0, "z2")]),
    spread=st.sampled_from([0.1, 2.0, 30.0]),
    labelled=st.booleans(),
)
def test_mass_is_exact_and_the_share_lies_between_its_bounds(
    seed: int, classes: int, k: int, temperatures: tuple[float | str, ...], spread: float, labelled: bool
) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(20, classes)) * spread).astype(np.float32)
    labels = rng.integers(-1, classes, 20)
    encoding = TopK((classes,), min(k, classes), temperatures, int(labelled))
    arrays = encoding.encode(logits, labels[:, None] if labelled else None).arrays
    rows = TeacherRows(encoding, arrays, np.arange(20), np.zeros(20, "u2"), labels, np.ones(20, bool))
    kept = np.zeros(logits.shape, bool)
    np.put_along_axis(kept, arrays["topk_classes"].astype(np.int64), True, axis=1)
    if labelled:
        kept[np.flatnonzero(labels >= 0), labels[labels >= 0]] = True
    found = of_rows(rows)
    assert [one.temperature for one in found] == pytest.approx([t for t in temperatures if t != "z2"])
    for one in found:
        mass, dense, bucketed = dense_and_bucketed(logits, kept, one.temperature)
        assert one.mass == pytest.approx(mass, abs=2e-3)
        least, most = one.kl_share
        slack = 5e-3 + 1e-5 / dense
        assert least - slack <= bucketed / dense <= most + slack


def test_a_cache_is_sampled_and_one_with_all_logits_has_nothing_to_say(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(size=(3000, 40)).astype(np.float32)
    for name, top_k in (("part", 5), ("all", 40), ("dense", None)):
        with Writer(tmp_path / name, classes=40, top_k=top_k) as writer:
            writer.write(np.arange(3000), logits)
    with open_cache(tmp_path / "part") as cache:
        found = captured(cache)
    assert [one.temperature for one in found] == [1.0, 2.0, 4.0]
    assert 0.3 < found[0].mass < 0.6
    assert found[0].mass > found[2].mass
    for name in ("all", "dense"):
        with open_cache(tmp_path / name) as cache:
            assert captured(cache) == []


def test_before_rows_are_encoded_the_share_is_exact(tmp_path: Path) -> None:
    logits = np.random.default_rng(3).normal(size=(50, 30)).astype(np.float32) * 2
    labels = np.arange(50) % 31 - 1
    encoding = TopK((30,), 4, (1.0, 2.0), 1)
    kept = np.zeros(logits.shape, bool)
    np.put_along_axis(kept, np.argsort(-logits, axis=1)[:, :4], True, axis=1)
    kept[np.flatnonzero(labels >= 0), labels[labels >= 0]] = True
    for one in of_logits(encoding, logits, labels[:, None]):
        mass, dense, bucketed = dense_and_bucketed(logits, kept, one.temperature)
        assert one.mass == pytest.approx(mass)
        assert one.kl_share == pytest.approx((bucketed / dense,) * 2)
