"""Views of many pipelines, loaded by every kind of DataLoader, and what came out: also as a process of its own.

`python -c "import view_jobs; view_jobs.main()" SUITE FOLDER RANK WORLD OUT CELLS` loads the caches in FOLDER as one
rank of several, with the workers and start methods in CELLS, and writes a hash of each view and its row to OUT.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

import kdcache
from kdcache.train.mixed_labels import MixedLabels
from kdcache.train.mixing import Mix
from kdcache.train.replay import Replay
from kdcache.train.viewed import ViewedItems
from kdcache.train.views import named, replayable
from kdcache.train.with_ids import SampleIds

sys.path.append(str(Path(__file__).parent.parent / "train"))  # view_caches

Cell = tuple[int, str | None]  # workers, start method
CELLS: tuple[Cell, ...] = (
    (0, None),
    *((workers, method) for workers in (2, 4) for method in ("fork", "spawn", "forkserver")),
)
BATCH_SIZES = (3, 8)
SAMPLES, VIEWS, EPOCHS, SEED = 13, 2, 3, 20


def _define_torchvision_operators() -> object | None:
    """As tests/conftest.py does, which processes of their own do not read."""
    if importlib.util.find_spec("torchvision") is None or hasattr(torch.ops.torchvision, "nms"):
        return None
    stubs = torch.library.Library("torchvision", "FRAGMENT")
    stubs.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    stubs.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return stubs


_STUBS = _define_torchvision_operators()


class Pictures(Dataset[tuple[Any, int]]):
    """Items (image, label): as a tensor of bytes or floats (3, 12, 10), an array (12, 10, 3), or a PIL image."""

    def __init__(self, form: str) -> None:
        self.form = form
        self.images = np.random.default_rng(5).integers(0, 256, (SAMPLES, 12, 10, 3), np.uint8)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        if self.form == "pil":
            from PIL import Image

            return Image.fromarray(image), index % 5
        if self.form == "array":
            return image, index % 5
        tensor = torch.from_numpy(image.transpose(2, 0, 1).copy())
        return (tensor if self.form == "bytes" else tensor.float() / 255), index % 5


def three_generators(image: torch.Tensor) -> torch.Tensor:
    """A plain function that draws from all the global generators."""
    return image * torch.rand(()) + float(np.random.normal()) + random.gauss(0, 1)


def own_generator(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A plain function that takes a generator."""
    return image + torch.from_numpy(rng.normal(size=tuple(image.shape)).astype(np.float32))


def albumentations_pipeline() -> Any:
    import albumentations

    parts = [
        albumentations.RandomCrop(10, 8),
        albumentations.HorizontalFlip(p=0.5),
        albumentations.RandomBrightnessContrast(p=0.8),
        albumentations.GaussNoise(p=0.8),
        albumentations.CoarseDropout(p=0.5),
    ]
    return albumentations.Compose(parts)


def timm_pipeline() -> Any:
    from timm.data import create_transform

    return create_transform(10, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5, color_jitter=0.4)


def torchvision_pipeline() -> Any:
    from torchvision import transforms

    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    return transforms.Compose([transforms.RandomResizedCrop(8), jitter, transforms.ToTensor()])


Pipeline = tuple[str, Callable[[], Replay]]  # the form of the images, and what makes the pipeline


def _named(form: str, *texts: str) -> dict[str, Pipeline]:
    return {f"{text} of {form}": (form, lambda text=text: named(text, seed=SEED)) for text in texts}  # type: ignore[misc]


def _custom(name: str, form: str, make: Callable[[], Any], mix: Mix | None = None) -> dict[str, Pipeline]:
    return {name: (form, lambda: replayable(make(), seed=SEED, name=name, mix=mix))}


SUITES: dict[str, dict[str, Pipeline]] = {
    "torch": {
        **_named("floats", "shift", "noise", "erase", "mixup", "shift2,noise0.2,erase,cutmix"),
        **_named("bytes", "shift3,mixup1", "erase,cutmix"),
        **_custom("a function", "floats", lambda: three_generators),
        **_custom("a function with a generator", "floats", lambda: own_generator, Mix("mixup", 1.0)),
    },
    "torchvision": {
        **_named("bytes", "crop", "hflip", "rrc", "randaug", "crop4,hflip", "rrc8,hflip,cutmix"),
        **_named("floats", "rrc,hflip", "randaug,mixup"),
        **_custom("torchvision v1", "pil", torchvision_pipeline),
    },
    "albumentations": _custom("albumentations", "array", albumentations_pipeline, Mix("cutmix", 1.0)),
    "timm": _custom("timm", "pil", timm_pipeline),
}


def dump(suite: str, folder: Path) -> dict[str, str]:
    """Dumps the views of every pipeline of a suite; the hash of each view and row by "pipeline/sample/view"."""
    from view_caches import logits_of, write_views

    expected = {}
    for number, (name, (form, make)) in enumerate(SUITES[suite].items()):
        pictures, replay = Pictures(form), make()
        write_views(folder / str(number), pictures, replay, range(VIEWS)).close()
        items = ViewedItems(pictures, np.arange(SAMPLES), replay)
        for sample in range(SAMPLES):
            for view in range(VIEWS):
                (one,) = items.load([sample], [view])
                value, mixed = torch.as_tensor(one.item[0]), (one.label_b, float(np.float32(one.mix_ratio)))
                labels = (sample % 5, *mixed) if items.is_mixed else (sample % 5,)
                expected[f"{name}/{sample}/{view}"] = _hash(value, logits_of(value), labels)
    return expected


class Together(Dataset[Any]):
    """Data sets whose views are of different shapes; an index is (number of the data set, index in it)."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts

    def __getitem__(self, index: tuple[int, int]) -> Any:
        return self.parts[index[0]][index[1]]

    def __getitems__(self, indices: Sequence[tuple[int, int]]) -> list[Any]:
        found: list[Any] = self.parts[indices[0][0]].__getitems__([index for _, index in indices])
        return found


def load(suite: str, folder: Path, cell: Cell, *, rank: int, world: int, batch_sizes: Sequence[int]) -> dict[str, str]:
    """What a DataLoader over all pipelines gives, joined and attached, in three epochs with workers that live on.

    Returns:
        The hash of each view and row by "pipeline/sample/view"; "two views" where one came out in two ways.
    """
    names, parts, caches = list(SUITES[suite]), [], []
    for number, (form, make) in enumerate(SUITES[suite].values()):
        cache, pictures, replay = kdcache.open(folder / str(number)), Pictures(form), make()
        given = None if replay.is_named else replay
        parts.append(kdcache.join(pictures, cache, augment=given, view_order="epoch", check="full"))
        parts.append(kdcache.with_ids(pictures, cache=cache, augment=given, view_order="epoch"))
        caches += [cache, cache]
    workers, method = cell
    batches = list(_batches(len(parts), rank=rank, world=world, batch_sizes=batch_sizes))
    loader: DataLoader[Any] = DataLoader(
        Together(parts),
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context=method,
        collate_fn=default_collate,
    )
    found: dict[str, str] = {}
    for epoch in range(EPOCHS):
        for part in parts:
            part.set_epoch(epoch)
        for wanted, batch in zip(batches, loader, strict=True):
            number = wanted[0][0]
            has_ids = isinstance(batch[-1], SampleIds)
            full = next(iter(kdcache.attach([batch], caches[number], check="full"))) if has_ids else batch
            for key, value in _hashes(names[number // 2], full):
                found[key] = value if found.get(key, value) == value else "two views"
    return found


def _batches(parts: int, *, rank: int, world: int, batch_sizes: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Batches of one part each, in an order of their own, over a rank's share of the samples."""
    share = np.random.default_rng(1).permutation(SAMPLES)[rank::world]
    for size in batch_sizes:
        for part in range(parts):
            order = np.random.default_rng(100 * size + part).permutation(share).tolist()
            for start in range(0, len(order), size):
                yield [(part, index) for index in order[start : start + size]]


def _hashes(name: str, batch: Any) -> Iterator[tuple[str, str]]:
    x, labels, teacher = batch
    dense = teacher.dense().numpy()
    for place, (sample, view) in enumerate(zip(teacher.sample_id.tolist(), teacher.view.tolist(), strict=True)):
        parts = (labels.first, labels.second, labels.ratio) if isinstance(labels, MixedLabels) else (labels,)
        yield f"{name}/{sample}/{view}", _hash(x[place], dense[place], tuple(part[place].item() for part in parts))


def _hash(value: torch.Tensor, logits: np.ndarray, labels: tuple[Any, ...]) -> str:
    text = f"{value.dtype} {tuple(value.shape)} {labels}".encode()
    return hashlib.sha256(text + value.numpy().tobytes() + logits.tobytes()).hexdigest()[:16]


def main() -> None:
    """A rank in a process of its own."""
    import multiprocessing
    import warnings

    warnings.filterwarnings("ignore", message="This DataLoader will create")
    torch.set_num_threads(1)
    multiprocessing.set_forkserver_preload(["view_jobs"])
    suite, folder, rank, world, out, cells = sys.argv[1:]
    found = {
        f"{workers} {method}": load(
            suite, Path(folder), (workers, method), rank=int(rank), world=int(world), batch_sizes=BATCH_SIZES
        )
        for workers, method in json.loads(cells)
    }
    Path(out).write_text(json.dumps(found))
