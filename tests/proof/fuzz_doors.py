"""Everything that a reader may do with a cache somebody sent: each call gives a result or refuses with our error."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.errors import KDCacheError
from kdcache.store.cache import Cache
from kdcache.store.cache import open as open_cache
from kdcache.store.card import render_card
from kdcache.store.inspect import describe
from kdcache.store.rows import TeacherRows
from kdcache.store.verify import verify
from kdcache_cli.output import to_json, to_lines

Rows = dict[str, np.ndarray]
MOST_ROWS = 1000
MOST_LETTERS = 3000  # of a message: a file must not fill a log


class Fault(AssertionError):
    """A promise that a mutated file broke."""


@dataclass
class Outcome:
    """What the doors said: `rows` that were gathered and their `numbers`, whether `verify` calls the cache sound."""

    rows: Rows | None = None
    numbers: np.ndarray | None = None
    sound: bool = False
    refusals: dict[str, str] = field(default_factory=dict)

    def attempt(self, door: str, call: Callable[[], Any]) -> Any:
        """The result of a call; a refusal is noted and gives None, every other exception passes."""
        try:
            return call()
        except KDCacheError as error:
            check_message(error)
            self.refusals[door] = type(error).__name__
            return None


def check_message(error: KDCacheError) -> None:
    """One text that can be printed: it survives a worker process, and nothing in it moves a terminal's cursor."""
    message = str(error)
    if not message or len(message) > MOST_LETTERS:
        raise Fault(f"a message of {len(message)} letters: {message[:200]!r}")
    if any(not letter.isprintable() for letter in message):
        raise Fault(f"a message with control characters: {message!r:.500}")
    again = pickle.loads(pickle.dumps(error))
    if (type(again), str(again)) != (type(error), message):
        raise Fault("an error that changes when it is pickled")


def use(path: Path, *, access: str, sample_ids: Any) -> Outcome:
    """Opens, looks up, gathers, verifies, inspects a cache.

    Args:
        path: of the cache.
        access: as `kdcache.open` takes it.
        sample_ids: that the cache held before it was mutated.

    Raises:
        Fault: the doors contradict each other.
    """
    outcome = Outcome()
    cache = outcome.attempt("open", lambda: open_cache(path, access=access))
    if cache is not None:
        with cache:
            _read(cache, sample_ids, outcome)
    report = verify(path)  # reports what is wrong, and raises nothing
    outcome.sound = report.ok
    outcome.attempt("report", report.raise_on_error)
    to_json(report.to_json()).encode()
    if cache is not None:
        check_output(describe(path))
    if report.ok and (outcome.rows is None or set(outcome.refusals) - {"rows"}):
        raise Fault(f"verify finds nothing wrong, but there were refusals: {outcome.refusals}")
    return outcome


def check_output(summary: dict[str, Any]) -> None:
    """What `kdcache inspect` and `kdcache card` print of a cache."""
    texts = ["\n".join(to_lines(summary)), render_card(summary, name="cache")]
    for text in (*texts, to_json(summary)):
        text.encode()
        if any(not letter.isprintable() and letter != "\n" for letter in text):
            raise Fault(f"control characters are printed: {text!r:.2000}")


def _read(cache: Cache, sample_ids: Any, outcome: Outcome) -> None:
    repr(cache), cache.shape, cache.num_classes, cache.classes, cache.provenance
    outcome.attempt("rows", lambda: cache.rows(sample_ids, cache.views[0]))  # a mutated cache may hold other samples
    count = len(cache)
    numbers = np.arange(count) if count <= MOST_ROWS else np.r_[0:10, count // 2, count - 10 : count]
    stored = outcome.attempt("gather", lambda: cache.gather(numbers))
    if stored is None:
        return
    outcome.numbers, outcome.rows = numbers, as_rows(stored)
    if stored.encoding.has_all_logits:
        stored.dense()
    stored.encoding.top_class(stored.arrays)
    outcome.attempt("ids", lambda: cache.sample_ids if count <= MOST_ROWS else None)
    again = outcome.attempt("again", lambda: cache.gather(numbers[::-1], out=stored))
    if again is None or not same(as_rows(again), {name: array[::-1] for name, array in outcome.rows.items()}):
        raise Fault("the same rows read differently the second time")


def as_rows(stored: TeacherRows) -> Rows:
    """Copies of the arrays of gathered rows by name."""
    if not stored.has_teacher.all():
        raise Fault("a row came back without a teacher")
    optional = {name: getattr(stored, name) for name in ("label", "label_b", "mix_ratio", "input_digest")}
    found = {**stored.arrays, "sample_id": stored.sample_id, "view": stored.view}
    return {name: array.copy() for name, array in {**found, **optional}.items() if array is not None}


def same(left: Rows, right: Rows) -> bool:
    """Whether two sets of arrays are equal to the byte."""
    return set(left) == set(right) and all(
        array.dtype == right[name].dtype
        and array.shape == right[name].shape
        and array.tobytes() == right[name].tobytes()
        for name, array in left.items()
    )
