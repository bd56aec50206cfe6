"""Makes all hostile and valid caches: `python tests/hostile/make_hostile.py FOLDER`, one folder each, 140 MB.

    python tests/hostile/make_hostile.py --readme      # writes README.md beside this file from the docstrings
    python tests/hostile/make_hostile.py /tmp/hostile  # then try: kdcache verify /tmp/hostile/external_link/teacher.h5

Most of what is made is sparse; nothing of it runs by itself. Look at it with `h5dump` at your own risk.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hostile_cases import all_cases, readme


def main(arguments: list[str]) -> int:
    """Writes the page, or the files; returns the exit code."""
    if arguments == ["--readme"]:
        Path(__file__).with_name("README.md").write_text(readme(), encoding="utf-8")
        return 0
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    for case in all_cases():
        folder = Path(arguments[0]) / case.name
        folder.mkdir(parents=True)
        print(case.build(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
