"""The loss, forward and backward on a CPU, against the straightforward form, in time and in peak memory.

The straightforward form is `(1-a)*cross_entropy + a*T*T*kl_div(log_softmax(v/T), softmax(z/T))`, with torch's own
functions. What is measured of ours is `kd_loss` with its checks, and the fused function alone. Memory is the peak of
torch's allocations during one step, from its profiler, beside the student's and the teacher's logits.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_measure import interleaved, ratio, timed
from torch.autograd.profiler import profile
from torch.nn import functional

from kdcache.train.fused import fused_terms
from kdcache.train.losses import kd_loss

ALPHA = 0.5
SHAPES = ((256, 1000), (64, 20_000), (256, 10), (4, 200_000))

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def straightforward(v: torch.Tensor, z: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    log_q, p = functional.log_softmax(v / temperature, dim=1), functional.softmax(z / temperature, dim=1)
    soft = functional.kl_div(log_q, p, reduction="batchmean")
    return (1 - ALPHA) * functional.cross_entropy(v, labels) + ALPHA * temperature**2 * soft


def checked(v: torch.Tensor, z: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    return kd_loss(v, z, labels, alpha=ALPHA, temperature=temperature)


def fused(v: torch.Tensor, z: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    terms = fused_terms(
        v,
        z,
        labels,
        temperature=temperature,
        student_temperature=temperature,
        ce_weight=1 - ALPHA,
        kl_weight=ALPHA * temperature**2,
    )
    return terms.mean()


SIDES: dict[str, Loss] = {"plain": straightforward, "kd_loss": checked, "fused": fused}


def batch(rows: int, classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    v, z = (3 * torch.randn(rows, classes, generator=generator) for _ in range(2))
    return v.requires_grad_(), z, torch.randint(classes, (rows,), generator=generator)


def step(loss: Loss, v: torch.Tensor, z: torch.Tensor, labels: torch.Tensor, temperature: float) -> None:
    v.grad = None
    loss(v, z, labels, temperature).backward()


def peak_bytes(function: Callable[[], None]) -> int:
    """The most that torch had allocated at once in a call, above what was there before (no old gradient among it)."""
    with profile(profile_memory=True, use_kineto=True) as found:
        function()
    assert found.kineto_results is not None
    events = sorted((e.start_ns(), e.nbytes()) for e in found.kineto_results.events() if e.name() == "[memory]")
    now = peak = 0
    for _, size in events:
        now += size
        peak = max(peak, now)
    return peak


@pytest.mark.bench
@pytest.mark.parametrize("temperature", [4.0, 3.0, 20.0])
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_the_time_of_forward_and_backward(figures: Any, rows: int, classes: int, temperature: float) -> None:
    inputs = batch(rows, classes)
    often = max(3, 2_000_000 // (rows * classes))

    def seconds(loss: Loss) -> float:
        return statistics.median(timed(lambda: step(loss, *inputs, temperature)) for _ in range(often))

    found = interleaved({name: lambda loss=loss: seconds(loss) for name, loss in SIDES.items()}, repeats=15)
    target = "<= 0.6" if (rows, classes) in SHAPES[:2] and temperature < 8 else "-"
    for name in ("fused", "kd_loss"):
        figures.add(
            f"{name} forward+backward, {rows} x {classes}, T = {temperature:g}, {torch.get_num_threads()} thread(s)",
            ratio(found[name], found["plain"]),
            target,
            against="cross_entropy + kl_div(log_softmax, softmax)",
            milliseconds=1e3 * statistics.median(found[name]),
        )


@pytest.mark.bench
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_the_peak_memory_of_forward_and_backward(figures: Any, rows: int, classes: int) -> None:
    inputs = batch(rows, classes)
    peaks = {}
    for name, loss in SIDES.items():
        inputs[0].grad = None
        peaks[name] = peak_bytes(lambda loss=loss: step(loss, *inputs, 4.0))
    for name in ("fused", "kd_loss"):
        figures.add(
            f"peak memory of {name}, {rows} x {classes}",
            peaks[name] / peaks["plain"],
            "<= 0.6" if (rows, classes) in SHAPES[:2] else "-",
            against="cross_entropy + kl_div(log_softmax, softmax)",
            arrays_of_logits=peaks[name] / (4 * rows * classes),
            arrays_of_the_plain_form=peaks["plain"] / (4 * rows * classes),
        )
