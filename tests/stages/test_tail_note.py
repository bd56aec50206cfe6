"""The line about the tail, against all logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdcache.stages.tail_note import tail_facts, tail_line
from kdcache.store.cache import open as open_cache
from kdcache.store.writer import Writer

LOGITS = np.random.default_rng(0).normal(size=(200, 30)).astype(np.float32) * 2


def write(path: Path, **options: object) -> Path:
    with Writer(path, classes=30, **options) as writer:  # type: ignore[arg-type]
        writer.write(np.arange(200), LOGITS)
    return path


@pytest.mark.parametrize(("temperature", "is_stored"), [(2.0, True), (3.0, False)])
def test_the_mass_of_the_tail_lies_within_what_is_said(tmp_path: Path, temperature: float, is_stored: bool) -> None:
    with open_cache(write(tmp_path / "top", top_k=4, temperatures=(1.0, 2.0, 4.0))) as cache:
        facts = tail_facts(cache, temperature)
        assert facts is not None
        line = tail_line(cache, facts)[0]
    p = np.exp(LOGITS / temperature)
    p = np.sort(p / p.sum(axis=1, keepdims=True), axis=1)
    assert facts["mass"] == pytest.approx(p[:, :-4].sum(axis=1).mean(), abs=facts["error"] + 1e-3)
    assert (facts["error"] == 0) == is_stored
    assert line.endswith("(exact)" if is_stored else "since only 1, 2, 4 are stored)")


def test_rows_with_all_logits_have_no_tail(tmp_path: Path) -> None:
    for name, options in (("dense", {}), ("all", {"top_k": 30})):
        with open_cache(write(tmp_path / name, **options)) as cache:
            assert tail_facts(cache, 2.0) is None
            assert tail_line(cache, None) == []
    assert tail_facts(None, 2.0) is None
