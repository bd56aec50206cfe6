"""Three teachers of different reliability: what each rule of `--ensemble` makes of them, and of a student.

    python tests/bench/several_teachers.py --data MNIST_FOLDER --out RESULTS [--seeds 3] [--rows 2000] [--alike]

The teachers are trained on disjoint parts of MNIST's training images:

    good    a small CNN on 3,000 rows
    gaps    the same CNN on 3,000 rows, of which those of the classes 3, 5 and 8 are left out but for 1 in 50
    weak    an MLP on 300 rows, to zero loss

With --alike all three are the CNN on 1,000 rows each. All three answer for `rows` other training images, from which
students (a small MLP, equal steps, same initial weights for each seed, alpha 0.9, T = 4) learn with their labels.
`student` is the accuracy on the 10,000 test images; `teacher` that of the combined teacher on the student's rows, which
no teacher has seen (`cross-entropy` looks at their labels, and so does `route:FILE`, which sends 3, 5 and 8 to `good`,
the rest to `gaps`). One JSON line a result goes to RESULTS/results.jsonl (results that are there are not repeated), the
table to standard output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from label_noise import BATCH, Digits, cnn, load, logits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import kdcache
from kdcache.stages.distill_options import DistillOptions

POOR = (3, 5, 8)
TEACHER_ROWS, WEAK_ROWS, ALIKE_ROWS, KEPT_ONE_IN = 3000, 300, 1000, 50
TEACHER_EPOCHS, WEAK_EPOCHS, EPOCHS, TEMPERATURE = 12, 60, 15, 4.0
RULES = (
    "logits",
    "soft-targets",
    "accuracy",
    "calibration",
    "class-accuracy",
    "entropy",
    "cross-entropy",
    "route:max-confidence",
    "route:FILE",
    "random",
)


def taught(net: nn.Module, x: Tensor, y: Tensor, seed: int, epochs: int) -> nn.Module:
    """The net trained on some rows."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval()


def teachers(train: Digits, order: Tensor, seed: int, *, alike: bool) -> dict[str, nn.Module]:
    """The three, on disjoint rows from the head of an order."""
    torch.manual_seed(seed)
    if alike:
        parts = order[: 3 * ALIKE_ROWS].split(ALIKE_ROWS)
        return {
            f"number {number}": taught(cnn(), train.x[part], train.y[part], seed, TEACHER_EPOCHS)
            for number, part in enumerate(parts, 1)
        }
    first, second, third = order.split([TEACHER_ROWS, TEACHER_ROWS, WEAK_ROWS])
    is_poor = torch.isin(train.y[second], torch.tensor(POOR))
    few = torch.zeros_like(is_poor)
    few[torch.nonzero(is_poor).squeeze(1)[::KEPT_ONE_IN]] = True
    second = second[~is_poor | few]
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    return {
        "good": taught(cnn(), train.x[first], train.y[first], seed, TEACHER_EPOCHS),
        "gaps": taught(cnn(), train.x[second], train.y[second], seed, TEACHER_EPOCHS),
        "weak": taught(mlp, train.x[third], train.y[third], seed, WEAK_EPOCHS),
    }


def learnt(own: Digits, test: Digits, caches: Any, seed: int, **changed: Any) -> float:
    """Accuracy of a student on the test images."""
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    options = DistillOptions(
        epochs=EPOCHS,
        batch_size=BATCH,
        temperature=TEMPERATURE,
        device="cpu",
        threads=1,
        quiet=True,
        seed=seed,
        **changed,
    )
    result = kdcache.distill(options, student=student, data=TensorDataset(own.x, own.y), cache=caches)
    return float((logits(result.student, test.x).argmax(dim=1) == test.y).float().mean())


def of_mean(caches: list[Path], rule: str, y: Tensor, folder: Path, weights: tuple[float, ...] = ()) -> float | None:
    """Accuracy of the combined teacher on the rows of its caches; None where each step has another one."""
    if rule == "random":
        return None
    asked = [f"{cache}={weight}" for cache, weight in zip(caches, weights, strict=True)] if weights else caches
    softly = rule not in ("logits", "route:max-confidence") and not rule.endswith(".csv")
    at = TEMPERATURE if softly else None
    kdcache.ensemble(asked, folder / "mean.h5", rule=rule, temperature=at, dtype="float32", overwrite=True)
    with kdcache.open(folder / "mean.h5") as cache:
        rows = cache.gather(np.arange(len(cache)))
    return float((rows.encoding.top_class(rows.arrays) == y.numpy()).mean())


def one_seed(train: Digits, test: Digits, seed: int, rows: int, folder: Path, *, alike: bool) -> list[dict[str, Any]]:
    """All results of a seed."""
    order = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(seed))
    head = 2 * TEACHER_ROWS + WEAK_ROWS
    own = Digits(train.x[order[head : head + rows]], train.y[order[head : head + rows]])
    results = [{"seed": seed, "arm": "labels alone", "student": learnt(own, test, None, seed, alpha=0.0)}]
    caches = []
    for name, net in teachers(train, order[:head], seed, alike=alike).items():
        cache = folder / f"{name}.h5"
        cache.unlink(missing_ok=True)
        found = logits(net, own.x)
        with kdcache.Writer(cache, classes=10, provenance={"teacher_seen": "no"}) as writer:
            writer.write(np.arange(rows), found.numpy(), own.y.numpy())
        right = found.argmax(dim=1) == own.y
        is_poor = torch.isin(own.y, torch.tensor(POOR))
        results.append(
            {
                "seed": seed,
                "arm": f"{name} alone",
                "teacher": float(right.float().mean()),
                "poor": float(right[is_poor].float().mean()),
                "student": learnt(own, test, cache, seed),
            }
        )
        caches.append(cache)
    if alike:
        rules = ("logits", "soft-targets", "entropy", "cross-entropy", "random")
        return results + [_of_rule(own, test, caches, rule, rule, seed, folder) for rule in rules]
    routes = folder / "routes.csv"
    to = ["good" if label in POOR else "gaps" for label in own.y.tolist()]
    routes.write_text("sample_id,teacher\n" + "".join(f"{number},{name}\n" for number, name in enumerate(to)))
    for rule in RULES:
        asked = f"route:{routes}" if rule == "route:FILE" else rule
        results.append(_of_rule(own, test, caches, rule, asked, seed, folder))
    weights = (4.0, 2.0, 1.0)
    weighted = [f"{cache}={weight}" for cache, weight in zip(caches, weights, strict=True)]
    results.append(
        {
            "seed": seed,
            "arm": "logits, weights 4 2 1",
            "teacher": of_mean(caches, "logits", own.y, folder, weights),
            "student": learnt(own, test, weighted, seed),
        }
    )
    return results


def _of_rule(
    own: Digits, test: Digits, caches: list[Path], arm: str, rule: str, seed: int, folder: Path
) -> dict[str, Any]:
    accuracy = of_mean(caches, rule, own.y, folder)
    return {"seed": seed, "arm": arm, "teacher": accuracy, "student": learnt(own, test, caches, seed, ensemble=rule)}


def show(results: list[dict[str, Any]]) -> None:
    """The table: means over seeds, with the standard deviation."""
    grouped: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in results:
        grouped[one["arm"]].append(one)
    print("| rule | teacher | teacher on 3, 5, 8 | student |\n|---|---|---|---|")
    for arm, same in grouped.items():
        cells = [_cell([one.get(name) for one in same]) for name in ("teacher", "poor", "student")]
        print(f"| {arm} | " + " | ".join(cells) + " |")


def _cell(values: list[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    return f"{statistics.mean(known):.2f} ({statistics.stdev(known) if len(known) > 1 else 0:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--alike", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {one["seed"] for one in results}
    train, test = load(arguments.data, "train"), load(arguments.data, "t10k")
    began = time.perf_counter()
    for seed in (seed for seed in range(arguments.seeds) if seed not in done):
        more = one_seed(train, test, seed, arguments.rows, arguments.out, alike=arguments.alike)
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(one) + "\n" for one in more)
        results += more
    show(results)
    print(
        f"\n{time.perf_counter() - began:.0f} s, one thread, torch {torch.__version__}, kdcache {kdcache.__version__}"
    )


if __name__ == "__main__":
    main()
