"""Where numba keeps compiled kernels: a folder named after the sources they were compiled from.

numba's own check looks at the file of a kernel alone, not at the files of the kernels that were compiled into it: after
an edit or a checkout it would go on running old code. Here any change of a source with kernels in it leads to a fresh
folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

NUM_KEPT = 3
"""Folders of earlier sources that are kept."""


def use_cache_of_sources() -> None:
    """Point numba at the folder of the present sources, unless $NUMBA_CACHE_DIR names another."""
    if "NUMBA_CACHE_DIR" in os.environ:
        return
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for room in ("envs", "baselines", "agents", "real_backend", "experiments"):
        for source in sorted((root / room).rglob("*.py")):
            text = source.read_bytes()
            if b"njit" in text:
                digest.update(text)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "schedlab" / "numba"
    folder = home / digest.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.touch()
        older = sorted(home.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)[NUM_KEPT + 1 :]
    except OSError:  # no home that can be written to: numba's own choice, next to the sources
        return
    for path in older:
        shutil.rmtree(path, ignore_errors=True)
    os.environ["NUMBA_CACHE_DIR"] = str(folder)
    if "numba" in sys.modules:
        sys.modules["numba"].config.CACHE_DIR = str(folder)
