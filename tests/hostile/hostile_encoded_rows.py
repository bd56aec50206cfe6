"""Rows of int8, int4, top-k, factored and soft-target caches that no writer stores, checksums and hashes right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from encoded_base import put_rows
from hostile_cases import hostile

Arrays = dict[str, np.ndarray]


def _set(name: str, place: object, value: object) -> object:
    def change(arrays: Arrays) -> None:
        arrays[name][place] = value  # type: ignore[index]

    return change


# --------------------------------------------------------------------------- top-k


@hostile("v000-00000.h5: topk_classes has a class beyond the last", at="verify")
def kept_class_beyond_the_last(folder: Path) -> Path:
    """Class 65,535 of 64: an index behind the student's logits. On a GPU that ends the process, and every later call
    fails with it."""
    return put_rows(folder, "topk", _set("topk_classes", (9, 3), 65_535))


@hostile("v000-00000.h5: topk_classes has a class twice in a row", at="verify")
def class_kept_twice(folder: Path) -> Path:
    """One class twice in a row: its probability counts twice, and the whole is more than 1."""

    def change(arrays: Arrays) -> None:
        arrays["topk_classes"][9, 3] = arrays["topk_classes"][9, 7]

    return put_rows(folder, "topk", change)


@hostile("v000-00000.h5: topk_logits do not descend from 0", at="verify")
def kept_logits_out_of_order(folder: Path) -> Path:
    """A logit above the largest: the teacher's first class is not the first of the row."""
    return put_rows(folder, "topk", _set("topk_logits", (9, 3), 60_000))


@hostile("v000-00000.h5: topk_logits of sample 9 holds NaN", at="verify")
def kept_logit_that_is_no_number(folder: Path) -> Path:
    """NaN among the kept logits: one step of training with it, and every weight of the student is NaN."""
    return put_rows(folder, "topk", _set("topk_logits", (9, 3), np.nan))


@hostile("v000-00000.h5: label_logits has a logit above the largest", at="verify")
def label_above_the_largest_logit(folder: Path) -> Path:
    """The label's logit is 60,000 above the largest of the row: the softmax overflows."""
    return put_rows(folder, "topk", _set("label_logits", (9, 0), 60_000))


@hostile("v000-00000.h5: tail_logsumexp is above that of all classes", at="verify")
def tail_that_outweighs_the_row(folder: Path) -> Path:
    """A tail of e**1e38 for classes that are all below the kept ones: all mass is in it, and nothing is taught."""
    return put_rows(folder, "topk", _set("tail_logsumexp", (9, 1), 1e38))


@hostile("v000-00000.h5: tail_logsumexp of sample 9 holds NaN or .inf", at="verify")
def tail_that_is_infinite(folder: Path) -> Path:
    """A tail of +inf: less itself it is NaN."""
    return put_rows(folder, "topk", _set("tail_logsumexp", (9, 0), np.inf))


@hostile("v000-00000.h5: tail_mean is above the largest logit", at="verify")
def mean_above_all_logits(folder: Path) -> Path:
    """A mean of the tail above its largest logit: bounds that cross, and the square root of a negative distance."""
    return put_rows(folder, "topk", _set("tail_mean", 9, 3e38))


@hostile("v000-00000.h5: logit_std is negative", at="verify")
def standard_deviation_below_zero(folder: Path) -> Path:
    """A negative standard deviation: as a temperature it turns the teacher's order round."""
    return put_rows(folder, "topk", _set("logit_std", 9, -1))


@hostile("v000-00000.h5: row_max is infinite", at="verify")
def row_maximum_of_minus_infinity(folder: Path) -> Path:
    """A row maximum of -inf, as of a row in which every class is masked: its softmax is 0 / 0."""
    return put_rows(folder, "topk", _set("row_max", 9, -np.inf))


# --------------------------------------------------------------------------- int8 and int4


@hostile("v000-00000.h5: top_classes has a class beyond the last", at="verify")
def top_class_beyond_the_last(folder: Path) -> Path:
    """Class 65,535 of 64 among the eight largest of an int8 row: an index behind the row that is decoded."""
    return put_rows(folder, "int8", _set("top_classes", (9, 3), 65_535))


@hostile("v000-00000.h5: top_classes has a class twice in a row", at="verify")
def top_class_twice(folder: Path) -> Path:
    """One class twice among the eight largest: which of its logits is the last one written differs between devices."""

    def change(arrays: Arrays) -> None:
        arrays["top_classes"][9, 3] = arrays["top_classes"][9, 7]

    return put_rows(folder, "int8", change)


@hostile("v000-00000.h5: top_logits do not descend from 0", at="verify")
def top_logits_out_of_order(folder: Path) -> Path:
    """The last of the eight largest is the largest: the grid of all other logits hangs from it."""
    return put_rows(folder, "int8", _set("top_logits", (9, 7), 60_000))


@hostile("v000-00000.h5: row_scale is negative or infinite", at="verify")
def steps_of_negative_length(folder: Path) -> Path:
    """Steps of a negative length: the smallest logits become the largest."""
    return put_rows(folder, "int8", _set("row_scale", 9, -1))


@hostile("v000-00000.h5: row_scale of sample 9 holds NaN or .inf", at="verify")
def steps_of_infinite_length(folder: Path) -> Path:
    """Steps of infinite length: the code 0 times infinity is NaN."""
    return put_rows(folder, "int4", _set("row_scale", 9, np.inf))


@hostile("v000-00000.h5: row_max is infinite", at="verify", alike="row_maximum_of_minus_infinity")
def int8_row_maximum_of_minus_infinity(folder: Path) -> Path:
    """The same in an int8 row."""
    return put_rows(folder, "int8", _set("row_max", 9, -np.inf))


@hostile("v000-00000.h5: logits has a code behind the last class", at="verify")
def message_in_half_bytes(folder: Path) -> Path:
    """63 codes of four bits leave half a byte a row, which no reader shows: room for a message."""

    def change(arrays: Arrays) -> None:
        arrays["logits"][9, -1] |= 0xA0

    return put_rows(folder, "int4", change)


# --------------------------------------------------------------------------- factored


@hostile("v000-00000.h5: row_scale is no power of two that a row can have", at="verify")
def features_beyond_all_numbers(folder: Path) -> Path:
    """A scale of 2**127 over features of 2**14: the input of the layer is infinite, and half of the logits NaN."""
    return put_rows(folder, "factored", _set("row_scale", 9, 2.0**127))


@hostile("v000-00000.h5: features are infinite", at="verify")
def features_of_minus_infinity(folder: Path) -> Path:
    """A feature of -inf, which logits may be and features not: times a weight of 0 it is NaN."""
    return put_rows(folder, "factored", _set("features", (9, 3), -np.inf))


@hostile(
    "v000-00000.h5: row_scale is no power of two that a row can have", at="verify", alike="features_beyond_all_numbers"
)
def row_without_a_scale(folder: Path) -> Path:
    """A scale of 0, which marks a sample that has no teacher: the row is there, and nothing is learnt from it."""
    return put_rows(folder, "factored", _set("row_scale", 9, 0))


@hostile(
    "v000-00000.h5: row_scale is no power of two that a row can have", at="verify", alike="features_beyond_all_numbers"
)
def features_turned_round(folder: Path) -> Path:
    """A negative scale: the logits of the opposite image, and no bias."""
    return put_rows(folder, "factored", _set("row_scale", 9, -1))


# --------------------------------------------------------------------------- soft targets


@hostile("v000-00000.h5: log_probs are of probabilities that do not sum to 1", at="verify")
def probability_above_one(folder: Path) -> Path:
    """A probability of e: a loss below 0, which training drives to minus infinity."""
    return put_rows(folder, "soft_targets", _set("log_probs", (9, 3), 1.0))


@hostile(
    "v000-00000.h5: log_probs are of probabilities that do not sum to 1", at="verify", alike="probability_above_one"
)
def mass_of_the_rest_that_is_none(folder: Path) -> Path:
    """The mass of all other classes taken away, with which the rest of the row would be renormalised."""
    return put_rows(folder, "soft_targets", _set("log_rest", 9, -np.inf))


@hostile("v000-00000.h5: log_rest of sample 9 holds NaN", at="verify")
def mass_of_the_rest_that_is_no_number(folder: Path) -> Path:
    """NaN in the one number that a row has for most of its classes."""
    return put_rows(folder, "soft_targets", _set("log_rest", 9, np.nan))


@hostile("v000-00000.h5: kept_classes has a class beyond the last", at="verify")
def soft_target_of_a_class_beyond_the_last(folder: Path) -> Path:
    """Class 65,535 of 64, an index behind the student's logits."""
    return put_rows(folder, "soft_targets", _set("kept_classes", (9, 3), 65_535))


@hostile("v000-00000.h5: kept_classes has a class twice in a row", at="verify")
def soft_target_of_a_class_twice(folder: Path) -> Path:
    """One class with two probabilities, counted twice on the teacher's side and once on the student's."""

    def change(arrays: Arrays) -> None:
        arrays["kept_classes"][9, 3] = arrays["kept_classes"][9, 7]

    return put_rows(folder, "soft_targets", change)
