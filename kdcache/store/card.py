"""`kdcache card`: a README.md in a folder cache, so that whoever receives the files knows what they are."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from kdcache.errors import UsageError, printable
from kdcache.store import posix
from kdcache.store.inspect import describe
from kdcache.store.shards import remove_temporaries

CARD = "README.md"
# What the arrays of an encoding mean, in a line.
_MEANING = {
    ("dense", "float16"): "The row maximum is kept apart: raw logit = `logits` + `row_max`.",
    ("dense", "float32"): "They are `logits`.",
    ("topk", "float16"): "The largest are `topk_logits` + `row_max` of `topk_classes`; the others are summed up.",
    ("factored", "float16"): "Raw logits = (`features` * `row_scale`) @ weight.T + bias, which are in `head.h5`.",
}
_ELSE = "They are coded in small integers, with the largest beside; the format is documented with kdcache."
_MARKUP = re.compile(r"[<>&\[\]!\\]")  # tags, entities, links, images, escapes; * and _ only make text slanted


def write_card(path: str | Path, *, overwrite: bool = False) -> Path:
    """Writes the card of a folder cache.

    Args:
        path: a finished folder cache.
        overwrite: replace a card that is there.

    Returns:
        The path of the card.

    Raises:
        UsageError: a one-file cache, or a card is there already.
    """
    folder = Path(path)
    summary = describe(folder)
    if summary["kind"] != "folder":
        raise UsageError(f"{folder} is one file; a card goes into a folder cache. Print it with `kdcache card --print`")
    target = folder / CARD
    remove_temporaries(folder, CARD, of_the_dead=True)
    if posix.exists(target) and not overwrite:
        raise UsageError(f"{target} exists; pass --overwrite to replace it")
    posix.write_file(target, render_card(summary, name=folder.resolve().name).encode(), replace=True)
    return target


def render_card(summary: dict[str, Any], *, name: str) -> str:
    """The text of a card: YAML front matter as the dataset hubs read it, then what the rows are.

    Args:
        summary: what `describe` returns.
        name: of the cache.
    """
    provenance = summary["provenance"]
    teacher, data = provenance.get("teacher", {}), provenance.get("data", {})
    licence = str(provenance.get("licence") or teacher.get("licence") or "unknown")
    encoding = summary["encoding"]
    if summary["kind"] == "folder":
        files, stand, path, here = "shards/*.h5", "each file in `shards/`", "PATH_OF_THIS_FOLDER", "."
    else:
        files, stand, path, here = "*.h5", "the file", "PATH_OF_THE_FILE", shlex.quote(_one_line(name))
    lines = [
        "---",
        f"license: {_yaml(licence)}",
        "tags: [knowledge-distillation, teacher-logits, kdcache]",
        f"pretty_name: {_yaml(name)}",
        "configs:",
        "- config_name: default",
        f"  data_files: {_yaml(files)}",
        "---",
        "",
        f"# Teacher logits: {_cell(name)}",
        "",
        f"{summary['samples']:,} samples x {len(summary['views'])} view(s), {summary['classes']['count']} classes, "
        f"encoding {encoding['name']} {encoding['dtype']}, {summary['bytes_per_row']['total']} bytes a row on disk.",
        "",
        "| | |",
        "|---|---|",
        f"| teacher | {_cell(str(teacher.get('spec', 'unknown')))} |",
        f"| weights sha256 | `{_cell(str(teacher.get('state_sha256', 'unknown')))}` |",
        f"| data | {_cell(str(data.get('name', 'unknown')))} |",
        f"| did the teacher train on these rows? | {_cell(str(provenance.get('teacher_seen', 'unknown')))} |",
        f"| licence | {_cell(licence)} |",
        f"| root hash | `{summary['root']}` |",
        f"| created | {_cell(summary['created'] or 'not recorded')} |",
        "",
        f"The arrays stand at the root of {stand}; any HDF5 tool reads them. Logits are raw (no softmax,",
        f"no temperature). {_MEANING.get((encoding['name'], encoding['dtype']), _ELSE)}",
        "",
        "```python",
        "import kdcache",
        "",
        f"cache = kdcache.open({path})",
        "loader = DataLoader(kdcache.join(dataset, cache), batch_size=256, shuffle=True)",
        "```",
        "",
        f"Check what you received: `kdcache verify {here} --expect-root {summary['root']}`",
        "",
    ]
    return "\n".join(lines)


def _yaml(text: str) -> str:
    """A YAML scalar in quotes (a JSON string is one), so that `no` stays text and a colon starts nothing."""
    return json.dumps(_one_line(text), ensure_ascii=False)


def _cell(text: str) -> str:
    """One line of Markdown that is shown as it is: a hub makes a page of it, and the text is a stranger's."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", _one_line(text))


def _one_line(text: str) -> str:
    """One line without what could break a table cell, the front matter or a terminal."""
    return printable(" ".join(text.split())).replace("|", "/").replace("`", "'")[:300]
