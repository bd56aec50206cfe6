"""The options of the `precompute` stage: one frozen record, from which the command line is generated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.errors import UsageError
from kdcache.format.encodings import DTYPES, EncodingChoice
from kdcache.format.topk import temperatures_of
from kdcache.format.view_seed import MAX_SEED, check_views
from kdcache.stages.choices import AMP
from kdcache.stages.option import flag, option

TEACHER_SAW = ("yes", "no", "unknown")
LABELS = ("all", "known", "none")
DTYPE_HELP = "Stored type of all logits; float16 keeps the row maximum apart, int8 and int4 the top 8 in float16."
TOP_K_HELP = "Store the K largest logits of a row (and its label's), and sums over the others."
TEMPERATURES_HELP = (
    "With --top-k: where the sums are taken, such as 1,2,4 (the default); z2 for twice the row's standard deviation."
)


@dataclass(frozen=True)
class PrecomputeOptions:
    """What `precompute` is asked to do; every field has a default and a help text in its metadata.

    `batch_size` and `threads` belong to the dump: another value moves float32 logits in the last bit, so a
    resumed dump must use the same. Ranks, workers and launches may change freely.
    """

    teacher: str | None = option(None, "Teacher: module:factory, pt2:FILE or run:FOLDER.", group="inputs")
    weights: Path | None = option(None, "State dict (.pt or .safetensors) for the teacher.", group="inputs")
    data: str | None = option(
        None, "Data: digits:train, npz:FILE, idx:FOLDER:train, folder:PATH, module:factory ...", group="inputs"
    )
    out: Path | None = option(None, "Folder of the cache, or a name in .h5 for one file.", group="inputs")
    output_key: str | None = option(None, "Where the logits are in the teacher's output.", group="inputs")
    limit: int | None = option(None, "Only the first N samples.", group="inputs")

    dtype: str = option("float16", DTYPE_HELP, group="cache", choices=DTYPES)
    top_k: int | None = option(None, TOP_K_HELP, group="cache")
    temperatures: str | None = option(None, TEMPERATURES_HELP, group="cache")
    factored: str | None = option(
        None, "Store the input of this layer, the teacher's last nn.Linear, and the layer once.", group="cache"
    )
    shard_rows: int | None = option(None, "Rows of a shard (default: up to 131,072, and 256 MiB).", group="cache")
    teacher_saw: str = option("unknown", "Was the teacher trained on these rows?", group="cache", choices=TEACHER_SAW)
    labels: str = option(
        "all",
        "Labels to store: all must be classes of the teacher; those that are; or none, where classes differ.",
        group="cache",
        choices=LABELS,
    )
    licence: str | None = option(None, "Licence and terms of the logits, for the card.", group="cache")
    augment: str | None = option(
        None,
        "Augmentation that makes the views: crop4,hflip, shift2, hflip,mixup0.2 ... or module:factory.",
        group="cache",
    )
    views: int = option(1, "Views of each sample.", group="cache")
    seed: int = option(0, "Seed of the views.", group="cache")
    overwrite: bool = option(False, "Replace what is in --out.", group="cache")

    batch_size: int = option(256, "Rows of a forward pass.", group="machine")
    workers: int = option(0, "DataLoader workers of a process.", group="machine")
    device: str = option("auto", "Device: auto, cpu, cuda, cuda:0 ...", group="machine")
    amp: str = option("none", "Precision of the forward pass.", group="machine", choices=AMP)
    threads: int | None = option(None, "Threads of torch on the CPU (default: what torch chooses).", group="machine")
    shard: str | None = option(None, "I/N: take only every N-th shard, from the I-th (0 to N-1).", group="machine")

    dry_run: bool = option(False, "Measure and report, write nothing.", group="run")
    epochs: int = option(30, "Epochs of a student, for the break-even of --dry-run.", group="run")
    quiet: bool = option(False, "No progress on stderr.", group="run")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices and value not in choices:
                raise UsageError(f"{flag(field.name)} {value!r} is not known; choose one of {', '.join(choices)}")
        for name, least in (
            ("batch_size", 1),
            ("workers", 0),
            ("limit", 1),
            ("shard_rows", 1),
            ("threads", 1),
            ("epochs", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{flag(name)} must be at least {least}, found {value}")
        check_views(self.views)
        if not 0 <= self.seed <= MAX_SEED:
            raise UsageError(f"--seed must be 0 to 2**63 - 1, found {self.seed}")
        share_of(self.shard)
        choice_of(self.dtype, self.top_k, self.temperatures)
        if self.factored is not None and (self.dtype != "float16" or self.top_k is not None):
            raise UsageError("--factored stores float16 features of all classes: leave --dtype and --top-k out")

    @property
    def encoding(self) -> EncodingChoice:
        """What the options say about the encoding."""
        return choice_of(self.dtype, self.top_k, self.temperatures)


def choice_of(dtype: str, top_k: int | None, temperatures: str | Sequence[float | str] | None) -> EncodingChoice:
    """The encoding that three options name.

    Raises:
        UsageError: they cannot be meant, or not together.
    """
    if temperatures is not None:
        temperatures = temperatures_of(temperatures) if isinstance(temperatures, str) else tuple(temperatures)
    return EncodingChoice(dtype, top_k, temperatures)


def options_of(settings: dict[str, Any]) -> PrecomputeOptions:
    """The record for keyword arguments.

    Raises:
        UsageError: an unknown name, or a value out of range.
    """
    known = {f.name for f in dataclasses.fields(PrecomputeOptions)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise UsageError(f"precompute has no setting {unknown[0]!r}; it takes {', '.join(sorted(known))}")
    return PrecomputeOptions(**settings)


def share_of(text: str | None) -> tuple[int, int]:
    """(I, N) from `I/N`; (0, 1) if not given.

    Raises:
        UsageError: not of that form, or I not below N.
    """
    if text is None:
        return 0, 1
    first, slash, second = text.partition("/")
    if not slash or not first.isdecimal() or not second.isdecimal() or int(first) >= int(second):
        raise UsageError(f"--shard is I/N with 0 <= I < N, for example 0/4; found {text!r}")
    return int(first), int(second)
