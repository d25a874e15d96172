"""Modules of this folder that tests share are found by name: `routing`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
