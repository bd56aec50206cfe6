"""A data set is compared with a cache without any model: replayed in all views, and differences are explained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import kdcache
from kdcache.errors import CoverageError, MismatchError, UsageError
from kdcache.stages.precompute import precompute
from kdcache.stages.verify_data import verify_data
from kdcache.stages.verify_teacher import verify_teacher
from kdcache.store.writer import Writer
from kdcache.train.pipelines import named
from kdcache.train.views import replayable


@pytest.fixture(autouse=True)
def caches(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that writes caches of views."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "train"))
    import view_caches

    return view_caches


@pytest.fixture
def images(caches: Any) -> Any:
    return caches.Images(100)


def own(x: Tensor) -> Tensor:
    """A transform of somebody's own: a random brightness."""
    return x * torch.rand(1)


def other(x: Tensor) -> Tensor:
    return x * torch.rand(1) + 1


@pytest.mark.parametrize("pipeline", [None, "shift,noise", "shift,mixup0.4", "cutmix"])
def test_the_data_of_a_cache_passes_in_all_its_views(caches: Any, images: Any, tmp_path: Path, pipeline: Any) -> None:
    replay = None if pipeline is None else named(pipeline, seed=5)
    views = (0,) if replay is None else (0, 2, 5)
    caches.write_views(tmp_path / "c", images, replay, views)
    done: list[int] = []
    report = verify_data(tmp_path / "c", images, progress=done.append)
    assert report.ok
    assert (report.samples, report.views, report.rows) == (64, views, 64 * len(views))
    assert (report.labels_differ, report.inputs_differ, report.problem) == (0, 0, None)
    assert sum(done) == report.rows
    report.raise_on_error()
    assert report.to_json()["views"] == list(views)


def test_another_transform_fails_and_is_explained(caches: Any, images: Any, tmp_path: Path) -> None:
    caches.write_views(tmp_path / "c", images, named("shift,noise"))
    report = verify_data(tmp_path / "c", TensorDataset(images.inputs * 2, torch.tensor(images.labels)), sample=20)
    assert (report.rows, report.inputs_differ, report.labels_differ, report.cause) == (80, 80, 0, "transform")
    with pytest.raises(
        MismatchError, match=r"in view 0 .*transform\. 80 of the 80 .*pipeline 'shift2,noise0.1' with seed 0"
    ):
        report.raise_on_error()


def test_one_sample_of_another_content_fails_in_each_view(caches: Any, images: Any, tmp_path: Path) -> None:
    caches.write_views(tmp_path / "c", images, named("shift"), (0, 1))
    images.inputs[99] = 0.5
    report = verify_data(tmp_path / "c", images, sample=100)
    assert (report.inputs_differ, report.cause) == (2, "sample content")
    assert "since the dump (99)" in str(report.problem)


def test_another_order_is_explained_and_labels_are_counted(caches: Any, images: Any, tmp_path: Path) -> None:
    caches.write_views(tmp_path / "c", images, None, (0,))
    order = [*range(1, 100), 0]
    shifted = TensorDataset(images.inputs[order], torch.tensor(images.labels)[order])
    report = verify_data(tmp_path / "c", shifted, sample=100)
    assert (report.labels_differ, report.inputs_differ, report.cause) == (100, 100, "order")
    assert "100 of the 100 labels are not those of c (sample 0 has 1, and 0 in the cache)" in str(report.problem)


def test_corrected_labels_alone_fail(caches: Any, images: Any, tmp_path: Path) -> None:
    caches.write_views(tmp_path / "c", images, named("shift"), (0, 1))
    images.labels[7] = 4
    report = verify_data(tmp_path / "c", images, sample=100)
    assert (report.labels_differ, report.inputs_differ, report.cause) == (2, 0, None)
    with pytest.raises(MismatchError, match=r"sample 7 has 4, and 2 in the cache\): labels were corrected"):
        report.raise_on_error()


def test_corrected_labels_of_partners_fail(caches: Any, images: Any, tmp_path: Path) -> None:
    caches.write_views(tmp_path / "c", images, named("mixup1"), (0,))
    images.labels = [(label + 1) % 5 if n >= 64 else label for n, label in enumerate(images.labels)]
    report = verify_data(tmp_path / "c", images, sample=100)
    assert report.labels_differ is not None
    assert report.labels_differ > 36  # those that changed, and those that are mixed with them


def test_a_pipeline_that_is_code_has_to_be_given(caches: Any, images: Any, tmp_path: Path) -> None:
    caches.write_views(tmp_path / "c", images, replayable(own, seed=3), (0, 1))
    with pytest.raises(UsageError, match="--augment module:factory"):
        verify_data(tmp_path / "c", images)
    assert verify_data(tmp_path / "c", images, augment=own).ok
    with pytest.raises(MismatchError, match="was dumped with the pipeline"):
        verify_data(tmp_path / "c", images, augment=other)


def test_data_that_lack_samples_or_partners_are_refused(caches: Any, images: Any, tmp_path: Path) -> None:
    caches.write_views(tmp_path / "c", images, named("shift"), (0, 1))
    with pytest.raises(MismatchError, match="lacks 64 of the 64 samples"):
        verify_data(tmp_path / "c", images, sample_ids=np.arange(100) + 1000)
    caches.write_views(tmp_path / "mixed", images, named("cutmix"), (0,))
    with pytest.raises((CoverageError, MismatchError), match="lacks"):
        verify_data(tmp_path / "mixed", caches.Images(60))
    with pytest.raises(UsageError, match="--sample"):
        verify_data(tmp_path / "c", images, sample=0)


def test_a_cache_without_digests_has_its_labels_compared(caches: Any, images: Any, tmp_path: Path) -> None:
    caches.write_views(tmp_path / "c", images, None, (0,), digests=False)
    report = verify_data(tmp_path / "c", images)
    assert (report.ok, report.labels_differ, report.inputs_differ) == (True, 0, None)
    assert report.note == "inputs are not compared: the cache holds no input digests"
    with Writer(tmp_path / "bare", classes=5) as writer:
        writer.write(np.arange(100), np.zeros((100, 5), np.float32))
    with pytest.raises(UsageError, match="holds no labels, and inputs cannot be compared"):
        verify_data(tmp_path / "bare", images)


def test_a_dump_of_images_is_compared(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    rng = np.random.default_rng(0)
    for name in ("cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "pictures" / name)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    spec = f"folder:{tmp_path / 'pictures'}"
    precompute(teacher, None, tmp_path / "c", data=spec, device="cpu", quiet=True)
    decoder = kdcache.open(tmp_path / "c").provenance["data"]["decoder"]
    assert decoder["pillow"] == __import__("PIL").__version__
    assert verify_data(tmp_path / "c", spec).ok
    image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "pictures" / "dog" / "3.png")
    report = verify_data(tmp_path / "c", spec)
    assert (report.inputs_differ, report.cause) == (1, "sample content")
    assert "'dog/3.png'" in str(report.problem)


class ByDigest(nn.Module):
    """The teacher of `write_views`: logits from the digests of what it sees; `blind` to all views but the first."""

    def __init__(self, caches: Any, known: Any = None) -> None:
        super().__init__()
        self.logits_of = caches.logits_of
        self.known = known

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.from_numpy(np.stack([self.logits_of(value) for value in x]))
        if self.known is None:
            return logits
        return torch.where(torch.tensor([[value.sum().item() in self.known] for value in x]), logits, -logits)


def test_the_teacher_is_run_on_all_views(caches: Any, images: Any, tmp_path: Path) -> None:
    replay = named("shift,noise")
    caches.write_views(tmp_path / "c", images, replay, (0, 1))
    report = verify_teacher(tmp_path / "c", ByDigest(caches), images, sample=20)
    assert (report.ok, report.rows, report.inputs_differ, report.labels_differ) == (True, 40, 0, 0)
    first = {replay(images[n][0], n, 0).sum().item() for n in range(100)}
    assert not verify_teacher(tmp_path / "c", ByDigest(caches, first), images, sample=20).ok


def test_the_teacher_of_a_pipeline_that_is_code_is_run_with_it(caches: Any, images: Any, tmp_path: Path) -> None:
    caches.write_views(tmp_path / "c", images, replayable(own, seed=3), (0, 1))
    with pytest.raises(UsageError, match="--augment"):
        verify_teacher(tmp_path / "c", ByDigest(caches), images)
    assert verify_teacher(tmp_path / "c", ByDigest(caches), images, augment=own).ok
