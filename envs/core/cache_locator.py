"""`SourcesLocator`, by which numba finds compiled kernels of this package (see `compile_cache`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numba.core.caching import UserProvidedCacheLocator

from .compile_cache import ROOT, stamp_of


class SourcesLocator(UserProvidedCacheLocator):
    """Stamps a kernel with all the sources that it depends on; leaves files outside the package to numba."""

    def get_source_stamp(self) -> str:
        """What numba compares with the stamp under which it stored a kernel."""
        return stamp_of(Path(self._py_file).resolve())

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Any:
        """The locator of a kernel; None for one that is not of this package, or without a folder to store in."""
        if not Path(py_file).resolve().is_relative_to(ROOT):
            return None
        return super().from_function(py_func, py_file)
