"""When distilling loses: teachers that are weak, over-fitted or of another domain, against the labels alone.

    python tests/bench/losing_teachers.py --data MNIST_FOLDER --out RESULTS [--seeds 5] [--rows 4000]

A small MLP learns `rows` images of MNIST by their labels alone, and with the logits of five teachers, all the same CNN:

    good            trained on 10,000 other images
    weak            trained on 60 other images
    over-fitted     trained on 300 other images until its loss on them is 0
    saw the rows    trained on the student's own rows until its loss on them is 0
    other domain    trained on the 8x8 digits that ship with kdcache, enlarged to 28x28

Equal steps, the same initial weights for each seed; accuracy is that on the 10,000 test images, the difference to the
labels alone is paired by seed. Before any student is trained, `kdcache report` is asked for its warnings on each cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from label_noise import Digits, cnn, learnt, load, logits
from torch import nn
from torch.nn import functional

import kdcache
from kdcache.stages.data import load_data
from kdcache.stages.report import report

SETTINGS = ({"alpha": 0.5, "temperature": 1.0}, {"alpha": 0.9, "temperature": 4.0})
ZERO_LOSS, MOST_EPOCHS = 0.001, 400
# teacher -> (its rows, epochs; None = until the loss is 0, what the cache says of `teacher_seen`)
TEACHERS: dict[str, tuple[str, int | None, str]] = {
    "good": ("others", 12, "no"),
    "weak": ("few", 30, "no"),
    "over-fitted": ("some", None, "no"),
    "saw the rows": ("own", None, "yes"),
    "other domain": ("scans", 40, "no"),
}


def enlarged() -> Digits:
    """The digits that ship with kdcache, 8x8, as images of MNIST's size."""
    loaded = load_data("digits:train")
    items = [loaded.dataset[at] for at in range(len(loaded.dataset))]
    x = torch.stack([item[0].reshape(1, 8, 8) for item in items])
    x = functional.interpolate(x / x.max(), size=(28, 28), mode="bilinear", align_corners=False)
    return Digits(x, torch.tensor([int(item[1]) for item in items]))


def taught(rows: Digits, epochs: int | None) -> nn.Module:
    """A teacher trained for some epochs, or until its loss is 0."""
    torch.manual_seed(0)
    net = cnn()
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.0)
    for _ in range(MOST_EPOCHS if epochs is None else epochs):
        losses = []
        for part in torch.randperm(len(rows.y)).split(64):
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(rows.x[part]), rows.y[part])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        if epochs is None and statistics.mean(losses) < ZERO_LOSS:
            break
    return net.eval()


def dumped(name: str, rows: dict[str, Digits], folder: Path) -> Path:
    """The cache of a teacher's logits for the student's rows."""
    source, epochs, seen = TEACHERS[name]
    cache = folder / f"{name.replace(' ', '-')}.h5"
    if not cache.exists():
        outputs = logits(taught(rows[source], epochs), rows["own"].x).numpy()
        with kdcache.Writer(cache, classes=10, provenance={"teacher_seen": seen}) as writer:
            writer.write(np.arange(len(outputs)), outputs, rows["own"].y.numpy())
    return cache


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
    cuts = {"own": (0, n), "others": (n, n + 10_000), "few": (n, n + 60), "some": (n, n + 300)}
    rows = {name: Digits(train.x[order[a:b]], train.y[order[a:b]]) for name, (a, b) in cuts.items()}
    rows["scans"] = enlarged()
    path = arguments.out / "results.jsonl"
    results: list[dict[str, Any]] = (
        [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    )
    done = {(one["teacher"], one["alpha"], one["seed"]) for one in results}
    arms: list[tuple[str, dict[str, float]]] = [("-", {"alpha": 0.0, "temperature": 1.0})]
    arms += [(name, setting) for name in TEACHERS for setting in SETTINGS]
    caches = {name: dumped(name, rows, arguments.out) for name in TEACHERS}
    for teacher, setting in arms:
        for seed in range(arguments.seeds):
            if (teacher, setting["alpha"], seed) in done:
                continue
            accuracy = learnt(rows["own"], test, caches.get(teacher), seed, **setting)
            results.append({"teacher": teacher, **setting, "seed": seed, "accuracy": accuracy})
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(results[-1]) + "\n")
    show(results, caches)
    print(
        f"\n{time.perf_counter() - began:.0f} s, one thread, torch {torch.__version__}, kdcache {kdcache.__version__}"
    )


def show(results: list[dict[str, Any]], caches: dict[str, Path]) -> None:
    """A line for each teacher and setting, with the teacher's accuracy, and what `report` said of it."""
    by_arm: dict[tuple[str, float], dict[int, float]] = {}
    for one in results:
        by_arm.setdefault((one["teacher"], one["alpha"]), {})[one["seed"]] = 100 * one["accuracy"]
    labels = by_arm["-", 0.0]
    print(f"labels alone: {statistics.mean(labels.values()):.2f}\n")
    print("| teacher | its accuracy, ECE | alpha 0.5, T 1 | alpha 0.9, T 4 | warned |\n|---|---|---|---|---|")
    said = []
    for name, cache in caches.items():
        found = report(cache).to_json()
        cells = []
        for setting in SETTINGS:
            gains = [accuracy - labels[seed] for seed, accuracy in by_arm[name, setting["alpha"]].items()]
            error = statistics.stdev(gains) / len(gains) ** 0.5
            cells.append(f"{statistics.mean(gains):+.2f} ({error:.2f})")
        warnings = [one["text"] for one in found["advice"] if one["level"] == "warning"]
        said += [f"{name}: {text}" for text in warnings]
        teacher = found["teacher"]
        figures = f"{100 * teacher['top1']:.1f}, {teacher['ece']['equal_width']:.3f}"
        print(f"| {name} | {figures} | " + " | ".join(cells) + f" | {'yes' if warnings else 'no'} |")
    print("\nwarnings of `kdcache report`, before any student:\n" + "\n".join(said))


if __name__ == "__main__":
    main()
