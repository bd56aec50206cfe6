"""Losses against the teacher as small frozen records, which a weighted sum composes.

    alpha * (weight_1 * loss_1 + weight_2 * loss_2 + ...)

A record holds the loss's own numbers, and says its formula with them. Nothing here imports torch, so that the command
line can check what was asked for before it does; a record finds its arithmetic when it is first used.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from kdcache.errors import UsageError
from kdcache.train.loss_numbers import SERIES_FROM, check_mixture, check_part_weight, check_temperature

if TYPE_CHECKING:
    from torch import Tensor

    from kdcache.train.cross_entropy import Labels
    from kdcache.train.reductions import RowTerms
    from kdcache.train.soft_targets import Teacher


@final
@dataclass(frozen=True, eq=False)
class LossCall:
    """What a loss is given.

    Attributes:
        student_logits: (N, C, ...).
        teacher: TeacherRows or (N, C, ...).
        labels: (N, ...) int64, -1 = none; None where no row has one.
        temperature: of the run, for losses that have none of their own.
        student_temperature: of the run's student, where it differs.
        sample_weight: (N,) or (N, ...), for losses of a batch.
        class_mask: (C,) bool.
        tail_tolerance: of `topk` rows, see `kdcache.train.distributions.pair`; None for its default.
    """

    student_logits: Tensor
    teacher: Teacher
    labels: Labels | None
    temperature: float
    student_temperature: float | None = None
    sample_weight: Tensor | None = None
    class_mask: Tensor | None = None
    tail_tolerance: float | None = None


@dataclass(frozen=True)
class Loss(ABC):
    """A loss of a student's logits against a teacher's rows.

    Attributes:
        name: as `--loss` spells it.
        needs_labels: whether rows without a label have no such loss.
        is_of_batch: whether it is a property of a batch, which cannot be summed over the pieces of one.
    """

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = False
    is_of_batch: ClassVar[bool] = False

    @property
    def follows_run(self) -> bool:
        """Whether the run's temperature is in it."""
        return False

    @property
    def need(self) -> str:
        """What rows must serve, a name of `kdcache.train.capability`."""
        return self.name

    @abstractmethod
    def rows(self, call: LossCall) -> RowTerms:
        """The loss of each row (N, ...), its factor included, and which rows it counts for."""

    @abstractmethod
    def formula(self, temperature: float, student_temperature: float | None) -> str:
        """The loss with its numbers, for a run of these temperatures."""


@dataclass(frozen=True)
class _Divergence(Loss):
    """temperature**2 * a divergence of the softened distributions.

    Args:
        temperature: of both; None for the run's, with its schedule.
    """

    temperature: float | None = None
    symbol: ClassVar[str]

    def __post_init__(self) -> None:
        if self.temperature is not None:
            check_temperature(f"temperature of {self.name}", self.temperature)

    @property
    def follows_run(self) -> bool:
        """Whether it has no temperature of its own."""
        return self.temperature is None

    def temperatures(self, temperature: float, student_temperature: float | None) -> tuple[float, float]:
        """The teacher's and the student's."""
        if self.temperature is not None:
            return self.temperature, self.temperature
        return temperature, temperature if student_temperature is None else student_temperature

    def formula(self, temperature: float, student_temperature: float | None) -> str:
        """As `16*KL(teacher || student)`, with the temperature where it is the loss's own."""
        of_student = self.temperatures(temperature, student_temperature)[1]
        own = "" if self.temperature is None else f" at temperature {self.temperature:g}"
        return f"{of_student**2:g}*{self.symbol}{self._numbers()}{own}"

    def _numbers(self) -> str:
        return ""

    def rows(self, call: LossCall) -> RowTerms:
        """Of each row (N, ...)."""
        from kdcache.train import divergence_losses, divergences

        of_teacher, of_student = self.temperatures(call.temperature, call.student_temperature)
        return divergence_losses.divergence_rows(
            getattr(divergences, self._function),
            call.student_logits,
            call.teacher,
            temperature=of_teacher,
            student_temperature=of_student,
            class_mask=call.class_mask,
            tail_tolerance=call.tail_tolerance,
            **self._options(of_teacher, of_student),
        )

    _function: ClassVar[str]

    def _options(self, temperature: float, student_temperature: float) -> dict[str, Any]:
        return {}


@final
@dataclass(frozen=True)
class Kl(_Divergence):
    """temperature**2 * KL(teacher || student), the KD term itself."""

    name: ClassVar[str] = "kl"
    symbol: ClassVar[str] = "KL(teacher || student)"
    _function: ClassVar[str] = "kl"

    def _options(self, temperature: float, student_temperature: float) -> dict[str, Any]:
        return {"is_soft": min(temperature, student_temperature) >= SERIES_FROM}


@final
@dataclass(frozen=True)
class SpreadKl(_Divergence):
    """temperature**2 * KL(teacher || student), the tail of top-k rows spread evenly over the classes not kept."""

    name: ClassVar[str] = "spread_kl"
    symbol: ClassVar[str] = "KL(teacher, tail spread || student)"
    _function: ClassVar[str] = ""

    def rows(self, call: LossCall) -> RowTerms:
        """Of each row (N, ...)."""
        from kdcache.train.spread import spread_kl_rows

        of_teacher, of_student = self.temperatures(call.temperature, call.student_temperature)
        return spread_kl_rows(
            call.student_logits,
            call.teacher,
            temperature=of_teacher,
            student_temperature=of_student,
            class_mask=call.class_mask,
            tail_tolerance=call.tail_tolerance,
        )


@final
@dataclass(frozen=True)
class ReverseKl(_Divergence):
    """temperature**2 * KL(student || teacher)."""

    name: ClassVar[str] = "reverse_kl"
    symbol: ClassVar[str] = "KL(student || teacher)"
    _function: ClassVar[str] = "reverse_kl"


@final
@dataclass(frozen=True)
class SoftCrossEntropy(_Divergence):
    """temperature**2 * CE of the teacher's soft targets; the gradient of `kl`."""

    name: ClassVar[str] = "soft_ce"
    symbol: ClassVar[str] = "CE(teacher, student)"
    _function: ClassVar[str] = "soft_cross_entropy"


@final
@dataclass(frozen=True)
class JensenShannon(_Divergence):
    """temperature**2 * generalised Jensen-Shannon divergence.

    Args:
        temperature: of both; None for the run's.
        beta: share of the teacher in the mixture, above 0 and below 1.
    """

    name: ClassVar[str] = "js"
    symbol: ClassVar[str] = "JS"
    _function: ClassVar[str] = "jensen_shannon"
    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mixture("beta of js", self.beta)

    def _numbers(self) -> str:
        return f"(beta {self.beta:g})"

    def _options(self, temperature: float, student_temperature: float) -> dict[str, Any]:
        return {"beta": self.beta}


@final
@dataclass(frozen=True)
class Dkd(_Divergence):
    """temperature**2 * (alpha * TCKD + beta * NCKD), Zhao et al. 2022; rows without a label have none.

    Args:
        temperature: of both; None for the run's.
        alpha: weight of the target part.
        beta: weight of the part of the other classes.
    """

    name: ClassVar[str] = "dkd"
    needs_labels: ClassVar[bool] = True
    symbol: ClassVar[str] = "DKD"
    _function: ClassVar[str] = ""
    alpha: float = 1.0
    beta: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_part_weight("alpha of dkd", self.alpha)
        check_part_weight("beta of dkd", self.beta)

    @property
    def need(self) -> str:
        """The label's probability is enough where the other classes weigh nothing."""
        return "dkd" if self.beta else "dkd_target"

    def _numbers(self) -> str:
        return f"({self.alpha:g}*TCKD + {self.beta:g}*NCKD)"

    def rows(self, call: LossCall) -> RowTerms:
        """Of each row (N, ...)."""
        from kdcache.train.dkd import dkd_rows

        labels, logits = call.labels, call.student_logits
        if labels is None:
            labels = logits.new_full((logits.shape[0], *logits.shape[2:]), -1).long()
        of_teacher, of_student = self.temperatures(call.temperature, call.student_temperature)
        return dkd_rows(
            call.student_logits,
            call.teacher,
            labels,
            temperature=of_teacher,
            student_temperature=of_student,
            alpha=self.alpha,
            beta=self.beta,
            class_mask=call.class_mask,
            tail_tolerance=call.tail_tolerance,
        )


@final
@dataclass(frozen=True)
class Dist(Loss):
    """DIST, Huang et al. 2022: correlations over the classes of a row, and over the rows of a batch.

    Args:
        temperature: its own, not the run's (the paper: 1 on ImageNet, 4 on CIFAR-100).
        beta: weight of the correlation over classes.
        gamma: weight of the correlation over the batch.
    """

    name: ClassVar[str] = "dist"
    is_of_batch: ClassVar[bool] = True
    temperature: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_temperature("temperature of dist", self.temperature)
        check_part_weight("beta of dist", self.beta)
        check_part_weight("gamma of dist", self.gamma)

    def formula(self, temperature: float, student_temperature: float | None) -> str:
        """With its own temperature."""
        return (
            f"{self.temperature**2:g}*DIST({self.beta:g}*inter + {self.gamma:g}*intra) at temperature "
            f"{self.temperature:g}"
        )

    def rows(self, call: LossCall) -> RowTerms:
        """Of each row (N, ...), the batch's part in every one."""
        from kdcache.train.dist import dist_rows

        return dist_rows(
            call.student_logits,
            call.teacher,
            temperature=self.temperature,
            beta=self.beta,
            gamma=self.gamma,
            sample_weight=call.sample_weight,
            class_mask=call.class_mask,
        )


@final
@dataclass(frozen=True)
class StandardizedKl(Loss):
    """KL of z-scores at a base temperature, times its square, Sun et al. 2024.

    Args:
        temperature: the base temperature, its own and not the run's; 2 in the paper, and what `z2` stores.
    """

    name: ClassVar[str] = "standardized_kd"
    temperature: float = 2.0

    def __post_init__(self) -> None:
        check_temperature("temperature of standardized_kd", self.temperature)

    def formula(self, temperature: float, student_temperature: float | None) -> str:
        """With its base temperature."""
        return f"{self.temperature**2:g}*KL(z-scores) at base temperature {self.temperature:g}"

    def rows(self, call: LossCall) -> RowTerms:
        """Of each row (N, ...)."""
        from kdcache.train.standardized import standardized_rows

        return standardized_rows(
            call.student_logits,
            call.teacher,
            temperature=self.temperature,
            class_mask=call.class_mask,
            tail_tolerance=call.tail_tolerance,
        )


@final
@dataclass(frozen=True)
class LogitMse(Loss):
    """Mean squared difference of the logits.

    Args:
        centred: subtract each row's mean first.
    """

    name: ClassVar[str] = "mse"
    centred: bool = False

    def formula(self, temperature: float, student_temperature: float | None) -> str:
        """Without a temperature."""
        return f"MSE({'centred ' if self.centred else ''}logits)"

    def rows(self, call: LossCall) -> RowTerms:
        """Of each row (N, ...)."""
        from kdcache.train.logit_mse import mse_rows

        return mse_rows(call.student_logits, call.teacher, centred=self.centred, class_mask=call.class_mask)


@final
@dataclass(frozen=True)
class WeightedLoss:
    """A loss and its weight in a sum, above 0."""

    loss: Loss
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise UsageError(f"the weight of {self.loss.name} is {self.weight}, expected a finite number above 0")


LOSSES: tuple[type[Loss], ...] = (
    Kl,
    ReverseKl,
    SoftCrossEntropy,
    JensenShannon,
    Dkd,
    Dist,
    StandardizedKl,
    LogitMse,
    SpreadKl,
)
