"""`kdcache sweep`: many students from one cache, in several processes, and which of them to take.

    grid  ->  every setting checked  ->  runs (what is finished is kept)  ->  choice on --val  ->  --test, once

The teacher is never loaded. All runs take the optimiser steps that the base takes over all of the data, also with a
share of the labels. Each is what `kdcache distill` makes of the same options, bit for bit with the same --threads.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.errors import InterruptedRunError, KDCacheError, UsageError
from kdcache.stages.progress import Progress
from kdcache.stages.signals import graceful_signals
from kdcache.stages.sweep_choice import Scored, Verdict, scored, verdicts
from kdcache.stages.sweep_folder import (
    HEAT_MAP_NAME,
    RUNS_NAME,
    TABLE_NAME,
    Table,
    check_same_sweep,
    close_folder,
    finished_row,
    identity_of,
    open_folder,
    row_of,
    write_sweep,
)
from kdcache.stages.sweep_grid import Run, Setting, runs_of, settings_of, with_labelled_rows_alone
from kdcache.stages.sweep_options import SweepOptions, check_lists, check_values
from kdcache.stages.sweep_table import described, heat_maps, report_lines, sides_line, write_heat_map
from kdcache.stages.sweep_workers import Answer, Task, Workers, kind_of, refuse

_FACTS = ("data fingerprint", "data cache root", "val fingerprint")


@dataclass(frozen=True, eq=False)
class SweepResult:
    """What a sweep gives.

    Attributes:
        out: its folder.
        runs: how many there are.
        labels_only_runs: how many of them are without the teacher.
        failed: how many of them failed.
        metric: that settings were chosen by: `val_accuracy`, for data without labels `agreement`.
        steps: of every run.
        answers: for each fraction of the labels the choice, its command and how it compares with alpha 0.
        lines: all of it for people.
    """

    out: Path
    runs: int
    labels_only_runs: int
    failed: int
    metric: str
    steps: int
    answers: tuple[dict[str, Any], ...]
    lines: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {**{name: value for name, value in vars(self).items() if name != "lines"}, "answers": list(self.answers)}


def sweep(asked: SweepOptions) -> SweepResult:
    """Makes the runs of a sweep, or those that are left of it, and chooses.

    Args:
        asked: base, lists and folder.

    Raises:
        UsageError: nothing to sweep over, a folder that is taken, or a value that `distill` refuses: before the
            first run, with the setting named.
        MismatchError: another sweep than the one to go on with; or what `distill` says of data and cache.
        InterruptedRunError: SIGINT or SIGTERM; `resume` goes on.
        KDCacheError: no setting with the teacher finished; of the kind of what the runs failed with, where they agree.
    """
    check_values(asked)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("sweep starts its processes itself, one a run: call it without torchrun, see --processes")
    processes, threads = _shares(asked)
    asked = dataclasses.replace(asked, base=dataclasses.replace(asked.base, threads=threads))
    settings = settings_of(asked)
    assert asked.base.out is not None
    out = Path(asked.base.out)
    with graceful_signals() as stop:
        found = open_folder(out, resume=asked.base.resume)
        try:
            if found:  # before a process is started; what is known of the data follows
                check_same_sweep(found["identity"], identity_of(asked, {}), out=out)
            with Workers(min(processes, len(settings)), stop) as workers:
                return _Sweep(asked, out, settings, workers, found).run()
        finally:
            close_folder(out)


class _Sweep:
    """A sweep at work."""

    def __init__(
        self, asked: SweepOptions, out: Path, settings: list[Setting], workers: Workers, found: Mapping[str, Any]
    ) -> None:
        self._asked, self._out, self._workers, self._found = asked, out, workers, found
        self._settings = settings
        self._failures: list[tuple[Run, Answer]] = []

    def run(self) -> SweepResult:
        facts = self._check_base()
        self._check_test()
        check_lists(self._asked)
        identity = identity_of(self._asked, {name: facts[name] for name in _FACTS})
        if self._found:
            check_same_sweep(self._found["identity"], identity, out=self._out)
        eval_steps = self._asked.base.eval_steps or facts["steps_per_epoch"]
        equal = {"epochs": None, "steps": facts["total_steps"], "eval_steps": eval_steps, "quiet": True}
        self._settings = [
            dataclasses.replace(one, options=dataclasses.replace(one.options, **equal)) for one in self._settings
        ]
        labels = facts["labels"]["source"]
        if labels == "none":
            self._settings = [one for one in self._settings if not one.is_labels_only]
        elif labels == "some":
            self._settings = with_labelled_rows_alone(self._settings)
        self._check_settings()
        record = {"status": "running", "identity": identity}
        write_sweep(self._out, record)
        runs = runs_of(self._settings, self._asked)
        if not self._asked.base.quiet:
            print(sides_line(runs, steps=facts["total_steps"]), file=sys.stderr, flush=True)
        try:
            rows = self._make(runs)
        except InterruptedRunError:
            write_sweep(self._out, {**record, "status": "interrupted"})
            raise
        result = self._choose(runs, rows, facts["total_steps"])
        write_sweep(self._out, {**record, "status": "done", **result.to_json(), "out": self._out.name})
        return result

    def _check_base(self) -> dict[str, Any]:
        """What all runs have in common: steps, data and cache, from the base with all labels."""
        base = dataclasses.replace(self._asked.base, label_fraction=None, unlabelled=None, label_seed=None)
        first = next((one.options for one in self._settings if not one.is_labels_only), base)
        base = dataclasses.replace(base, alpha=first.alpha, temperature=first.temperature, loss=first.loss)
        [(_, answer)] = self._workers.answers([Task("check", base, more={"asks_labels": ["source", "held_out"]})])
        refuse(answer, what="the base of the sweep")
        if answer.result["labels"]["held_out"] == "none" and not base.val_cache:
            raise UsageError(
                f"--val {base.val}: the data have no labels, and settings are chosen by accuracy, or by the agreement "
                "with the teacher on these data: give its rows for them with --val-cache, or other data"
            )
        return answer.result

    def _check_test(self) -> None:
        """That the chosen can be measured, before there is anything to choose from."""
        if self._asked.test is None:
            return
        options = dataclasses.replace(self._settings[0].options, val=self._asked.test, val_cache=())
        [(_, answer)] = self._workers.answers([Task("check", options, more={"asks_labels": ["held_out"]})])
        refuse(answer, what=f"--test {self._asked.test}")
        if answer.result["labels"]["held_out"] == "none":
            raise UsageError(f"--test {self._asked.test}: the data have no labels to measure accuracy with")

    def _check_settings(self) -> None:
        tasks = [Task("check", one.options, label=one) for one in self._settings]
        for task, answer in self._workers.answers(tasks):
            refuse(answer, what=f"the setting {task.label.text}")

    def _make(self, runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
        """The rows of all runs, by name; those that were there are kept."""
        done = {run.name: row for run in runs if (row := finished_row(self._out, run)) is not None}
        table, is_shown = Table(self._out, list(done.values())), not self._asked.base.quiet
        try:
            with Progress(len(runs), what="sweep", unit=" runs", done=len(done), enabled=is_shown) as bar:
                tasks = [Task("run", self._options(run), label=run) for run in runs if run.name not in done]
                for task, answer in self._workers.answers(tasks):
                    run: Run = task.label
                    if answer.error is not None:
                        self._failures.append((run, answer))
                    row = finished_row(self._out, run) if answer.error is None else row_of(run, error=answer.error)
                    assert row is not None
                    table.append(row)
                    done[run.name] = row
                    bar.advance()
        finally:
            table.close()
        return done

    def _options(self, run: Run) -> Any:
        folder = str(self._out / RUNS_NAME / run.name)
        return dataclasses.replace(run.setting.options, seed=run.seed, out=folder, resume=True)

    def _choose(self, runs: Sequence[Run], rows: Mapping[str, Mapping[str, Any]], steps: int) -> SweepResult:
        numbers = {id(setting): number for number, setting in enumerate(self._settings)}
        by_seed = {(numbers[id(run.setting)], run.seed): rows[run.name] for run in runs}
        failed = len(self._failures)
        metric = "val_accuracy" if any(row.get("val_accuracy") is not None for row in rows.values()) else "agreement"
        found = scored(self._settings, by_seed, metric)
        if all(one.setting.is_labels_only for one in found):
            raise self._failed(len(runs))
        chosen = verdicts(found)
        tests = self._measure(runs, chosen) if self._asked.test is not None else {}
        out = str(self._asked.base.out)
        maps = heat_maps(found)
        if maps:
            write_heat_map(self._out / HEAT_MAP_NAME, maps, metric=metric)
        lines = report_lines(found, chosen, tests, metric=metric, out=out, failures=self._failure_lines())
        answers = tuple(described(one, tests, out=out) for one in chosen)
        alone = sum(run.setting.is_labels_only for run in runs)
        return SweepResult(self._out, len(runs), alone, failed, metric, steps, answers, tuple(lines))

    def _failure_lines(self) -> list[str]:
        if not self._failures:
            return []
        run, answer = self._failures[0]
        return [f"{len(self._failures)} runs failed: see the column `error` of sweep.csv; {run.name}: {answer.error}"]

    def _failed(self, runs: int) -> KDCacheError:
        """For a sweep with nothing to choose: what the first run died of, of its kind where all died of that kind."""
        first, answer = self._failures[0]
        kinds = {kind_of(other.exit_code) for _, other in self._failures}
        kind = kinds.pop() if len(kinds) == 1 else KDCacheError
        return kind(
            f"no setting with the teacher has all of its seeds finished ({len(self._failures)} of {runs} runs failed). "
            f"The first, {first.name}: {answer.error}\nThe column `error` of {self._out / TABLE_NAME} has the others; "
            "--resume tries them again"
        )

    def _measure(self, runs: Sequence[Run], chosen: Sequence[Verdict]) -> dict[Scored, dict[int, float]]:
        """Accuracy of the chosen settings on the test set, by seed."""
        wanted = {id(one.setting): one for verdict in chosen for one in verdict.chosen}
        tasks = [
            Task("test", self._options(run), label=run, more={"test": self._asked.test})
            for run in runs
            if id(run.setting) in wanted
        ]
        found: dict[Scored, dict[int, float]] = {one: {} for one in wanted.values()}
        for task, answer in self._workers.answers(tasks):
            refuse(answer, what=f"--test {self._asked.test}")
            found[wanted[id(task.label.setting)]][task.label.seed] = answer.result["val_accuracy"]
        return found


def _shares(asked: SweepOptions) -> tuple[int, int]:
    """Processes, and torch's threads in each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes, threads = asked.processes, asked.base.threads
    if processes is None:
        processes = _cuda_devices(asked.base.device) or max(1, cores // (threads or 1))
    return processes, threads or max(1, cores // processes)


def _cuda_devices(name: str) -> int:
    if name == "cpu":
        return 0
    import torch  # 1-2 s, which --processes or --device cpu save

    if name not in ("auto", "cuda"):
        return 1 if name.startswith("cuda") else 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
