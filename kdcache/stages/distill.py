"""The `distill` stage: a student learns from labels and cached teacher logits, top to bottom.

One step: draw the global batch, run this rank's pieces of it forward and backward, sum gradients and
denominators over ranks, divide once, update. So the loss is the mean over the whole batch (design,
section 7), whatever the number of ranks and pieces, and a loop written by hand over the same rows gets
the same weights bit for bit.

Nothing in a step waits for a GPU: losses stay on the device until a line of metrics is due.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from kdcache.errors import DataError, InterruptedRunError, KDCacheError
from kdcache.stages import checkpoint, resuming
from kdcache.stages.amp import autocast, grad_scaler
from kdcache.stages.calls import call_model, forward_names, take_apart
from kdcache.stages.data import LoadedData
from kdcache.stages.distill_inputs import Source, build_loader, check_signal, open_source, open_student
from kdcache.stages.distill_options import DistillOptions, portable, resolve
from kdcache.stages.evaluate import batches_of_rank, evaluate, is_better
from kdcache.stages.metrics import MetricsLog
from kdcache.stages.objective import Objective
from kdcache.stages.optim import Schedule, build_optimizer, set_lr
from kdcache.stages.order import Order, StepSampler
from kdcache.stages.parallel import Team, team
from kdcache.stages.progress import Progress
from kdcache.stages.run_record import describe_source, now, prepare_folder, read_record, versions, write_record
from kdcache.stages.signals import StopRequest, graceful_signals
from kdcache.store.cache import Cache


@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run gives.

    Attributes:
        student: trained in place, on the run's device.
        out: the run's folder, None for a run without one.
        steps: optimiser steps done, those of earlier processes included.
        last: metrics of the last evaluation, and the last `loss`.
        best: metrics of the best evaluation with its `step`; empty without validation data.
        record: the content of run.json.
    """

    student: nn.Module
    out: Path | None
    steps: int
    last: dict[str, float]
    best: dict[str, float]
    record: dict[str, Any]
