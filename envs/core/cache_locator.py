"""`SourcesLocator`, by which numba finds compiled kernels of this package (see `compile_cache`)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from numba.core.caching import UserProvidedCacheLocator

from .compile_cache import ROOT, stamp_of


class SourcesLocator(UserProvidedCacheLocator):
    """Stamps a kernel with all the sources that it depends on; leaves files outside the package to numba.

    The stamp names the folder, too. numba unpickles a kernel's index before it looks at the stamp in it, and that
    raises AttributeError where the index speaks of a class that sources of today have renamed.
    """

    def __init__(self, py_func: Any, py_file: str) -> None:
        super().__init__(py_func, py_file)
        path = Path(py_file).resolve()
        self._stem = path.stem
        self._cache_path = os.path.join(self._cache_path, f"{path.stem}-{stamp_of(path)[:16]}")

    def ensure_cache_path(self) -> None:
        """Make the folder, in place of the one for earlier sources of the same file."""
        folder = Path(self._cache_path)
        if not folder.is_dir():
            for stale in folder.parent.glob(f"{self._stem}-*"):
                shutil.rmtree(stale, ignore_errors=True)
        super().ensure_cache_path()

    def get_source_stamp(self) -> str:
        """What numba compares with the stamp under which it stored a kernel."""
        return stamp_of(Path(self._py_file).resolve())

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Any:
        """The locator of a kernel; None for one that is not of this package, or without a folder to store in."""
        if not Path(py_file).resolve().is_relative_to(ROOT):
            return None
        return super().from_function(py_func, py_file)
