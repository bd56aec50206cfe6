"""What is mutated, and through which doors it is read: one class for each kind of file that comes from elsewhere."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import fuzz_bases
import fuzz_changes
import fuzz_doors
import fuzz_hdf5
import fuzz_json
import fuzz_reseal
from fuzz_bases import Base
from fuzz_doors import Outcome

from kdcache.format.identity import canonical_json


@dataclass
class Case:
    """A mutant on the disk, the cache it was made of, and what its readers said."""

    base: Base
    path: Path
    outcome: Outcome


class Target:
    """A folder of base caches, and the mutation of one of them per case.

    Args:
        home: an empty folder of its own.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir(parents=True)
        self.bases = self.prepare()

    def prepare(self) -> list[Base]:
        return fuzz_bases.make_folders(self.home / "bases")

    def case(self, number: int) -> Case:
        """The mutant of a number, and what its readers say."""
        return self.run(random.Random(f"{type(self).__name__} {number}"))

    def run(self, rng: random.Random) -> Case:
        """Makes the mutant that the generator leads to, and uses it."""
        base = rng.choice(self.bases)
        path = base.write(self.home / f"case{base.path.suffix}-{base.path.name}", self.changes(rng, base))
        return Case(base, path, fuzz_doors.use(path, access=rng.choice(["mmap", "pread"]), sample_ids=base.ids[:7]))

    def changes(self, rng: random.Random, base: Base) -> dict[str, bytes]:
        """The files that differ from the base, with their new bytes."""
        raise NotImplementedError

    def warm_up(self) -> None:
        """Uses every base unchanged, so that what is imported late or kept is there before memory is limited."""
        for base in self.bases:
            outcome = fuzz_doors.use(base.path, access="mmap", sample_ids=base.ids[:7])
            assert outcome.sound
            assert outcome.rows is not None
            assert fuzz_doors.same(outcome.rows, base.rows)
            fuzz_doors.use(base.path, access="pread", sample_ids=base.ids[:7])


class OneFile(Target):
    """The headers of a one-file cache: messages, bytes, and seldom its rows; every digest is made to fit."""

    def prepare(self) -> list[Base]:
        return fuzz_bases.make_files(self.home / "bases")

    def changes(self, rng: random.Random, base: Base) -> dict[str, bytes]:
        image = self.mutated(rng, base.files[""], base)
        if rng.random() < 0.05:
            image = fuzz_changes.change_rows(rng, image)
            image = fuzz_reseal.reseal_rows(image, base.schema.crc_names, list(base.views), base.samples)
        return {"": fuzz_reseal.reseal_file(image)}

    def mutated(self, rng: random.Random, image: bytes, base: Base) -> bytes:
        return fuzz_changes.mutate_container(rng, image, rng.choice(self.bases).files[""])


class FileHeader(OneFile):
    """The JSON in the root attribute of a one-file cache."""

    def mutated(self, rng: random.Random, image: bytes, base: Base) -> bytes:
        parts = fuzz_hdf5.take_apart(image)
        value = json.loads(bytes(parts.blocks[0].find(fuzz_hdf5.ATTRIBUTE)[0].body[29:]))
        if rng.random() < 0.9:
            parts.set_attribute(fuzz_changes.mutate_json(rng, value))
            return parts.build()
        schema = fuzz_changes.consistent_change(rng, parts, value, base)
        parts.set_attribute(canonical_json(value).encode())
        return fuzz_reseal.reseal_rows(parts.build(), schema.crc_names, list(base.views), base.samples)


class Shard(Target):
    """The headers of a shard in a folder whose manifest is made to fit."""

    def changes(self, rng: random.Random, base: Base) -> dict[str, bytes]:
        value = json.loads(base.files["manifest.json"])
        record = rng.choice(value["shards"])
        name = f"shards/{record['file']}"
        image = fuzz_changes.mutate_container(
            rng, base.files[name], rng.choice(self.bases).files["shards/v000-00000.h5"]
        )
        fuzz_reseal.reseal_shard(record, image)
        return {name: image, "manifest.json": fuzz_reseal.reseal_manifest(value)}


class ManifestFile(Target):
    """The manifest, its root hash and its seal made to fit."""

    def changes(self, rng: random.Random, base: Base) -> dict[str, bytes]:
        value = json.loads(base.files["manifest.json"])
        if rng.random() < 0.15:
            return {"manifest.json": fuzz_json.mutate_text(rng, canonical_json(value) + "\n")}
        if rng.random() < 0.2:
            rng.choice([fuzz_changes.grow, fuzz_changes.swap_records])(rng, value)
        if rng.random() < 0.9:
            value = fuzz_json.mutate(rng, value)
        return {"manifest.json": fuzz_reseal.reseal_manifest(value)}


class HeadFile(Target):
    """The head of factored rows; manifest and shards name it by its new hash, and list its arrays where they are."""

    def prepare(self) -> list[Base]:
        return fuzz_bases.make_folders(self.home / "bases")[-1:]

    def changes(self, rng: random.Random, base: Base) -> dict[str, bytes]:
        value = json.loads(base.files["manifest.json"])
        image = fuzz_changes.mutate_container(rng, base.files["head.h5"], base.files["shards/v000-00000.h5"])
        if rng.random() < 0.2:
            image = fuzz_changes.change_rows(rng, image)
        found, head = fuzz_reseal.parsed(image), value["head"]
        if found is not None:
            head["arrays"] = {name: [a.offset, a.dtype, list(a.shape)] for name, a in found.arrays.items()}
        old, new = head["sha256"], hashlib.sha256(image).hexdigest()
        value["encoding"]["head"], head["sha256"], head["size"] = new, new, len(image)
        files = {"head.h5": image}
        for record in value["shards"]:
            name = f"shards/{record['file']}"
            files[name] = fuzz_hdf5.take_apart(base.files[name].replace(old.encode(), new.encode())).build()
            fuzz_reseal.reseal_shard(record, files[name])
        if rng.random() < 0.2:
            value["head"] = fuzz_json.mutate(rng, head)
        return {**files, "manifest.json": fuzz_reseal.reseal_manifest(value)}


class ClassesFile(Target):
    """`classes.json`, which holds class names that are too long for a manifest; its hash made to fit."""

    def prepare(self) -> list[Base]:
        names = tuple(f"{'a class with a long name ' * 30}{n}" for n in range(95))
        return [fuzz_bases.make_dump(self.home / "base", rows=4, shard_rows=4, row_shape=(95,), names=names)]

    def changes(self, rng: random.Random, base: Base) -> dict[str, bytes]:
        names = json.loads(base.files["classes.json"])
        if rng.random() < 0.5:
            names = names[: rng.randrange(4)]
        data = fuzz_changes.mutate_json(rng, names)
        value = json.loads(base.files["manifest.json"])
        value["classes"]["sha256"] = hashlib.sha256(data).hexdigest()
        if rng.random() < 0.2:
            value["classes"] = fuzz_json.mutate(rng, value["classes"])
        return {"classes.json": data, "manifest.json": fuzz_reseal.reseal_manifest(value)}
