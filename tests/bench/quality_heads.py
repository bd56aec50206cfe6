"""The teachers of `quality.py`: two that were trained, two that are made up, and what their logits are like."""

from __future__ import annotations

import itertools
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from k_curve import load, normalised, train_teacher
from torch import Tensor, nn

from kdcache.format.known_heads import Head
from kdcache.stages.models import MLP
from kdcache.train.losses import kd_loss

BUCKETS, HIDDEN = 4096, 256


@dataclass(frozen=True, eq=False)
class Teacher:
    """A teacher's answers, and what a student of it needs.

    Attributes:
        name: of the head.
        logits: (N, C) float32 of the transfer rows.
        labels: (N,) int64.
        features: (N, D) float32 inputs of the last layer.
        head: that layer.
        inputs: (N, ...) of the transfer rows, for students; None where there is nothing to learn.
        test_inputs, test_labels: of the test set.
        accuracy: of the teacher on the test set.
    """

    name: str
    logits: np.ndarray
    labels: np.ndarray
    features: np.ndarray
    head: Head
    inputs: Tensor | None = None
    test_inputs: Tensor | None = None
    test_labels: Tensor | None = None
    accuracy: float | None = None


def cifar(folder: Path, weights: Path, *, rows: int, teacher_rows: int = 25000, epochs: int = 12) -> Teacher:
    """A convolutional teacher of one half of the CIFAR-10 training images; the transfer rows are of the other half."""
    missing = not weights.exists()
    data = load(folder / "train", half=0, limit=teacher_rows) if missing else load(folder / "train", half=0, limit=10)
    net = train_teacher("BASE", data, weights, epochs=epochs)
    transfer, test = load(folder / "train", half=1, limit=rows), load(folder / "test")
    return _answers("CIFAR-10", net, transfer.pixels, transfer.labels, test.pixels, test.labels, normalised)


def clinc(file: Path, weights: Path) -> Teacher:
    """A bag of hashed words, pairs of words and trigrams of letters, one hidden layer, 150 intents.

    The teacher learns the 15,000 training sentences; the 3,000 of the validation set are the transfer rows.
    """
    splits = json.loads(file.read_text())
    names = sorted({intent for _, intent in splits["train"]})
    (inputs, labels), (transfer, own), (test, test_labels) = (
        (bags([text for text, _ in splits[part]]), torch.tensor([names.index(intent) for _, intent in splits[part]]))
        for part in ("train", "val", "test")
    )
    torch.manual_seed(0)
    net = MLP((BUCKETS, HIDDEN, len(names)))
    if weights.exists():
        net.load_state_dict(torch.load(weights, weights_only=True))
    else:
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.1)
        for epoch in range(12):
            order = torch.from_numpy(np.random.Generator(np.random.PCG64((0, epoch))).permutation(len(labels)))
            for batch in order.split(128):
                loss = kd_loss(net(inputs[batch]), None, labels[batch], alpha=0.0, temperature=1.0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        torch.save(net.state_dict(), weights)
    return _answers("CLINC150", net, transfer, own, test, test_labels, lambda x: x)


def synthetic(classes: int, features: int, rows: int, *, scale: float, zipf: float, seed: int = 0) -> Teacher:
    """A head that nobody trained: z = scale * W x + b, with |x| = |W_c| = 1.

    The classes come in families of 20: half of the square of W_c is its family's direction. A class is drawn by Zipf's
    law, rank**-zipf, and x = g W_c + sqrt(1 - g**2) n with a random unit vector n and g from Beta(5, 3), so that some
    rows are certain and some are not; then |x| is made 1. b is half the log of the class's frequency, for what a head
    learns of it. The label is the class drawn.
    """
    random = np.random.Generator(np.random.PCG64((seed, classes)))
    families = random.standard_normal((classes // 20, features))
    weight = families[random.integers(0, len(families), classes)] + random.standard_normal((classes, features))
    weight /= np.linalg.norm(weight, axis=1, keepdims=True)
    frequency = -zipf * np.log(random.permutation(classes) + 1.0)
    labels = random.choice(classes, rows, p=np.exp(frequency) / np.exp(frequency).sum())
    noise = random.standard_normal((rows, features))
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    clear = random.beta(5, 3, rows)[:, None]
    inputs = clear * weight[labels] + np.sqrt(1 - clear**2) * noise
    inputs *= scale / np.linalg.norm(inputs, axis=1, keepdims=True)
    head = Head(weight.astype(np.float32), (frequency / 2).astype(np.float32))
    given = inputs.astype(np.float32)
    logits = given @ head.weight.T + head.bias
    return Teacher(f"synthetic {classes:,}", logits, labels.astype(np.int64), given, head)


def bags(texts: list[str]) -> Tensor:
    """(N, BUCKETS) float32 of length 1: counts of hashed words, pairs of words and trigrams of letters, with signs."""
    found = np.zeros((len(texts), BUCKETS), np.float32)
    for row, text in enumerate(texts):
        words = re.findall(r"[a-z0-9']+", text.lower())
        joined = f" {' '.join(words)} "
        parts = [*words, *map(" ".join, itertools.pairwise(words))]
        parts += [f"#{joined[at : at + 3]}" for at in range(len(joined) - 2)]
        for part in parts:
            code = zlib.crc32(part.encode())
            found[row, code % BUCKETS] += 1 if code >> 31 else -1
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6)
    return torch.from_numpy(found)


@torch.inference_mode()
def _answers(
    name: str, net: nn.Module, inputs: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, prepare: object
) -> Teacher:
    """Runs a teacher over its transfer rows and its test set; the input of its last layer is caught on the way."""
    net.eval()
    last = [layer for layer in net.modules() if isinstance(layer, nn.Linear)][-1]
    caught: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    logits = torch.cat([net(prepare(part)) for part in inputs.split(500)])  # type: ignore[operator]
    hook.remove()
    right = sum(
        int((net(prepare(part)).argmax(1) == own).sum())  # type: ignore[operator]
        for part, own in zip(test.split(500), test_labels.split(500), strict=True)
    )
    prepared = torch.cat([prepare(part) for part in inputs.split(500)])  # type: ignore[operator]
    prepared_test = torch.cat([prepare(part) for part in test.split(500)])  # type: ignore[operator]
    return Teacher(
        name,
        logits.numpy(),
        labels.numpy(),
        torch.cat(caught).numpy(),
        Head(last.weight.numpy().copy(), last.bias.numpy().copy()),
        prepared.clone(),
        prepared_test.clone(),
        test_labels,
        right / len(test_labels),
    )
