"""Teacher SPECs: `pt2:FILE`, `run:FOLDER` or `module:factory`, with `--weights FILE` for a state dict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kdcache.errors import UsageError
from kdcache.stages import student_of_run, teacher_pt2
from kdcache.stages.loaded_data import describe_file
from kdcache.stages.specs import PYTHON, Spec, SpecKind, call_factory, describe, recorded_spec
from kdcache.stages.weights import load_weights, state_sha256

TEACHER = SpecKind("teacher", {"pt2": teacher_pt2.USAGE, "run": student_of_run.USAGE})


@dataclass(frozen=True, eq=False)
class LoadedTeacher:
    """A teacher in eval mode whose parameters take no gradient, on the CPU or where its factory put it.

    `transform` turns an input of the data set into one of the teacher (None: they are the same); `max_batch` is the
    largest batch that an exported program takes (None: any).
    """

    module: nn.Module
    transform: Callable[[Any], Any] | None
    provenance: dict[str, Any]
    max_batch: int | None = None


def load_teacher(text: str, *, weights: Path | None = None) -> LoadedTeacher:
    """The teacher that a SPEC names.

    Args:
        text: `pt2:FILE`, `run:FOLDER` (see `student_of_run`), or `module:factory` whose factory returns an
            `nn.Module` or `(module, transform)`.
        weights: a `.safetensors`, `.pt` or `.pth` state dict to fill the module with.

    Raises:
        UsageError: an unknown scheme, a file or module that is not there, a factory that returns something else, a
            pickled module, an exported program with a fixed batch.
        MismatchError: the weights do not fit the module.
        DataError: a damaged file.
        KDCacheError: the factory raised.
    """
    if Path(text).suffix in (".pt", ".pth") and not text.startswith("pt2:"):
        raise UsageError(
            f"teacher SPEC {text!r} is a file: a pickled module is never loaded, since unpickling runs code from the "
            f"file. Give the module as module:factory and its state dict as --weights FILE, or export it to pt2:FILE"
        )
    spec = TEACHER.parse(text)
    if spec.scheme == PYTHON:
        module, transform = _call_teacher_factory(spec)
        provenance: dict[str, Any] = {"spec": recorded_spec(text)}
        max_batch = None
    elif spec.scheme == "run":
        found = student_of_run.student_of_run(Path(spec.rest), weights=weights)
        module, transform, weights, max_batch = found.module, None, None, None
        provenance = {"spec": recorded_spec(text), "weights": describe_file(found.weights)}
        provenance["generation"] = found.generation
    else:
        path = Path(spec.rest)
        if weights is not None:
            raise UsageError(f"--weights does not go with {text!r}: an exported program brings its own weights")
        module, transform = teacher_pt2.load_pt2(path), None
        provenance = {"spec": recorded_spec(text), "file": describe_file(path)}
        max_batch = module.max_batch
    if weights is not None:
        load_weights(module, weights)
        provenance["weights"] = describe_file(weights)
    module.eval().requires_grad_(False)
    provenance["state_sha256"] = state_sha256(module)
    provenance["parameters"] = sum(parameter.numel() for parameter in module.parameters())
    return LoadedTeacher(module, transform, provenance, max_batch)


def _call_teacher_factory(spec: Spec) -> tuple[nn.Module, Callable[[Any], Any] | None]:
    returned = call_factory(spec, TEACHER)
    if isinstance(returned, nn.Module):
        return returned, None
    if isinstance(returned, tuple) and len(returned) == 2:
        module, transform = returned
        if isinstance(module, nn.Module) and (transform is None or callable(transform)):
            return module, transform
        found = f"a tuple of {describe(module)} and {describe(transform)}"
    else:
        found = describe(returned)
    raise UsageError(f"{spec.rest} returned {found}; expected an nn.Module or (nn.Module, transform)")
