"""`--factored LAYER`: the last linear layer of a teacher, whose input is stored in place of the logits.

A hook takes the input of the layer while the teacher runs. What comes behind the layer would be lost, so its output
must be the teacher's output: of each batch the stored rows are decoded and compared.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import LogitsError, UsageError
from kdcache.format.factored import Factored
from kdcache.format.known_heads import head_on
from kdcache.stages.teacher_pt2 import ExportedTeacher
from kdcache.store.head_writer import HeadContent, head_content
from kdcache.train.encode_features import LayerInputs, encode_features, tolerances

_BEHIND = (
    "what comes behind the layer (a softmax, a temperature or scale, a bias, a mask) is not stored: dump without "
    "--factored, or let the teacher return the output of the layer (see --output-key)"
)


@dataclass(frozen=True, eq=False)
class LastLayer:
    """The layer of a teacher that `--factored` names."""

    name: str
    layer: nn.Linear

    def run(self, forward: Callable[[], Tensor]) -> tuple[Tensor, LayerInputs]:
        """The logits of a batch (N, C), and what went into the layer on the way.

        Args:
            forward: runs the teacher once.

        Raises:
            UsageError: the layer was not called once, or not with one input (N, D) a sample.
        """
        seen: list[LayerInputs] = []

        def keep(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            value = given[0] if given else named.get("input")
            if isinstance(value, Tensor) and isinstance(output, Tensor):
                seen.append(LayerInputs(value.detach(), output.dtype))

        handle = self.layer.register_forward_hook(keep, with_kwargs=True)
        try:
            logits = forward()
        finally:
            handle.remove()
        if len(seen) != 1:
            raise UsageError(
                f"--factored {self.name}: the layer was called {len(seen)} times in a forward pass of the teacher, "
                "expected once; it is shared, compiled or used in another way than by a call. Dump without --factored"
            )
        inputs = seen[0]
        if logits.ndim != 2 or inputs.values.ndim != 2 or len(inputs.values) != len(logits):
            raise UsageError(
                f"--factored {self.name}: the layer got an input of shape {tuple(inputs.values.shape)} for logits of "
                f"shape {tuple(logits.shape)}, expected (N, D) and (N, C); dump without --factored"
            )
        return logits, inputs

    def encoding_of(self, logits: Tensor, inputs: LayerInputs) -> tuple[Factored, HeadContent]:
        """The encoding of rows that this layer makes, and the layer's file.

        Args:
            logits: (N, C) of a first batch.
            inputs: of the layer for that batch.

        Raises:
            LogitsError: the teacher's output is not that of the layer, or weights are NaN or infinite.
        """
        content = self._content()
        classes, features = content.record.arrays["weight"].shape
        encoding = Factored((classes,), features, content.record.sha256)
        self._check(encoding, logits, inputs)
        return encoding, content

    def _content(self) -> HeadContent:
        with torch.no_grad():
            weight = self.layer.weight.detach().float().cpu()
            bias = weight.new_zeros(len(weight)) if self.layer.bias is None else self.layer.bias.detach().float().cpu()
            return head_content(weight.numpy(), bias.numpy())

    def _check(self, encoding: Factored, logits: Tensor, inputs: LayerInputs) -> None:
        if logits.shape[1] != encoding.num_classes:
            raise LogitsError(
                f"--factored {self.name}: the layer has {encoding.num_classes} outputs, the teacher returns "
                f"{logits.shape[1]} logits; {_BEHIND}"
            )
        with torch.inference_mode():
            arrays = encode_features(encoding, inputs, logits)
            difference = (encoding.decode(arrays) - logits.float()).abs()
            weight, bias = head_on(encoding.head, logits.device)
            allowed = tolerances(encoding, arrays, weight, bias, inputs.computed_in)
            if not bool(torch.isfinite(arrays["features"]).all()):
                raise LogitsError(f"--factored {self.name}: the input of the layer holds NaN or infinity")
            if bool((difference <= allowed).all()):
                return
            excess = torch.nan_to_num(difference - allowed, nan=torch.inf)
            worst = int(excess.argmax())
        found, limit = float(difference.flatten()[worst]), float(allowed.flatten()[worst])
        raise LogitsError(
            f"--factored {self.name}: weight @ input + bias of the layer differs from the teacher's logits by "
            f"{found:.3g}, where rounding explains {limit:.3g}; {_BEHIND}"
        )


def last_layer(teacher: nn.Module, name: str) -> LastLayer:
    """The linear layer of a teacher by its dotted name.

    Raises:
        UsageError: an exported program, which has no modules; no module of this name (close names are suggested), or
            one that is not an `nn.Linear`.
    """
    if isinstance(teacher, ExportedTeacher):
        raise UsageError(
            f"--factored {name} needs the teacher's modules, and an exported program (pt2:) has none: give the teacher "
            "as module:factory"
        )
    modules = dict(teacher.named_modules(remove_duplicate=False))
    found = modules.get(name)
    linear = [n for n, module in modules.items() if isinstance(module, nn.Linear)]
    if not name or found is None:
        close = difflib.get_close_matches(name, linear, n=3) or linear[-3:]
        advice = f"its linear layers are {', '.join(close)}" if close else "it has no linear layer"
        raise UsageError(f"--factored {name!r}: the teacher has no layer of this name; {advice}")
    if not isinstance(found, nn.Linear):
        inside = [n for n in linear if n.startswith(f"{name}.")][-3:]
        more = f"; its linear layers are {', '.join(inside)}" if inside else ""
        raise UsageError(
            f"--factored {name}: that is a {type(found).__name__}, expected the final nn.Linear of the teacher{more}"
        )
    return LastLayer(name, found)


def smaller_layer(teacher: nn.Module, row_shape: tuple[int, ...], payload_bytes: int) -> str | None:
    """The name of a layer by which `--factored` would make smaller rows than `payload_bytes`; None if there is none.

    The last `nn.Linear` with as many outputs as the row has classes; whether it makes the logits is not tried.
    """
    if isinstance(teacher, ExportedTeacher) or len(row_shape) != 1:
        return None
    fitting = [
        (name, layer)
        for name, layer in teacher.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == row_shape[0]
    ]
    if not fitting or 2 * fitting[-1][1].in_features + 4 >= payload_bytes:
        return None
    return fitting[-1][0] or None
