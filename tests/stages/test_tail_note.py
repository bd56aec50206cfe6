"""The line about the tail, against all logits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kdcache.errors import UsageError
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.tail_note import tail_facts, tail_lines
from kdcache.store.cache import open as open_cache
from kdcache.store.writer import Writer

LOGITS = np.random.default_rng(0).normal(size=(200, 30)).astype(np.float32) * 2


def write(path: Path, **options: object) -> Path:
    with Writer(path, classes=30, **options) as writer:  # type: ignore[arg-type]
        writer.write(np.arange(200), LOGITS)
    return path


@pytest.mark.parametrize(("temperature", "is_stored"), [(2.0, True), (3.0, False)])
def test_the_mass_of_the_tail_lies_within_what_is_said(tmp_path: Path, temperature: float, is_stored: bool) -> None:
    source = source_of(write(tmp_path / "top", top_k=4, temperatures=(1.0, 2.0, 4.0)))
    facts = tail_facts(source.cache, temperature)
    p = np.exp(LOGITS / temperature)
    p = np.sort(p / p.sum(axis=1, keepdims=True), axis=1)
    assert facts.mass == pytest.approx(p[:, :-4].sum(axis=1).mean(), abs=facts.error + 1e-3)
    assert (facts.error == 0) == is_stored
    line = tail_lines(source, DistillOptions(temperature=temperature))[0]
    assert line.endswith("(exact)" if is_stored else "since only 1, 2, 4 are stored)")


def test_a_line_for_each_temperature_that_a_loss_has(tmp_path: Path) -> None:
    source = source_of(write(tmp_path / "top", top_k=4, temperatures=(1.0, 2.0, 4.0)))
    options = DistillOptions(temperature=2.0, loss=("kl", "js:temperature=4"))
    assert [line.partition(" at T = ")[2][0] for line in tail_lines(source, options)] == ["2", "4"]
    assert tail_lines(source, DistillOptions(loss=("standardized_kd",))) == []
    assert tail_lines(source, DistillOptions(hard_targets=True)) == []


def test_a_schedule_through_a_vague_temperature_is_refused_before_the_run(tmp_path: Path) -> None:
    source = source_of(write(tmp_path / "top", top_k=4, temperatures=(1.0, 2.0, 4.0)))
    with pytest.raises(UsageError, match=r"was not stored \(stored: 1, 2, 4\)"):
        tail_lines(source, DistillOptions(temperature=4.0, temperature_schedule="linear:30", tail_tolerance=1e-4))
    wide = DistillOptions(temperature=4.0, temperature_schedule="linear:30", tail_tolerance=1.0)
    assert len(tail_lines(source, wide)) == 1


def test_rows_with_all_logits_have_no_tail(tmp_path: Path) -> None:
    for name, options in (("dense", {}), ("all", {"top_k": 30})):
        assert tail_lines(source_of(write(tmp_path / name, **options)), DistillOptions()) == []
    assert tail_lines(source_of(None), DistillOptions()) == []


def source_of(path: Path | None) -> Any:
    """As far as the lines look at it."""
    return SimpleNamespace(cache=None if path is None else open_cache(path), calibration=None)
