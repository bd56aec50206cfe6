"""What a run refuses, before it starts where possible: each with its error, and with what to do."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from kdcache.errors import (
    CoverageError,
    DataError,
    KDCacheError,
    MismatchError,
    MissingExtraError,
    StorageError,
    UsageError,
)
from kdcache.stages.distill import distill
from kdcache.stages.distill_options import DistillOptions
from kdcache.store.cache import open as open_cache
from kdcache.store.writer import Writer

OPTIONS = DistillOptions(student="mlp:6-8-4", epochs=1, batch_size=16, device="cpu", quiet=True)


def test_a_student_of_another_width_than_the_cache(toy: Any) -> None:
    with pytest.raises(MismatchError, match=r"3 classes, the teacher of teacher0 has 4"):
        distill(OPTIONS, student=nn.Linear(6, 3), data=toy.data, cache=toy.cache)


def test_data_of_other_classes_than_the_teacher_has(toy: Any) -> None:
    """Another width of the student would only move the refusal into the run."""
    data = TensorDataset(toy.inputs, torch.full((len(toy.inputs),), -1))
    data.num_classes = 7  # type: ignore[attr-defined]
    for student in ("mlp:6-8-4", "mlp:6-8-7"):
        with pytest.raises(
            MismatchError, match=r"data has 7 classes, the teacher of teacher0 has 4: .*--classes MAP.json"
        ):
            distill(replace(OPTIONS, student=student), data=data, cache=toy.cache)
    data.num_classes = 2  # type: ignore[attr-defined]
    with pytest.raises(MismatchError, match=r"mlp:6-8-2 has 2 classes, the training data has 2 .* has 4: say which"):
        distill(replace(OPTIONS, student="mlp:6-8-2"), data=data, cache=toy.cache)
    with pytest.raises(MismatchError, match=r"the student has 2 classes, the training data has 2 .* has 4: say which"):
        distill(OPTIONS, student=nn.Linear(6, 2), data=data, cache=toy.cache)


def test_a_folder_that_the_run_reads_from_is_not_replaced(toy: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    version = out / "teacher" / "v000001"
    with open_cache(toy.cache) as cache, Writer(version, classes=4) as writer:
        rows = cache.gather(np.arange(len(cache)))
        writer.write(rows.sample_id, rows.dense(), rows.label)
    (out / "run.json").write_text("{}")
    torch.save({}, out / "best.pt")
    for changed, message in (
        ({"cache": str(version), "overwrite": True}, "--cache v000001 lies in --out"),
        ({"cache": str(version), "resume": True}, "--cache v000001 lies in --out"),
        ({"cache": str(toy.cache), "init": str(out / "best.pt"), "overwrite": True}, "--init best.pt lies in --out"),
    ):
        options = replace(OPTIONS, out=str(out), **changed)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=message):
            distill(options, data=toy.data)
    assert open_cache(version).num_classes == 4


def test_a_cache_with_another_root_hash(toy: Any) -> None:
    root = open_cache(toy.cache).root
    assert distill(replace(OPTIONS, expect_root=root), data=toy.data, cache=toy.cache).steps
    other = replace(OPTIONS, expect_root=root[::-1])
    for cache in (toy.cache, open_cache(toy.cache)):
        with pytest.raises(MismatchError, match=rf"has the root hash {root}, expected {root[::-1]}"):
            distill(other, data=toy.data, cache=cache)
    with pytest.raises(UsageError, match=r"--expect-root '' is no root hash"):
        distill(replace(OPTIONS, expect_root=""), data=toy.data, cache=toy.cache)
    with pytest.raises(UsageError, match="--expect-root without --cache"):
        distill(replace(other, alpha=0.0), data=toy.data)


def test_a_teacher_without_its_cache(toy: Any) -> None:
    with pytest.raises(UsageError, match=r"--alpha 0\.9 needs the teacher's logits; give --cache"):
        distill(OPTIONS, data=toy.data)
    with pytest.raises(UsageError, match="--hard-targets needs"):
        distill(replace(OPTIONS, alpha=0.0, hard_targets=True), data=toy.data)


def test_data_with_neither_labels_nor_a_teacher(toy: Any) -> None:
    with pytest.raises(UsageError, match="nothing to learn from"):
        distill(replace(OPTIONS, alpha=0.0), student=nn.Linear(6, 4), data=TensorDataset(toy.inputs))
    unlabelled = TensorDataset(toy.inputs, torch.full((len(toy.inputs),), -1))
    with pytest.raises(DataError, match="no row of a whole epoch had a label or a teacher"):
        distill(replace(OPTIONS, alpha=0.0), student=nn.Linear(6, 4), data=unlabelled)


def test_a_batch_without_any_label_is_no_error(make_toy: Any) -> None:
    toy = make_toy(unlabelled=slice(1, 100))
    result = distill(replace(OPTIONS, alpha=0.0, epochs=2), student=nn.Linear(6, 4), data=toy.data)
    assert np.isfinite(result.last["loss"])


def test_a_one_class_teacher(make_toy: Any) -> None:
    toy = make_toy(classes=1)
    with pytest.raises(UsageError, match="one class"):
        distill(OPTIONS, student=nn.Linear(6, 1), data=toy.data, cache=toy.cache)


def test_samples_that_the_cache_lacks(make_toy: Any) -> None:
    toy = make_toy(covered=90)
    with pytest.raises(CoverageError, match="does not hold 10 of the 100"):
        distill(OPTIONS, data=toy.data, cache=toy.cache)
    with pytest.raises(CoverageError):
        distill(replace(OPTIONS, alpha=0.0), data=toy.data, val=toy.data, val_cache=toy.cache)


def test_validation_that_can_measure_nothing(toy: Any, make_toy: Any) -> None:
    with pytest.raises(UsageError, match="give --val-cache"):
        distill(OPTIONS, data=toy.data, cache=toy.cache, val=TensorDataset(toy.inputs))
    with pytest.raises(UsageError, match="--val-cache without --val"):
        distill(OPTIONS, data=toy.data, cache=toy.cache, val_cache=toy.cache)
    with pytest.raises(MismatchError, match=r"\(--val-cache\) has 5"):
        distill(OPTIONS, data=toy.data, cache=toy.cache, val=toy.data, val_cache=make_toy(classes=5).cache)


def test_nothing_left_after_skipping(toy: Any, tmp_path: Path) -> None:
    with Writer(tmp_path / "elsewhere", classes=4) as writer:
        writer.write(np.arange(1000, 1010), np.zeros((10, 4), np.float32))
    with pytest.raises(DataError, match="none of the 100 samples"):
        distill(replace(OPTIONS, missing="skip"), data=toy.data, cache=tmp_path / "elsewhere")


def test_labels_that_disagree_with_the_cache(toy: Any) -> None:
    shifted = TensorDataset(toy.inputs, (toy.labels + 1) % 4)
    with pytest.raises(MismatchError, match="label"):
        distill(OPTIONS, data=shifted, cache=toy.cache)


@pytest.mark.parametrize("bad", [4, -100])
def test_labels_out_of_range(toy: Any, bad: int) -> None:
    toy.labels[50] = bad
    with pytest.raises(DataError, match=str(bad)):
        distill(replace(OPTIONS, alpha=0.0), data=toy.data)


def test_labels_that_are_not_integers(toy: Any) -> None:
    with pytest.raises(DataError, match="labels must be integers"):
        distill(replace(OPTIONS, alpha=0.0), data=TensorDataset(toy.inputs, toy.labels.float()))


def test_data_without_a_length_or_without_rows(toy: Any) -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            return iter(toy.inputs)

    with pytest.raises(DataError):
        distill(OPTIONS, data=Stream(), cache=toy.cache)
    with pytest.raises(DataError, match="no rows"):
        distill(OPTIONS, data=TensorDataset(toy.inputs[:0], toy.labels[:0]), cache=toy.cache)


def test_a_wrapper_whose_index_may_not_be_the_id(toy: Any) -> None:
    class Wrapper(Dataset[Any]):
        def __init__(self, dataset: Any) -> None:
            self.dataset = dataset

        def __len__(self) -> int:
            return len(self.dataset)

        def __getitem__(self, index: int) -> Any:
            return self.dataset[index]

    with pytest.raises(DataError, match="sample_ids"):
        distill(OPTIONS, data=Wrapper(toy.data), cache=toy.cache)


def test_a_run_that_diverges_names_the_step_and_keeps_no_such_checkpoint(toy: Any, tmp_path: Path) -> None:
    class Diverging(nn.Linear):
        calls = 0

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += self.training
            return super().forward(inputs) * (float("nan") if self.calls == 4 else 1.0)

    options = replace(OPTIONS, out=str(tmp_path / "run"), checkpoint_steps=2, log_steps=6)
    with pytest.raises(KDCacheError, match=r"not finite at step 4: training diverged\. Try a lower --lr"):
        distill(options, student=Diverging(6, 4), data=toy.data, cache=toy.cache)
    assert torch.load(tmp_path / "run" / "resume.pt", weights_only=True)["step"] == 2


def test_no_student_and_no_data(toy: Any) -> None:
    with pytest.raises(UsageError, match="give --student"):
        distill(replace(OPTIONS, student=None), data=toy.data, cache=toy.cache)
    with pytest.raises(UsageError, match="give --data"):
        distill(OPTIONS, cache=toy.cache)


def test_a_student_whose_output_is_no_logits(toy: Any) -> None:
    class Flat(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs).sum(dim=1)

    with pytest.raises(UsageError, match=r"shape \(1,\); expected logits"):
        distill(OPTIONS, student=Flat(6, 4), data=toy.data, cache=toy.cache)


def test_a_folder_that_is_taken(toy: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        distill(replace(OPTIONS, out=str(tmp_path / "file")), data=toy.data, cache=toy.cache)
    options = replace(OPTIONS, out=str(tmp_path / "run"))
    distill(options, data=toy.data, cache=toy.cache)
    with pytest.raises(UsageError, match=r"holds a run .* --resume, replace it with --overwrite"):
        distill(options, data=toy.data, cache=toy.cache)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    distill(replace(options, overwrite=True), data=toy.data, cache=toy.cache)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_made(toy: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose another folder"):
        distill(replace(OPTIONS, out=str(tmp_path / "file" / "run")), data=toy.data, cache=toy.cache)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there(toy: Any, device: str) -> None:
    with pytest.raises(UsageError, match="device"):
        distill(replace(OPTIONS, device=device), data=toy.data, cache=toy.cache)


def test_tensorboard_without_its_package(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    options = replace(OPTIONS, out=str(tmp_path / "run"), tensorboard=True)
    with pytest.raises(MissingExtraError, match=r'pip install "kdcache\[tensorboard\]"'):
        distill(options, data=toy.data, cache=toy.cache)


def test_a_frozen_student(toy: Any) -> None:
    with pytest.raises(UsageError, match="no trainable parameter"):
        distill(OPTIONS, student=nn.Linear(6, 4).requires_grad_(False), data=toy.data, cache=toy.cache)
