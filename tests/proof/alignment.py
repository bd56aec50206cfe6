"""A small data set, what its teacher saw of each sample in each view, and the ways in which a student's goes wrong.

What a row means is kept here beside the caches: `Truth` holds the input, label and logits of each id and view, and
says of any row that is handed out whether it is that one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

import kdcache
from kdcache.train.replay import Replay
from kdcache.train.views import named, replayable

SAMPLES, CLASSES, SIDE, VIEWS, SEED = 100, 10, 8, 2, 20
NAMED = "shift1,noise0.1"
Key = tuple[int | bytes, int]  # id, view


def make_teacher(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(SIDE * SIDE, CLASSES)
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return nn.Sequential(nn.Flatten(), linear)


def make_items(order: str, samples: int = SAMPLES) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 1, 8, 8) float32 and labels (N,), `sorted` by class or `shuffled`."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(samples) * CLASSES // samples
    if order == "shuffled":
        labels = labels[torch.randperm(samples, generator=generator)]
    return torch.randn(samples, 1, SIDE, SIDE, generator=generator), labels


def name_of(position: int) -> str:
    return f"n{position:05d}"


class Samples(Dataset[tuple[torch.Tensor, int]]):
    """Items (image, label); their ids are the index, or `sample_ids`."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, sample_ids: Sequence[str] | None = None) -> None:
        self.images = images
        self.labels = labels
        if sample_ids is not None:
            self.sample_ids = list(sample_ids)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], int(self.labels[index])

    def id_at(self, index: int) -> int | bytes:
        """As a cache stores it."""
        return self.sample_ids[index].encode() if hasattr(self, "sample_ids") else index


@dataclass(frozen=True)
class Recipe:
    """A pipeline of the user's own, which draws from three generators."""

    crop: int = 6
    corner: int = 0
    mode: str = "bilinear"
    axis: int = -1
    flipped: float = 0.5
    mean: float = 0.5
    std: float = 0.25
    draws_more: str = ""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        if self.draws_more == "torch":
            torch.rand(1)
        elif self.draws_more == "numpy":
            np.random.random()
        elif self.draws_more == "random":
            random.random()
        top, left = (int(n) + self.corner for n in torch.randint(0, 2, (2,)))
        view = image[..., top : top + self.crop, left : left + self.crop]
        if np.random.random() < self.flipped:
            view = view.flip(self.axis)
        view = functional.interpolate(view[None], size=(SIDE, SIDE), mode=self.mode)[0]
        return (view * (1 + 0.1 * random.random()) - self.mean) / self.std


def recipe(made: Recipe | None = None) -> Replay:
    """All recipes have one name: that one differs from the dump's shows in its views alone."""
    return replayable(made or Recipe(), seed=SEED, name="recipe")


PIPELINES: dict[str, Callable[[], Replay | None]] = {
    "plain": lambda: None,
    "named": lambda: named(NAMED, seed=SEED),
    "recipe": recipe,
}


def view_of(pipeline: Replay | None, image: torch.Tensor, sample_id: int | bytes, view: int) -> torch.Tensor:
    return image if pipeline is None else pipeline(image, sample_id, view)


class Truth:
    """A cache, and what its teacher saw of each sample in each view."""

    def __init__(self, cache: kdcache.Cache, data: Samples, kind: str) -> None:
        self.cache, self.data, self.kind = cache, data, kind
        self.pipeline = PIPELINES[kind]()
        self.views = range(1 if kind == "plain" else VIEWS)
        self._items = {data.id_at(n): (data.images[n], int(data.labels[n])) for n in range(len(data))}
        self.rows: dict[Key, tuple[torch.Tensor, int, torch.Tensor]] = {}
        for view in self.views:
            values = [view_of(self.pipeline, data.images[n], data.id_at(n), view) for n in range(len(data))]
            with torch.no_grad():
                logits = make_teacher()(torch.stack(values))
            for n, value in enumerate(values):
                self.rows[data.id_at(n), view] = value, int(data.labels[n]), logits[n]

    def join(self, data: Any, pipeline: Replay | None = None, **settings: Any) -> Any:
        """Joins a data set as a student does: only a pipeline of one's own is given again."""
        augment = (pipeline or self.pipeline) if self.kind == "recipe" else None
        return kdcache.join(data, self.cache, augment=augment, **settings)

    def is_wrong(self, value: torch.Tensor, label: int, sample_id: int | bytes, view: int) -> bool:
        """Whether an item is not what the teacher saw under that id in that view."""
        seen, known, _ = self.rows[sample_id, view]
        return label != known or not torch.equal(value, seen)

    def wrong_items(self, data: Samples, changed: Replay | None = None) -> set[tuple[int, int]]:
        """(index, view) of the items of a data set that are wrong: in themselves, or through a changed pipeline."""
        wrong = set()
        for n in range(len(data)):
            sample_id, label = data.id_at(n), int(data.labels[n])
            if changed is None:
                whole, known = self._items[sample_id]
                views = list(self.views) if label != known or not torch.equal(data.images[n], whole) else []
            else:
                drawn = [(view, changed(data.images[n], sample_id, view)) for view in self.views]
                views = [view for view, value in drawn if self.is_wrong(value, label, sample_id, view)]
            wrong.update((n, view) for view in views)
        return wrong

    def wrong_rows(self, batch: Any, ids: Sequence[int | bytes]) -> int:
        """How many of a batch (images, labels, rows) that was handed out are not what the teacher saw and said."""
        images, labels, rows = batch
        assert rows.sample_id.tolist() == list(ids)
        keys = list(zip(ids, rows.view.tolist(), strict=True))
        logits = torch.stack([self.rows[key][2] for key in keys])
        wrong = ~torch.isclose(torch.as_tensor(rows.dense()), logits, rtol=0, atol=1e-4).all(1)
        for n, key in enumerate(keys):
            wrong[n] |= self.is_wrong(images[n], int(labels[n]), *key)
        return int(wrong.sum())


def make_truth(folder: Path, order: str, kind: str, *, has_names: bool) -> Truth:
    """Dumps the data set and opens the cache."""
    names = [name_of(n) for n in range(SAMPLES)] if has_names else None
    data, pipeline = Samples(*make_items(order), names), PIPELINES[kind]()
    settings: dict[str, Any] = {} if pipeline is None else {"augment": pipeline, "views": VIEWS, "seed": SEED}
    dump(folder, data, **settings)
    return Truth(kdcache.open(folder), data, kind)


def dump(folder: Path, data: Any, *, teacher: nn.Module | None = None, **settings: Any) -> None:
    settings = {"dtype": "float32", "batch_size": 64, "device": "cpu", "quiet": True, **settings}
    kdcache.precompute(teacher or make_teacher(), data, folder, **settings)


@dataclass(frozen=True)
class Student:
    """What a student's data set has become: items, where each of them was in the dump (-1: nowhere), the pipeline."""

    images: torch.Tensor
    labels: torch.Tensor
    origin: np.ndarray
    recipe: Recipe | None = None

    def take(self, origin: np.ndarray) -> Student:
        return replace(self, images=self.images[origin], labels=self.labels[origin], origin=self.origin[origin])

    def data(self, *, has_names: bool, names_travel: bool = False) -> Samples:
        """With ids by index, or a list of names: those of the dump's order, or those that belong to the items."""
        if not has_names:
            return Samples(self.images, self.labels)
        places = self.origin if names_travel else range(len(self.origin))
        return Samples(self.images, self.labels, [name_of(int(n)) for n in places])


Fault = Callable[[Student, np.random.Generator], Student]


def removed(clean: Student, rng: np.random.Generator) -> Student:
    return clean.take(np.delete(np.arange(SAMPLES), rng.integers(SAMPLES - 1)))


def removed_and_added(clean: Student, rng: np.random.Generator) -> Student:
    """The new sample is the last one, or stands where the removed one stood; of the same class."""
    gone = int(rng.integers(SAMPLES))
    new = torch.from_numpy(rng.normal(size=(1, 1, SIDE, SIDE)).astype(np.float32))
    at = gone if rng.random() < 0.5 else SAMPLES - 1
    rest = np.delete(np.arange(SAMPLES), gone)
    order = np.concatenate([rest[:at], [gone], rest[at:]])
    images, labels = clean.images[order].clone(), clean.labels[order]
    images[at] = new
    origin = order.copy()
    origin[at] = -1
    return replace(clean, images=images, labels=labels, origin=origin)


def reshuffled(clean: Student, rng: np.random.Generator) -> Student:
    return clean.take(rng.permutation(SAMPLES))


def reshuffled_inside_classes(clean: Student, rng: np.random.Generator) -> Student:
    order = np.arange(SAMPLES)
    for label in range(CLASSES):
        members = np.flatnonzero(clean.labels.numpy() == label)
        order[members] = rng.permutation(members)
    return clean.take(order)


def two_samples_swapped(clean: Student, rng: np.random.Generator) -> Student:
    order = np.arange(SAMPLES)
    first, second = rng.choice(SAMPLES, 2, replace=False)
    order[[first, second]] = second, first
    return clean.take(order)


def two_classes_swapped(clean: Student, rng: np.random.Generator) -> Student:
    first, second = rng.choice(CLASSES, 2, replace=False).tolist()
    names = torch.arange(CLASSES)
    names[first], names[second] = second, first
    return replace(clean, labels=names[clean.labels])


def labels_corrected(clean: Student, rng: np.random.Generator) -> Student:
    """1 % of them."""
    labels = clean.labels.clone()
    for at in rng.choice(SAMPLES, SAMPLES // 100, replace=False):
        labels[at] = (labels[at] + int(rng.integers(1, CLASSES))) % CLASSES
    return replace(clean, labels=labels)


def subset_by_its_own_index(clean: Student, rng: np.random.Generator) -> Student:
    return clean.take(np.sort(rng.choice(SAMPLES, SAMPLES // 2, replace=False)))


def rank_indexed(clean: Student, rng: np.random.Generator) -> Student:
    """A rank's share of the samples, counted by the rank."""
    world = int(rng.integers(2, 9))
    return clean.take(np.arange(rng.integers(world), SAMPLES, world))


def step_indexed(clean: Student, rng: np.random.Generator) -> Student:
    """The samples in an epoch's order, counted by the loader."""
    return clean.take(rng.permutation(SAMPLES))


def another_recipe(name: str, choices: Sequence[Any], clean: Student, rng: np.random.Generator) -> Student:
    made = Recipe(**{name: choices[int(rng.integers(len(choices)))]})  # type: ignore[arg-type]
    return replace(clean, recipe=made)


def other_normalisation(clean: Student, rng: np.random.Generator) -> Student:
    """In the pipeline, by 0.001 to 0.1."""
    by = 10 ** rng.uniform(-3, -1)
    return replace(clean, recipe=Recipe(mean=0.5 + by) if rng.random() < 0.5 else Recipe(std=0.25 + by))


ITEM_FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        removed,
        removed_and_added,
        reshuffled,
        reshuffled_inside_classes,
        two_samples_swapped,
        two_classes_swapped,
        labels_corrected,
        subset_by_its_own_index,
        rank_indexed,
        step_indexed,
    )
}
VIEW_FAULTS: dict[str, Fault] = {
    "other_crop": partial(another_recipe, "crop", [5, 7]),
    "other_corner": partial(another_recipe, "corner", [1]),
    "other_interpolation": partial(another_recipe, "mode", ["nearest", "nearest-exact", "bicubic", "area"]),
    "other_flip": partial(another_recipe, "axis", [-2]),
    "other_share_of_flips": partial(another_recipe, "flipped", [0.0, 0.3, 0.7, 1.0]),
    "other_normalisation": other_normalisation,
    "other_consumption_of_random_numbers": partial(another_recipe, "draws_more", ["torch", "numpy", "random"]),
}
FAULTS = {**ITEM_FAULTS, **VIEW_FAULTS}
