"""The K-curve: how many stored views does a student need, against a teacher that answers live?

    python tests/bench/k_curve.py --data CIFAR_FOLDER --out RESULTS [--seeds 5] [--rows 4000] [--epochs 32]
    python tests/bench/k_curve.py --data CIFAR_FOLDER --out RESULTS --plot k_curve.png   # needs matplotlib

CIFAR_FOLDER holds `train/CLASS/*` and `test/CLASS/*`. The training images are cut in two halves by the parity of their
number: the teacher learns the first, the students a subset of the second, which the teacher never saw. All students
are one network, start from the same weights, see the same rows in the same order (for each seed) and take the same
number of steps; only views and targets differ:

    K=1, 2, 4, 8    cached rows of K views, view e mod K in epoch e, crop and flip replayed
    live            a fresh view each epoch, the teacher run on it
    not_replayed    a fresh view each epoch, the row of another view: what a cache without replay does
    labels_fresh    labels alone, a fresh view each epoch
    labels_1, _8    labels alone, 1 or 8 fixed views

One JSON line a run goes to RESULTS/runs.jsonl (runs that are there are not repeated), the table to standard output.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import kdcache
from kdcache.stages.models import CNN, CNN_WIDTHS
from kdcache.train.losses import kd_loss
from kdcache.train.viewed import ViewedItems

AUGMENT, SEED, VIEWS = "crop4,hflip", 0, 8
CACHED = (1, 2, 4, 8)
ARMS = (*(f"K={k}" for k in CACHED), "live", "not_replayed", "labels_fresh", "labels_1", "labels_8")
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's t, two-sided, by number of seeds


@dataclass(frozen=True, eq=False)
class Images(Dataset[tuple[Tensor, int]]):
    """uint8 images (N, 3, 32, 32) in memory with labels (N,) and ids."""

    pixels: Tensor
    labels: Tensor
    sample_ids: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index], int(self.labels[index])


def load(folder: Path, *, half: int | None = None, limit: int | None = None) -> Images:
    """Images of a folder of classes; those whose number is even (half 0) or odd (half 1), or all."""
    from PIL import Image

    pixels, labels, names = [], [], []
    for label, kind in enumerate(sorted(path for path in folder.iterdir() if path.is_dir())):
        files = sorted(kind.iterdir())
        chosen = [path for number, path in enumerate(files) if half is None or number % 2 == half]
        for path in chosen[: None if limit is None else limit // 10]:
            pixels.append(np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1))
            labels.append(label)
            names.append(f"{kind.name}/{path.name}")
    return Images(torch.from_numpy(np.stack(pixels)), torch.tensor(labels), names)


def normalised(pixels: Tensor) -> Tensor:
    """What both models are given: each does this to the shared view itself."""
    return pixels.float() / 127.5 - 1.0


def view_of(items: ViewedItems, indices: np.ndarray, view: int) -> Tensor:
    """(n, 3, 32, 32) uint8: some samples in one view."""
    return torch.stack([seen.item[0] for seen in items.load(indices.tolist(), [view] * len(indices))])


def network(size: str, seed: int) -> nn.Module:
    """A network for CIFAR-10 with the weights that `seed` draws."""
    torch.manual_seed(seed)
    return CNN(size, in_channels=3, num_classes=10, pixels=32)


def train_teacher(size: str, data: Images, path: Path, *, epochs: int) -> nn.Module:
    """The larger network on its own half, with fresh views; kept in `path`."""
    net = network(size, 0)
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    items = ViewedItems(data, np.arange(len(data)), kdcache.views.named(AUGMENT, seed=12345))
    fit(net, len(data), epochs, 0, lambda rows, epoch: (view_of(items, rows, epoch), data.labels[rows], None))
    torch.save(net.state_dict(), path)
    return net.eval()


def fit(net: nn.Module, rows: int, epochs: int, seed: int, batch_of: object, *, alpha: float = 0.0) -> float:
    """One recipe for every network: AdamW, one-cycle, batches of 128. Returns the seconds of an epoch."""
    steps = math.ceil(rows / 128) * epochs
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.15)
    net.train()
    began = time.perf_counter()
    for epoch in range(epochs):
        order = np.random.Generator(np.random.PCG64((seed, epoch))).permutation(rows)
        for start in range(0, rows, 128):
            pixels, labels, teacher = batch_of(order[start : start + 128], epoch)  # type: ignore[operator]
            loss = kd_loss(net(normalised(pixels)), teacher, labels, alpha=alpha, temperature=4.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return (time.perf_counter() - began) / epochs


@torch.inference_mode()
def accuracy(net: nn.Module, data: Images) -> float:
    """Top-1 on images as they are."""
    net.eval()
    right = 0
    for start in range(0, len(data), 500):
        pixels, labels = data.pixels[start : start + 500], data.labels[start : start + 500]
        right += int((net(normalised(pixels)).argmax(dim=1) == labels).sum())
    return right / len(data)


def run(
    arm: str, seed: int, student: nn.Module, *, data: Images, test: Images, teacher: nn.Module, cache: Path, epochs: int
) -> dict:
    """Trains one student and measures it at its last step."""
    opened = kdcache.open(cache)
    replayed = ViewedItems(data, np.asarray(data.sample_ids, "S"), kdcache.views.named(AUGMENT, seed=SEED))
    joined = None
    if arm.startswith("K="):
        joined = kdcache.join(data, opened, views=int(arm[2:]), view_order="epoch")

    def batch_of(indices: np.ndarray, epoch: int) -> tuple[Tensor, Tensor, object]:
        labels = data.labels[indices]
        if joined is not None:
            joined.set_epoch(epoch)
            pixels, found, rows = torch.utils.data.default_collate(joined.__getitems__(indices.tolist()))
            return pixels, found, rows
        if arm.startswith("labels"):
            fixed = {"labels_fresh": None, "labels_1": 1, "labels_8": 8}[arm]
            return view_of(replayed, indices, epoch if fixed is None else epoch % fixed), labels, None
        # Views from 1,000 on are in no cache: each is seen once.
        pixels = view_of(replayed, indices, 1000 + epoch)
        if arm == "live":
            with torch.inference_mode():
                logits = teacher(normalised(pixels))
            return pixels, labels, logits.clone()
        ids = [data.sample_ids[i] for i in indices.tolist()]
        return pixels, labels, opened.gather(opened.rows(ids, 0)).tensors()

    alpha = 0.0 if arm.startswith("labels") else 0.9
    seconds = fit(student, len(data), epochs, seed, batch_of, alpha=alpha)
    return {"arm": arm, "seed": seed, "accuracy": accuracy(student, test), "epoch_seconds": round(seconds, 3)}


def table(runs: list[dict]) -> str:
    """Mean and 95 % interval of each arm, and of its difference to the live teacher, paired by seed."""
    by_arm = {arm: {run["seed"]: run for run in runs if run["arm"] == arm} for arm in ARMS}
    lines = [
        "| student | test accuracy | minus live, paired | minus labels_fresh, paired | epoch |",
        "|---|---|---|---|---|",
    ]
    for arm, found in by_arm.items():
        if not found:
            continue
        scores = [run["accuracy"] for run in found.values()]
        live, labels = (
            interval(
                [found[s]["accuracy"] - by_arm[other][s]["accuracy"] for s in found if s in by_arm[other]], signed=True
            )
            for other in ("live", "labels_fresh")
        )
        epoch = float(np.median([run["epoch_seconds"] for run in found.values()]))
        lines.append(f"| {arm} | {interval(scores)} | {live} | {labels} | {epoch:.2f} s |")
    return "\n".join(lines)


def interval(values: list[float], *, signed: bool = False) -> str:
    """The mean and half of its 95 % interval by Student's t."""
    if len(values) < 2:
        return "" if not values else f"{values[0]:.4f}"
    half = T_95.get(len(values), 2.0) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{np.mean(values):{'+' if signed else ''}.4f} ± {half:.4f}"


def plot(runs: list[dict], path: Path) -> None:
    """Accuracy over K, with the other students as lines across; needs matplotlib."""
    import matplotlib.pyplot as plt

    def mean_and_half(arm: str) -> tuple[float, float]:
        values = [100 * run["accuracy"] for run in runs if run["arm"] == arm]
        return float(np.mean(values)), T_95[len(values)] * float(np.std(values, ddof=1)) / math.sqrt(len(values))

    figure, axes = plt.subplots(figsize=(6.4, 4))
    points = [mean_and_half(f"K={k}") for k in CACHED]
    axes.errorbar(CACHED, [m for m, _ in points], [h for _, h in points], fmt="o-", capsize=3, label="K cached views")
    for arm, label in (
        ("live", "live teacher, fresh views"),
        ("not_replayed", "cached, crop not replayed"),
        ("labels_fresh", "labels, fresh views"),
    ):
        mean, half = mean_and_half(arm)
        (line,) = axes.plot([CACHED[0], CACHED[-1]], [mean, mean], "--", label=label)
        axes.fill_between([CACHED[0], CACHED[-1]], mean - half, mean + half, color=line.get_color(), alpha=0.15)
    labels = [mean_and_half(f"labels_{k}") for k in (1, 8)]
    axes.errorbar(
        (1, 8), [m for m, _ in labels], [h for _, h in labels], fmt="s:", capsize=3, label="labels, K fixed views"
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(CACHED, [str(k) for k in CACHED])
    axes.set_xlabel("views K of each sample")
    axes.set_ylabel("test accuracy, % (95 % interval over seeds)")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4000, help="transfer images of the students")
    parser.add_argument("--teacher-rows", type=int, default=25000)
    parser.add_argument("--teacher-epochs", type=int, default=12)
    parser.add_argument("--test-rows", type=int, default=10000)
    parser.add_argument("--epochs", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--teacher", default="BASE", choices=sorted(CNN_WIDTHS))
    parser.add_argument("--student", default="SMALL", choices=sorted(CNN_WIDTHS))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--plot", type=Path, help="draw the curve of RESULTS/runs.jsonl there, and train nothing")
    parser.add_argument("--part", default="0/1", help="I/N: take every N-th run, for several processes")
    options = parser.parse_args()
    if options.epochs < 4 * max(CACHED):
        print("with fewer epochs than 4 K, e mod K is nearly a live teacher", file=sys.stderr)
    log = options.out / "runs.jsonl"
    if options.plot is not None:
        runs = [json.loads(line) for line in log.read_text().splitlines()]
        plot(runs, options.plot)
        print(table(runs))
        return
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    train, test = options.data / "train", load(options.data / "test", limit=options.test_rows)
    teacher_path = options.out / "teacher.pt"
    half = load(train, half=0, limit=options.teacher_rows)
    teacher = train_teacher(options.teacher, half, teacher_path, epochs=options.teacher_epochs)
    data = load(train, half=1, limit=options.rows)
    cache_path = options.out / "cache"
    kdcache.precompute(
        teacher,
        data,
        cache_path,
        transform=normalised,
        augment=AUGMENT,
        views=VIEWS,
        seed=SEED,
        teacher_saw="no",
        threads=1,
    )
    facts = {
        "teacher": accuracy(teacher, test),
        "bytes_a_view": sum(p.stat().st_size for p in cache_path.rglob("*.h5")) / VIEWS / len(data),
    }
    print(json.dumps(facts), flush=True)
    runs = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(run["arm"], run["seed"]) for run in runs}
    wanted = [(arm, seed) for seed in range(options.seeds) for arm in options.arms.split(",")]
    part, parts = map(int, options.part.split("/"))
    for arm, seed in wanted[part::parts]:
        if (arm, seed) in done:
            continue
        student = network(options.student, seed)
        found = run(arm, seed, student, data=data, test=test, teacher=teacher, cache=cache_path, epochs=options.epochs)
        runs.append(found)
        with log.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)
    print(table(runs))


if __name__ == "__main__":
    main()
