"""Training on a share of the labels: which rows keep theirs, and that nothing sees the hidden ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import TensorDataset

from kdcache.errors import DataError, MismatchError, UsageError
from kdcache.stages.distill import distill
from kdcache.stages.distill_options import resolve
from kdcache.stages.label_fraction import choose_labelled, labels_of
from kdcache.train.losses import kd_loss

sys.path.insert(0, str(Path(__file__).parent))
from test_distill_losses import OPTIONS, by_hand, make_student, one_thread, ran  # noqa: F401

LABELS = st.lists(st.integers(-1, 5), min_size=1, max_size=200).map(lambda found: np.array(found, np.int64))
FRACTIONS = st.floats(0.001, 1.0)


@given(LABELS, FRACTIONS, FRACTIONS, st.integers(0, 2**63 - 1))
def test_the_choice_is_balanced_nested_and_leaves_no_class_out(
    labels: np.ndarray, one: float, other: float, seed: int
) -> None:
    small, large = sorted((one, other))
    everywhere = np.arange(len(labels))
    few, more = (choose_labelled(labels, everywhere, fraction=f, seed=seed) for f in (small, large))
    assert set(few) <= set(more)
    assert (np.diff(few) > 0).all()
    for label, count in zip(*np.unique(labels[labels >= 0], return_counts=True), strict=True):
        assert (labels[few] == label).sum() == max(1, round(small * count))
    assert (labels[more] >= 0).all()
    assert len(choose_labelled(labels, everywhere, fraction=1.0, seed=seed)) == (labels >= 0).sum()


def test_the_choice_is_the_same_for_ever_and_another_with_another_seed() -> None:
    labels = np.arange(40) % 4
    first = choose_labelled(labels, np.arange(40), fraction=0.1, seed=0)
    assert first.tolist() == choose_labelled(labels, np.arange(40), fraction=0.1, seed=0).tolist()
    assert first.tolist() == [3, 5, 10, 32]
    assert first.tolist() != choose_labelled(labels, np.arange(40), fraction=0.1, seed=1).tolist()


def chosen(toy: Any, fraction: float, seed: int = 0) -> np.ndarray:
    return choose_labelled(toy.labels.numpy(), np.arange(len(toy.labels)), fraction=fraction, seed=seed)


def test_the_other_rows_learn_from_the_teacher_alone_as_in_a_loop(toy: Any) -> None:
    labels = torch.full_like(toy.labels, -1)
    labels[chosen(toy, 0.3, 5)] = toy.labels[chosen(toy, 0.3, 5)]

    def loss(v: Tensor, rows: Tensor, _: float) -> Tensor:
        return kd_loss(v, toy.teacher_logits[rows], labels[rows], alpha=0.6, temperature=4.0)

    found = ran(toy, alpha=0.6, label_fraction=0.3, label_seed=5)
    assert torch.allclose(found, by_hand(toy, loss), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found, ran(toy, alpha=0.6), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_dropped_rows_are_as_good_as_absent(toy: Any, tmp_path: Path, alpha: float) -> None:
    rows = chosen(toy, 0.3)
    asked = replace(OPTIONS, epochs=None, steps=9, alpha=alpha, out=str(tmp_path / "run"))
    given_data = {"data": toy.data, "cache": toy.cache}
    options = replace(asked, label_fraction=0.3, unlabelled="drop")
    result = distill(options, student=make_student(), **given_data)
    few = TensorDataset(toy.inputs[rows], toy.labels[rows])
    few.sample_ids = rows  # type: ignore[attr-defined]
    alone = distill(replace(asked, out=None), student=make_student(), data=few, cache=toy.cache)
    for mine, theirs in zip(result.student.parameters(), alone.student.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["labels"] == {
        "fraction": 0.3,
        "seed": 0,
        "unlabelled": "drop",
        "labelled_rows": len(rows),
        "other_rows": 0,
    }
    assert record["data"]["rows"] == len(rows)


def test_without_a_teacher_that_counts_the_other_rows_are_dropped(toy: Any) -> None:
    for changed, mode in (({"alpha": 0.6}, "keep"), ({"alpha": 0.0}, "drop"), ({"hard_targets": True}, "keep")):
        options = replace(OPTIONS, label_fraction=0.5, **changed)
        result = distill(options, student=make_student(), data=toy.data, cache=toy.cache)
        assert result.record["labels"]["unlabelled"] == mode
    alone = distill(replace(OPTIONS, label_fraction=0.5, alpha=0.0), student=make_student(), data=toy.data)
    assert alone.record["labels"]["unlabelled"] == "drop"


@pytest.mark.parametrize("policy", ["drop", "downweight", "trust-teacher"])
def test_no_policy_sees_a_hidden_label(toy: Any, tmp_path: Path, policy: str) -> None:
    wrong = toy.labels.clone()
    hidden = np.setdiff1d(np.arange(len(wrong)), chosen(toy, 0.3))
    wrong[hidden] = (wrong[hidden] + 1) % 4
    # Other labels where they are hidden, in data and cache: nothing may change.
    from kdcache.store.writer import Writer

    with Writer(tmp_path / "other", classes=4, dtype="float32") as writer:
        writer.write(np.arange(len(wrong)), toy.teacher_logits.numpy(), wrong.numpy())
    same = chosen(toy, 0.3).tolist()
    assert (wrong[same] == toy.labels[same]).all()
    options = replace(OPTIONS, alpha=0.6, label_fraction=0.3, disagreement=policy)
    first = distill(options, student=make_student(), data=toy.data, cache=toy.cache)
    with pytest.MonkeyPatch.context() as patch:  # the choice itself depends on the labels: keep it
        patch.setattr("kdcache.stages.label_fraction.choose_labelled", lambda *a, **k: np.array(same))
        data = TensorDataset(toy.inputs, wrong)
        second = distill(options, student=make_student(), data=data, cache=str(tmp_path / "other"))
    for mine, theirs in zip(first.student.parameters(), second.student.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert first.record["policies"] == second.record["policies"]


def test_topk_rows_teach_of_a_hidden_label_what_rows_without_it_do(toy: Any, tmp_path: Path) -> None:
    """The label's logit is kept beside the K largest; hiding the label alone would lose its probability."""
    from kdcache.store.writer import Writer

    few = torch.full_like(toy.labels, -1)
    few[chosen(toy, 0.3)] = toy.labels[chosen(toy, 0.3)]
    for name, labels in (("all", toy.labels), ("few", few)):
        with Writer(tmp_path / name, classes=4, top_k=1) as writer:
            writer.write(np.arange(len(labels)), toy.teacher_logits.numpy(), labels.numpy())
    options = replace(OPTIONS, alpha=0.6, label_fraction=0.3)
    first = distill(options, student=make_student(), data=toy.data, cache=str(tmp_path / "all"))
    second = distill(
        replace(options, label_fraction=None),
        student=make_student(),
        data=TensorDataset(toy.inputs, few),
        cache=str(tmp_path / "few"),
    )
    for mine, theirs in zip(first.student.parameters(), second.student.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_a_hidden_label_is_still_compared_with_the_cache(toy: Any) -> None:
    wrong = toy.labels.clone()
    row = int(np.setdiff1d(np.arange(len(wrong)), chosen(toy, 0.3))[0])
    wrong[row] = (wrong[row] + 1) % 4
    with pytest.raises(MismatchError, match=f"sample {row} has the label"):
        distill(
            replace(OPTIONS, label_fraction=0.3),
            student=make_student(),
            data=TensorDataset(toy.inputs, wrong),
            cache=toy.cache,
        )


def test_a_run_goes_on_with_its_own_labels_only(toy: Any, tmp_path: Path) -> None:
    options = replace(OPTIONS, label_fraction=0.3, out=str(tmp_path / "run"), resume=True)
    distill(options, student=make_student(), data=toy.data, cache=toy.cache)
    distill(options, student=make_student(), data=toy.data, cache=toy.cache)
    for changed in ({"label_fraction": 0.4}, {"label_seed": 1}, {"unlabelled": "drop", "epochs": None, "steps": 14}):
        with pytest.raises(MismatchError, match=next(iter(changed)) if len(changed) == 1 else "epochs|unlabelled"):
            distill(replace(options, **changed), student=make_student(), data=toy.data, cache=toy.cache)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label_fraction": 0.0}, "--label-fraction must be above 0"),
        ({"label_fraction": 1.5}, "--label-fraction must be above 0"),
        ({"unlabelled": "keep"}, "--label-fraction leaves"),
        ({"label_seed": 1}, "--label-fraction leaves"),
        ({"label_fraction": 0.5, "label_seed": -1}, "--label-seed"),
        ({"label_fraction": 0.5, "unlabelled": "hide"}, "choose one of keep, drop"),
    ],
)
def test_what_cannot_be_meant_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(replace(OPTIONS, **changed))


def test_data_that_have_no_such_labels_are_refused(toy: Any, make_toy: Callable[..., Any]) -> None:
    options = replace(OPTIONS, label_fraction=0.5)
    dense = TensorDataset(toy.inputs, toy.labels[:, None].repeat(1, 3))
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (toy.data, {"alpha": 0.0, "unlabelled": "keep"}, UsageError, "give --cache"),
        (TensorDataset(toy.inputs), {"cache": toy.cache}, UsageError, "has none"),
        (TensorDataset(toy.inputs, toy.labels * 0 - 1), {"cache": toy.cache}, UsageError, "none of the 100"),
        (dense, {"alpha": 0.0}, DataError, "dense"),
        (TensorDataset(toy.inputs, toy.labels.double()), {"cache": toy.cache}, DataError, "expected integers"),
    ]
    for data, changed, error, message in cases:
        cache = changed.pop("cache", None)
        with pytest.raises(error, match=message):
            distill(replace(options, **changed), student=make_student(), data=data, cache=cache)


def test_mixed_views_are_refused(tmp_path: Path) -> None:
    from kdcache.stages.data import load_data

    data = load_data("digits:teacher")
    options = replace(
        OPTIONS, label_fraction=0.5, alpha=0.0, student="mlp:64-10", augment="mixup", steps=1, epochs=None
    )
    with pytest.raises(UsageError, match="mixed"):
        distill(options, data=data)


class Column(TensorDataset):
    """Items whose labels are not those of its attribute."""

    def __init__(self, inputs: Tensor, labels: Tensor, targets: Any) -> None:
        super().__init__(inputs, labels)
        self.targets = targets


def test_a_column_of_labels_is_believed_where_items_agree(toy: Any) -> None:
    right = Column(toy.inputs, toy.labels, toy.labels.tolist())
    other = Column(toy.inputs, toy.labels, (toy.labels + 1).tolist())
    for data in (toy.data, right, other):
        found = labels_of(data, name="training")
        assert found is not None
        assert found.tolist() == toy.labels.tolist()
