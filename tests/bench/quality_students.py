"""Students of `quality.py`: one network, one order of rows, equal steps; only what they are told differs."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_heads import BUCKETS, Teacher
from torch import Tensor, nn

from kdcache.stages.models import CNN, MLP
from kdcache.store.rows import TeacherRows
from kdcache.train.losses import kd_loss

ALPHA, BATCH = 0.9, 128


def student_of(teacher: Teacher, seed: int, size: str) -> nn.Module:
    """A small network with the weights that `seed` draws; `size` is of a convolutional one."""
    torch.manual_seed(seed)
    if teacher.name == "CIFAR-10":
        return CNN(size, in_channels=3, num_classes=10, pixels=32)
    return MLP((BUCKETS, 32, 150))


def train_all(
    teacher: Teacher, arms: dict[str, Any], log: Path, *, temperature: float, seeds: int, epochs: int, size: str
) -> None:
    """Trains a student of each arm for each seed; runs that `log` holds are not repeated.

    Args:
        teacher: with inputs and a test set.
        arms: name to (bytes a row, rows): TeacherRows, or a tensor (N, C) that is told as a live teacher's logits
            would be; None for labels alone.
        log: JSON lines, one a run.
        temperature: of teacher and student.
        seeds: 0 to this.
        epochs: equal for all.
        size: of a convolutional student.
    """
    there = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(run["head"], run["temperature"], run["arm"], run["seed"]) for run in there}
    for seed in range(seeds):
        for arm, told in arms.items():
            if (teacher.name, temperature, arm, seed) in done:
                continue
            began = time.perf_counter()
            found = fit(
                teacher, None if told is None else told[1], seed, temperature=temperature, epochs=epochs, size=size
            )
            run = {"head": teacher.name, "temperature": temperature, "arm": arm, "seed": seed, "accuracy": found}
            run |= {"bytes": 0 if told is None else told[0], "seconds": round(time.perf_counter() - began, 1)}
            run["epochs"] = epochs
            with log.open("a") as file:
                file.write(json.dumps(run) + "\n")
            print(json.dumps(run), flush=True)


def fit(
    teacher: Teacher, told: TeacherRows | Tensor | None, seed: int, *, temperature: float, epochs: int, size: str
) -> float:
    """Trains one student and returns its accuracy on the test set: AdamW, one cycle, batches of 128."""
    assert teacher.inputs is not None
    net, labels = student_of(teacher, seed, size), torch.from_numpy(teacher.labels)
    rate = 3e-3 if teacher.name == "CIFAR-10" else 1e-2
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.05)
    steps = math.ceil(len(labels) / BATCH) * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.15)
    for epoch in range(epochs):
        order = np.random.Generator(np.random.PCG64((seed, epoch))).permutation(len(labels))
        for start in range(0, len(labels), BATCH):
            chosen = torch.from_numpy(order[start : start + BATCH])
            rows = told.take(chosen) if isinstance(told, TeacherRows) else None if told is None else told[chosen]
            loss = kd_loss(
                net(teacher.inputs[chosen]),
                rows,
                labels[chosen],
                alpha=0.0 if rows is None else ALPHA,
                temperature=temperature,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return accuracy(net.eval(), teacher)


@torch.inference_mode()
def accuracy(net: nn.Module, teacher: Teacher) -> float:
    """Top-1 on the test set."""
    assert teacher.test_inputs is not None
    assert teacher.test_labels is not None
    answers = torch.cat([net(part).argmax(dim=1) for part in teacher.test_inputs.split(500)])
    return float((answers == teacher.test_labels).float().mean())
