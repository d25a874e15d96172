"""Kernels are compiled again when, and only when, a source that they depend on has changed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from schedlab.envs.core import compile_cache

ROOT = compile_cache.ROOT
SIM = ROOT / "envs" / "expert_caching" / "sim.py"


def test_dependencies_are_followed():
    direct = compile_cache.imports_of(SIM)
    assert ROOT / "envs" / "expert_caching" / "state.py" in direct
    assert ROOT / "envs" / "core" / "kernel.py" in direct
    assert not any("request_scheduling" in file.parts for file in direct)


def test_a_stamp_changes_with_what_a_kernel_depends_on_and_with_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "ROOT", tmp_path)
    for name, text in {
        "a/far.py": "from x import njit\nFAR = 1\n",
        "a/near.py": "from x import njit\nfrom .far import (\n    FAR,\n)\n",
        "b/top.py": "from ..a import near\n",
        "b/other.py": "from x import njit\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    def stamp():
        compile_cache.imports_of.cache_clear()
        compile_cache.stamp_of.cache_clear()
        return compile_cache.stamp_of(tmp_path / "b" / "top.py")

    first = stamp()
    (tmp_path / "b" / "other.py").write_text("from x import njit\nOTHER = 2\n")
    assert stamp() == first
    (tmp_path / "a" / "far.py").write_text("from x import njit\nFAR = 2\n")
    assert stamp() != first


def test_all_kernels_are_in_that_cache():
    for room in ("envs", "baselines", "agents", "real_backend", "experiments"):
        for file in (ROOT / room).rglob("*.py"):
            if file.name != "kernel.py":
                assert not re.search(r"^from numba import .*\bnjit\b", file.read_text(), re.M), file
    code = (
        "from schedlab.agents.fused import _score; from numba.core.registry import CPUDispatcher\n"
        "print(type(_score._cache._impl.locator).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.home())
    assert run.stdout.strip() == "SourcesLocator"


def test_a_class_of_a_signature_may_be_renamed(tmp_path):
    """As an upgrade of the package does: the index that names the old class is not even read; its folder goes."""
    code = (
        "import sys; from pathlib import Path; import schedlab.envs.core.compile_cache as cache\n"
        "import schedlab.envs.core.cache_locator as locator; cache.ROOT = locator.ROOT = Path(sys.argv[1])\n"
        "sys.path.insert(0, sys.argv[1]); import kernels; print(kernels.total(kernels.new()))"
    )
    source = (
        "from typing import NamedTuple\nfrom schedlab.envs.core.kernel import njit\n"
        "class NAME(NamedTuple):\n    number: int\n"
        "@njit(cache=True)\ndef total(pair):\n    return pair.number\n"
        "def new():\n    return NAME(3)\n"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    for name in ("First", "Second", "Second"):
        (tmp_path / "kernels.py").write_text(source.replace("NAME", name))
        command = [sys.executable, "-c", code, str(tmp_path)]
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path.home(), env=environment)
        assert run.stdout.strip() == "3"
        folders = [path for path in (tmp_path / "cache").rglob("kernels-*") if path.is_dir()]
        assert len(folders) == 1 and len(list(folders[0].glob("*.nbi"))) == 1
