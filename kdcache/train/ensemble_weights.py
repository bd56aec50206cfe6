"""How much each of several teachers counts, row by row: the rules of `ensemble_rules` as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.cross_entropy import Labels
from kdcache.train.distributions import is_topk
from kdcache.train.ensemble_rules import Rule
from kdcache.train.mixed_labels import MixedLabels
from kdcache.train.sparse_metrics import confidence, label_log_prob

_LARGEST_LOSS = 1e4  # nats: a label of probability 0 has no finite cross-entropy


@final
@dataclass(frozen=True)
class Skill:
    """What the labelled rows of each of M caches say of its teacher.

    Attributes:
        accuracy: (M,) top-1, with half a row added on either side.
        nll: (M,) nats; None where it was not asked for.
        of_class: (M, C) share of the rows of a class that are right, with one row added on either side; None likewise.
        rows: (M,) labelled rows.
    """

    accuracy: tuple[float, ...]
    nll: tuple[float, ...] | None
    of_class: tuple[tuple[float, ...], ...] | None
    rows: tuple[int, ...]

    def weights(self, rule: Rule, classes: int) -> Tensor:
        """(M,), or (M, C) for `class-accuracy`, float32.

        Raises:
            UsageError: no teacher is better than chance.
        """
        if rule.name == "class-accuracy":
            assert self.of_class is not None
            return torch.tensor(self.of_class, dtype=torch.float32)
        if rule.name == "calibration":
            assert self.nll is not None
            return torch.tensor(self.nll, dtype=torch.float64).neg().exp().float()
        votes = [max(0.0, math.log(a / (1 - a)) + math.log(max(1, classes - 1))) for a in self.accuracy]
        if not any(votes):
            raise UsageError(
                "by the labelled rows of their caches no teacher is better than chance "
                f"(accuracy {', '.join(f'{a:.3g}' for a in self.accuracy)}): there is nothing to weigh by"
            )
        return torch.tensor(votes, dtype=torch.float32)


def weights_of(
    rule: Rule,
    given: Sequence[TeacherRows],
    base: Sequence[float],
    labels: Labels | None,
    *,
    skill: Skill | None = None,
    routes: np.ndarray | None = None,
    draw: tuple[int, int] = (0, 0),
) -> Tensor:
    """The weights of each row, which sum to 1 over the teachers that have it.

    Args:
        rule: whose formula it is.
        given: N rows of each of M teachers, of tensors, calibrated.
        base: (M,) above 0.
        labels: (N,) int64, -1 = none; for `cross-entropy`.
        skill: for the rules that weigh by accuracy or calibration.
        routes: (N,) the teacher of each row, for `route:FILE.csv`.
        draw: seed and step, for `random`.

    Returns:
        (N, M) float32, or (N, M, C) for `class-accuracy`; 0 where a teacher lacks the row.

    Raises:
        UsageError: rows that do not serve the rule, or labels of mixed inputs for `cross-entropy`.
        MismatchError: `topk` rows that do not keep the logit of a label.
    """
    has = torch.stack([rows.has_teacher for rows in given], dim=1)
    fixed = torch.tensor(list(base), dtype=torch.float32, device=has.device) * has
    chosen = _factors(rule, given, base, fixed, labels, skill=skill, routes=routes, draw=draw)
    if chosen is None:
        return _normalised(fixed)
    if chosen.ndim == 3:
        return _normalised(chosen * fixed.unsqueeze(2))
    weighed = chosen * fixed
    # A row whose teachers all weigh 0, as where the one that was drawn lacks it, takes those that it has.
    return _normalised(torch.where((weighed > 0).any(dim=1, keepdim=True), weighed, fixed))


def _factors(
    rule: Rule,
    given: Sequence[TeacherRows],
    base: Sequence[float],
    fixed: Tensor,
    labels: Labels | None,
    *,
    skill: Skill | None,
    routes: np.ndarray | None,
    draw: tuple[int, int],
) -> Tensor | None:
    """What the fixed weights (N, M) are multiplied by: (N, M), (M,) or (1, M, C); None for nothing."""
    count, device = len(given), fixed.device
    if rule.needs_labelled_cache:
        assert skill is not None
        found = skill.weights(rule, given[0].num_classes).to(device)
        return found.unsqueeze(0)
    if rule.name == "entropy":
        return torch.stack([_entropy(rows) for rows in given], dim=1).neg().exp()
    if rule.name == "cross-entropy":
        return None if labels is None else _by_cross_entropy(given, fixed, labels)
    if rule.name == "route:max-confidence":
        sure = torch.stack([_confidence(rows) for rows in given], dim=1).masked_fill(fixed == 0, -1.0)
        return _one_hot(sure.argmax(dim=1), count)
    if rule.name == "route:FILE.csv":
        assert routes is not None
        return _one_hot(torch.from_numpy(routes).to(device), count)
    if rule.name == "random":
        return _one_hot(torch.tensor([random_teacher(base, *draw)], device=device), count)
    return None


def random_teacher(base: Sequence[float], seed: int, step: int) -> int:
    """The teacher of a step: it depends on seed, step and weights alone, so that a resumed run draws the same."""
    shares = np.asarray(base, np.float64)
    return int(np.random.default_rng([seed, step]).choice(len(shares), p=shares / shares.sum()))


def _by_cross_entropy(given: Sequence[TeacherRows], fixed: Tensor, labels: Labels) -> Tensor:
    """(N, M): 1 - exp(CE_m) / sum_j exp(CE_j) over the K teachers of a row; 1 for rows without a label, or of one."""
    if isinstance(labels, MixedLabels):
        raise UsageError("--ensemble cross-entropy asks for the label of each row, and mixed views have two")
    votes = fixed > 0
    loss = torch.stack([-_label_log_prob(rows, labels) for rows in given], dim=1).clamp(max=_LARGEST_LOSS)
    share = loss.float().masked_fill(~votes, -math.inf).softmax(dim=1).nan_to_num(0.0)
    is_plain = (labels < 0) | (votes.sum(dim=1) < 2)
    return torch.where(is_plain[:, None], 1.0, 1 - share)


def _label_log_prob(rows: TeacherRows, labels: Tensor) -> Tensor:
    if is_topk(rows):
        return label_log_prob(rows, 1.0, labels=labels).value
    log_p = rows.dense().log_softmax(dim=1)
    found: Tensor = log_p.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    return found


def _confidence(rows: TeacherRows) -> Tensor:
    if is_topk(rows):
        return confidence(rows, 1.0).value.float()
    found: Tensor = rows.dense().softmax(dim=1).amax(dim=1)
    return found


def _entropy(rows: TeacherRows) -> Tensor:
    """(N,) nats at temperature 1."""
    found: Tensor = torch.special.entr(rows.dense().softmax(dim=1)).sum(dim=1)
    return found


def _one_hot(number: Tensor, count: int) -> Tensor:
    return torch.nn.functional.one_hot(number, count).float()


def _normalised(weights: Tensor) -> Tensor:
    """Divided by their sum over the teachers; 0 stays 0, and a single weight becomes exactly 1."""
    total = weights.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weights / total, 0.0)
