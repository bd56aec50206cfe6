"""Which device a stage computes on, and with how many threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kdcache.errors import UsageError
from kdcache.train.ranks import discover


def pick_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda`, `cuda:1` ... names, with this rank's GPU under a launcher.

    Raises:
        UsageError: unknown, or not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r} is not known; choose auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this torch sees no GPU; choose cpu, or run `kdcache doctor`")
    if name == "cuda":
        return torch.device("cuda", discover().local_rank % torch.cuda.device_count())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this torch sees {torch.cuda.device_count()} GPUs, numbered from 0")
    return device


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Sets torch's threads on the CPU for the block; another number would move logits in the last bit."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
