"""Augmentations of plain tensors that need nothing but torch: for digits, MNIST and the like.

Each is a frozen record that is called with a tensor (..., H, W) and draws from torch's global generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from kdcache.errors import DataError


@final
@dataclass(frozen=True)
class Shift:
    """Moves an image by up to `pixels` in each direction; what comes in is 0."""

    pixels: int = 2

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """(..., H, W) of the same dtype."""
        height, width = _image_shape(image, "shift")
        down, right = (int(n) for n in torch.randint(-self.pixels, self.pixels + 1, (2,)))
        down, right = max(-height, min(height, down)), max(-width, min(width, right))
        moved = torch.zeros_like(image)
        source = image[..., _slice(-down, height), _slice(-right, width)]
        moved[..., _slice(down, height), _slice(right, width)] = source
        return moved


@final
@dataclass(frozen=True)
class Noise:
    """Adds Gaussian noise of standard deviation `std` to inputs of floating point."""

    std: float = 0.1

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """The shape and dtype of `values`."""
        if not isinstance(values, torch.Tensor) or not values.is_floating_point():
            raise DataError(f"noise needs a tensor of floating point, found {_kind(values)}")
        return values + torch.randn(values.shape, dtype=values.dtype) * self.std


@final
@dataclass(frozen=True)
class Erase:
    """Sets a box to 0, whose sides are each up to `share` of the image's (random erasing, Zhong et al., 2020)."""

    share: float = 0.5

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """(..., H, W) of the same dtype."""
        height, width = _image_shape(image, "erase")
        draws = torch.rand(4).tolist()
        tall, wide = (max(1, round(size * self.share * draws[i])) for i, size in enumerate((height, width)))
        top, left = int(draws[2] * (height - tall + 1)), int(draws[3] * (width - wide + 1))
        erased = image.clone()
        erased[..., top : top + tall, left : left + wide] = 0
        return erased


def _slice(by: int, size: int) -> slice:
    """Where a movement by `by` ends."""
    return slice(max(0, by), size + min(0, by))


def _image_shape(image: torch.Tensor, name: str) -> tuple[int, int]:
    if not isinstance(image, torch.Tensor) or image.ndim < 2:
        raise DataError(f"{name} needs a tensor (..., height, width), found {_kind(image)}")
    return image.shape[-2], image.shape[-1]


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
