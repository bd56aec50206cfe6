"""How kdcache calls a model: `model(item[0])` for tuple items, `model(**inputs)` for dict items.

The output is a tensor, has a tensor `logits` (as in transformers), or is picked by `output_key`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import KDCacheError, LogitsError, UsageError
from kdcache.stages.specs import describe, one_line
from kdcache.train.items import NOT_INPUTS, first_input


def call_model(model: nn.Module, batch: Any, *, output_key: str | None = None, what: str = "model") -> Tensor:
    """A model's output for a batch as a DataLoader gives it.

    Args:
        model: called once.
        batch: a tensor; a tuple or list, whose first element is the input; or a dict, of which the keys that `forward`
            names are passed (all of them where it takes `**kwargs`), but never labels, ids or teacher rows
            (`kdcache.train.items.NOT_INPUTS`).
        output_key: key, attribute or position of the logits in the output.
        what: `teacher` or `student`, for the messages.

    Returns:
        the logits, as the model gives them; usually (N, C) or (N, C, ...).

    Raises:
        DataError: an empty tuple or list.
        UsageError: a dict batch lacks an argument of `forward`, or `output_key` picks nothing.
        LogitsError: the output, or what was picked from it, is not a tensor.
        KDCacheError: the model raised; its error is chained.
    """
    try:
        if isinstance(batch, Mapping):
            output = model(**_forward_inputs(model, batch, what))
        else:
            output = model(first_input(batch))
    except KDCacheError:
        raise
    except Exception as error:
        raise KDCacheError(f"the {what} failed on {_describe_batch(batch)}: {one_line(error)}") from error
    return _pick(output, output_key, what)


def move_to_device(value: Any, device: torch.device) -> Any:
    """The tensors in nested dicts, tuples and lists on the device; from pinned memory the copy does not wait."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: move_to_device(inner, device) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        moved = [move_to_device(inner, device) for inner in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)  # a namedtuple, or not
    return value


def _forward_inputs(model: nn.Module, batch: Mapping[str, Any], what: str) -> dict[str, Any]:
    offered = {key: value for key, value in batch.items() if key not in NOT_INPUTS}
    parameters = _parameters(model)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        offered = {p.name: offered[p.name] for p in parameters if p.name in offered}
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in offered
    ]
    if missing or not offered:
        raise UsageError(
            f"the {what}'s forward takes {', '.join(p.name for p in parameters) or 'no arguments'}; the items are "
            f"dicts with {', '.join(map(str, batch)) or 'no keys'}, which lack {', '.join(missing) or 'any of them'}; "
            f"rename the keys or wrap the model"
        )
    return offered


def _parameters(model: nn.Module) -> Sequence[inspect.Parameter]:
    named: Sequence[str] | None = getattr(model, "forward_keys", None)
    if named is not None:  # an exported program, whose forward takes anything
        return [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in named]
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return _parameters(model.module)
    return list(inspect.signature(model.forward).parameters.values())


def _pick(output: Any, output_key: str | None, what: str) -> Tensor:
    if output_key is None:
        picked = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(picked, Tensor):
            raise LogitsError(
                f"the {what} returned {_describe_output(output)}; expected a tensor or an object with a tensor "
                f"`logits`; pick one with --output-key (output_key=)"
            )
        return picked
    if isinstance(output, Mapping) and output_key in output:
        picked = output[output_key]
    elif isinstance(output, (tuple, list)) and output_key.isdecimal() and int(output_key) < len(output):
        picked = output[int(output_key)]
    elif not isinstance(output, Tensor) and hasattr(output, output_key):
        picked = getattr(output, output_key)
    else:
        raise UsageError(f"the {what} returned {_describe_output(output)}, which has no {output_key!r} (output_key)")
    if not isinstance(picked, Tensor):
        raise LogitsError(f"the {what}'s output {output_key!r} is {describe(picked)}; expected a tensor")
    return picked


def _describe_output(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"{describe(output)} with the keys {', '.join(map(str, output)) or '(none)'}"
    if isinstance(output, (tuple, list)):
        return f"{describe(output)} of {len(output)}"
    return describe(output)


def _describe_batch(batch: Any) -> str:
    value = batch if isinstance(batch, Mapping) else first_input(batch)
    if isinstance(value, torch.Tensor):
        return f"an input of shape {tuple(value.shape)} and {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"items with the keys {', '.join(map(str, value))}"
    return describe(value)
