"""Where numba keeps compiled kernels, and how it knows that they are still those of the present sources.

numba's own check looks at the file of a kernel alone, not at the files of the kernels that were compiled into it: after
an edit or a checkout it would go on running old code. Here a kernel is stamped with its file and all files of the
package that this one imports, however far away, so that an edit makes numba compile again what depends on it, and that
alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
"""Of the package."""
IMPORT = re.compile(r"^\s*from (\.+)([\w.]*) import (\([^)]*\)|[^\n]*)", re.MULTILINE)
"""A relative import; the package imports its own modules in no other way."""


def use_cache_of_sources() -> None:
    """Give numba a folder of its own for what it compiles, unless $NUMBA_CACHE_DIR names one, and `SourcesLocator`.

    To be called before the first kernel is decorated: by `schedlab.envs` and, as numba may not be imported yet then, by
    `kernel.py`.
    """
    if "NUMBA_CACHE_DIR" not in os.environ:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "schedlab" / "numba"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # no home that can be written to: numba's own choice, next to the sources
            return
        os.environ["NUMBA_CACHE_DIR"] = str(folder)
    if "numba" in sys.modules:
        config: Any = sys.modules["numba"].config
        config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]
        if not config.CACHE_LOCATOR_CLASSES:
            ours = f"{__package__}.cache_locator.SourcesLocator"
            config.CACHE_LOCATOR_CLASSES = f"{ours},UserProvidedCacheLocator,IPythonCacheLocator,ZipCacheLocator"


@cache
def imports_of(path: Path) -> frozenset[Path]:
    """The files of the package that this file of it imports: modules, and the packages that they are in."""
    found = set()
    for dots, module, names in IMPORT.findall(path.read_text()):
        folder = path.parents[len(dots) - 1]
        base = folder.joinpath(*module.split(".")) if module else folder
        for name in ("", *re.findall(r"\w+", names)):
            place = base / name if name else base
            found |= {file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()}
    return frozenset(file for file in found if file.is_relative_to(ROOT))


@cache
def stamp_of(path: Path) -> str:
    """Digest of a file of the package and of every file with kernels that it depends on."""
    seen, front = {path}, [path]
    while front:
        new = imports_of(front.pop()) - seen
        seen |= new
        front += new
    digest = hashlib.sha256()
    for file in sorted(seen):
        text = file.read_bytes()
        if file == path or b"njit" in text:
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + text)
    return digest.hexdigest()
