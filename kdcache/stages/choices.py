"""Names and defaults that options of the command line show, apart from the torch code that they stand for.

`kdcache distill --help` and shell completion read them without importing torch.
"""

from __future__ import annotations

AMP = ("none", "bf16", "fp16")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "constant", "step")
DEFAULT_LR = {"sgd": 0.1, "adamw": 1e-3}
DEFAULT_WEIGHT_DECAY = {"sgd": 5e-4, "adamw": 1e-2}
