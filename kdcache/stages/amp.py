"""Automatic mixed precision: which numbers the student's forward and backward pass compute in.

Weights, optimiser state and losses stay float32. float16 gradients underflow below 6e-8, so the loss is
scaled (and steps with an overflow are skipped, as torch's GradScaler does); bfloat16 needs none of that.
"""

from __future__ import annotations

import torch

from kdcache.errors import UsageError
from kdcache.stages.choices import AMP

AMP_DTYPES = dict(zip(AMP, (torch.float32, torch.bfloat16, torch.float16), strict=True))


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """The context for a forward pass; does nothing for `none`.

    Raises:
        UsageError: an unknown name.
    """
    if amp not in AMP_DTYPES:
        raise UsageError(f"amp {amp!r} is not known; choose one of {', '.join(AMP_DTYPES)}")
    dtype = torch.bfloat16 if amp == "none" else AMP_DTYPES[amp]  # float32 is refused even when disabled
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "none")


def grad_scaler(amp: str, device: torch.device) -> torch.amp.GradScaler:
    """The scaler for a backward pass; passes everything through unless `fp16`."""
    return torch.amp.GradScaler(device.type, enabled=amp == "fp16")
