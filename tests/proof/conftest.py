"""What the proofs of docs/reliability.md share: helper modules beside them can be imported by name."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
