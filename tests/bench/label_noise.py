"""Injected label noise: what `suspects` finds of it, and what each policy of `distill` makes of it.

    python tests/bench/label_noise.py --data MNIST_FOLDER --out RESULTS [--seeds 3] [--rows 4000]

Of the training images of MNIST, `rows` train a clean teacher and `rows` others get wrong labels, in 5, 10 and 20 % of
the rows: any other class (symmetric), or one that looks alike (class-dependent: 4 and 9, 3 and 8, 1 and 7 ...). The
logits that are asked about the noisy rows come from three teachers, all the same small CNN:

    clean       trained on the other rows, whose labels are right
    folds       trained on the other half of the noisy rows, twice (out of fold: what one has without clean labels)
    noisy       trained on the noisy rows themselves, for contrast

Precision and recall are those of `is_issue`; `top` is the share of wrong labels among as many rows from the head of the
list. Students (a small MLP, equal steps, same initial weights for each seed) learn the noisy rows; accuracy is that on
the 10,000 test images. One JSON line a result goes to RESULTS/results.jsonl (results that are there are not repeated),
the tables to standard output.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import kdcache
from kdcache.stages.data_idx import read_idx
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.suspects import suspects

KINDS, RATES = ("symmetric", "class-dependent"), (0.05, 0.1, 0.2)
TEACHERS = ("clean", "folds", "noisy")
ALIKE = np.array([6, 7, 7, 8, 9, 3, 5, 1, 3, 4])
# name -> options of `distill`
POLICIES: dict[str, dict[str, Any]] = {
    "keep": {},
    "drop": {"disagreement": "drop"},
    "downweight": {"disagreement": "downweight"},
    "trust-teacher": {"disagreement": "trust-teacher"},
    "labels, drop": {"disagreement": "drop", "alpha": 0.0},
    "teacher alone": {"alpha": 1.0},
}
EPOCHS, TEACHER_EPOCHS, BATCH = 12, 12, 128


@dataclass(frozen=True, eq=False)
class Digits:
    """Images (N, 1, 28, 28) float32 in [0, 1] and labels (N,) int64."""

    x: Tensor
    y: Tensor


def load(folder: Path, part: str) -> Digits:
    """A part of MNIST."""
    x = read_idx(folder / f"{part}-images-idx3-ubyte.gz", dimensions=3)
    y = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", dimensions=1)
    return Digits(torch.from_numpy(x.astype(np.float32) / 255)[:, None], torch.from_numpy(y.astype(np.int64)))


def with_noise(labels: np.ndarray, kind: str, rate: float, rng: np.random.Generator) -> np.ndarray:
    """The labels with that share of them made wrong."""
    noisy = labels.copy()
    chosen = rng.choice(len(labels), round(rate * len(labels)), replace=False)
    other = (labels[chosen] + rng.integers(1, 10, len(chosen))) % 10
    noisy[chosen] = other if kind == "symmetric" else ALIKE[labels[chosen]]
    return noisy


def cnn() -> nn.Module:
    """The teacher."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def taught(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """A teacher trained on some rows."""
    torch.manual_seed(seed)
    net, generator = cnn(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(TEACHER_EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval()


@torch.no_grad()
def logits(net: nn.Module, x: Tensor) -> Tensor:
    """(N, 10)."""
    return torch.cat([net(part) for part in x.split(1000)])


def asked(teacher: str, noisy: Digits, clean: nn.Module, seed: int) -> Tensor:
    """The logits of a teacher for the noisy rows."""
    if teacher != "folds":
        return logits(clean if teacher == "clean" else taught(noisy.x, noisy.y, seed), noisy.x)
    half = len(noisy.y) // 2
    first, second = slice(half), slice(half, None)
    return torch.cat(
        [
            logits(taught(noisy.x[other], noisy.y[other], seed), noisy.x[own])
            for own, other in ((first, second), (second, first))
        ]
    )


def found(cache: Path, wrong: np.ndarray, out: Path) -> dict[str, float]:
    """Precision and recall of the list that `kdcache suspects` writes."""
    suspects(cache, out, overwrite=True)
    with open(out, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    ids = np.array([int(line["sample_id"]) for line in lines])
    issues = ids[np.array([line["is_issue"] == "1" for line in lines])]
    hits, head = wrong[issues].sum(), wrong[ids[: wrong.sum()]]
    return {
        "precision": float(hits / max(1, len(issues))),
        "recall": float(hits / wrong.sum()),
        "top": float(head.mean()),
    }


def learnt(noisy: Digits, test: Digits, cache: Path | None, seed: int, **changed: Any) -> float:
    """Accuracy of a student on the test images."""
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    options = DistillOptions(epochs=EPOCHS, batch_size=BATCH, device="cpu", threads=1, quiet=True, seed=seed)
    options = DistillOptions(**{**options.__dict__, **changed})
    result = kdcache.distill(options, student=student, data=TensorDataset(noisy.x, noisy.y), cache=cache)
    return float((logits(result.student, test.x).argmax(dim=1) == test.y).float().mean())


def one_setting(
    kind: str, rate: float, seed: int, clean: nn.Module, truth: Digits, test: Digits, folder: Path
) -> list[dict[str, Any]]:
    """All results of a kind and rate of noise, for a seed."""
    labels = with_noise(truth.y.numpy(), kind, rate, np.random.default_rng(seed))
    noisy, wrong = Digits(truth.x, torch.from_numpy(labels)), labels != truth.y.numpy()
    base = {"kind": kind, "rate": rate, "seed": seed}
    results = [{**base, "teacher": "-", "arm": "labels", "accuracy": learnt(noisy, test, None, seed, alpha=0.0)}]
    for teacher in TEACHERS:
        cache = folder / f"{kind}-{rate}-{seed}-{teacher}.h5"
        rows = asked(teacher, noisy, clean, seed).numpy()
        cache.unlink(missing_ok=True)
        seen = "yes" if teacher == "noisy" else "no"
        with kdcache.Writer(cache, classes=10, provenance={"teacher_seen": seen}) as writer:
            writer.write(np.arange(len(labels)), rows, labels)
        results.append({**base, "teacher": teacher, "arm": "suspects", **found(cache, wrong, folder / "suspects.csv")})
        for arm, changed in POLICIES.items():
            accuracy = learnt(noisy, test, cache, seed, **changed)
            results.append({**base, "teacher": teacher, "arm": arm, "accuracy": accuracy})
        cache.unlink()
    return results


def show(results: list[dict[str, Any]]) -> None:
    """Both tables, means over seeds; accuracies with the standard deviation."""
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for one in results:
        grouped[one["kind"], one["rate"], one["teacher"], one["arm"]].append(one)
    print("| noise | teacher | precision | recall | top |\n|---|---|---|---|---|")
    for (kind, rate, teacher, arm), same in grouped.items():
        if arm == "suspects":
            means = [statistics.mean(one[name] for one in same) for name in ("precision", "recall", "top")]
            print(f"| {kind} {rate:.0%} | {teacher} | " + " | ".join(f"{value:.3f}" for value in means) + " |")
    print("\n| noise | labels | teacher | " + " | ".join(POLICIES) + " |\n" + "|---" * (3 + len(POLICIES)) + "|")
    for kind, rate, teacher in dict.fromkeys(key[:3] for key in grouped if key[2] != "-"):
        cells = [_accuracy(grouped[kind, rate, teacher, arm]) for arm in POLICIES]
        labels = _accuracy(grouped[kind, rate, "-", "labels"])
        print(f"| {kind} {rate:.0%} | {labels} | {teacher} | " + " | ".join(cells) + " |")


def _accuracy(same: list[dict[str, Any]]) -> str:
    values = [100 * one["accuracy"] for one in same]
    return f"{statistics.mean(values):.2f} ({statistics.stdev(values) if len(values) > 1 else 0:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(one["kind"], one["rate"], one["seed"]) for one in results}
    train, test, rows = load(arguments.data, "train"), load(arguments.data, "t10k"), arguments.rows
    began = time.perf_counter()
    for seed in range(arguments.seeds):
        order = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(seed))
        clean, truth = (Digits(train.x[part], train.y[part]) for part in (order[:rows], order[rows : 2 * rows]))
        left = [(kind, rate) for kind in KINDS for rate in RATES if (kind, rate, seed) not in done]
        teacher = taught(clean.x, clean.y, seed) if left else cnn()
        for kind, rate in left:
            more = one_setting(kind, rate, seed, teacher, truth, test, arguments.out)
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(one) + "\n" for one in more)
            results += more
    show(results)
    print(
        f"\n{time.perf_counter() - began:.0f} s, one thread, torch {torch.__version__}, kdcache {kdcache.__version__}"
    )


if __name__ == "__main__":
    main()
