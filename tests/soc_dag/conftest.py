"""Modules of this folder that tests share are found by name: `soc_reference`, `soc_problems`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
