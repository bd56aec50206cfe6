"""What a report advises about teacher and data: fixed rules over its figures, one sentence each, with a command.

They are written down in docs/guide/report.md. `information` is the share of the labels' entropy that the teacher's
probabilities explain, 1 - NLL / prior NLL: 1 for a teacher that is sure and right, 0 for one that knows how frequent
each class is and no more, below 0 for one that misleads. Unlike accuracy it means the same for 10 classes and for 1000.
"""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Any

from kdcache.train.teacher_statistics import LEAST_ROWS

INFORMATION = 0.7  # below it the teacher is weak
NEAR_MAJORITY = 0.1  # accuracy above the largest class, as a share of what is above it
OVER_CONFIDENT = 0.05  # mean confidence above accuracy
ELSEWHERE = 0.2  # the same gap where no information is left: sure and wrong, a teacher of other data
MISCALIBRATED = 0.03  # equal-mass ECE
HARD = 0.01  # mean entropy at T = 1 over that of equal probabilities
FLAT = 0.95
SOFT_ENOUGH = 0.1  # probability outside the top class
FEW_CLASSES = 4
POOR_CLASS = 0.5  # of the mean accuracy
INCONSISTENT = 0.9  # agreement of views
UNLIKE_SHARE = 0.05
DISAGREEMENT = 0.02
OTHER_ORDER = 0.5  # rows whose teacher's class is the one that their label mostly gets
_SHOWN = 5
# What a warning begins with.
WEAK, WRONG_DOMAIN, OVER_FITTED = "weak teacher", "wrong domain", "over-fitted"

# Stand in commands for the cache and for a new one beside it, until `named` knows what they are called.
_CACHE, _NEW = "{cache}", "{new}"

Advice = dict[str, Any]


def named(advice: list[Advice], cache: Path) -> list[Advice]:
    """The advice with commands for a shell: of the cache as somebody reaches it.

    Args:
        advice: of `teacher_advice` and `data_advice`.
        cache: its path for the reader of a terminal, its name for a page that travels.
    """
    words = {_CACHE: _word(cache), _NEW: _word(cache.with_name(f"new-{cache.name}"))}
    return [
        {**one, "command": "".join(words.get(part, part) for part in re.split(r"(\{cache\}|\{new\})", one["command"]))}
        if one["command"] is not None
        else one
        for one in advice
    ]


def information(teacher: dict[str, Any]) -> float | None:
    """1 - NLL / prior NLL; None without labels, and where all labels are of one class."""
    nll, prior = teacher["nll"], teacher["prior_nll"]
    return None if nll is None or not prior else float(1 - nll / prior)


def teacher_advice(found: dict[str, Any]) -> list[Advice]:
    """The advice of the section `teacher`, the worst first; at least one.

    Args:
        found: a report with `cache`, `teacher` and `data`.
    """
    cache, teacher = found["cache"], found["teacher"]
    # One sentence for one trouble: who is of another domain is over-confident too, and who is that has a large ECE.
    advice = _worth(found)
    advice += _over_fitted(found) if not any(one["text"].startswith(WRONG_DOMAIN) for one in advice) else []
    advice += (
        []
        if any(one["text"].startswith((WRONG_DOMAIN, OVER_FITTED)) for one in advice)
        else _calibration(cache, teacher)
    )
    advice += [*_softness(cache, teacher), *_classes(cache, teacher), *_views(cache, teacher)]
    if teacher["top1"] is None:
        text = "the rows have no labels, so nobody can say how good this teacher is: dump data that have them"
        advice.append(_advice("teacher", "note", text, f"kdcache precompute --data SPEC --out {_NEW} ..."))
    elif _is_of_one_class(teacher):
        text = "all labels are of one class, so nobody can say how good this teacher is: dump rows of the others too"
        advice.append(_advice("teacher", "note", text, f"kdcache precompute --data SPEC --out {_NEW} ..."))
    elif not any(one["level"] == "warning" for one in advice):
        temperature = _soft_temperature(teacher) or 4.0
        text = f"nothing speaks against this teacher{_caveat(cache)}: distil, at T = {temperature:g} to begin with"
        command = f"kdcache distill --cache {_CACHE} --temperature {temperature:g} ..."
        advice.append(_advice("teacher", "ok", text, command))
    return _worst_first(advice)


def data_advice(found: dict[str, Any]) -> list[Advice]:
    """The advice of the section `data`, the worst first; at least one."""
    cache, data = found["cache"], found["data"]
    advice, domain = _coverage(data["covered"]), data["domain"]
    share = domain["unlike_share"]
    if share is not None and share > UNLIKE_SHARE:
        text = (
            f"{share:.1%} of the rows are unlike the others (energy): look at them, or let the teacher say nothing "
            "where it is unsure"
        )
        command = f"kdcache distill --cache {_CACHE} --confidence-below 0.5 ..."
        advice.append(_advice("data", "warning", text, command))
    differ = data["disagreement"]
    if differ is not None and differ["share"] > DISAGREEMENT:
        text = (
            f"teacher and label differ in {differ['rows']} rows ({differ['share']:.1%}){_caveat(cache)}: see which of "
            "the two is wrong"
        )
        advice.append(_advice("data", "note", text, f"kdcache suspects {_CACHE} -o suspects.csv"))
    if not advice:
        what = "rows are alike" if differ is None else "rows are alike and their labels agree with the teacher"
        text = f"the {what}{'' if differ is None else _caveat(cache)}: nothing to do before distilling"
        advice.append(_advice("data", "ok", text, f"kdcache verify {_CACHE}"))
    return _worst_first(advice)


def _coverage(covered: dict[str, Any] | None) -> list[Advice]:
    if covered is None or covered["found"] == covered["samples"]:
        return []
    if not covered["found"]:
        text = (
            f"none of the {covered['samples']} samples of {covered['data']} is in the cache: it is the cache of other "
            "data, or of other sample ids; dump these data"
        )
        command = f"kdcache precompute --data {shlex.quote(covered['data'])} --out {_NEW} ..."
        return [_advice("data", "warning", text, command)]
    text = (
        f"{covered['samples'] - covered['found']} of the {covered['samples']} samples of {covered['data']} are not in "
        "the cache: dump them too, or train them on their labels alone"
    )
    return [_advice("data", "warning", text, f"kdcache distill --cache {_CACHE} --missing ce ...")]


def _worth(found: dict[str, Any]) -> list[Advice]:
    """Weak, or of another domain, or with its classes in another order."""
    cache, teacher = found["cache"], found["teacher"]
    top1, sure, known = teacher["top1"], teacher["confidence"], information(teacher)
    if top1 is None or _is_of_one_class(teacher):
        return []
    above = 1 - teacher["majority_share"]
    near_majority = top1 - teacher["majority_share"] < NEAR_MAJORITY * above
    is_weak = near_majority or (known is not None and known < INFORMATION)
    if not is_weak:
        return []
    usual = teacher["usual_class_share"]
    if near_majority and usual is not None and usual - top1 > OTHER_ORDER:
        text = (
            f"top-1 is {top1:.3g}, and {usual:.0%} of the rows would be right with the classes in another order: "
            "teacher and labels number them differently"
        )
        return [_advice("teacher", "warning", text, f"kdcache distill --cache {_CACHE} --classes MAP ...")]
    told = "" if known is None else f" and its probabilities explain {max(known, 0):.0%} of the labels' entropy"
    figures = f"top-1 is {top1:.3g} (the largest class alone: {teacher['majority_share']:.3g}){told}{_caveat(cache)}"
    command = "kdcache distill --alpha 0 ..."
    if sure is not None and sure - top1 > ELSEWHERE and (known is None or known <= 0):
        text = (
            f"{WRONG_DOMAIN}, or a far over-fitted teacher: {figures}, at a mean confidence of {sure:.3g}. Use a "
            "teacher of such data; a student of the labels alone may well be better"
        )
    else:
        text = f"{WEAK}: {figures}. Train a student on the labels alone first; only a better teacher helps it"
    return [_advice("teacher", "warning", text, command)]


def _over_fitted(found: dict[str, Any]) -> list[Advice]:
    cache, teacher = found["cache"], found["teacher"]
    top1, sure = teacher["top1"], teacher["confidence"]
    if top1 is None or sure is None:
        return []
    seen = cache["teacher_seen"]
    if sure - top1 > OVER_CONFIDENT:
        text = (
            f"{OVER_FITTED}, or of other data: mean confidence is {sure:.3g} and top-1 {top1:.3g}{_caveat(cache)}; "
            "calibrate it, and compare with a student of the labels alone"
        )
        return [_advice("teacher", "warning", text, _calibrate(cache))]
    entropy = _relative_entropy(cache, teacher)
    if seen != "no" and top1 > 0.995 and (sure > 0.99 if entropy is None else entropy < HARD):
        text = (
            f"{OVER_FITTED} to these rows: top-1 is {top1:.4g} at a mean confidence of {sure:.4g}{_caveat(cache)}, so "
            "that its targets are the labels again; dump rows that it has not seen, or raise T"
        )
        return [_advice("teacher", "warning", text, f"kdcache precompute --data SPEC --teacher-saw no --out {_NEW}")]
    return []


def _softness(cache: dict[str, Any], teacher: dict[str, Any]) -> list[Advice]:
    found, relative = [], _relative_entropy(cache, teacher)
    if relative is not None and relative < HARD:
        entropy, better = teacher["softness"][0]["entropy"], _soft_temperature(teacher)
        at = "" if better is None else f" (at T = {better:g} a tenth of the probability lies outside the top class)"
        text = f"targets at T = 1 have entropy {entropy:.2g}: they are labels; calibrate, or raise T{at}"
        command = f"kdcache distill --cache {_CACHE} --temperature {better or 8:g} ..."
        found.append(_advice("teacher", "note", text, command))
    elif relative is not None and relative > FLAT:
        text = f"targets at T = 1 are nearly equal for all classes ({relative:.0%} of the largest entropy): keep T at 1"
        command = f"kdcache distill --cache {_CACHE} --temperature 1 ..."
        found.append(_advice("teacher", "note", text, command))
    if cache["classes"] <= FEW_CLASSES:
        text = (
            f"{cache['classes']} classes only: a row tells {cache['classes'] - 1} number"
            f"{'s' if cache['classes'] > 2 else ''}, so logit distillation is weak here; features tell more"
        )
        command = "kdcache precompute --factored LAYER ..., then kdcache distill --loss feature_cosine ..."
        found.append(_advice("teacher", "note", text, command))
    return found


def _calibration(cache: dict[str, Any], teacher: dict[str, Any]) -> list[Advice]:
    ece = teacher["ece"]
    if ece is None or ece["equal_mass"] < MISCALIBRATED:
        return []
    both = f"{ece['equal_width']:.2g} (equal width; equal mass: {ece['equal_mass']:.2g})"
    text = f"teacher's ECE is {both}{_caveat(cache)}: calibrate it"
    return [_advice("teacher", "note", text, _calibrate(cache))]


def _classes(cache: dict[str, Any], teacher: dict[str, Any]) -> list[Advice]:
    if teacher["classes"] is None:
        return []
    poor = [
        one
        for one in teacher["classes"]
        if one["rows"] >= LEAST_ROWS and one["accuracy"] < POOR_CLASS * teacher["top1"]
    ]
    if not poor:
        return []
    poor.sort(key=lambda one: one["accuracy"])
    shown = ", ".join(f"{one['name'] or one['class']} ({one['accuracy']:.2g})" for one in poor[:_SHOWN])
    more = f" and {len(poor) - _SHOWN} more" if len(poor) > _SHOWN else ""
    text = (
        f"the teacher is poor on {len(poor)} of {cache['classes']} classes: {shown}{more}{_caveat(cache)}; weigh it by "
        "its probability of the label there"
    )
    command = f"kdcache distill --cache {_CACHE} --disagreement downweight ..."
    return [_advice("teacher", "note", text, command)]


def _views(cache: dict[str, Any], teacher: dict[str, Any]) -> list[Advice]:
    views = teacher["views"]
    if views is None or views["agreement"] >= INCONSISTENT:
        return []
    text = (
        f"the teacher gives {1 - views['agreement']:.0%} of the augmented rows another class than the first view: the "
        "student must see exactly these views, which distill replays; milder augmentation may be better"
    )
    return [_advice("teacher", "note", text, f"kdcache verify {_CACHE} --data SPEC")]


def _calibrate(cache: dict[str, Any]) -> str:
    """The command; on rows that the teacher saw it would refuse."""
    return f"kdcache calibrate {_CACHE}" + (" --on UNSEEN_CACHE" if cache["teacher_seen"] == "yes" else "")


def _is_of_one_class(teacher: dict[str, Any]) -> bool:
    """Whether whoever always says one class is right on all rows: nothing is better than that."""
    return bool(teacher["majority_share"] == 1)


def _word(path: Path) -> str:
    """For a shell; a name like an option gets its folder."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def _relative_entropy(cache: dict[str, Any], teacher: dict[str, Any]) -> float | None:
    """Mean entropy at T = 1 over the largest there can be, log C."""
    entropy = teacher["softness"][0]["entropy"]
    return None if entropy is None else float(entropy / math.log(cache["classes"]))


def _soft_temperature(teacher: dict[str, Any]) -> float | None:
    """The least of T = 1, 2, 4, 8 at which a tenth of the probability lies outside the top class."""
    for one in teacher["softness"]:
        if one["outside_top"] is not None and one["outside_top"] >= SOFT_ENOUGH:
            return float(one["temperature"])
    return None


def _caveat(cache: dict[str, Any]) -> str:
    """What has to be said beside each figure of accuracy."""
    said = {"no": "", "yes": " (flattering: the teacher saw these rows)"}
    return said.get(cache["teacher_seen"], " (flattering if the teacher saw these rows; unknown)")


def _advice(section: str, level: str, text: str, command: str | None) -> Advice:
    return {"section": section, "level": level, "text": text, "command": command}


def _worst_first(advice: list[Advice]) -> list[Advice]:
    return sorted(advice, key=lambda one: ("warning", "note", "ok").index(one["level"]))
