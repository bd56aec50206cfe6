"""Runs that drop, weigh or mend rows where teacher and label conflict: the weights of a loop, and counted rows."""

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
from torch import Tensor

from kdcache.errors import DataError, UsageError
from kdcache.stages.distill import distill
from kdcache.stages.distill_options import resolve
from kdcache.store.writer import Writer
from kdcache.train.losses import kd_loss

sys.path.insert(0, str(Path(__file__).parent))
from test_distill_losses import OPTIONS, by_hand, child_options, make_student, one_thread, ran  # noqa: F401
from test_distill_processes import TORCHRUN, close_runs, run_child, same_run


def conflict(toy: Any) -> Tensor:
    found: Tensor = (toy.teacher_logits.argmax(dim=1) != toy.labels) & (toy.labels >= 0)
    return found


def label_probability(toy: Any) -> Tensor:
    return torch.softmax(toy.teacher_logits, dim=1).gather(1, toy.labels[:, None])[:, 0]


@pytest.mark.parametrize("policy", ["drop", "downweight", "trust-teacher"])
@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_a_policy_is_that_of_a_loop_with_weights(toy: Any, policy: str, alpha: float) -> None:
    weights = {
        "drop": torch.where(conflict(toy), 0.0, 1.0),
        "downweight": torch.where(conflict(toy), label_probability(toy), 1.0),
        "trust-teacher": torch.ones(len(toy.labels)),
    }[policy]
    labels = torch.where(conflict(toy), -1, toy.labels) if policy == "trust-teacher" else toy.labels

    def loss(v: Tensor, rows: Tensor, _: float) -> Tensor:
        z = toy.teacher_logits[rows]
        return kd_loss(v, z, labels[rows], alpha=alpha, temperature=4.0, sample_weight=weights[rows])

    assert 20 < conflict(toy).sum() < 90
    found = ran(toy, alpha=alpha, disagreement=policy)
    assert torch.allclose(found, by_hand(toy, loss), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found, ran(toy, alpha=alpha), rtol=1e-4, atol=1e-6)


def test_weights_that_sum_to_less_than_one_still_give_a_mean(toy: Any) -> None:
    # Steps of one row: each has its row's weight alone, so that weights cancel, however small.
    options = replace(OPTIONS, batch_size=1, steps=30, epochs=None, alpha=0.6)
    given = {"student": make_student, "data": toy.data, "cache": toy.cache}
    plain = distill(options, **{**given, "student": make_student()})
    weighed = distill(replace(options, disagreement="downweight"), **{**given, "student": make_student()})
    for mine, theirs in zip(weighed.student.parameters(), plain.student.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_rows_that_the_teacher_is_not_sure_of(toy: Any) -> None:
    sure = torch.softmax(toy.teacher_logits, dim=1).amax(dim=1) >= 0.8

    def loss(v: Tensor, rows: Tensor, _: float) -> Tensor:
        z, labels = toy.teacher_logits[rows], toy.labels[rows]
        both = kd_loss(v, z, labels, alpha=0.6, temperature=4.0, reduction="none")
        hard = kd_loss(v, None, labels, alpha=0.0, temperature=1.0, reduction="none")
        return torch.where(sure[rows], both, hard).mean()

    found = ran(toy, alpha=0.6, confidence_below=0.8, confidence_policy="trust-label")
    assert torch.allclose(found, by_hand(toy, loss), rtol=1e-4, atol=1e-6)


def test_the_record_counts_the_rows_of_every_epoch(
    toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = replace(
        OPTIONS,
        disagreement="drop",
        threshold=0.3,
        confidence_below=0.6,
        log_steps=5,  # 7 steps an epoch: lines do not end with it
        out=str(tmp_path / "run"),
        quiet=False,
    )
    result = distill(options, student=make_student(), data=toy.data, val=toy.data, cache=toy.cache)
    unsure = torch.softmax(toy.teacher_logits, dim=1).amax(dim=1) < 0.6
    disagree = conflict(toy) & (label_probability(toy) < 0.3) & ~unsure
    count = {"disagree": int(disagree.sum()), "unconfident": int(unsure.sum())}
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["policies"] == {
        "disagreement": "drop",
        "threshold": 0.3,
        "confidence_below": 0.6,
        "confidence_policy": "drop",
        "epochs": [count, count],
    }
    assert min(count.values()) > 3
    assert result.last["val_accuracy"] > 0  # over all rows: held-out data are not filtered
    shown = capsys.readouterr().err
    assert "rows whose label the teacher contradicts with p(label) < 0.3: drop" in shown
    assert "rows that the teacher is less than 0.6 sure of: drop" in shown


def test_held_out_rows_are_measured_as_they_are(toy: Any) -> None:
    kept, dropped = (
        distill(
            replace(OPTIONS, steps=1, epochs=None, lr=1e-12, disagreement=policy),
            student=make_student(),
            data=toy.data,
            cache=toy.cache,
            val=toy.data,
            val_cache=toy.cache,
        )
        for policy in ("keep", "drop")
    )
    assert dropped.last["val_loss"] == pytest.approx(kept.last["val_loss"], rel=1e-6)


def test_a_run_without_policies_says_nothing_of_them(toy: Any) -> None:
    result = distill(OPTIONS, student=make_student(), data=toy.data, cache=toy.cache)
    assert "policies" not in result.record


@pytest.fixture
def policies(tmp_path: Path) -> Any:
    options = replace(child_options(tmp_path), loss=(), alpha_schedule="constant", temperature_schedule="constant")
    return replace(options, disagreement="downweight", confidence_below=0.6, confidence_policy="downweight")


def test_a_resumed_run_has_the_same_weights_and_the_same_counts(policies: Any, tmp_path: Path) -> None:
    assert run_child(policies, KILL_AT_ITEM="160", KILL_SIGNAL="SIGTERM") == 75
    resumed = distill(replace(policies, resume=True))
    whole = distill(replace(policies, out=str(tmp_path / "uninterrupted")))
    same_run(resumed, whole)
    assert resumed.record["policies"] == whole.record["policies"]
    assert len(whole.record["policies"]["epochs"]) == 3


def test_two_ranks_and_two_pieces_give_the_losses_and_counts_of_one(policies: Any, tmp_path: Path) -> None:
    split = replace(policies, grad_accumulation=2)
    assert run_child(split, TORCHRUN) == 0
    alone = distill(replace(policies, out=str(tmp_path / "alone")))
    close_runs(split.out, alone)
    record = json.loads((Path(str(split.out)) / "run.json").read_text())
    assert record["policies"] == alone.record["policies"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"disagreement": "ignore"}, "--disagreement 'ignore' is not known"),
        ({"disagreement": "drop", "threshold": 0.0}, "--threshold must be above 0"),
        ({"threshold": 0.5}, "give --disagreement"),
        ({"confidence_below": 1.5}, "--confidence-below must be above 0"),
        ({"confidence_policy": "drop"}, "without --confidence-below"),
        ({"confidence_below": 0.5, "confidence_policy": "keep"}, "--confidence-policy 'keep' is not known"),
        ({"disagreement": "drop", "hard_targets": True}, "leave out --disagreement"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_loaded(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(replace(OPTIONS, **changed))


def test_policies_need_a_cache(toy: Any) -> None:
    for changed, name in (({"disagreement": "drop"}, "--disagreement"), ({"confidence_below": 0.5}, "--confidence")):
        with pytest.raises(UsageError, match=f"{name}.*give --cache"):
            distill(replace(OPTIONS, alpha=0.0, **changed), student=make_student(), data=toy.data)


def test_what_a_cache_cannot_tell_is_refused_before_the_first_step(toy: Any, tmp_path: Path) -> None:
    with Writer(tmp_path / "sparse", classes=4, top_k=2) as writer:
        writer.write(np.arange(len(toy.labels)), toy.teacher_logits.numpy())
    given = {"student": make_student(), "data": toy.data, "cache": tmp_path / "sparse"}
    with pytest.raises(UsageError, match="the dump saw no label of each row"):
        distill(replace(OPTIONS, disagreement="downweight"), **given)
    assert distill(replace(OPTIONS, disagreement="drop"), **given).record["policies"]["epochs"][1]["disagree"] > 20


def test_mixed_views_have_no_label_to_contradict(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
    from view_caches import Images, write_views

    from kdcache.train.pipelines import named

    images = Images(40)
    cache = write_views(tmp_path / "views", images, named("mixup1"), (0, 1))
    options = replace(OPTIONS, student="mlp:64-8-5")
    with pytest.raises(UsageError, match="the views of views are mixed"):
        distill(replace(options, disagreement="drop"), data=images, cache=cache)
    unsure = distill(replace(options, confidence_below=1.0, confidence_policy="downweight"), data=images, cache=cache)
    assert unsure.record["policies"]["epochs"][0]["disagree"] == 0


def test_a_run_of_which_nothing_is_left_is_an_error(toy: Any, make_toy: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="that --disagreement and --confidence-below let count"):
        distill(replace(OPTIONS, confidence_below=1.0), student=make_student(), data=toy.data, cache=toy.cache)


def test_top_k_rows_serve_policies(toy: Any, tmp_path: Path) -> None:
    with Writer(tmp_path / "sparse", classes=4, top_k=2, temperatures=(1.0, 4.0)) as writer:
        writer.write(np.arange(len(toy.labels)), toy.teacher_logits.numpy(), toy.labels.numpy())
    options = replace(OPTIONS, disagreement="downweight", confidence_below=0.6)
    dense, sparse = (
        distill(options, student=make_student(), data=toy.data, cache=cache).record["policies"]
        for cache in (toy.cache, tmp_path / "sparse")
    )
    assert dense == sparse
