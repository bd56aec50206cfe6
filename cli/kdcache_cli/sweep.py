"""`kdcache sweep`: many students from one cache, and which of them to take."""

from __future__ import annotations

from typing import Any

from kdcache.stages.sweep_options import command_record, from_command
from kdcache_cli.command import define
from kdcache_cli.output import emit


@define(
    "sweep",
    record=command_record(),
    examples=(
        "kdcache sweep --cache teacher.h5 --student mlp:64-32-10 --data digits:train --val digits:test "
        "--alpha 0.5,0.9 --temperature 1,2,4 --seed 0,1,2 --out sweep",
        "kdcache sweep --config run.toml --alpha 0.5,0.9 --loss kl --loss dkd:beta=2 --loss 'kl;js*0.5' --out s",
        "kdcache sweep --config run.toml --alpha 0.9 --seed 0,1,2 --label-fraction 0.01,0.05,0.2,1 --out labels",
        "kdcache sweep --config run.toml --alpha 0.1,0.5,0.9 --temperature 1,2,4 --random 5 --test npz:t.npz --out s",
    ),
)
def command(as_json: bool, **options: Any) -> None:
    """Train students over a grid of settings, several at once, and say which is best; the teacher is not loaded.

    LISTs are numbers with commas between them. Alpha 0, the labels alone, is part of every sweep, with the same seeds
    and optimiser steps and as many settings: see --labels-budget. Settings are chosen by their mean accuracy on --val
    over the seeds; the data of --test are looked at once, in the end, for the chosen one and for alpha 0. With
    --label-fraction each share of the labels is trained with and without the unlabelled rest. The same command with
    --resume goes on.
    """
    asked = from_command(**options)
    from kdcache.stages.sweep import sweep

    result = sweep(asked)
    emit(result.to_json(), as_json=as_json, text="\n".join(result.lines))
