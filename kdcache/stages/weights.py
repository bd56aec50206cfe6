"""State dicts: reading them from files without running anybody's code, loading them strictly, naming them by a hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kdcache.errors import DataError, MismatchError, MissingExtraError, UsageError
from kdcache.stages.specs import describe, one_line

_SHOWN = 5


def load_weights(module: nn.Module, path: Path) -> None:
    """Fills a module from a `.safetensors`, `.pt` or `.pth` state dict, strictly.

    Raises:
        UsageError, DataError, MissingExtraError: as in `read_state_dict`.
        MismatchError: as in `load_strictly`.
    """
    load_strictly(module, read_state_dict(path), name=path.name)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors in a `.safetensors`, `.pt` or `.pth` file, on the CPU.

    Raises:
        UsageError: no such file, another suffix, or a file that holds more than a plain state dict: a pickled module
            is never loaded, since unpickling runs whatever code the file names.
        DataError: the file is damaged.
        MissingExtraError: safetensors is not installed.
    """
    if not path.is_file():
        raise UsageError(f"there is no weights file {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix not in (".pt", ".pth"):
        raise UsageError(f"weights file {path.name}: expected a name ending in .safetensors, .pt or .pth")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    # A refused pickle, a damaged zip and a text file each raise a type of their own, some of them from C++.
    except Exception as error:
        if type(error).__name__ == "UnpicklingError":
            raise UsageError(
                f"weights file {path.name} holds pickled objects, not only tensors (or is damaged); kdcache never "
                f"unpickles, since that runs code from the file. Save with torch.save(model.state_dict(), ...) and "
                f"give the module as module:factory"
            ) from error
        raise DataError(f"weights file {path.name} cannot be read: {one_line(error)}") from error
    return _check_state_dict(found, path.name)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], *, name: str) -> None:
    """Fills a module from a state dict; nothing is left over and nothing left out.

    Args:
        module: on the CPU or elsewhere.
        state: tensors under the module's names.
        name: of the weights file, for the messages.

    Raises:
        MismatchError: keys are missing, unexpected, or of another shape.
    """
    check_fits(module, state, name=name)
    try:
        module.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise MismatchError(f"weights file {name} does not fit {type(module).__name__}: {one_line(error)}") from error


def check_fits(module: nn.Module, state: Mapping[str, Tensor], *, name: str) -> None:
    """Compares names and shapes alone, so that the module may be on the meta device; see `load_strictly`."""
    expected = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    if missing or unexpected:
        hint = ""
        if state and all(key.startswith("module.") for key in state):
            hint = "; its keys begin with module.: save model.module.state_dict() of the DistributedDataParallel model"
        raise MismatchError(
            f"weights file {name} does not fit {type(module).__name__}: {_some('missing', missing)}, "
            f"{_some('unexpected', unexpected)}{hint}"
        )
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if not is_lazy(value) and state[key].shape != value.shape
    ]
    if shapes:
        raise MismatchError(f"weights file {name} does not fit {type(module).__name__}: {_some('wrong', shapes)}")


def state_sha256(module: nn.Module) -> str:
    """sha256 (hex) over the tensors of a module's state dict: names, dtypes, shapes and bytes, sorted by name.

    Equal on every device; parameters and persistent buffers count, what a module computes for itself does not.

    Raises:
        UsageError: a parameter that has no values yet (a lazy module, the meta device).
    """
    state = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, Tensor):
            continue
        if is_lazy(value) or value.is_meta:
            raise UsageError(
                f"the parameter {name} of {type(module).__name__} has no values yet; initialise it in the factory"
            )
        state.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        state.update(flat.view(torch.uint8).numpy().data)
    return state.hexdigest()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingExtraError.of("safetensors", extra="safetensors", what=f"the weights file {path.name}") from error
    try:
        return dict(load_file(path, device="cpu"))
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"weights file {path.name} cannot be read: {one_line(error)}") from error


def _check_state_dict(found: Any, name: str) -> dict[str, Tensor]:
    advice = "expected the state dict alone: torch.save(model.state_dict(), ...)"
    if not isinstance(found, Mapping):
        raise UsageError(f"weights file {name} holds {describe(found)}; {advice}")
    others = [str(key) for key, value in found.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise UsageError(f"weights file {name} is a dict in which {', '.join(others[:_SHOWN])} is no tensor; {advice}")
    return dict(found)


def _some(label: str, keys: list[str]) -> str:
    if not keys:
        return f"none {label}"
    return f"{len(keys)} {label} ({', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''})"
