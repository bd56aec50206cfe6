"""Names and defaults that options of the command line show, apart from the torch code that they stand for.

`kdcache distill --help` and shell completion read them without importing torch.
"""

from __future__ import annotations

from collections.abc import Mapping

AMP = ("none", "bf16", "fp16")
OPTIMIZERS = ("sgd", "adamw")
NOVEL = ("restricted", "bucket")
SCHEDULES = ("cosine", "constant", "step")
DEFAULT_LR = {"sgd": 0.1, "adamw": 1e-3}
DEFAULT_WEIGHT_DECAY = {"sgd": 5e-4, "adamw": 1e-2}


def listed(defaults: Mapping[str, float]) -> str:
    """Defaults that depend on a choice, for a help text.

    >>> listed({"sgd": 0.1, "adamw": 1e-3})
    '0.1 for sgd, 0.001 for adamw'
    """
    return ", ".join(f"{value:g} for {name}" for name, value in defaults.items())
