"""Tiny engines and random workloads are shared with the tests of the simulator."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "request_scheduling"))
