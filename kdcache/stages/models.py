"""The built-in students: a multilayer perceptron and a small convolutional network.

Both normalise per sample or not at all. Batch norm would make a row's loss depend on the batch, the ranks and the
accumulation steps it shares; group norm does not, and here it trains as fast (3x32x32, 2 cores: 3,900 rows/s against
3,500 for a network of 205,000 parameters).

Each has a `recipe` of plain values, by which `built` makes it again: a run's record names its student so.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kdcache.errors import UsageError

# Channels of the three stages.
CNN_WIDTHS = {
    "TINY": (8, 16, 32),
    "SMALL": (24, 48, 96),
    "BASE": (64, 128, 256),
}

_CHANNELS_PER_GROUP = 8
_LARGE_PIXELS = 16
_MOST_LAYERS = 1000  # of a recipe, which may list millions


class MLP(nn.Sequential):
    """Linear layers with ReLU between them; takes (N, ...) and flattens it.

    Args:
        widths: inputs, hidden layers, classes; at least two.

    >>> import torch
    >>> MLP((784, 128, 10))(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, widths: Sequence[int]) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            if index:
                layers.append(nn.ReLU())
            layers.append(nn.Linear(inputs, outputs))
        super().__init__(*layers)
        self.recipe: dict[str, Any] = {"kind": "mlp", "widths": list(widths)}


class CNN(nn.Module):
    """Three stages of two 3x3 convolutions, the second with a shortcut, then the mean over positions.

    Every stage halves height and width; the first does not where an image is at most 16 pixels high or wide.
    With 3x32x32 inputs and 10 classes: TINY 19,000 parameters, SMALL 163,000, BASE 1,150,000.

    Args:
        size: a key of `CNN_WIDTHS`.
        in_channels: of the images.
        num_classes: C.
        pixels: the smaller of an image's height and width.
    """

    def __init__(self, size: str, *, in_channels: int, num_classes: int, pixels: int) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        channels = in_channels
        for index, width in enumerate(CNN_WIDTHS[size]):
            stride = 1 if index == 0 and pixels <= _LARGE_PIXELS else 2
            stages += [_convolution(channels, width, stride), _Shortcut(_convolution(width, width, 1))]
            channels = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)
        counts = {"in_channels": in_channels, "num_classes": num_classes, "pixels": pixels}
        self.recipe: dict[str, Any] = {"kind": "cnn", "size": size, **counts}

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C) of images (N, in_channels, H, W)."""
        features: Tensor = self.stages(images)
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


def built(recipe: Any) -> nn.Module:
    """The network of a recipe, with random weights.

    Args:
        recipe: plain values, as read from a file; nothing in them names code.

    Raises:
        UsageError: not the recipe of a network of this file.
    """
    if isinstance(recipe, dict):
        widths, size = recipe.get("widths"), recipe.get("size")
        counts: dict[str, Any] = {name: recipe.get(name) for name in ("in_channels", "num_classes", "pixels")}
        has_layers = isinstance(widths, list) and 1 < len(widths) <= _MOST_LAYERS and all(map(_is_count, widths))
        if widths is not None and has_layers and recipe.get("kind") == "mlp":
            return MLP(widths)
        if recipe.get("kind") == "cnn" and size in tuple(CNN_WIDTHS) and all(map(_is_count, counts.values())):
            return CNN(size, **counts)
    raise UsageError(f"{recipe!r:.200} is not the recipe of a built-in student")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 10**8


class _Shortcut(nn.Module):
    """What goes in plus what the inner module makes of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, features: Tensor) -> Tensor:
        changed: Tensor = self.inner(features)
        return features + changed


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(outputs // _CHANNELS_PER_GROUP, outputs),
        nn.ReLU(),
    )
