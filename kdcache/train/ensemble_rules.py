"""By which rules several teachers become one. Nothing here imports torch.

With weights v_m > 0 of the teachers (PATH=WEIGHT, 1 by default), p_m = softmax(z_m / T) and, per row, only the
teachers that have it; weights are divided by their sum before they are used:

    logits                z = sum_m v_m z_m, which serves every temperature and loss
    soft-targets          p = sum_m v_m p_m, as in Hinton et al. 2015 (arXiv:1503.02531), where both means stand
    accuracy              p = sum_m w_m p_m, w_m = v_m max(0, log(a_m / (1 - a_m)) + log(C - 1)), a_m the top-1 accuracy
                          (with half a row added on either side): the vote of SAMME, Zhu et al. 2009, 0 at chance
    calibration           w_m = v_m exp(-NLL_m), the geometric mean of the probability of the label
    class-accuracy        p(c) = sum_m w_mc p_m(c), then divided by its sum over c; w_mc = v_m times the share of the
                          rows of class c that teacher m gets right (with one row added on either side): the
                          weighted average with a weight for each class of Kuncheva 2004 (Combining Pattern Classifiers)
    entropy               per row w_m = v_m exp(-H(p_m at T = 1)): surer teachers count more; the idea of Kwon et al.
                          2020 (Adaptive knowledge distillation based on entropy), the form is that of a softmax over -H
    cross-entropy         per row w_m = v_m (1 - exp(CE_m) / sum_j exp(CE_j)) with CE_m of the true label at T = 1:
                          CA-MKD, Zhang et al. 2022 (arXiv:2201.00007); rows without a label take v_m
    route:max-confidence  per row the teacher with the largest probability at T = 1
    route:FILE.csv        per row the teacher that the file names
    random                one teacher a step, drawn with the probabilities v_m, the same on all ranks

The last three take the logits of one teacher where all caches hold logits, else soft targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import final

from kdcache.errors import UsageError

RULES = (
    "logits",
    "soft-targets",
    "accuracy",
    "calibration",
    "class-accuracy",
    "entropy",
    "cross-entropy",
    "route:max-confidence",
    "route:FILE.csv",
    "random",
)
_ROUTE = "route:"


@final
@dataclass(frozen=True)
class Rule:
    """A rule.

    Attributes:
        name: one of `RULES`.
        file: of `route:FILE.csv`.
    """

    name: str
    file: str | None = None

    def __str__(self) -> str:
        return self.name if self.file is None else f"{_ROUTE}{self.file}"

    @property
    def shown(self) -> str:
        """As it was asked for, without the folder of a file."""
        return self.name if self.file is None else f"{_ROUTE}{PurePath(self.file).name}"

    @property
    def needs_labelled_cache(self) -> bool:
        """Whether its weights come from the labelled rows of each cache, once at the start."""
        return self.name in ("accuracy", "calibration", "class-accuracy")

    @property
    def needs_all_logits(self) -> bool:
        """Whether every cache has to hold the logits of all classes."""
        return self.name in ("logits", "class-accuracy", "entropy")

    @property
    def takes_one(self) -> bool:
        """Whether each row has one teacher."""
        return self.name in ("random", "route:max-confidence", "route:FILE.csv")

    @property
    def is_per_row(self) -> bool:
        """Whether the weights differ from row to row, so that rows are (N, C)."""
        return self.name in ("entropy", "cross-entropy", "route:max-confidence", "route:FILE.csv", "class-accuracy")

    def held_out(self) -> Rule:
        """The rule for validation rows, which have to be measured the same way each time and are in no file."""
        return Rule("soft-targets") if self.name in ("random", "route:FILE.csv", "cross-entropy") else self


@final
@dataclass(frozen=True)
class Words:
    """How a command calls what messages advise.

    Attributes:
        rule: its option for the rule.
        cache: what names a cache.
        missing: what lets the other teachers speak for samples that a cache lacks.
        classes: what to do about classes that cannot be brought together by their names.
    """

    rule: str
    cache: str
    missing: str
    classes: str


_NAMED = (
    "the same names in another order are matched by themselves, so dump again from data that names its classes, or "
    "name those of a cache: kdcache export it, and kdcache import that with --class-names FILE.json"
)
OF_DISTILL = Words(
    "--ensemble",
    "--cache",
    "--missing ce or skip",
    "give one map (--classes MAP.json) that has the classes of all teachers, each by its name, or by its number where "
    f"its cache has no names. Or {_NAMED}",
)
OF_ENSEMBLE = Words(
    "--rule",
    "CACHE",
    "--missing vote",
    f"{_NAMED}. Other classes are mapped by kdcache distill --classes alone, which takes the caches themselves",
)


def parse_rule(text: str, *, option: str = "--ensemble") -> Rule:
    """The rule that `--ensemble` names, or another option.

    Raises:
        UsageError: it is not known.

    >>> parse_rule("route:which.csv")
    Rule(name='route:FILE.csv', file='which.csv')
    """
    if text in RULES and text != "route:FILE.csv":
        return Rule(text)
    if text.startswith(_ROUTE) and text.endswith(".csv") and len(text) > len(_ROUTE) + 4:
        return Rule("route:FILE.csv", text.removeprefix(_ROUTE))
    raise UsageError(f"{option} {text!r:.80} is not known; choose one of {', '.join(RULES)}")
