"""Pruned and quantisation-aware students on the digits: labels alone against a teacher, with equal steps.

    python tests/bench/compressed.py [--seeds 3] [--epochs 30]

The teacher is a wider network (64-256-10) trained on the same 1,300 rows, as an ensemble would be too large for the
place where the student works; students are 64-32-10. A pruned student is trained on the labels, loses the smallest of
its weights, and is then trained again with its masks (on labels, or distilled). Quantised ones learn with rounded
weights and inputs from the start, and are measured after their conversion to integers; `rounded after` are plain
students whose weights were rounded without further training. Prints one table: accuracy on 497 test rows in percent,
mean and standard deviation over seeds, and the mean difference with its standard error.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kdcache
from kdcache.stages.data import load_data
from kdcache.stages.distill_options import DistillOptions

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
import compressed_students as small

SHARES, BITS = (0.8, 0.9, 0.95), (8, 3, 2)
TAUGHT = {"alpha": 0.9, "temperature": 4.0}
ALONE = {"alpha": 0.0}


def learnt(student: nn.Module, seed: int, epochs: int, cache: Path | None, **given: Any) -> nn.Module:
    """The student, trained."""
    options = DistillOptions(
        data="digits:train",
        epochs=epochs,
        batch_size=64,
        lr=0.1,
        seed=seed,
        device="cpu",
        threads=1,
        quiet=True,
        **given,
    )
    return kdcache.distill(options, student=student, cache=cache).student


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    """On the test rows, in percent."""
    data = load_data("digits:test").dataset
    x, y = torch.stack([item[0] for item in data]), torch.tensor([item[1] for item in data])
    return 100 * float((net.eval()(x).argmax(dim=1) == y).float().mean())


@torch.no_grad()
def observed(net: nn.Module) -> nn.Module:
    """The network after it has seen the training rows, for the ranges of its inputs."""
    net.train()
    data = load_data("digits:train").dataset
    net(torch.stack([item[0] for item in data]))
    return net


def one_seed(seed: int, epochs: int, folder: Path) -> dict[str, tuple[float, float]]:
    """(labels alone, distilled) of each student."""
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    learnt(teacher, seed, 2 * epochs, None, **ALONE)
    cache = folder / f"{seed}.h5"
    kdcache.precompute(teacher, load_data("digits:train"), cache, quiet=True, teacher_saw="yes", threads=1)
    found = {"teacher": (accuracy(teacher), accuracy(teacher))}

    def both(make: Any, finish: Any = lambda net: net) -> tuple[float, float]:
        results = []
        for at, given in ((None, ALONE), (cache, TAUGHT)):
            torch.manual_seed(seed)
            results.append(accuracy(finish(learnt(make(), seed, epochs, at, **given))))
        return results[0], results[1]

    found["64-32-10"] = both(small.plain)
    torch.manual_seed(seed)
    start = learnt(small.plain(), seed, epochs, None, **ALONE)
    for share in SHARES:
        cut = small.pruned(copy.deepcopy(start), share)
        found[f"pruned {share:.0%}, before training again"] = (accuracy(cut),) * 2
        found[f"pruned {share:.0%}"] = both(
            lambda share=share: small.pruned(copy.deepcopy(start), share), small.unmasked
        )
    for bits in BITS:
        rounded = small.converted(observed(small.rounded_after(start, bits)))
        found[f"{bits}-bit weights, rounded after"] = (accuracy(rounded),) * 2
        found[f"{bits}-bit weights"] = both(lambda bits=bits: small.quantized(bits=bits), small.converted)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began, arms = time.perf_counter(), defaultdict(list)
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            for arm, pair in one_seed(seed, arguments.epochs, Path(folder)).items():
                arms[arm].append(pair)
    print("| student | labels | distilled | difference |\n|---|---|---|---|")
    for arm, pairs in arms.items():
        labels, taught = zip(*pairs, strict=True)
        if labels == taught:
            print(f"| {arm} | {_shown(labels)} | | |")
            continue
        differences = [b - a for a, b in pairs]
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(pairs) > 1 else 0.0
        mean = statistics.mean(differences)
        print(f"| {arm} | {_shown(labels)} | {_shown(taught)} | {mean:+.2f} ({error:.2f}) |")
    print(f"\n{time.perf_counter() - began:.0f} s, torch {torch.__version__}, kdcache {kdcache.__version__}")


def _shown(values: Any) -> str:
    return f"{statistics.mean(values):.2f} ({statistics.stdev(values) if len(values) > 1 else 0:.2f})"


if __name__ == "__main__":
    main()
