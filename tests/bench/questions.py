"""What people ask about distillation, answered with one teacher, one small student and real images.

    python tests/bench/questions.py --data MNIST_FOLDER --out RESULTS [--seeds 5] [--rows 4000]

The teacher is a CNN trained on 10,000 images of MNIST, the student an MLP with 64 hidden units that learns `rows`
others: 12 epochs of batch 128, the same initial weights for each seed. Accuracy is that on the 10,000 test images; the
difference to the labels alone is paired by seed. One JSON line a run goes to RESULTS/results.jsonl (runs that are there
are not repeated), the table to standard output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from label_noise import Digits, cnn, load, logits, taught
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import kdcache
from kdcache.stages.distill_options import DistillOptions

KD: dict[str, Any] = {"alpha": 0.9, "temperature": 4.0}
# arm -> options of `distill`; alpha 0 runs without the cache
ARMS: dict[str, dict[str, Any]] = {
    "labels": {"alpha": 0.0},
    "labels, smoothing 0.1": {"alpha": 0.0, "label_smoothing": 0.1},
    "labels, views of shift2": {"alpha": 0.0, "augment": "shift2"},
    "KD at T = 1": {**KD, "temperature": 1.0},
    "KD at T = 2": {**KD, "temperature": 2.0},
    "KD at T = 4": KD,
    "KD at T = 8": {**KD, "temperature": 8.0},
    "KD at T = 32": {**KD, "temperature": 32.0},
    "KD at T = 1000": {**KD, "temperature": 1000.0},
    "KD at T = 4, without its T² of 16": {**KD, "loss": ("kl*0.0625",)},
    "KD at T = 4, alpha 0.5": {**KD, "alpha": 0.5},
    "KD at T = 4, alpha 1 (no labels)": {**KD, "alpha": 1.0},
    "soft cross-entropy for KL": {**KD, "loss": ("soft_ce",)},
    "reverse KL": {**KD, "loss": ("reverse_kl",)},
    "MSE of logits": {"alpha": 0.9, "loss": ("mse",)},
    "MSE of logits, weighed 0.02": {"alpha": 0.9, "loss": ("mse*0.02",)},
    "the teacher's argmax as label": {"hard_targets": True},
    "KD at T = 4, 12 views of shift2": {**KD, "augment": "shift2"},
    "KD at T = 4, 6 epochs after 6 of labels": {**KD, "epochs": 6},
}
EPOCHS, BATCH = 12, 128


def mlp() -> nn.Module:
    """The student."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def student_of(arm: str, rows: Digits, caches: dict[str, Path], seed: int) -> nn.Module:
    """A student trained as the arm says."""
    given = dict(ARMS[arm])
    data = TensorDataset(rows.x, rows.y)
    torch.manual_seed(seed)
    student = mlp()
    common = {"epochs": EPOCHS, "batch_size": BATCH, "device": "cpu", "threads": 1, "quiet": True, "seed": seed}
    if "after" in arm:
        first = DistillOptions(**{**common, "alpha": 0.0, "epochs": EPOCHS - given["epochs"]})
        student = kdcache.distill(first, student=student, data=data).student
    needs_teacher = given.get("alpha") != 0
    cache = caches["views" if "augment" in given else "plain"] if needs_teacher else None
    return kdcache.distill(DistillOptions(**{**common, **given}), student=student, data=data, cache=cache).student


def accuracy(net: nn.Module, rows: Digits) -> float:
    """On those rows."""
    return float((logits(net, rows.x).argmax(dim=1) == rows.y).float().mean())


def fine_tuned(net: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """The teacher itself, trained on with the student's rows."""
    optimizer = torch.optim.AdamW(net.parameters(), 5e-4)
    for _ in range(EPOCHS):
        for part in torch.randperm(len(y)).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    train, test, n = load(arguments.data, "train"), load(arguments.data, "t10k"), arguments.rows
    order = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(0))
    rows, others = (Digits(train.x[part], train.y[part]) for part in (order[:n], order[n : n + 10_000]))
    teacher = taught(others.x, others.y, 0)
    caches = {name: arguments.out / f"{name}.h5" for name in ("plain", "views")}
    for name, cache in caches.items():
        if not cache.exists():
            views = {} if name == "plain" else {"views": EPOCHS, "augment": "shift2"}
            kdcache.precompute(teacher, TensorDataset(rows.x, rows.y), cache, threads=1, quiet=True, **views)
    path = arguments.out / "results.jsonl"
    results: list[dict[str, Any]] = (
        [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    )
    done = {(one["arm"], one["seed"]) for one in results}
    for arm in ARMS:
        for seed in range(arguments.seeds):
            if (arm, seed) not in done:
                found = accuracy(student_of(arm, rows, caches, seed), test)
                results.append({"arm": arm, "seed": seed, "accuracy": found})
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(results[-1]) + "\n")
    by_arm: dict[str, dict[int, float]] = {}
    for one in results:
        by_arm.setdefault(one["arm"], {})[one["seed"]] = 100 * one["accuracy"]
    print("| arm | accuracy (sd) | against the labels (se) |\n|---|---|---|")
    for arm, found in by_arm.items():
        gains = [found[seed] - by_arm["labels"][seed] for seed in found]
        error = statistics.stdev(gains) / len(gains) ** 0.5
        spread = statistics.stdev(found.values())
        mean, gain = statistics.mean(found.values()), statistics.mean(gains)
        print(f"| {arm} | {mean:.2f} ({spread:.2f}) | {gain:+.2f} ({error:.2f}) |")
    sizes = [sum(parameter.numel() for parameter in net.parameters()) for net in (teacher, mlp())]
    plain = accuracy(teacher, test)
    tuned = accuracy(fine_tuned(cnn_copy(teacher), rows.x, rows.y), test)
    print(f"\nteacher: {100 * plain:.2f}, fine-tuned on the student's rows {100 * tuned:.2f}")
    print(f"parameters: teacher {sizes[0]:,}, student {sizes[1]:,}")
    print(
        f"\n{time.perf_counter() - began:.0f} s, one thread, torch {torch.__version__}, kdcache {kdcache.__version__}"
    )


def cnn_copy(net: nn.Module) -> nn.Module:
    """Another teacher with the same weights."""
    copy = cnn()
    copy.load_state_dict(net.state_dict())
    return copy


if __name__ == "__main__":
    main()
