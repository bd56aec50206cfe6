"""Manifests and headers, hashes right, that name encodings which no writer makes, or arrays that do not fit theirs."""

from __future__ import annotations

from pathlib import Path

from encoded_base import FEATURES, manifest_of, put, put_encoding, put_field
from hostile_base import CLASSES, container, file_with, header_of, put_file, put_manifest, rows_of, sound_file
from hostile_cases import hostile

from kdcache.format.identity import canonical_json

_TOP_K = {"name": "topk", "dtype": "float16", "shape": [CLASSES], "k": 10, "labels": 1, "temperatures": [1.0]}
_ARRAYS = ("shards", 0, "arrays")


# --------------------------------------------------------------------------- top-k


@hostile("top-k keeps 1 to C logits of a row, found k = 0 with 64 classes")
def top_of_nothing(folder: Path) -> Path:
    """k = 0: the largest logit is the first of none, and `topk_logits[:, 0]` an IndexError."""
    return put_encoding(folder, "topk", k=0)


@hostile("top-k keeps 1 to C logits of a row, found k = -1 with 64 classes")
def top_k_from_the_end(folder: Path) -> Path:
    """k = -1, which slices take for all but one."""
    return put_encoding(folder, "topk", k=-1)


@hostile("top-k keeps 1 to C logits of a row, found k = 65 with 64 classes")
def more_kept_classes_than_there_are(folder: Path) -> Path:
    """k = 65 of 64 classes: the tail holds -1 classes, and log(-1) is NaN."""
    return put_encoding(folder, "topk", k=CLASSES + 1)


@hostile("top-k keeps 1 to C logits of a row, found k = 18446744073709551616 with 64 classes")
def top_k_that_is_zero_in_64_bits(folder: Path) -> Path:
    """k = 2**64, which is 0 in the integers of an array."""
    return put_encoding(folder, "topk", k=2**64)


@hostile("k and labels of an encoding must be integers, found True and 1")
def top_k_true(folder: Path) -> Path:
    """k = true, which is equal to 1."""
    return put_encoding(folder, "topk", k=True)


@hostile("k and labels of an encoding must be integers, found 10.0 and 1")
def top_k_as_a_fraction(folder: Path) -> Path:
    """k = 10.0, equal to 10 in every comparison, and a TypeError as a shape."""
    return put_encoding(folder, "topk", k=10.0)


@hostile("k and labels of an encoding must be integers, found .'10'. and 1")
def top_k_in_a_list(folder: Path) -> Path:
    """k is a list, which cannot be hashed: an encoding that is the key of a dictionary raises TypeError."""
    return put_encoding(folder, "topk", k=["10"])


@hostile("k and labels of an encoding must be integers, found 10 and True")
def kept_labels_true(folder: Path) -> Path:
    """labels = true, which is equal to the 1 that is expected."""
    return put_encoding(folder, "topk", labels=True)


@hostile("top-k keeps the logits of 0 to 2 labels a row, .*; found 3 with rows of shape .64,.")
def three_labels_a_row(folder: Path) -> Path:
    """The logits of three labels a row, where rows have two at most: the third is read from whatever comes next."""
    return put_encoding(folder, "topk", labels=3)


@hostile("the encoding keeps the logits of 2 labels a row, expected 1")
def kept_logit_of_a_label_that_is_not_there(folder: Path) -> Path:
    """The logits of two labels a row in a cache that stores one: which class the second belongs to is anyone's
    guess."""
    return put_encoding(folder, "topk", labels=2)


@hostile("top-k keeps the logits of 0 to 2 labels a row, .*; found 1 with rows of shape .64, 2.")
def label_logits_of_images(folder: Path) -> Path:
    """Label logits in dense prediction, whose labels are maps that a cache does not hold."""
    return put_encoding(folder, "topk", shape=[CLASSES, 2])


@hostile("top-k needs two classes or more")
def top_k_of_a_single_class(folder: Path) -> Path:
    """One class: nothing is left for the tail, and its mean is 0 / 0."""
    return put_encoding(folder, "topk", shape=[1], k=1)


@hostile(r"temperatures must ascend, each once; found \(4.0, 1.0\)")
def temperatures_that_descend(folder: Path) -> Path:
    """Temperatures 4, 1: a search by bisection takes the tail of one for that of the other."""
    return put_encoding(folder, "topk", temperatures=[4.0, 1.0])


@hostile(r"temperatures must ascend, each once; found \(1.0, 1.0\)")
def temperature_twice(folder: Path) -> Path:
    """One temperature twice: a line through the two points has no slope, 0 / 0."""
    return put_encoding(folder, "topk", temperatures=[1.0, 1.0])


@hostile("teacher.h5: NaN is not allowed", alike="header_with_nan")
def temperature_that_is_no_number(folder: Path) -> Path:
    """A temperature of NaN, which passes each check that asks whether it is too small or too large."""
    header = canonical_json({**header_of(sound_file()), "encoding": {**_TOP_K, "temperatures": ["PLACE"]}})
    return put_file(folder, container(rows_of(sound_file()), header.replace('"PLACE"', "NaN")))


@hostile("a temperature is a number from 0.01 .*; found 0.0$")
def temperature_zero(folder: Path) -> Path:
    """T = 0: logits are divided by it."""
    return put_encoding(folder, "topk", temperatures=[0.0, 1.0])


@hostile("a temperature is a number from 0.01 .*; found 1e[+]300")
def temperature_near_infinity(folder: Path) -> Path:
    """T = 1e300: every tail is log(C), and T**2 times a loss is infinite."""
    return put_encoding(folder, "topk", temperatures=[1e300])


@hostile("a temperature is a number from 0.01 .*; found 'inf'")
def temperature_as_text(folder: Path) -> Path:
    """`inf`, which `float` reads as a number."""
    return put_encoding(folder, "topk", temperatures=["inf"])


@hostile("a temperature is a number from 0.01 .*; found 'z2'")
def temperature_of_the_row_first(folder: Path) -> Path:
    """`z2` before a number, whose place in the row a reader that sorts them does not know."""
    return put_encoding(folder, "topk", temperatures=["z2", 1.0])


@hostile("temperatures are a list of 1 to 32, such as 1,2,4; found .0.1, 0.2")
def temperatures_by_the_thousand(folder: Path) -> Path:
    """A thousand temperatures: 4 KB a row, and a message of 5,000 characters."""
    return put_encoding(folder, "topk", temperatures=[n / 10 for n in range(1, 1001)])


@hostile("temperatures are a list of 1 to 32, such as 1,2,4; found ..$")
def no_temperature(folder: Path) -> Path:
    """No temperature at all: the tail is nowhere, and the first of the list an IndexError."""
    return put_encoding(folder, "topk", temperatures=[])


@hostile(r"temperatures of an encoding must be a list of fractions, found \[1\]")
def temperature_as_an_integer(folder: Path) -> Path:
    """T = 1, not 1.0: the same encoding in another text, so that equal caches have two hashes."""
    return put_encoding(folder, "topk", temperatures=[1])


@hostile("temperatures of an encoding must be a list of fractions, found {'1.0': 'z2'}")
def temperatures_in_an_object(folder: Path) -> Path:
    """An object in the place of the list, which has a length and can be walked through."""
    return put_encoding(folder, "topk", temperatures={"1.0": "z2"})


@hostile("dtype 'int8' is not known; the encoding topk stores float16")
def top_k_with_the_type_of_another_encoding(folder: Path) -> Path:
    """Top-k rows of int8: scales that are not there."""
    return put_encoding(folder, "topk", dtype="int8")


@hostile(r"dtype \['float16'\] is not known; the encoding topk stores float16")
def type_in_a_list(folder: Path) -> Path:
    """A type that is a list, which cannot be hashed: TypeError in a dictionary of types."""
    return put_encoding(folder, "topk", dtype=["float16"])


@hostile(r"encoding \['topk'\] is not known to this version")
def encoding_whose_name_is_a_list(folder: Path) -> Path:
    """A name that cannot be hashed: TypeError in the registry of encodings."""
    return put_encoding(folder, "topk", name=["topk"])


@hostile("the encoding topk needs exactly .*, found .*'renormalise': True")
def top_k_with_a_field_more(folder: Path) -> Path:
    """A field more, by which another program reads these rows as another teacher."""
    manifest = manifest_of("topk")
    manifest["encoding"] = {"renormalise": True, **manifest["encoding"]}
    return put(folder, "topk", manifest)


@hostile("the encoding topk needs exactly .*, found .'dtype': 'float16', 'k': 10, 'name'")
def top_k_without_labels(folder: Path) -> Path:
    """A field less, whose default may differ between two versions."""
    manifest = manifest_of("topk")
    del manifest["encoding"]["labels"]
    return put(folder, "topk", manifest)


@hostile("the encoding dense needs exactly .*, found .*'k': 10")
def dense_rows_with_a_k(folder: Path) -> Path:
    """Dense rows with the fields of top-k: which of the two is meant?"""
    return put_manifest(folder, "encoding", value={**_TOP_K, "name": "dense"})


@hostile(r"a row of logits has shape \(C,\) or \(C, ...\), found \(64, 1, 1,")
def row_of_fifty_thousand_dimensions(folder: Path) -> Path:
    """A shape of 50,000 sides, in the message of its refusal; NumPy has 64."""
    return put_encoding(folder, "topk", shape=[CLASSES] + [1] * 50_000, labels=0)


# --------------------------------------------------------------------------- arrays


@hostile("shard 0: array topk_classes is '<u2' .256, 10., expected <u2 .256, 9.")
def rows_of_one_class_more_than_k(folder: Path) -> Path:
    """k = 9 over rows of ten: a reader by k takes the tenth logit for the first of the next row."""
    return put_encoding(folder, "topk", k=9)


@hostile("shard 0: array tail_logsumexp is '<f4' .256, 3., expected <f4 .256, 2.")
def tails_of_another_number_of_temperatures(folder: Path) -> Path:
    """Two temperatures over tails of three."""
    return put_encoding(folder, "topk", temperatures=[1.0, 4.0])


@hostile("shard 0: array topk_classes is '<i2' .256, 10., expected <u2")
def classes_with_a_sign(folder: Path) -> Path:
    """Signed classes: -1 is the last one, and 60,000 is behind the start."""
    return put_field(folder, "topk", *_ARRAYS, "topk_classes", 1, value="<i2")


@hostile("shard 0: array topk_classes is '<u2' .256, 10., expected <u4")
def classes_too_narrow_for_a_vocabulary(folder: Path) -> Path:
    """100,000 classes whose numbers have 16 bits: class 65,536 is class 0."""
    manifest = manifest_of("topk")
    manifest["encoding"]["shape"] = [100_000]
    manifest["classes"] = {"count": 100_000, "sha256": None, "names": None}
    return put(folder, "topk", manifest)


@hostile("shard 0: arrays .*'input_digest', 'label', 'logit_std', .*, expected .*'label_logits'")
def logit_of_the_label_left_out(folder: Path) -> Path:
    """`labels` = 1 without the array of their logits."""
    manifest = manifest_of("topk")
    del manifest["shards"][0]["arrays"]["label_logits"]
    return put(folder, "topk", manifest)


@hostile(r"shard 0: array logits is '\|u1' .256, 64., expected \|u1 .256, 32.")
def int8_rows_called_int4(folder: Path) -> Path:
    """int4 over codes of 8 bits: each byte would become two logits."""
    return put_encoding(folder, "int8", dtype="int4")


@hostile(r"shard 0: arrays .*'top_classes', .*, expected \['input_digest', 'label', 'logits', 'row_crc', 'row_max'")
def int8_rows_called_float16(folder: Path) -> Path:
    """float16 over codes of 8 bits."""
    return put_encoding(folder, "int8", dtype="float16")


@hostile("teacher.h5: arrays .*, expected .*'tail_logsumexp'")
def one_file_of_dense_rows_called_top_k(folder: Path) -> Path:
    """A one-file cache of dense rows under the header of top-k rows."""
    return put_file(folder, file_with(encoding=_TOP_K))


# --------------------------------------------------------------------------- factored


@hostile("factored rows have 1 to 16777216 features, found 0$")
def factored_rows_of_no_features(folder: Path) -> Path:
    """No features: every row decodes to the bias, whatever the teacher saw."""
    return put_encoding(folder, "factored", features=0)


@hostile("factored rows have 1 to 16777216 features, found 9223372036854775807$")
def factored_rows_of_all_features(folder: Path) -> Path:
    """2**63 - 1 features: two bytes each overflow 64 bits."""
    return put_encoding(folder, "factored", features=2**63 - 1)


@hostile("factored rows have 1 to 16777216 features, found 16.0$")
def features_as_a_fraction(folder: Path) -> Path:
    """16.0 features, equal to 16 in every comparison."""
    return put_encoding(folder, "factored", features=float(FEATURES))


@hostile("factored rows have 1 to 16777216 features, found True$")
def features_true(folder: Path) -> Path:
    """`true` features, which is 1."""
    return put_encoding(folder, "factored", features=True)


@hostile("shard 0: array features is '<f2' .256, 16., expected <f2 .256, 8.")
def fewer_features_than_are_stored(folder: Path) -> Path:
    """8 features over rows of 16: a reader by the header reads a row as two."""
    return put_encoding(folder, "factored", features=8)


@hostile("the head of factored rows is the sha256 of its file, found '../../../home/victim/head.h5'")
def head_that_is_a_path(folder: Path) -> Path:
    """A path in the place of the hash, for readers that look files up by their hash."""
    return put_encoding(folder, "factored", head="../../../home/victim/head.h5")


@hostile("the head of factored rows is the sha256 of its file, found 'AAAA")
def head_in_capital_letters(folder: Path) -> Path:
    """A hash in capitals: another key for the same layer."""
    return put_encoding(folder, "factored", head="A" * 64)


@hostile("the head of factored rows is the sha256 of its file, found {'sha256': '0000")
def head_in_an_object(folder: Path) -> Path:
    """An object in the place of the hash, which cannot be hashed: TypeError in the table of layers."""
    return put_encoding(folder, "factored", head={"sha256": "0" * 64})


@hostile(r"factored rows have one logit a class, \(C,\), found \(64, 2\)")
def factored_rows_of_images(folder: Path) -> Path:
    """Factored rows of two positions, of which one layer makes one."""
    return put_encoding(folder, "factored", shape=[CLASSES, 2])


@hostile("dtype 'float32' is not known; the encoding factored stores float16")
def factored_rows_of_float32(folder: Path) -> Path:
    """float32 over features of 2 bytes."""
    return put_encoding(folder, "factored", dtype="float32")


@hostile("the encoding factored needs exactly .*, found .*'activation': 'relu'")
def factored_rows_with_an_activation(folder: Path) -> Path:
    """A field more, behind the layer: the logits of this reader and of that one differ."""
    manifest = manifest_of("factored")
    manifest["encoding"] = {"activation": "relu", **manifest["encoding"]}
    return put(folder, "factored", manifest)


@hostile("teacher.h5: factored rows need the teacher's last layer beside them .head.h5.")
def one_file_of_factored_rows(folder: Path) -> Path:
    """A one-file cache of factored rows, whose layer could lie anywhere."""
    encoding = {"name": "factored", "dtype": "float16", "shape": [CLASSES], "features": FEATURES, "head": "0" * 64}
    return put_file(folder, file_with(encoding=encoding))


# --------------------------------------------------------------------------- soft targets


@hostile("soft targets have a temperature from 0.01 .*, found 0.0$")
def soft_targets_at_temperature_zero(folder: Path) -> Path:
    """T = 0, by which the student's logits are divided."""
    return put_encoding(folder, "soft_targets", temperature=0.0)


@hostile("soft targets need k, an integer, and temperature, a fraction; found 10 and 4$")
def soft_targets_at_a_temperature_in_another_text(folder: Path) -> Path:
    """T = 4, not 4.0: the same encoding in another text, so that equal caches have two hashes."""
    return put_encoding(folder, "soft_targets", temperature=4)


@hostile("soft targets need k, an integer, and temperature, a fraction; found True and 4.0")
def soft_targets_of_true_classes(folder: Path) -> Path:
    """k = true, which is equal to 1."""
    return put_encoding(folder, "soft_targets", k=True)


@hostile("soft targets hold 1 to C classes a row, .*; found k = 65 with rows of shape .64,.")
def soft_targets_of_more_classes_than_there_are(folder: Path) -> Path:
    """k = 65 of 64 classes."""
    return put_encoding(folder, "soft_targets", k=CLASSES + 1)


@hostile("dtype 'int8' is not known; choose one of float16, float32")
def soft_targets_as_integers(folder: Path) -> Path:
    """Integers without the scale that would make logarithms of them."""
    return put_encoding(folder, "soft_targets", dtype="int8")


@hostile("the encoding soft_targets needs exactly")
def soft_targets_without_a_temperature(folder: Path) -> Path:
    """No temperature: probabilities that would serve any."""
    manifest = manifest_of("soft_targets")
    del manifest["encoding"]["temperature"]
    return put(folder, "soft_targets", manifest)
