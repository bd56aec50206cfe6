"""Students that become teachers, on the digits: born-again, a moving average refreshed, two that teach each other.

    python tests/bench/generations.py [--seeds 3] [--epochs 40] [--labelled 1300]

All students are mlp:64-32-10, trained with the same optimiser on 1,300 rows (or the first `labelled` of them) and
measured on the 497 test rows. Each arm takes as many epochs as `labels` does, but `born-again n`, which stands behind n
runs before it, and its control `labels x 4`. Prints one table: accuracy in percent, mean and standard deviation over
seeds, and the mean difference to `labels` with its standard error.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

import kdcache
from kdcache.stages.data import load_data
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.moving_teacher import MovingTeacher
from kdcache.stages.peer import Peer

GENERATIONS = 3
STUDENT, BATCH, LR = "mlp:64-32-10", 64, 0.1
SHARED: dict[str, Any] = {"student": STUDENT, "batch_size": BATCH, "lr": LR, "device": "cpu", "threads": 1}


def rows(labelled: int) -> Any:
    """The first rows of the training part."""
    return Subset(load_data("digits:train").dataset, range(labelled))


def learnt(labelled: int, seed: int, epochs: int, **given: Any) -> tuple[float, Any]:
    """Accuracy of a student on the test rows, and the student."""
    objects = {name: given.pop(name) for name in ("cache", "refresh") if name in given}
    options = DistillOptions(**{**SHARED, "val": "digits:test", "epochs": epochs, "seed": seed, "quiet": True, **given})
    result = kdcache.distill(options, data=rows(labelled), **objects)
    return result.last["val_accuracy"], result.student


def mutual(folder: str, mine: str, other: str, labelled: int, seed: int, epochs: int, every: int, found: Any) -> None:
    """One of the two students, in a process of its own."""
    torch.set_num_threads(1)
    peer = Peer(f"{folder}/{mine}", f"{folder}/{other}", rows(labelled), every=every, threads=1)
    found.put((mine, learnt(labelled, seed, epochs, refresh=peer, temperature=2.0, alpha=0.5)[0]))


def one_seed(labelled: int, epochs: int, seed: int, folder: Path) -> dict[str, float]:
    """Accuracy of each arm."""
    found: dict[str, float] = {}
    found["labels"], teacher = learnt(labelled, seed, epochs, alpha=0.0)
    found["labels x 4"] = learnt(labelled, seed, 4 * epochs, alpha=0.0)[0]
    for generation in range(1, GENERATIONS + 1):
        cache = folder / f"{seed}-{generation}.h5"
        kdcache.precompute(teacher, rows(labelled), cache, quiet=True, teacher_saw="yes", threads=1)
        name = f"born-again {generation}"
        found[name], teacher = learnt(
            labelled, seed + 100 * generation, epochs, cache=cache, temperature=2.0, alpha=0.5
        )
    for decay in (0.9, 0.99):
        for every in (2, 5):
            moving = MovingTeacher(
                folder / f"{seed}-{decay}-{every}", rows(labelled), every=every, decay=decay, threads=1
            )
            name = f"average {decay}, every {every}"
            found[name] = learnt(labelled, seed, epochs, refresh=moving, temperature=2.0, alpha=0.5)[0]
    context = multiprocessing.get_context("forkserver")
    answers, place = context.Queue(), str(folder / f"mutual-{seed}")
    both = [("a", "b", seed), ("b", "a", seed + 1000)]
    processes = [
        context.Process(target=mutual, args=(place, mine, other, labelled, own, epochs, 2, answers))
        for mine, other, own in both
    ]
    for process in processes:
        process.start()
    accuracies = dict(answers.get() for _ in processes)
    for process in processes:
        process.join()
    found["mutual, first"], found["mutual, second"] = accuracies["a"], accuracies["b"]
    found["labels, seed of the second"] = learnt(labelled, seed + 1000, epochs, alpha=0.0)[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--labelled", type=int, default=1300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began, arms = time.perf_counter(), defaultdict(list)
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            for arm, accuracy in one_seed(arguments.labelled, arguments.epochs, seed, Path(folder)).items():
                arms[arm].append(100 * accuracy)
    print(f"{arguments.labelled} rows, {arguments.epochs} epochs, {arguments.seeds} seeds\n")
    print("| arm | accuracy | against labels |\n|---|---|---|")
    for arm, values in arms.items():
        control = arms["labels, seed of the second" if arm == "mutual, second" else "labels"]
        differences = [value - base for value, base in zip(values, control, strict=True)]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(values) > 1 else 0.0
        mean = f"{statistics.mean(values):.2f} ({spread:.2f})"
        print(f"| {arm} | {mean} | {statistics.mean(differences):+.2f} ({error:.2f}) |")
    print(f"\n{time.perf_counter() - began:.0f} s, torch {torch.__version__}, kdcache {kdcache.__version__}")


if __name__ == "__main__":
    main()
