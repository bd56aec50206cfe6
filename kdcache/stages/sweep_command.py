"""A run's options as the `kdcache distill` command that repeats it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection
from typing import Any

from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.option import flag

_NOT_SAID = ("resume", "quiet")


def distill_command(options: DistillOptions, *, named: Collection[str] = ()) -> str:
    """The options that are not the default, and those `named` whatever they are, quoted for a shell.

    >>> distill_command(DistillOptions(data="digits:train", alpha=0.5, loss=("dkd:beta=2", "js*0.5")))
    "kdcache distill --data digits:train --alpha 0.5 --loss dkd:beta=2 --loss 'js*0.5'"
    """
    words = ["kdcache", "distill"]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value is None or (value == field.default and field.name not in named) or field.name in _NOT_SAID:
            continue
        for one in value if isinstance(value, (tuple, list)) else [value]:
            words += [flag(field.name)] if one is True else [flag(field.name), text_of(one)]
    return shlex.join(words)


def text_of(value: Any) -> str:
    """A value as it is typed."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
