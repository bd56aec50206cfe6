"""An over-fitted teacher: does calibrating it do more for students than choosing the best temperature?

    python tests/bench/overfitted.py --data CIFAR_FOLDER --out RESULTS [--seeds 3] [--rows 6000]

CIFAR_FOLDER holds train.zip and test.zip with CLASS/NAME.jpg in them. `rows` training images train a CNN until its loss
on them is 0, without augmentation; `rows` others, which it never saw, are dumped, calibrated (`kdcache calibrate`), and
train small students with equal steps: by the labels alone, and with each temperature and alpha, with and without the
calibration. The best setting of each arm is chosen on 5,000 further images by its mean over the seeds; accuracy, NLL
and ECE (15 bins of equal width) are those on the 10,000 test images. Results that stand in RESULTS are not repeated.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import kdcache
from kdcache.stages.calibrate import calibrate
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.models import CNN

ALPHAS, TEMPERATURES = (0.5, 0.9), (1.0, 2.0, 4.0, 8.0)
VAL_ROWS, BATCH, EPOCHS = 5000, 128, 12
MAX_TEACHER_EPOCHS, ZERO_LOSS = 60, 0.005


def load(archive: Path, rows: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) float32 in [0, 1] and labels (N,) of an archive, in a seeded order."""
    with zipfile.ZipFile(archive) as files:
        names = sorted(name for name in files.namelist() if name.endswith(".jpg"))
        classes = sorted({name.split("/")[-2] for name in names})
        order = np.random.default_rng(seed).permutation(len(names))[:rows]
        pixels = [np.asarray(Image.open(io.BytesIO(files.read(names[at])))) for at in order]
    x = torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).astype(np.float32) / 255)
    return x, torch.tensor([classes.index(names[at].split("/")[-2]) for at in order])


def overfitted(x: Tensor, y: Tensor) -> tuple[nn.Module, float]:
    """A teacher trained until its loss on its rows is 0, and that loss."""
    torch.manual_seed(0)
    net = CNN("BASE", in_channels=3, num_classes=10, pixels=32)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    loss = float("inf")
    for _ in range(MAX_TEACHER_EPOCHS):
        losses = []
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            found = functional.cross_entropy(net(x[rows]), y[rows])
            found.backward()
            optimizer.step()
            losses.append(float(found.detach()))
        loss = statistics.mean(losses)
        if loss < ZERO_LOSS:
            break
    return net.eval(), loss


@torch.no_grad()
def logits(net: nn.Module, x: Tensor) -> Tensor:
    """(N, 10)."""
    return torch.cat([net(part) for part in x.split(500)])


def measured(outputs: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy, NLL and ECE of logits."""
    p, top = outputs.softmax(dim=1).max(dim=1)
    right = (top == y).double()
    bins = (p * 15).long().clamp_max(14)
    gaps = torch.bincount(bins, p.double(), 15) - torch.bincount(bins, right, 15)
    return {
        "accuracy": float(right.mean()),
        "nll": float(functional.cross_entropy(outputs, y)),
        "ece": float(gaps.abs().sum() / len(y)),
    }


def settings() -> list[dict[str, Any]]:
    """What students are trained with; `arm` is labels, as it is, or calibrated."""
    found: list[dict[str, Any]] = [{"arm": "labels", "alpha": 0.0, "temperature": 1.0}]
    for arm in ("as it is", "calibrated"):
        found += [{"arm": arm, "alpha": a, "temperature": t} for a in ALPHAS for t in TEMPERATURES]
    return found


def show(results: list[dict[str, Any]]) -> None:
    """A line for each setting, means over seeds, and the chosen ones."""
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in results:
        grouped.setdefault((one["arm"], one["alpha"], one["temperature"]), []).append(one)
    print("| teacher | alpha | T | val | test accuracy | NLL | ECE |\n|---|---|---|---|---|---|---|")
    chosen: dict[str, tuple[Any, ...]] = {}
    for key, same in grouped.items():
        mean = {name: statistics.mean(one[name] for one in same) for name in ("val", "accuracy", "nll", "ece")}
        spread = statistics.stdev([100 * one["accuracy"] for one in same]) if len(same) > 1 else 0.0
        accuracies = f"{100 * mean['val']:.2f} | {100 * mean['accuracy']:.2f} ({spread:.2f})"
        print(f"| {key[0]} | {key[1]:g} | {key[2]:g} | {accuracies} | {mean['nll']:.3f} | {mean['ece']:.3f} |")
        best = chosen.get(key[0])
        if best is None or mean["val"] > best[0]:
            chosen[key[0]] = (mean["val"], key, mean)
    print("\nchosen on the validation images:")
    for arm, (_, key, mean) in chosen.items():
        values = ", ".join(f"{name} {mean[name]:.4f}" for name in ("accuracy", "nll", "ece"))
        print(f"  {arm}: alpha {key[1]:g}, T {key[2]:g}: {values}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=6000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out, rows = arguments.out, arguments.rows
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    x, y = load(arguments.data / "train.zip", 2 * rows + VAL_ROWS, 0)
    test_x, test_y = load(arguments.data / "test.zip", None, 0)
    own, others, val = slice(rows), slice(rows, 2 * rows), slice(2 * rows, None)
    cache, side = out / "teacher.h5", out / "teacher.h5.calibration.json"
    if not side.exists():
        teacher, loss = overfitted(x[own], y[own])
        print(
            f"teacher: loss on its own rows {loss:.4f}, on the test images {measured(logits(teacher, test_x), test_y)}"
        )
        cache.unlink(missing_ok=True)
        with kdcache.Writer(cache, classes=10, dtype="float32", provenance={"teacher_seen": "no"}) as writer:
            writer.write(np.arange(rows), logits(teacher, x[others]).numpy(), y[others].numpy())
        print("calibrate:", json.dumps(calibrate(cache, out=side).to_json(), default=str))
    path = out / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(one["arm"], one["alpha"], one["temperature"], one["seed"]) for one in results}
    for seed in range(arguments.seeds):
        for setting in settings():
            if (*setting.values(), seed) in done:
                continue
            torch.manual_seed(seed)
            student = CNN("TINY", in_channels=3, num_classes=10, pixels=32)
            options = DistillOptions(
                alpha=setting["alpha"],
                temperature=setting["temperature"],
                calibration=str(side) if setting["arm"] == "calibrated" else None,
                epochs=EPOCHS,
                batch_size=BATCH,
                seed=seed,
                device="cpu",
                threads=1,
                quiet=True,
            )
            given = None if setting["arm"] == "labels" else cache
            trained = kdcache.distill(options, student=student, data=TensorDataset(x[others], y[others]), cache=given)
            found = measured(logits(trained.student, test_x), test_y)
            held_out = measured(logits(trained.student, x[val]), y[val])["accuracy"]
            results.append({**setting, "seed": seed, "val": held_out, **found})
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(results[-1]) + "\n")
    show(results)
    print(
        f"\n{time.perf_counter() - began:.0f} s, one thread, torch {torch.__version__}, kdcache {kdcache.__version__}"
    )


if __name__ == "__main__":
    main()
