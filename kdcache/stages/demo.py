"""`kdcache demo`: teacher -> cache -> students -> table, on 1,797 real digits, offline, on a laptop's CPU.

Three disjoint blocks: the teacher's training rows, the transfer rows (100 of them labelled for the
students; the teacher never saw any), the test rows (the end of the file, since writers are grouped). All
five arms take the same number of optimiser steps, and a seed fixes initial weights, labelled rows and
order in all of them, so differences are paired.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdcache.stages.data import LoadedData
from kdcache.stages.data_digits import load_digits
from kdcache.stages.models import CNN, MLP
from kdcache.stages.precompute import precompute
from kdcache.stages.precompute_options import PrecomputeOptions
from kdcache.stages.progress import Progress
from kdcache.store.cache import Cache
from kdcache.store.cache import open as open_cache
from kdcache.train.losses import kd_loss

ARMS = ("label_only", "distilled_same_rows", "hard_labels", "distilled", "all_labels")
DIFFERENCES = {
    "distilled_same_rows - label_only": ("distilled_same_rows", "label_only"),
    "distilled - hard_labels": ("distilled", "hard_labels"),
}
LABELLED_ROWS = 100
STUDENT_WIDTHS = (64, 32, 10)
TEACHER_STEPS, STUDENT_STEPS, BATCH_ROWS = 800, 1000, 64
TEACHER_LR, STUDENT_LR = 3e-3, 1e-2
ALPHA, TEMPERATURE = 0.9, 4.0


@dataclass(frozen=True, eq=False)
class Blocks:
    """The three blocks as tensors: x (N, 1, 8, 8) in [0, 1], y (N,), and the transfer rows' ids."""

    teacher_x: Tensor
    teacher_y: Tensor
    transfer: LoadedData
    transfer_x: Tensor
    transfer_y: Tensor
    transfer_ids: np.ndarray
    test_x: Tensor
    test_y: Tensor


def run_demo(out: str | Path | None = None, *, seeds: int = 5, quiet: bool = False) -> dict[str, Any]:
    """Trains a teacher, dumps it, trains five kinds of students from the one cache, and compares them.

    Args:
        out: where to keep the cache; a temporary folder by default.
        seeds: paired repetitions of every arm, at least 2.
        quiet: no progress on stderr.

    Returns:
        `teacher_accuracy`; for each of `ARMS` the `mean`, `std` and `runs` of the test accuracy; `differences`,
        paired, with `mean` and `standard_error`; `cache` (its path, None for a temporary one), `root`, `rows`,
        `bytes_per_row`, `rows_per_second` read, `seconds`.

    Raises:
        UsageError, MismatchError: `out` exists and holds something else, or another cache.
    """
    begun = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are so small that a second thread costs more than it gives
    try:
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "digits.h5" if out is None else Path(out)
            result = _run(path, seeds=max(2, seeds), quiet=quiet)
    finally:
        torch.set_num_threads(threads)
    result["cache"] = None if out is None else str(out)
    result["seconds"] = round(time.monotonic() - begun, 1)
    return result


def _run(path: Path, *, seeds: int, quiet: bool) -> dict[str, Any]:
    blocks = load_blocks()
    teacher = train_teacher(blocks)
    options = PrecomputeOptions(teacher_saw="no", quiet=True, threads=1)
    precompute(teacher, blocks.transfer, path, options=options)
    with open_cache(path) as cache:
        rows = cache.rows(blocks.transfer_ids)
        runs: dict[str, list[float]] = {arm: [] for arm in ARMS}
        with Progress(seeds * len(ARMS), what="students", unit=" students", enabled=not quiet) as progress:
            for seed in range(seeds):
                for arm in ARMS:
                    student = train_student(arm, seed, blocks, cache, rows)
                    runs[arm].append(accuracy(student, blocks.test_x, blocks.test_y))
                    progress.advance()
        return {
            "teacher_accuracy": accuracy(teacher, blocks.test_x, blocks.test_y),
            **{arm: _summary(values) for arm, values in runs.items()},
            "differences": {name: _paired(runs[a], runs[b]) for name, (a, b) in DIFFERENCES.items()},
            "root": cache.root,
            "rows": len(cache),
            "bytes_per_row": cache.catalog.schema.payload_row_bytes,
            "rows_per_second": read_rate(cache),
        }


def load_blocks() -> Blocks:
    """The digits in three blocks that share no row."""
    teacher, transfer, test = load_digits("teacher"), load_digits("transfer"), load_digits("test")
    teacher_x, teacher_y = _stack(teacher)
    transfer_x, transfer_y = _stack(transfer)
    test_x, test_y = _stack(test)
    ids = transfer.sample_ids if transfer.sample_ids is not None else np.arange(len(transfer_y))
    return Blocks(teacher_x, teacher_y, transfer, transfer_x, transfer_y, ids, test_x, test_y)


def train_teacher(blocks: Blocks) -> nn.Module:
    """A small convolutional network, trained on its own block with labels; the last step is taken."""
    torch.manual_seed(0)
    teacher = CNN("SMALL", in_channels=1, num_classes=10, pixels=8)
    x, y = blocks.teacher_x, blocks.teacher_y
    _train(
        teacher, lambda at: functional.cross_entropy(teacher(x[at]), y[at]), len(y), steps=TEACHER_STEPS, lr=TEACHER_LR
    )
    return teacher.eval()


def train_student(arm: str, seed: int, blocks: Blocks, cache: Cache, rows: np.ndarray) -> nn.Module:
    """One student. Only `label_only`, `distilled_same_rows` and `all_labels` see labels, the first two of 100 rows.

    Args:
        arm: one of `ARMS`.
        seed: of initial weights, labelled rows and order.
        blocks: the data.
        cache: of the transfer rows.
        rows: (N,) of the transfer rows in the cache.
    """
    labelled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1000 + seed))[:LABELLED_ROWS]
    chosen = labelled if arm in ("label_only", "distilled_same_rows") else torch.arange(len(rows))
    torch.manual_seed(seed)
    student = MLP(STUDENT_WIDTHS)
    x, y = blocks.transfer_x, blocks.transfer_y

    def loss(at: Tensor) -> Tensor:
        picked = chosen[at]
        logits = student(x[picked])
        if arm in ("label_only", "all_labels"):
            return functional.cross_entropy(logits, y[picked])
        teacher = torch.from_numpy(cache.gather(rows[picked.numpy()]).dense())
        if arm == "hard_labels":
            return functional.cross_entropy(logits, teacher.argmax(1))
        if arm == "distilled":
            return kd_loss(logits, teacher, alpha=1.0, temperature=TEMPERATURE)
        return kd_loss(logits, teacher, y[picked], alpha=ALPHA, temperature=TEMPERATURE)

    _train(student, loss, len(chosen), steps=STUDENT_STEPS, lr=STUDENT_LR, seed=seed)
    return student.eval()


def _train(
    model: nn.Module, loss: Callable[[Tensor], Tensor], rows: int, *, steps: int, lr: float, seed: int = 0
) -> None:
    """AdamW with a one-cycle schedule; `loss` takes (n,) positions below `rows`."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    order = torch.empty(0, dtype=torch.long)
    model.train()
    for _ in range(steps):
        if len(order) < min(BATCH_ROWS, rows):
            order = torch.randperm(rows, generator=generator)
        at, order = order[:BATCH_ROWS], order[BATCH_ROWS:]
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss(at))
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of rows (N, ...) whose largest logit is the label (N,)."""
    return float((model(x).argmax(1) == y).float().mean())


def read_rate(cache: Cache) -> int:
    """Rows a second that random batches of 256 are gathered at, after every row was checked once."""
    order = np.random.default_rng(0).permutation(len(cache))
    cache.gather(order)
    out = cache.gather(order[:256])
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < 0.2:
        for start in range(0, len(order) - 255, 256):
            cache.gather(order[start : start + 256], out=out)
            done += 256
    return round(done / (time.perf_counter() - begun))


def table(result: dict[str, Any]) -> str:
    """The result as text for a terminal."""
    what = {
        "label_only": f"labels of {LABELLED_ROWS} rows",
        "distilled_same_rows": "labels and soft targets of the same rows",
        "hard_labels": "teacher's argmax on all transfer rows",
        "distilled": "soft targets on all transfer rows",
        "all_labels": "true labels of all transfer rows (upper control)",
    }
    lines = [
        f"teacher: {result['teacher_accuracy']:.3f} test accuracy",
        "",
        "student              mean    std   trained on",
    ]
    for arm in ARMS:
        lines.append(f"{arm:<20} {result[arm]['mean']:.3f}  {result[arm]['std']:.3f}   {what[arm]}")
    lines += ["", "paired difference                     mean      standard error"]
    lines += [f"{n:<36}{d['mean']:+.4f}    {d['standard_error']:.4f}" for n, d in result["differences"].items()]
    lines += [
        "",
        f"cache: {result['rows']} rows, {result['bytes_per_row']} bytes a row, {result['rows_per_second']:,} rows/s "
        f"read back; the demo took {result['seconds']} s",
        "",
        "next: kdcache precompute --help   (dump your own teacher)",
        "      kdcache distill --help      (train students from the dump)",
    ]
    return "\n".join(lines)


def _stack(data: LoadedData) -> tuple[Tensor, Tensor]:
    items = [data.dataset[index] for index in range(len(data))]
    return torch.stack([item[0] for item in items]), torch.tensor([item[1] for item in items])


def _summary(values: list[float]) -> dict[str, Any]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values), "runs": values}


def _paired(first: list[float], second: list[float]) -> dict[str, float]:
    differences = [a - b for a, b in zip(first, second, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return {"mean": statistics.fmean(differences), "standard_error": error}
