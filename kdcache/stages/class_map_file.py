"""`--classes`: which class of the student each class of the teacher is, from a JSON file or from names that agree.

    {"student": ["even", "odd"], "map": {"0": "even", "1": "odd", "2": "even", "lamp": null}}

A class of the teacher is named by its name in the cache, else by its number as text; one of the student by its name, or
its number among `student`. null leaves a class of the teacher out. Every class of the teacher must be in the map. Of
several teachers one map has the classes of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, final

from kdcache.errors import CorruptCacheError, MismatchError, UsageError
from kdcache.format.identity import fingerprint
from kdcache.format.strict_json import MAX_JSON_BYTES, load_json
from kdcache.stages.choices import NOVEL
from kdcache.store import posix
from kdcache.train.class_map import DROPPED, ClassMap, repeated

OtherTeacher: TypeAlias = tuple[str, Sequence[str] | None, int]  # its name, its class names, their number

BY_NAMES = "names"
_SHOWN = 6
_EXAMPLE = '{"student": ["even", "odd"], "map": {"0": "even", "1": "odd", "lamp": null}}'


@final
@dataclass(frozen=True)
class StoredClassMap:
    """A class map with what a run says about it.

    Attributes:
        classes: the map.
        student: ordered names of the student's classes.
        source: the file's name, or `names`.
        novel: restricted, or bucket.
    """

    classes: ClassMap
    student: tuple[str, ...]
    source: str
    novel: str = NOVEL[0]

    @property
    def sha256(self) -> str:
        """Of its content, however the file is written."""
        return fingerprint({"student": list(self.student), "targets": list(self.classes.targets)})

    def describe(self) -> dict[str, Any]:
        """For a run record."""
        found = self.classes
        return {
            "map": self.source,
            "sha256": self.sha256,
            "teacher": len(found.targets),
            "student": found.num_classes,
            "merged": {self.student[target]: len(group) for target, group in found.merged.items()},
            "dropped": len(found.dropped),
            "novel": [self.student[number] for number in found.novel],
            **({"novel_rule": self.novel} if found.novel else {}),
        }

    @property
    def note(self) -> str:
        """One line, for the start of a run."""
        found = self.classes
        parts = []
        if found.merged:
            parts.append(f"{sum(map(len, found.merged.values()))} merged into {len(found.merged)}")
        if found.dropped:
            parts.append(f"{len(found.dropped)} left out")
        if found.novel:
            rule = "the teacher's term is over the others" if self.novel == NOVEL[0] else "with teacher mass 0"
            parts.append(f"{len(found.novel)} of the student's novel ({rule}; their rows learn their labels alone)")
        if not parts:
            parts.append("in the same order" if found.is_identity else "in another order")
        return f"classes: {len(found.targets)} of the teacher, {found.num_classes} of the student; {', '.join(parts)}"


def load_class_map(
    text: str,
    *,
    novel: str,
    teacher: Sequence[str] | None,
    teacher_count: int,
    student: Sequence[str] | None,
    cache_name: str,
    others: Sequence[OtherTeacher] = (),
) -> StoredClassMap:
    """The map that `--classes` names.

    Args:
        text: a JSON file, or `names`.
        novel: restricted or bucket.
        teacher: ordered class names of the cache, None where it has none.
        teacher_count: number of its classes.
        student: ordered class names of the data, None where they have none.
        cache_name: for messages.
        others: teachers that the map is for as well, whose classes it may have beside this one's.

    Raises:
        UsageError: no such file, no names, or a file that cannot be meant.
        MismatchError: it does not fit the cache's or the data's classes; a map that is not total.
    """
    if text == BY_NAMES:
        if teacher is None:
            raise UsageError(
                f"--classes names: {cache_name} has no class names; give a map (JSON) that has the numbers of its "
                f"{teacher_count} classes, such as {_EXAMPLE}"
            )
        if student is None:
            raise UsageError(
                "--classes names: the training data has no class names (`classes`); give a map (JSON) that has them, "
                f"such as {_EXAMPLE}"
            )
        return StoredClassMap(ClassMap.of_names(teacher, student), tuple(student), BY_NAMES, novel)
    path = Path(text)
    if not posix.exists(path):
        raise UsageError(f"--classes: there is no file {text}; give a map such as {_EXAMPLE}, or the word names")
    try:
        content = load_json(posix.read_file(path, MAX_JSON_BYTES), where=path.name)
    except CorruptCacheError as error:
        raise UsageError(f"--classes: {error}; expected a map such as {_EXAMPLE}") from None
    names = _student_names(content, path.name)
    if student is not None and tuple(student) != names:
        differ = next((pair for pair in zip(names, student, strict=False) if pair[0] != pair[1]), None)
        detail = f"{len(names)} and {len(student)}" if differ is None else f"{differ[0]!r:.80} and {differ[1]!r:.80}"
        raise MismatchError(
            f"{path.name}: `student` are not the classes of the training data in their order ({detail}); labels are "
            "numbers of these classes, so write them as the data has them"
        )
    targets = _targets(
        content["map"], teacher, teacher_count, names, where=path.name, cache_name=cache_name, others=others
    )
    return StoredClassMap(ClassMap(targets, len(names)), names, path.name, novel)


def _student_names(content: dict[str, Any], where: str) -> tuple[str, ...]:
    if content.keys() != {"student", "map"} or not isinstance(content["map"], dict):
        raise UsageError(f"{where}: its keys are {sorted(content)!r:.200}; expected a map such as {_EXAMPLE}")
    names = content["student"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{where}: `student` is not a list of class names; expected a map such as {_EXAMPLE}")
    twice = repeated(names)
    if twice is not None:
        raise UsageError(
            f"{where}: `student` has the name {twice!r:.80} more than once; give each class one of its own"
        )
    return tuple(names)


def _targets(
    pairs: dict[str, Any],
    teacher: Sequence[str] | None,
    count: int,
    student: tuple[str, ...],
    *,
    where: str,
    cache_name: str,
    others: Sequence[OtherTeacher],
) -> tuple[int, ...]:
    found: dict[int, int] = {}
    names = {} if teacher is None else {name: number for number, name in enumerate(teacher)}
    by_name_alone = bool(others) and bool(names) and names.keys() <= pairs.keys()  # then numbers are of the others
    places = {name: number for number, name in enumerate(student)}
    for key, value in pairs.items():
        number = names.get(key) if by_name_alone else _teacher_class(key, names, count)
        if number is None and any(_knows(other, key) for other in others):
            continue
        if number is None:
            known = f"its names begin {list(names)[:_SHOWN]!r:.200}" if names else "it has no names, only numbers"
            raise MismatchError(
                f"{where}: {key!r:.80} is none of the {count} classes of {cache_name} ({known}); write the name, or "
                f"the number from 0 to {count - 1}"
            )
        if teacher is not None and key not in names:
            _check_number(number, teacher, others, where=where, cache_name=cache_name)
        if number in found:
            raise UsageError(
                f"{where}: class {number} of the teacher is in the map twice, the second time as {key!r:.80}"
            )
        found[number] = _student_class(key, value, places, where=where)
    missing = [number for number in range(count) if number not in found]
    if missing:
        shown = ", ".join(str(number) if teacher is None else repr(teacher[number]) for number in missing[:_SHOWN])
        raise MismatchError(
            f"{where}: {len(missing)} of the {count} classes of {cache_name} are not in the map: {shown:.400}"
            f"{' ...' if len(missing) > _SHOWN else ''}. Say what each of them is, or null for one to leave out"
        )
    return tuple(found[number] for number in range(count))


def _knows(other: OtherTeacher, key: str) -> bool:
    _, names, count = other
    return _teacher_class(key, dict.fromkeys(names or (), 0), count) is not None


def _check_number(
    number: int, teacher: Sequence[str], others: Sequence[OtherTeacher], *, where: str, cache_name: str
) -> None:
    """Refuses a number that is another class of another teacher."""
    for name, names, count in others:
        if names is not None and number < count and names[number] != teacher[number]:
            raise UsageError(
                f"{where}: the number {number} is the class {teacher[number]!r:.80} of {cache_name} and "
                f"{names[number]!r:.80} of {name}: write the names of the classes"
            )


def _teacher_class(key: str, names: dict[str, int], count: int) -> int | None:
    """A name comes before a number: classes may be named `0`, `1` ..."""
    if key in names:
        return names[key]
    if not key.isascii() or not key.isdecimal() or len(key) > 9 or int(key) >= count:
        return None
    return int(key)


def _student_class(key: str, value: Any, places: dict[str, int], *, where: str) -> int:
    if value is None:
        return DROPPED
    if isinstance(value, list):
        raise UsageError(
            f"{where}: the teacher's class {key!r:.80} is given {len(value)} classes of the student, and how its "
            "probability is to be shared among them cannot be known: name one, or null to leave it out"
        )
    if isinstance(value, str) and value in places:
        return places[value]
    if type(value) is int and 0 <= value < len(places):
        return value
    raise UsageError(
        f"{where}: the teacher's class {key!r:.80} is mapped to {value!r:.80}, which is none of the {len(places)} "
        "names in `student` (or their numbers, from 0)"
    )
