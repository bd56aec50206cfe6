"""What encoding costs beside the forward pass of a convolutional teacher, and how fast rows are decoded."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.format.encodings import EncodingChoice
from kdcache.format.topk import TopK
from kdcache.stages.models import CNN
from kdcache.store.rows import TeacherRows
from kdcache.train.encode import encode
from kdcache.train.kept import kept
from kdcache.train.sparse import teacher_log_probs

REPEATS, ROWS, CLASSES = 9, 256, 1000


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seconds(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


@pytest.mark.bench
@pytest.mark.parametrize(("size", "pixels"), [("SMALL", 32), ("BASE", 32), ("BASE", 64)])
@pytest.mark.parametrize(
    "options", [{}, {"dtype": "int8"}, {"dtype": "int4"}, {"top_k": 10}], ids=["float16", "int8", "int4", "topk"]
)
def test_encoding_beside_the_teacher(figures: Any, size: str, pixels: int, options: dict[str, Any]) -> None:
    teacher = CNN(size, in_channels=3, num_classes=CLASSES, pixels=pixels).eval()
    images, labels = torch.randn(ROWS, 3, pixels, pixels), torch.randint(CLASSES, (ROWS, 1))
    encoding = EncodingChoice(**options).of((CLASSES,), labels=1)
    shares = []
    with torch.inference_mode():
        logits = teacher(images)
        for _ in range(REPEATS):
            forward = seconds(lambda: teacher(images))
            shares.append(seconds(lambda: encode(encoding, logits, labels)) / forward)
    name = f"encoding {encoding.name} {encoding.dtype} of 1,000 classes, CNN {size}, {pixels} x {pixels} pixels"
    figures.add(name, 100 * statistics.median(shares[1:]), "<= 5", against="the forward pass", unit="%")


@pytest.mark.bench
def test_decoding_top_k_rows(figures: Any) -> None:
    encoding = TopK((CLASSES,), 10, (1.0, 2.0), 1)
    logits = np.random.default_rng(0).normal(size=(8192, CLASSES)).astype(np.float32) * 3
    labels = np.arange(8192) % CLASSES
    arrays = encoding.encode(logits, labels[:, None]).arrays
    rows = TeacherRows(encoding, arrays, np.arange(8192), np.zeros(8192, "u2"), labels, np.ones(8192, bool)).tensors()
    found = []
    for _ in range(REPEATS):
        found.append(8192 / seconds(lambda: teacher_side(rows)))
    figures.add(
        "top-k rows to log-probabilities of the teacher", statistics.median(found), ">= 1e6", against="-", unit="rows/s"
    )


def teacher_side(rows: TeacherRows) -> Any:
    """What every loss makes of the rows first: classes, and log-probabilities of them and of the bucket."""
    return teacher_log_probs(rows, kept(rows), 2.0)
