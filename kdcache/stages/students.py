"""Student SPECs: `mlp:784-128-10`, `cnn:SMALL` or `module:factory`.

A student is run once, on one item of the data, before training starts: a width or a class count that does not fit is
an error then, not after the data has been read.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from kdcache.errors import KDCacheError, MismatchError, UsageError
from kdcache.stages.calling import call_model, first_input
from kdcache.stages.models import CNN, CNN_WIDTHS, MLP
from kdcache.stages.specs import PYTHON, Spec, SpecKind, call_factory, describe, one_line

STUDENT = SpecKind("student", {"mlp": "mlp:784-128-10", "cnn": f"cnn:{'|'.join(CNN_WIDTHS)}"})

_WIDTHS = re.compile(r"[1-9]\d{0,7}(-[1-9]\d{0,7})+")


def load_student(text: str, *, num_classes: int | None, example: Any) -> nn.Module:
    """The student that a SPEC names, in training mode, on the CPU, initialised from torch's random state.

    Args:
        text: `mlp:` with the widths of all layers, `cnn:` with a size, or `module:factory`; a factory is called with
            `num_classes=` if its signature has it.
        num_classes: C of the cache or the data; None where neither knows it.
        example: one item of the data set, as it returns it.

    Raises:
        UsageError: an unknown scheme or size, a factory that returns no `nn.Module`, `num_classes` needed but unknown.
        MismatchError: the student does not take the example, or has another number of classes.
        KDCacheError: the factory or the student raised.
    """
    spec = STUDENT.parse(text)
    if spec.scheme == PYTHON:
        student = _call_student_factory(spec, num_classes)
    elif spec.scheme == "mlp":
        student = _build_mlp(spec, num_classes, example)
    else:
        student = _build_cnn(spec, num_classes, example)
    check_student(student, example, num_classes=num_classes)
    return student


def check_student(student: nn.Module, example: Any, *, num_classes: int | None, output_key: str | None = None) -> None:
    """Runs a student on one item, without gradients and in eval mode, and looks at its output.

    Raises:
        MismatchError: not (1, C, ...) with C = `num_classes`.
        KDCacheError: the student raised, or the item cannot be batched.
    """
    try:
        batch = default_collate([example])
    except (TypeError, RuntimeError) as error:
        raise KDCacheError(f"an item of the data set cannot be batched: {one_line(error)}") from error
    was_training = student.training
    student.eval()
    try:
        with torch.no_grad():
            logits = call_model(student, batch, output_key=output_key, what="student")
    finally:
        student.train(was_training)
    if logits.ndim < 2 or (num_classes is not None and logits.shape[1] != num_classes):
        expected = "(1, classes, ...)" if num_classes is None else f"(1, {num_classes}, ...): {num_classes} classes"
        raise MismatchError(
            f"the student's output for one sample has the shape {tuple(logits.shape)}; expected {expected}. Change the "
            f"student's last layer"
        )


def _build_mlp(spec: Spec, num_classes: int | None, example: Any) -> nn.Module:
    if not _WIDTHS.fullmatch(spec.rest):
        raise UsageError(f"student SPEC {spec.text!r}: expected all widths, input to classes: {STUDENT.usages['mlp']}")
    widths = [int(width) for width in spec.rest.split("-")]
    x = _image_or_vector(spec, example)
    if x.numel() != widths[0]:
        raise MismatchError(
            f"student {spec.text} takes {widths[0]} values, an input of the data has {x.numel()} {tuple(x.shape)}; use "
            f"{_mlp_text([x.numel(), *widths[1:]])}"
        )
    if num_classes is not None and widths[-1] != num_classes:
        raise MismatchError(
            f"student {spec.text} has {widths[-1]} classes, the cache or the data has {num_classes}; use "
            f"{_mlp_text([*widths[:-1], num_classes])}"
        )
    return MLP(widths)


def _mlp_text(widths: list[int]) -> str:
    return f"mlp:{'-'.join(map(str, widths))}"


def _build_cnn(spec: Spec, num_classes: int | None, example: Any) -> nn.Module:
    if spec.rest not in CNN_WIDTHS:
        raise UsageError(
            f"student SPEC {spec.text!r}: there is no size {spec.rest!r}; expected {STUDENT.usages['cnn']}"
        )
    if num_classes is None:
        raise UsageError(
            f"student {spec.text} needs the number of classes, which neither a cache nor the data gives; add `classes` "
            f"to the data, or use mlp: or module:factory"
        )
    x = _image_or_vector(spec, example)
    if x.ndim != 3:
        raise MismatchError(
            f"student {spec.text} takes images (channels, height, width); the data has {tuple(x.shape)}"
        )
    return CNN(spec.rest, in_channels=x.shape[0], num_classes=num_classes, pixels=min(x.shape[1:]))


def _image_or_vector(spec: Spec, example: Any) -> Tensor:
    x = first_input(example)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        what = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else describe(x)
        raise MismatchError(
            f"student {spec.text} takes float tensors, the data gives {what}; use a student of your own (module:factory)"
        )
    return x


def _call_student_factory(spec: Spec, num_classes: int | None) -> nn.Module:
    student = call_factory(spec, STUDENT, num_classes=num_classes)
    if not isinstance(student, nn.Module):
        raise UsageError(f"{spec.rest} returned {describe(student)}; expected an nn.Module")
    return student
