"""Benchmarks; results are kept in ``results``. Helpers of the tests start their processes."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
