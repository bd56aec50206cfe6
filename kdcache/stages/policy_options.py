"""The options of `distill` about rows that the teacher contradicts or is not sure of. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kdcache.errors import UsageError
from kdcache.train.capability import require
from kdcache.train.policy_names import RowPolicies

if TYPE_CHECKING:
    from kdcache.stages.distill_inputs import Source
    from kdcache.stages.distill_options import DistillOptions


def row_policies(options: DistillOptions) -> RowPolicies | None:
    """What the options ask for; None where every row stays as it is.

    Raises:
        UsageError: a number that cannot be meant, or one that would change nothing.
    """
    if options.threshold is not None and options.disagreement == "keep":
        raise UsageError("--threshold says which labels the teacher contradicts; give --disagreement drop, or another")
    if options.confidence_policy is not None and options.confidence_below is None:
        raise UsageError("--confidence-policy without --confidence-below: give the probability below which it holds")
    policies = RowPolicies(
        options.disagreement,
        1.0 if options.threshold is None else options.threshold,
        options.confidence_below,
        options.confidence_policy or "drop",
    )
    if options.hard_targets and policies.disagreement != "keep":
        raise UsageError("--hard-targets learns the teacher's argmax whatever the label is: leave out --disagreement")
    return None if policies.does_nothing else policies


def check_policies(policies: RowPolicies | None, source: Source) -> None:
    """Refuses policies that the training data cannot serve.

    Raises:
        UsageError: no cache, rows of mixed views, which have two labels, or `topk` rows without the label's logit.
    """
    if policies is None:
        return
    if source.cache is None:
        asked = "--disagreement" if policies.disagreement != "keep" else "--confidence-below"
        raise UsageError(f"{asked} asks the teacher about each row; give --cache")
    if policies.disagreement == "downweight" or (policies.disagreement != "keep" and policies.threshold < 1):
        require("nll", source.encoding)  # p(label)
    if policies.disagreement != "keep":
        require("top1", source.encoding)
    if policies.confidence_below is not None:
        require("calibration_error", source.encoding)  # p of the top class
    if policies.disagreement != "keep" and source.cache.catalog.schema.is_mixed:
        raise UsageError(
            f"--disagreement {policies.disagreement}: the views of {source.cache.path.name} are mixed (MixUp, CutMix), "
            "and a teacher that names one of the two labels of a row contradicts nothing"
        )


def policy_record(policies: RowPolicies | None, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Policies and how many rows each was about, epoch by epoch, for the run record; empty without any.

    Args:
        policies: of the run.
        rows: (epochs, 2) rows that disagree, and rows that the teacher is not sure of.
    """
    if policies is None:
        return {}
    epochs = [{"disagree": disagree, "unconfident": unconfident} for disagree, unconfident in rows]
    return {"policies": {**policies.describe(), "epochs": epochs}}
