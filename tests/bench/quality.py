"""Quality against bytes: what every encoding loses of a teacher, beside what others would store for the same bytes.

    python tests/bench/quality.py --cifar CIFAR_FOLDER --clinc data_full.json --out RESULTS [--heads ...]   # KL
    python tests/bench/quality.py ... --students CLINC150 --temperature 2 --seeds 5                         # students
    python tests/bench/quality.py --out RESULTS --report       # tables of what is there, and plots (needs matplotlib)

CIFAR_FOLDER holds `train/CLASS/*` and `test/CLASS/*`, and data_full.json is that of CLINC150. A teacher that RESULTS
does not hold is trained first (`--cifar-teacher FILE` names one that is elsewhere); the two made-up heads need no data.

For every encoding, and every format in `quality_peers.py`, one JSON line goes to RESULTS/kl.jsonl: payload bytes a row,
and at T = 1, 2, 4 the mean of

    kl        KL(teacher || row): of `topk` rows the tail's mass is spread evenly over the classes not kept
    moved     half the sum of |p - q|, finite also where a row says that a class is impossible and `kl` is not
    gradient  half the sum of |g - g'|, the gradients in the student's logits / T of the loss made of these rows and of
              the KL over classes: `moved`, but for `topk` rows, whose loss leaves the tail's shape to the student
    share     of `topk` rows: the bucketed KL / the KL over classes
    open      of `topk` rows at a T that was not stored: how far the tail's mass may be off, of a probability

The student of `gradient` and `share` is the teacher with half a standard deviation of noise in each logit.
Students are in `quality_students.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_heads import Teacher, cifar, clinc, synthetic
from quality_peers import Said, log_softmax, peers
from quality_report import plot, students_table, summary, table
from quality_students import train_all

from kdcache.format.encoding import Encoding
from kdcache.format.encodings import EncodingChoice
from kdcache.format.factored import Factored
from kdcache.format.known_heads import keep_head
from kdcache.format.topk import TopK
from kdcache.store.rows import TeacherRows
from kdcache.train.kept import kept
from kdcache.train.sparse import teacher_log_probs
from kdcache.train.tail import mass_error, tail_logsumexp

TEMPERATURES = (1.0, 2.0, 4.0)
STORED: tuple[tuple[float, ...], ...] = ((1.0,), (1.0, 2.0), (1.0, 2.0, 4.0))
KEPT = (5, 10, 32, 64)
HEADS = ("CIFAR-10", "CLINC150", "synthetic 1,000", "synthetic 20,000")


def row_bytes(encoding: Encoding) -> int:
    """Payload of a row: its arrays, without id, view, label, digest and checksum."""
    return sum(math.prod(spec.shape(1)) * np.dtype(spec.dtype).itemsize for spec in encoding.specs)


def teacher_rows(encoding: Encoding, teacher: Teacher) -> TeacherRows:
    """All rows of a teacher in an encoding, as tensors."""
    if isinstance(encoding, Factored):
        arrays = encoding.encode_features(teacher.features).arrays
    else:
        arrays = encoding.encode(teacher.logits, teacher.labels[:, None]).arrays
    count = len(teacher.labels)
    rows = TeacherRows(
        encoding, arrays, np.arange(count), np.zeros(count, np.int64), teacher.labels, np.ones(count, bool)
    )
    return rows.tensors()


def encodings(teacher: Teacher, sizes: tuple[int, ...] = KEPT) -> Iterator[tuple[str, Encoding]]:
    """Every encoding that these rows can have, with its name."""
    classes = teacher.logits.shape[1]
    for dtype in ("float32", "float16", "int8", "int4"):
        yield dtype, EncodingChoice(dtype).of((classes,))
    sha256 = hashlib.sha256(teacher.head.weight.tobytes()).hexdigest()
    keep_head(sha256, teacher.head)
    yield "factored", Factored((classes,), teacher.features.shape[1], sha256)
    for k in sizes:
        for stored in STORED:
            if k < classes:
                yield f"topk T={','.join(f'{t:g}' for t in stored)}", TopK((classes,), k, stored, 1)


def said_by(name: str, rows: TeacherRows) -> Said:
    """What rows of ours say, for all classes."""
    encoding = rows.encoding
    if encoding.has_all_logits:
        logits = rows.dense().numpy()
        return Said(name, None, row_bytes(encoding), lambda t: log_softmax(logits.astype(np.float64) / t), ours=True)
    assert isinstance(encoding, TopK)
    return Said(name, encoding.k, row_bytes(encoding), lambda t: _spread(*_bucketed(rows, t)), ours=True)


def _bucketed(rows: TeacherRows, temperature: float) -> tuple[np.ndarray, np.ndarray, int]:
    """log-probabilities (N, K + L + 1) of kept classes and the bucket, the classes (N, K + L), and C."""
    slots = kept(rows, dtype=torch.float64)
    log_p, _ = teacher_log_probs(rows, slots, temperature, tail_tolerance=math.inf)
    return log_p.numpy(), slots.classes.numpy(), rows.num_classes


def _spread(log_p: np.ndarray, classes: np.ndarray, count: int) -> np.ndarray:
    """(N, C): the bucket in equal shares over the classes that are not kept."""
    is_kept = np.isfinite(log_p[:, :-1])  # an empty slot repeats a class
    left = count - is_kept.sum(axis=1, keepdims=True)
    full = np.broadcast_to(log_p[:, -1:] - np.log(np.maximum(left, 1)), (len(log_p), count)).copy()
    for column in reversed(range(classes.shape[1])):
        own = is_kept[:, column]
        full[own, classes[own, column]] = log_p[own, column]
    return full


def figures(teacher: Teacher, said: Said, rows: TeacherRows | None) -> dict[str, Any]:
    """One line of kl.jsonl."""
    line: dict[str, Any] = {"head": teacher.name, "format": said.name, "k": said.k, "bytes": said.row_bytes}
    line |= {"ours": said.ours, "kl": {}, "moved": {}, "gradient": {}, "infinite": {}}
    noise = np.random.Generator(np.random.PCG64(1)).standard_normal(teacher.logits.shape)
    student = teacher.logits + 0.5 * teacher.logits.std(axis=1, keepdims=True) * noise
    for temperature in TEMPERATURES:
        log_p, log_q = log_softmax(teacher.logits / np.float64(temperature)), said.log_probs(temperature)
        p = np.exp(log_p)
        kl = np.where(p > 0, p * (log_p - log_q), 0).sum(axis=1)
        key = f"{temperature:g}"
        line["kl"][key] = float(kl.mean()) if np.isfinite(kl).all() else None
        line["infinite"][key] = float(np.isinf(kl).mean())
        line["moved"][key] = float(np.abs(p - np.exp(log_q)).sum(axis=1).mean() / 2)
        line["gradient"][key] = line["moved"][key]
        if rows is not None and not rows.encoding.has_all_logits:
            log_s = log_softmax(student / np.float64(temperature))
            share, line["gradient"][key] = _bucketed_loss(rows, temperature, log_p, log_s)
            line.setdefault("share", {})[key] = share
            line.setdefault("open", {})[key] = _open(rows, temperature)
    return line


def _bucketed_loss(rows: TeacherRows, temperature: float, log_p: np.ndarray, log_s: np.ndarray) -> tuple[float, float]:
    """The bucketed KL(teacher || student) as a share of the KL over classes, and how far its gradient is off.

    The gradient over classes is s - p, the bucketed one s - p where a class is kept, else s - s P / S with the buckets'
    masses P of the teacher and S of the student.
    """
    log_b, classes, count = _bucketed(rows, temperature)
    is_kept = np.zeros((len(classes), count), bool)
    np.put_along_axis(is_kept, classes, True, axis=1)
    p, s, told = np.exp(log_p), np.exp(log_s), np.exp(_spread(log_b, classes, count))
    bucket, student_bucket = np.exp(log_b[:, -1]), np.where(is_kept, 0, s).sum(axis=1)
    kl = np.where(is_kept, p * (log_p - log_s), 0).sum(axis=1) + bucket * (log_b[:, -1] - np.log(student_bucket))
    pulled = np.where(is_kept, told, s * (bucket / student_bucket)[:, None])
    return float(kl.mean() / (p * (log_p - log_s)).sum(axis=1).mean()), float(np.abs(p - pulled).sum(axis=1).mean() / 2)


def _open(rows: TeacherRows, temperature: float) -> float:
    slots = kept(rows, dtype=torch.float64)
    tail = tail_logsumexp(rows, temperature, slots=slots, dtype=torch.float64)
    error = mass_error(tail, (slots.logits / temperature).logsumexp(dim=1))
    return 0.0 if error is None else float(error.mean())


def head_facts(teacher: Teacher) -> dict[str, Any]:
    """What a teacher's logits are like: entropy, and the mass of the 10 and 100 largest, at each temperature."""
    facts: dict[str, Any] = {"head": teacher.name, "rows": len(teacher.labels), "classes": teacher.logits.shape[1]}
    facts |= {"test_accuracy": teacher.accuracy, "features": teacher.features.shape[1]}
    facts["head_bytes"] = teacher.head.weight.nbytes + teacher.head.bias.nbytes
    for temperature in TEMPERATURES:
        log_p = log_softmax(teacher.logits / np.float64(temperature))
        p = np.exp(log_p)
        mass = -np.sort(-p, axis=1)
        facts[f"T={temperature:g}"] = {
            "entropy": float(-(p * log_p).sum(axis=1).mean()),
            "top_10": float(mass[:, :10].sum(axis=1).mean()),
            "top_100": float(mass[:, :100].sum(axis=1).mean()),
        }
    return facts


def measure(teacher: Teacher, log: Path) -> None:
    """Every encoding and every format of others; lines of this head that are there already are replaced."""
    lines = [head_facts(teacher)]
    sizes = (3, *KEPT) if teacher.logits.shape[1] <= 10 else KEPT
    others = set(sizes)
    for name, encoding in encodings(teacher, sizes):
        rows = teacher_rows(encoding, teacher)
        lines.append(figures(teacher, said_by(name, rows), rows))
        if not encoding.has_all_logits:
            others |= {row_bytes(encoding) // 4, row_bytes(encoding) // 6}  # what others keep for the same bytes
    lines += [figures(teacher, said, None) for said in peers(teacher.logits, others)]
    there = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    lines = [line for line in there if line["head"] != teacher.name] + lines
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _told(said: Said, options: argparse.Namespace) -> torch.Tensor:
    """(N, C) float32 logits that say at the students' temperature what rows say."""
    return torch.from_numpy(said.log_probs(options.temperature) * options.temperature).float()


def made(name: str, options: argparse.Namespace) -> Teacher | None:
    """A teacher by its name; None where its data was not given."""
    if name == "CIFAR-10":
        weights = options.cifar_teacher or options.out / "cifar.pt"
        return None if options.cifar is None else cifar(options.cifar, weights, rows=options.rows)
    if name == "CLINC150":
        return None if options.clinc is None else clinc(options.clinc, options.out / "clinc.pt")
    if name == "synthetic 1,000":
        return synthetic(1000, 512, 1000, scale=26, zipf=0.5)
    return synthetic(20000, 1024, 300, scale=30, zipf=0.7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, help="a folder with train/CLASS/* and test/CLASS/*")
    parser.add_argument("--cifar-teacher", type=Path, help="weights of CNN('BASE'), as k_curve.py trains it")
    parser.add_argument("--clinc", type=Path, help="data_full.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--heads", nargs="*", default=HEADS, choices=HEADS)
    parser.add_argument("--rows", type=int, default=4000, help="transfer rows of CIFAR-10")
    parser.add_argument("--students", choices=HEADS[:2], help="train students of this teacher, and measure no KL")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--student-size", default="SMALL", choices=("TINY", "SMALL"), help="of students of CIFAR-10")
    parser.add_argument("--report", action="store_true", help="print tables and draw plots, and measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    log, runs = options.out / "kl.jsonl", options.out / "students.jsonl"
    if options.report:
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        for name in HEADS:
            of_head = [line for line in lines if line["head"] == name and "format" in line]
            if of_head:
                facts = next(line for line in lines if line["head"] == name and "format" not in line)
                print(f"\n## {name}\n{json.dumps(facts)}\n\n{table(of_head)}\n\n{summary(of_head)}")
                for figure in ("kl", "gradient"):
                    short = name.split()[-1].replace(",", "")
                    plot(name, of_head, options.out / f"{figure}_{short}.png", figure)
        if runs.exists():
            print(f"\n## Students\n{students_table([json.loads(line) for line in runs.read_text().splitlines()])}")
        return
    if options.students:
        teacher = made(options.students, options)
        if teacher is None:
            parser.error("give --cifar or --clinc, the data of this teacher")
        sizes = (3, 5) if options.students == "CIFAR-10" else (10, 32)
        arms: dict[str, Any] = {"labels": None}
        for name, encoding in encodings(teacher, sizes):
            if name == "factored":
                continue
            if encoding.has_all_logits or name == f"topk T={','.join(f'{t:g}' for t in STORED[-1])}":
                rows = teacher_rows(encoding, teacher)
                size = "" if encoding.has_all_logits else f", K={encoding.k}"  # type: ignore[attr-defined]
                arms[name + size] = (row_bytes(encoding), rows)
                if not encoding.has_all_logits:  # the same rows, told like those of others: a KL over classes
                    arms[f"{name}{size}, tail spread"] = (row_bytes(encoding), _told(said_by(name, rows), options))
        alike = {told[0] // 4 for name, told in arms.items() if name.startswith("topk")}  # the same bytes
        for said in peers(teacher.logits, {*sizes, *alike}):
            if said.k is None:
                continue
            arms[f"{said.name}, K={said.k}"] = (said.row_bytes, _told(said, options))
        train_all(
            teacher,
            arms,
            runs,
            temperature=options.temperature,
            seeds=options.seeds,
            epochs=options.epochs,
            size=options.student_size,
        )
        return
    for name in options.heads:
        teacher = made(name, options)
        if teacher is not None:
            measure(teacher, log)
            print(f"{name}: measured", flush=True)


if __name__ == "__main__":
    main()
