"""What a dump reads: items with their labels and digests, in batches that never cross a shard's border.

One DataLoader serves a whole run. Its batch sampler takes the next free shard only when it needs one, so
processes share the work without talking. Workers load ahead, across the border of a shard: a kill costs what they
have loaded, and of the teacher's work the shard in hand alone (`ShardSink.begin`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from kdcache.errors import DataError, KDCacheError
from kdcache.format.identity import input_digest, show_id
from kdcache.stages.devices import torch_threads
from kdcache.stages.signals import shield_worker
from kdcache.stages.specs import one_line
from kdcache.train.items import NOT_INPUTS, first_input, label_of
from kdcache.train.replay import Replay
from kdcache.train.viewed import Viewed, ViewedItems


@dataclass(frozen=True)
class Claim:
    """A shard in hand: number `index` of `view`, samples [start, stop)."""

    view: int
    index: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Fed:
    """A batch.

    Attributes:
        inputs: of the teacher, collated.
        labels: (N,) int64; None: the data has none.
        digests: (N,) uint64.
        label_b: (N,) int64, the partners' labels; None where nothing is mixed.
        mix_ratio: (N,) float32, with `label_b`.
    """

    inputs: Any
    labels: np.ndarray | None
    digests: np.ndarray
    label_b: np.ndarray | None = None
    mix_ratio: np.ndarray | None = None


@dataclass(frozen=True)
class _Failure:
    """An exception of an item, carried as plain text: torch would wrap its message in a traceback."""

    kind: type[KDCacheError]
    message: str


class DumpItems(Dataset[Any]):
    """What the rows of a dump are made of, and stored with: input, label, digest, and labels of mixed views.

    Item `view * N + place` is sample `place` in a view.

    Args:
        dataset: the user's.
        sample_ids: (N,) of its samples.
        transform: from the shared view (without augmentation: the data set's input) to the teacher's input; None
            leaves it.
        replay: what makes the shared views, if anything.
    """

    def __init__(
        self,
        dataset: Any,
        sample_ids: np.ndarray,
        transform: Callable[[Any], Any] | None,
        replay: Replay | None = None,
    ) -> None:
        self._dataset = dataset
        self._sample_ids = sample_ids
        self._transform = transform
        self._viewed = ViewedItems(dataset, sample_ids, replay)

    def __len__(self) -> int:
        return len(self._sample_ids)

    def __getitem__(self, index: int) -> Any:
        return self._guarded(index, lambda: self._load([index])[0])

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """The items of a batch, computed by one thread, here as in a DataLoader worker."""
        with torch_threads(1):
            if not callable(getattr(self._dataset, "__getitems__", None)):
                return [self[index] for index in indices]
            try:
                loaded = self._load(indices)
            except KDCacheError as error:
                return [self._failure(error, indices[0])]
            except Exception:  # of which sample? One by one, the failing one names itself.
                return [self[index] for index in indices]
            return [self._guarded(index, partial(_same, seen)) for index, seen in zip(indices, loaded, strict=True)]

    def _load(self, indices: list[int]) -> list[Viewed]:
        views, places = np.divmod(np.asarray(indices, np.int64), len(self._sample_ids))
        return self._viewed.load(places.tolist(), views.tolist())

    def _guarded(self, index: int, load: Callable[[], Viewed]) -> Any:
        try:
            seen = load()
            digest = input_digest(first_input(seen.item))
            label = plain_label(label_of(seen.item))
            return self._teacher_input(seen.item), label, digest, seen.label_b, seen.mix_ratio
        except Exception as error:
            return self._failure(error, index)

    def _failure(self, error: Exception, index: int) -> _Failure:
        return _failure(error, self._sample_ids[index % len(self._sample_ids)])

    def _teacher_input(self, item: Any) -> Any:
        if isinstance(item, dict):
            inputs = {k: v for k, v in item.items() if k not in NOT_INPUTS and not isinstance(v, (str, bytes))}
            return inputs if self._transform is None else self._transform(inputs)
        value = first_input(item)
        return value if self._transform is None else self._transform(value)


class ShardBatches(Sampler[list[int]]):
    """Batches of indices of `DumpItems`, shard by shard, of the shards that `claim` gives until it gives None.

    Args:
        claim: takes the next free shard.
        batch_size: rows of a batch; none crosses a shard's border.
        samples: N, of each view.
    """

    def __init__(self, claim: Callable[[], Claim | None], batch_size: int, samples: int) -> None:
        self._claim = claim
        self._batch_size = batch_size
        self._samples = samples
        self.under_way: deque[tuple[Claim, int, int]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        while (claim := self._claim()) is not None:
            for start in range(claim.start, claim.stop, self._batch_size):
                stop = min(start + self._batch_size, claim.stop)
                self.under_way.append((claim, start, stop))
                first = claim.view * self._samples
                yield list(range(first + start, first + stop))


def batches(
    items: DumpItems, sampler: ShardBatches, *, workers: int, pin_memory: bool
) -> Generator[tuple[Claim, int, int, Fed], None, None]:
    """(shard, first position, position behind the last, batch), in the order the sampler made them.

    Raises:
        DataError: the data set raised, or its items cannot be collated; the message names the sample.
    """
    loader: DataLoader[Any] = DataLoader(
        items,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=shield_worker if workers else None,
    )
    for fed in loader:
        claim, start, stop = sampler.under_way.popleft()
        if isinstance(fed, _Failure):
            raise fed.kind(fed.message)
        yield claim, start, stop, Fed(*fed)


@contextmanager
def worker_deaths() -> Iterator[None]:
    """Turns what torch and Python raise when a DataLoader worker dies into an error of ours.

    That is torch's own error, anywhere in the main thread (from a signal handler), or a broken connection where a
    batch was on its way. The traceback is dropped, for it would keep the other workers.

    Raises:
        KDCacheError: a worker died inside the block.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise KDCacheError(
            f"a process that loads data died ({one_line(error)}); finished shards are kept. If memory ran out, run the "
            "same command again with fewer --workers"
        ) from error.with_traceback(None)


def collate(items: list[Any]) -> Any:
    """Stacks inputs; labels and digests become arrays. The first failure wins."""
    failed = next((item for item in items if isinstance(item, _Failure)), None)
    if failed is not None:
        return failed
    inputs, labels, digests, labels_b, ratios = zip(*items, strict=True)
    try:
        stacked = default_collate(list(inputs))
    except (TypeError, RuntimeError) as error:
        first = inputs[0]
        return _Failure(
            DataError,
            f"the inputs cannot be stacked into a batch ({type(first).__name__}: {str(error).splitlines()[0]}); "
            "give the teacher a transform that makes tensors of one shape, or use --batch-size 1",
        )
    known = [label for label in labels if label is not None]
    stored = None if not known else np.array([-1 if label is None else label for label in labels], np.int64)
    if labels_b[0] is None:
        return stacked, stored, np.array(digests, np.uint64), None, None
    return stacked, stored, np.array(digests, np.uint64), np.array(labels_b, np.int64), np.array(ratios, np.float32)


def _same(seen: Viewed) -> Viewed:
    return seen


def plain_label(value: Any) -> int | None:
    """A class label as an int; None where there is none or it is a map (dense prediction keeps those itself)."""
    if value is None:
        return None
    if hasattr(value, "ndim") and value.ndim > 0:
        return None
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, bool) or not isinstance(plain, int):
        raise DataError(f"a label must be an integer class (-1 for none), found {type(plain).__name__} {plain!r:.50}")
    return plain


def _failure(error: Exception, sample_id: Any) -> _Failure:
    if isinstance(error, KDCacheError):
        return _Failure(type(error), f"sample {show_id(sample_id)}: {error}")
    return _Failure(DataError, f"the data set failed at sample {show_id(sample_id)}: {one_line(error)}")
