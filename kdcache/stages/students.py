"""Student SPECs: `mlp:784-128-10`, `cnn:SMALL`, `run:FOLDER` or `module:factory`.

The built-in ones are compared with the data and the class count before they are built; what a factory returns is
judged by its first output, when a run opens it.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdcache.errors import MismatchError, UsageError
from kdcache.stages import student_of_run
from kdcache.stages.models import CNN, CNN_WIDTHS, MLP
from kdcache.stages.specs import PYTHON, Spec, SpecKind, call_factory, describe

STUDENT = SpecKind(
    "student", {"mlp": "mlp:784-128-10", "cnn": f"cnn:{'|'.join(CNN_WIDTHS)}", "run": student_of_run.USAGE}
)

_WIDTHS = re.compile(r"[1-9]\d{0,7}(-[1-9]\d{0,7})+")


def load_student(text: str, *, num_classes: int | None, example: Any, instead: str | None = None) -> nn.Module:
    """The student that a SPEC names, in training mode, on the CPU, initialised from torch's random state.

    Args:
        text: `mlp:` with the widths of all layers, `cnn:` with a size, `run:` with the folder of a run, or
            `module:factory`; a factory is called with `num_classes=` if its signature has it.
        num_classes: C of the cache or the data; None where neither knows it.
        example: inputs of a batch, as a loader collates them: a tensor (N, ...) or a dict. One row is enough.
        instead: what is to be done about another number of classes, where that many would not help either.

    Raises:
        UsageError: an unknown scheme or size, a factory that returns no `nn.Module`, `num_classes` needed but unknown.
        MismatchError: a built-in student that does not take the example, or has another number of classes.
        KDCacheError: the factory raised.
    """
    spec = STUDENT.parse(text)
    if spec.scheme == PYTHON:
        return _call_student_factory(spec, num_classes)
    if spec.scheme == "run":
        return student_of_run.student_of_run(Path(spec.rest)).module
    if spec.scheme == "mlp":
        return _build_mlp(spec, num_classes, example, instead)
    return _build_cnn(spec, num_classes, example)


def _build_mlp(spec: Spec, num_classes: int | None, example: Any, instead: str | None) -> nn.Module:
    if not _WIDTHS.fullmatch(spec.rest):
        raise UsageError(f"student SPEC {spec.text!r}: expected all widths, input to classes: {STUDENT.usages['mlp']}")
    widths = [int(width) for width in spec.rest.split("-")]
    shape = _input_shape(spec, example)
    values = math.prod(shape)
    if values != widths[0]:
        raise MismatchError(
            f"student {spec.text} takes {widths[0]} values, an input of the data has {values} {shape}; use "
            f"{_mlp_text([values, *widths[1:]])}"
        )
    if num_classes is not None and widths[-1] != num_classes:
        advice = instead or f"the cache or the data has {num_classes}; use {_mlp_text([*widths[:-1], num_classes])}"
        raise MismatchError(f"student {spec.text} has {widths[-1]} classes, {advice}")
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
    shape = _input_shape(spec, example)
    if len(shape) != 3:
        raise MismatchError(f"student {spec.text} takes images (channels, height, width); the data has {shape}")
    return CNN(spec.rest, in_channels=shape[0], num_classes=num_classes, pixels=min(shape[1:]))


def _input_shape(spec: Spec, example: Any) -> tuple[int, ...]:
    """Shape of one input, without the N."""
    if not isinstance(example, Tensor) or not example.is_floating_point():
        what = f"a tensor of {example.dtype}" if isinstance(example, Tensor) else describe(example)
        raise MismatchError(
            f"student {spec.text} takes float tensors, the data gives {what}; use a student of your own "
            f"(module:factory)"
        )
    return tuple(example.shape[1:])


def _call_student_factory(spec: Spec, num_classes: int | None) -> nn.Module:
    student = call_factory(spec, STUDENT, num_classes=num_classes)
    if not isinstance(student, nn.Module):
        raise UsageError(f"{spec.rest} returned {describe(student)}; expected an nn.Module")
    return student
