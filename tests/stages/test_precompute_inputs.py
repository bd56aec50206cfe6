"""What a dump is made from: forms of items and outputs, precisions, ids, threads, memory, and what it would cost."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

import kdcache
from kdcache.format.identity import input_digest
from kdcache.stages.dry_run import DryRun
from kdcache.stages.precompute import PrecomputeResult, precompute
from kdcache.store.rows import TeacherRows

ROWS, WIDTH, CLASSES = 30, 5, 3
INPUTS = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(ROWS) % CLASSES


class Linear(nn.Module):
    """A fixed linear teacher whose output is wrapped as `form` says."""

    def __init__(self, form: Any = None, classes: int = CLASSES) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, WIDTH * classes).reshape(WIDTH, classes))
        self.form = form or (lambda logits: logits)

    def forward(self, x: Tensor) -> Any:
        return self.form(x @ self.weight)


class Items(Dataset[Any]):
    """Items made by a function of the index."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def dump(out: Path, model: nn.Module, dataset: Any, **settings: Any) -> TeacherRows:
    """All rows of a dump in the order of its data."""
    settings = {"device": "cpu", "quiet": True, "batch_size": 7, "shard_rows": 16, "dtype": "float32", **settings}
    result = precompute(model, dataset, out, **settings)
    assert isinstance(result, PrecomputeResult)
    with kdcache.open(out) as cache:
        return cache.gather(np.arange(len(cache)))


def expected(inputs: Tensor = INPUTS) -> np.ndarray:
    with torch.no_grad():
        return Linear()(inputs).numpy()


@pytest.mark.parametrize(
    ("make", "labelled"),
    [
        (lambda i: (INPUTS[i], int(LABELS[i])), True),
        (lambda i: [INPUTS[i], LABELS[i]], True),
        (lambda i: {"x": INPUTS[i], "label": int(LABELS[i]), "name": f"item {i}"}, True),
        (lambda i: {"labels": LABELS[i], "x": INPUTS[i]}, True),
        (lambda i: (INPUTS[i].numpy(), np.int64(LABELS[i]), "more"), True),
        (lambda i: INPUTS[i], False),
        (lambda i: (INPUTS[i],), False),
        (lambda i: (INPUTS[i], None), False),
    ],
)
def test_items_may_be_tuples_dicts_or_bare_inputs(tmp_path: Path, make: Any, labelled: bool) -> None:
    rows = dump(tmp_path / "teacher", Linear(), Items(make))
    np.testing.assert_allclose(rows.dense(), expected(), atol=1e-6)
    assert (rows.label is not None) == labelled
    if rows.label is not None:
        assert (rows.label == LABELS.numpy()).all()
    assert rows.input_digest is not None
    assert rows.input_digest[3] == input_digest(INPUTS[3])


@pytest.mark.parametrize(
    ("form", "key"),
    [
        (lambda logits: SimpleNamespace(logits=logits), None),
        (lambda logits: {"scores": logits, "hidden": 0}, "scores"),
        (lambda logits: (0, logits), "1"),
    ],
)
def test_outputs_are_tensors_have_logits_or_are_picked(tmp_path: Path, form: Any, key: str | None) -> None:
    rows = dump(tmp_path / "teacher", Linear(form), TensorDataset(INPUTS, LABELS), output_key=key)
    np.testing.assert_allclose(rows.dense(), expected(), atol=1e-6)


def test_float16_keeps_the_raw_logits_to_three_digits(tmp_path: Path) -> None:
    rows = dump(tmp_path / "teacher", Linear(), TensorDataset(INPUTS * 100, LABELS), dtype="float16")
    np.testing.assert_allclose(rows.dense(), expected(INPUTS * 100), rtol=1e-3, atol=0.3)
    assert (rows.dense().argmax(1) == expected().argmax(1)).all()


def test_bfloat16_autocast_runs_on_a_cpu(tmp_path: Path) -> None:
    rows = dump(tmp_path / "teacher", Linear(), TensorDataset(INPUTS, LABELS), amp="bf16")
    assert not np.array_equal(rows.dense(), expected())
    np.testing.assert_allclose(rows.dense(), expected(), atol=0.05)
    assert kdcache.open(tmp_path / "teacher").provenance["precision"]["amp"] == "bf16"


def test_the_teachers_transform_changes_its_inputs_and_not_the_digests(tmp_path: Path) -> None:
    rows = dump(tmp_path / "teacher", Linear(), TensorDataset(INPUTS, LABELS), transform=lambda x: x + 1)
    np.testing.assert_allclose(rows.dense(), expected(INPUTS + 1), atol=1e-6)
    assert rows.input_digest is not None
    assert rows.input_digest[0] == input_digest(INPUTS[0])


def test_limit_takes_the_first_samples(tmp_path: Path) -> None:
    rows = dump(tmp_path / "teacher", Linear(), TensorDataset(INPUTS, LABELS), limit=11)
    assert rows.sample_id.tolist() == list(range(11))


def test_ids_are_those_of_the_data_never_the_index_in_a_subset(tmp_path: Path) -> None:
    subset = Subset(TensorDataset(INPUTS, LABELS), [20, 3, 11])
    assert dump(tmp_path / "subset", Linear(), subset).sample_id.tolist() == [20, 3, 11]
    named = [f"photo/{n}.jpg" for n in range(ROWS)]
    rows = dump(tmp_path / "named", Linear(), TensorDataset(INPUTS, LABELS), sample_ids=named)
    assert rows.sample_id.tolist() == [name.encode() for name in named]
    keyed = Items(lambda i: {"x": INPUTS[i], "key": i * 10})
    assert dump(tmp_path / "keyed", Linear(), keyed, id_key="key").sample_id.tolist() == list(range(0, 300, 10))


def test_a_label_of_minus_one_is_no_label(tmp_path: Path) -> None:
    labels = torch.where(LABELS == 0, -1, LABELS)
    rows = dump(tmp_path / "teacher", Linear(), TensorDataset(INPUTS, labels))
    assert rows.label is not None
    assert (rows.label == labels.numpy()).all()


@pytest.mark.parametrize("labels", [LABELS % 2, None])
def test_a_teacher_with_one_logit_is_stored_with_its_two_labels(tmp_path: Path, labels: Tensor | None) -> None:
    data = TensorDataset(INPUTS) if labels is None else TensorDataset(INPUTS, labels)
    rows = dump(tmp_path / "teacher", Linear(classes=1), data, dtype="float16")
    assert rows.num_classes == 1
    np.testing.assert_allclose(rows.dense()[:, 0], Linear(classes=1)(INPUTS).detach().numpy()[:, 0], atol=1e-6)
    assert kdcache.verify(tmp_path / "teacher").ok


def test_dense_prediction_keeps_its_positions(tmp_path: Path) -> None:
    class PerPixel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x, x * 2, -x], dim=1)

    maps = Items(lambda i: (INPUTS[i], torch.zeros(WIDTH, dtype=torch.int64)))
    rows = dump(tmp_path / "teacher", PerPixel(), maps)
    assert rows.dense().shape == (ROWS, 3, WIDTH)
    assert rows.label is None


def test_the_model_keeps_its_modes(tmp_path: Path) -> None:
    model = nn.Sequential(Linear(), nn.Dropout(0.5).eval()).train()
    model[1].eval()
    dump(tmp_path / "teacher", model, TensorDataset(INPUTS, LABELS))
    assert [module.training for module in (model, model[0], model[1])] == [True, True, False]
    model.train()
    with pytest.raises(kdcache.KDCacheError):
        dump(tmp_path / "other", model, Items(lambda i: (INPUTS[i, : 1 + i % 2], 0)))
    assert model[1].training


def test_dropout_is_off_while_the_teacher_runs(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Dropout(0.5), Linear()).train()
    np.testing.assert_allclose(
        dump(tmp_path / "teacher", model, TensorDataset(INPUTS, LABELS)).dense(), expected(), atol=1e-6
    )


def test_an_exported_program_is_a_teacher(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(Linear().eval(), (INPUTS,), dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, tmp_path / "teacher.pt2")
    result = precompute(
        None,
        TensorDataset(INPUTS, LABELS),
        tmp_path / "teacher.h5",
        teacher=f"pt2:{tmp_path / 'teacher.pt2'}",
        dtype="float32",
        batch_size=7,
        device="cpu",
        quiet=True,
    )
    assert isinstance(result, PrecomputeResult)
    with kdcache.open(result.path) as cache:
        np.testing.assert_allclose(cache.gather(np.arange(ROWS)).dense(), expected(), atol=1e-6)
        assert cache.provenance["teacher"]["spec"] == "pt2:teacher.pt2"


@pytest.mark.parametrize("workers", [0, 2])
def test_items_are_computed_by_one_thread_whoever_loads_them(tmp_path: Path, workers: int) -> None:
    """A sum over a million values differs in its last bit between one thread and two."""
    values = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = values.softmax(0).sum()
    data = Items(lambda i: (torch.full((WIDTH,), float(values.softmax(0).sum() - 1)), torch.get_num_threads()))
    try:
        rows = dump(tmp_path / "teacher", Linear(), data, threads=2, limit=4, workers=workers)
    finally:
        torch.set_num_threads(before)
    assert rows.label is not None
    assert (rows.label == 1).all()
    np.testing.assert_array_equal(rows.dense()[0], expected(torch.full((1, WIDTH), float(alone - 1)))[0])


def test_a_resumed_dump_takes_the_threads_of_its_plan(tmp_path: Path) -> None:
    data = TensorDataset(INPUTS, LABELS)
    settings = {"device": "cpu", "quiet": True, "shard_rows": 10}
    precompute(Linear(), data, tmp_path / "teacher", threads=2, shard="0/2", **settings)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as OMP_NUM_THREADS=1 under torchrun
        precompute(Linear(), data, tmp_path / "teacher", **settings)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert kdcache.open(tmp_path / "teacher").provenance["precision"]["threads"] == 2
    with pytest.raises(kdcache.MismatchError, match=r"provenance.precision.threads is 2 there and 3"):
        precompute(Linear(), data, tmp_path / "teacher", threads=3, **settings)


def test_a_dry_run_states_size_shards_disk_speed_and_when_it_pays(tmp_path: Path) -> None:
    data = TensorDataset(INPUTS, LABELS)
    found = precompute(Linear(), data, tmp_path / "teacher", dry_run=True, shard_rows=8, batch_size=4, device="cpu")
    assert isinstance(found, DryRun)
    assert not (tmp_path / "teacher").exists()
    assert (found.rows, found.shards) == (ROWS, 4)
    assert found.bytes_per_row == CLASSES * 2 + 4
    assert found.free_bytes > found.bytes
    assert found.rows_per_second > 0
    assert found.break_even_epochs >= 1  # it loads the data, too
    assert found.break_even_students >= 1
    real = precompute(Linear(), data, tmp_path / "teacher", shard_rows=8, batch_size=4, device="cpu", quiet=True)
    assert isinstance(real, PrecomputeResult)
    on_disk = sum(file.stat().st_size for file in (tmp_path / "teacher").rglob("*.h5"))
    assert real.bytes == on_disk
    assert found.bytes >= on_disk


def test_what_identifies_a_dump_is_in_its_provenance_and_no_path_is(tmp_path: Path) -> None:
    dump(tmp_path / "teacher", Linear(), TensorDataset(INPUTS, LABELS), teacher_saw="no", licence="CC0")
    text = (tmp_path / "teacher" / "manifest.json").read_text()
    provenance = kdcache.open(tmp_path / "teacher").provenance
    assert provenance["teacher"]["parameters"] == WIDTH * CLASSES
    assert len(provenance["teacher"]["state_sha256"]) == 64
    assert provenance["data"]["digest_point"] == "item"
    assert provenance["data"]["dumped"] == ROWS
    assert (provenance["teacher_seen"], provenance["licence"]) == ("no", "CC0")
    assert str(tmp_path) not in text
