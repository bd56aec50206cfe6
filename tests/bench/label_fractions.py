"""When does distilling beat fitting the small model to the labels alone? A sweep over shares of the labels.

    python tests/bench/label_fractions.py --mnist FOLDER --out WORK

Two tasks, each with a teacher that was trained on other rows: 600 digits (a teacher of 700), and 10,000 images of MNIST
(a CNN of 20,000). Students are small MLPs. `kdcache sweep` chooses alpha and the learning rate on validation rows, for
alpha 0 with as many settings, seeds and steps, and looks at the test rows once.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import kdcache
from kdcache.stages.demo import load_blocks, train_teacher
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.sweep import sweep
from kdcache.stages.sweep_options import LABELS_BUDGETS, SweepOptions

sys.path.append(str(Path(__file__).parent))  # tests are no package
from label_noise import load, logits, taught

FRACTIONS = (0.01, 0.05, 0.2, 1.0)
VALUES: dict[str, tuple[Any, ...]] = {"alpha": (0.5, 0.9), "lr": (0.02, 0.1), "label_fraction": FRACTIONS}
STUDENTS = {"digits": "mlp:64-32-10", "mnist": "mlp:784-64-10"}
STEPS = {"digits": 400, "mnist": 790}


def write(folder: Path, name: str, x: Tensor, y: Tensor) -> str:
    """Rows as a file; its SPEC."""
    path = folder / f"{name}.npz"
    np.savez(path, x=x.numpy(), y=y.numpy())
    return f"npz:{path}"


def write_cache(path: Path, teacher: nn.Module, x: Tensor, y: Tensor) -> str:
    """What the teacher says of rows that it was not trained on."""
    path.unlink(missing_ok=True)
    with kdcache.Writer(path, classes=10, provenance={"teacher_seen": "no"}) as writer:
        writer.write(np.arange(len(y)), logits(teacher, x).numpy(), y.numpy())
    return str(path)


def digits(folder: Path) -> tuple[dict[str, str], str]:
    """SPECs of train, val and test, and the cache."""
    blocks = load_blocks()
    teacher = train_teacher(blocks)
    half = len(blocks.test_y) // 2
    specs = {
        "train": write(folder, "digits_train", blocks.transfer_x, blocks.transfer_y),
        "val": write(folder, "digits_val", blocks.test_x[:half], blocks.test_y[:half]),
        "test": write(folder, "digits_test", blocks.test_x[half:], blocks.test_y[half:]),
    }
    return specs, write_cache(folder / "digits.h5", teacher, blocks.transfer_x, blocks.transfer_y)


def mnist(folder: Path, source: Path) -> tuple[dict[str, str], str]:
    """Likewise."""
    train, test = load(source, "train"), load(source, "t10k")
    teacher = taught(train.x[20_000:40_000], train.y[20_000:40_000], 0)
    specs = {
        "train": write(folder, "mnist_train", train.x[:10_000], train.y[:10_000]),
        "val": write(folder, "mnist_val", train.x[10_000:12_000], train.y[10_000:12_000]),
        "test": write(folder, "mnist_test", test.x, test.y),
    }
    return specs, write_cache(folder / "mnist.h5", teacher, train.x[:10_000], train.y[:10_000])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--labels-budget", choices=LABELS_BUDGETS, default=LABELS_BUDGETS[0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for task in ("digits", "mnist") if arguments.mnist else ("digits",):
        begun = time.perf_counter()
        specs, cache = digits(arguments.out) if task == "digits" else mnist(arguments.out, arguments.mnist)
        base = DistillOptions(
            student=STUDENTS[task],
            data=specs["train"],
            val=specs["val"],
            cache=(cache,),
            steps=STEPS[task],
            device="cpu",
            threads=1,
            out=str(arguments.out / f"sweep_{task}"),
            resume=True,
        )
        values = {**VALUES, "seed": tuple(range(arguments.seeds))}
        own: dict[str, Any] = {"processes": arguments.processes, "labels_budget": arguments.labels_budget}
        result = sweep(SweepOptions(base, values, **own, test=specs["test"]))
        print(f"\n## {task}\n", *result.lines, sep="\n")
        print(f"\n{result.runs} runs of {result.steps} steps, {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
