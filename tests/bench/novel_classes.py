"""Classes that the teacher never saw: naive against partial distillation on CLINC150.

    python tests/bench/novel_classes.py --clinc data_full.json --out RESULTS [--seeds 3]

For each seed 30 of the 150 intents, drawn at random, and the out-of-scope class are withheld from the teacher, which
learns the training sentences of the other 120. The student has all 151 classes and learns the validation sentences (20
of each intent and 100 out of scope), on which the teacher was not trained. Both see bags of hashed words, pairs of
words and trigrams of letters; the teacher has 256 hidden units, the student 64. All arms take equal steps from the same
weights; accuracy is over all 151 classes, on test sentences of known and of novel intents:

    labels      the labels alone
    naive       the teacher's 120 logits beside 31 of -inf, as if it knew all classes: it teaches rows of novel ones too
    bucket      the same, but rows of novel classes learn their labels alone (--novel bucket)
    restricted  rows of novel classes learn their labels alone, the others' KD is over the 120 (--novel restricted)

One JSON line a run goes to RESULTS/results.jsonl (what is there is not repeated), the table to standard output.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_heads import BUCKETS, HIDDEN, bags
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import kdcache
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.models import MLP

WITHHELD, OUT_OF_SCOPE = 30, "oos"
ARMS: dict[str, dict[str, Any]] = {
    "labels": {"alpha": 0.0},
    "naive": {},
    "bucket": {"classes": "names", "novel": "bucket"},
    "restricted": {"classes": "names", "novel": "restricted"},
}
SETTINGS = ((0.5, 1.0), (0.5, 4.0), (0.9, 4.0))
TEACHER_EPOCHS, EPOCHS, BATCH = 8, 30, 128


class Sentences(TensorDataset):
    """Bags (N, 4096) float32 and labels (N,) int64, with the names of the classes."""

    def __init__(self, x: Tensor, y: Tensor, classes: list[str]) -> None:
        super().__init__(x, y)
        self.classes = classes


def load(file: Path) -> tuple[dict[str, Sentences], list[str]]:
    """Training, validation and test sentences; out-of-scope ones have the last class."""
    splits = json.loads(file.read_text())
    names = [*sorted({intent for _, intent in splits["train"]}), OUT_OF_SCOPE]
    place = {name: number for number, name in enumerate(names)}
    found = {}
    for part in ("train", "val", "test"):
        pairs = splits[part] + ([] if part == "train" else splits[f"oos_{part}"])
        labels = torch.tensor([place[intent] for _, intent in pairs])
        found[part] = Sentences(bags([text for text, _ in pairs]), labels, names)
    return found, names


def taught(x: Tensor, y: Tensor, classes: int, seed: int) -> nn.Module:
    """The teacher."""
    torch.manual_seed(seed)
    net, generator = MLP((BUCKETS, HIDDEN, classes)), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.1)
    for _ in range(TEACHER_EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval()


def written(path: Path, logits: Tensor, labels: Tensor, classes: list[str]) -> Path:
    """A cache of these rows."""
    path.unlink(missing_ok=True)
    with kdcache.Writer(path, classes=classes, provenance={"teacher_seen": "no"}) as writer:
        writer.write(np.arange(len(labels)), logits.numpy(), labels.numpy())
    return path


def one_seed(data: dict[str, Sentences], names: list[str], seed: int, folder: Path, done: set[Any]) -> list[Any]:
    """The results of a choice of withheld intents."""
    chosen = np.random.default_rng(seed).permutation(len(names) - 1)
    known = torch.from_numpy(np.sort(chosen[WITHHELD:]))
    of_teacher = torch.full((len(names),), -1).scatter(0, known, torch.arange(len(known)))
    left = [(arm, setting) for setting in SETTINGS for arm in ARMS if (seed, arm, *setting) not in done]
    if not left:
        return []
    x, y = data["train"].tensors
    rows = of_teacher[y] >= 0
    teacher = taught(x[rows], of_teacher[y[rows]], len(known), seed)
    x, y = data["val"].tensors
    with torch.no_grad():
        logits = teacher(x)
        of_test = teacher(data["test"].tensors[0]).argmax(dim=1)
    wide = torch.full((len(x), len(names)), -math.inf)
    wide[:, known] = logits
    own = [names[number] for number in known.tolist()]
    caches = {
        "naive": written(folder / f"naive-{seed}.h5", wide, y, names),
        "partial": written(folder / f"partial-{seed}.h5", logits, of_teacher[y], own),
    }
    test_x, test_y = data["test"].tensors
    is_known, is_out = of_teacher[test_y] >= 0, test_y == len(names) - 1
    results = []
    for arm, (alpha, temperature) in left:
        if arm == "labels" and (alpha, temperature) != SETTINGS[0]:
            continue
        torch.manual_seed(seed)
        student = MLP((BUCKETS, 64, len(names)))
        asked = {"alpha": alpha, "temperature": temperature, **ARMS[arm]}
        options = DistillOptions(
            epochs=EPOCHS, batch_size=BATCH, optimizer="adamw", lr=2e-3, weight_decay=0.1, device="cpu", threads=1,
            quiet=True, seed=seed, **asked,
        )  # fmt: skip
        cache = None if arm == "labels" else caches.get(arm, caches["partial"])
        result = kdcache.distill(options, student=student, data=data["val"], cache=cache)
        with torch.no_grad():
            found = result.student(test_x).argmax(dim=1)
        right, as_known = (found == test_y).float(), (of_teacher[found] >= 0).float()
        results.append(
            {
                "seed": seed,
                "arm": arm,
                "alpha": alpha,
                "temperature": temperature,
                "teacher": float((of_test == of_teacher[test_y])[is_known].float().mean()),
                "known": float(right[is_known].mean()),
                "novel": float(right[~is_known & ~is_out].mean()),
                "out_of_scope": float(right[is_out].mean()),
                "intents": float(right[~is_out].mean()),
                "novel_taken_for_known": float(as_known[~is_known & ~is_out].mean()),
            }
        )
    return results


def show(results: list[dict[str, Any]]) -> None:
    """Means over seeds in per cent, with the standard deviation."""
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for one in results:
        setting = ("-", "-") if one["arm"] == "labels" else (one["alpha"], one["temperature"])
        grouped[(*setting, one["arm"])].append(one)
    columns = ("known", "novel", "intents", "out_of_scope", "novel_taken_for_known")
    print("| alpha | T | arm | " + " | ".join(name.replace("_", " ") for name in columns) + " |")
    print("|---" * (3 + len(columns)) + "|")
    for key, same in grouped.items():
        cells = []
        for name in columns:
            values = [100 * one[name] for one in same]
            cells.append(f"{statistics.mean(values):.1f} ({statistics.stdev(values) if len(values) > 1 else 0:.1f})")
        print(f"| {key[0]} | {key[1]} | {key[2]} | " + " | ".join(cells) + " |")
    teacher = [100 * one["teacher"] for one in results]
    print(f"\nteacher on its own classes: {statistics.mean(teacher):.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clinc", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(one["seed"], one["arm"], one["alpha"], one["temperature"]) for one in results}
    began = time.perf_counter()
    data, names = load(arguments.clinc)
    for seed in range(arguments.seeds):
        more = one_seed(data, names, seed, arguments.out, done)
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(one) + "\n" for one in more)
        results += more
    show(results)
    print(f"{time.perf_counter() - began:.0f} s, one thread, torch {torch.__version__}, kdcache {kdcache.__version__}")


if __name__ == "__main__":
    main()
