"""Students that are small in another way: pruned, and quantisation-aware with weights of few bits.

torch.ao.quantization is deprecated and torchao is no dependency, so the fake-quantised layer is written out here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

WIDTHS = (64, 32, 10)
SHARE = 0.9


def plain(num_classes: int = WIDTHS[-1]) -> nn.Sequential:
    """64-32-10, as `mlp:64-32-10`."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, num_classes))


def prunable(num_classes: int = WIDTHS[-1]) -> nn.Sequential:
    """The same with masks that keep everything: what the state dict of a pruned student fits into (`--init`)."""
    net = plain(num_classes)
    for layer in layers(net):
        prune.identity(layer, "weight")
    return net


def pruned(net: nn.Sequential, share: float = SHARE) -> nn.Sequential:
    """Masks the smallest weights of all layers together, in place."""
    prune.global_unstructured([(layer, "weight") for layer in layers(net)], prune.L1Unstructured, amount=share)
    return net


def unmasked(net: nn.Sequential) -> nn.Sequential:
    """Plain weights with their zeros, in place."""
    for layer in layers(net):
        prune.remove(layer, "weight")
    return net


def layers(net: nn.Sequential) -> list[nn.Linear]:
    """The linear layers."""
    return [layer for layer in net if isinstance(layer, nn.Linear)]


class QuantizedLinear(nn.Linear):
    """A linear layer that trains as it will compute: int weights, uint8 inputs (Jacob et al., 1712.05877).

    Rounding has the gradient of the identity (`torch.fake_quantize_*`). The range of the inputs is a moving average of
    those of the training batches, kept in buffers.

    Args:
        inputs: width in.
        outputs: width out.
        bits: of a weight, 2 (-1, 0, 1) to 8.
    """

    low: Tensor
    high: Tensor

    def __init__(self, inputs: int, outputs: int, bits: int) -> None:
        super().__init__(inputs, outputs)
        self.largest = 2 ** (bits - 1) - 1
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, outputs) of inputs (N, inputs)."""
        if self.training:
            self._observe(inputs.detach())
        scale, zero = self.input_grid()
        rounded = torch.fake_quantize_per_tensor_affine(inputs, scale, zero, 0, 255)
        weight = torch.fake_quantize_per_channel_affine(
            self.weight, self.weight_scale(), self._zeros(), 0, -self.largest, self.largest
        )
        return nn.functional.linear(rounded, weight, self.bias)

    def weight_scale(self) -> Tensor:
        """(outputs,) the value of one step; half as wide where there are three values only, most of them small."""
        largest = self.weight.detach().abs().amax(dim=1)
        return (largest / (self.largest if self.largest > 1 else 2)).clamp(min=1e-8)

    def input_grid(self) -> tuple[Tensor, Tensor]:
        """Step and zero point () of the inputs."""
        scale = ((self.high - self.low) / 255).clamp(min=1e-8)
        return scale, torch.round(-self.low / scale).clamp(0, 255).to(torch.int32)

    def _observe(self, inputs: Tensor) -> None:
        low, high = inputs.min().clamp(max=0), inputs.max().clamp(min=0)
        rate = 1.0 if not self.high and not self.low else 0.05
        self.low.lerp_(low, rate)
        self.high.lerp_(high, rate)

    def _zeros(self) -> Tensor:
        return torch.zeros(self.out_features, dtype=torch.int32)


class IntegerLinear(nn.Module):
    """What a `QuantizedLinear` becomes: weights int8, sums of integers, one multiplication by the steps at the end."""

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    zero: Tensor
    bias: Tensor

    def __init__(self, trained: QuantizedLinear) -> None:
        super().__init__()
        scale, (input_scale, zero) = trained.weight_scale(), trained.input_grid()
        limit = trained.largest
        whole = torch.round(trained.weight.detach() / scale[:, None]).clamp(-limit, limit)
        self.register_buffer("weight", whole.to(torch.int8))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("zero", zero)
        self.register_buffer("bias", trained.bias.detach().clone())

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, outputs) of inputs (N, inputs)."""
        whole = (torch.round(inputs / self.input_scale) + self.zero).clamp(0, 255).to(torch.int32) - self.zero
        sums = whole @ self.weight.to(torch.int32).T
        return sums * (self.input_scale * self.weight_scale) + self.bias


def quantized(num_classes: int = WIDTHS[-1], bits: int = 8) -> nn.Sequential:
    """64-32-10 that trains for weights of so many bits."""
    return nn.Sequential(nn.Flatten(), QuantizedLinear(64, 32, bits), nn.ReLU(), QuantizedLinear(32, num_classes, bits))


def ternary(num_classes: int = WIDTHS[-1]) -> nn.Sequential:
    """Weights -1, 0 and 1 times one number for each output."""
    return quantized(num_classes, bits=2)


def converted(net: nn.Sequential) -> nn.Sequential:
    """The network in integers."""
    return nn.Sequential(*(IntegerLinear(part) if isinstance(part, QuantizedLinear) else part for part in net)).eval()


def rounded_after(net: nn.Sequential, bits: int) -> nn.Sequential:
    """A plain network's weights put into a quantised one that never trained: its inputs stay to be observed."""
    target = quantized(bits=bits)
    for mine, theirs in zip(layers(target), layers(net), strict=True):
        mine.weight.data.copy_(theirs.weight.data)
        mine.bias.data.copy_(theirs.bias.data)
    return target
