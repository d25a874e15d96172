"""The house itself: floors, packaging, light imports, and nothing of one machine in the files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

import schedlab

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("agents", "baselines", "envs", "experiments", "real_backend")
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_tests_run_against_this_tree():
    assert Path(schedlab.__file__).resolve().parent == ROOT


def test_floors():
    config = str(ROOT / "pyproject.toml")
    assert lint_imports(config_filename=config, no_cache=True) == EXIT_STATUS_SUCCESS


def test_every_package_is_listed():
    folders = {p.parent.relative_to(ROOT) for room in ROOMS for p in (ROOT / room).rglob("__init__.py")}
    packages = {"schedlab"} | {".".join(["schedlab", *folder.parts]) for folder in folders}
    assert CONFIG["tool"]["setuptools"]["packages"] == sorted(packages)


def test_no_module_lies_outside_a_package():
    stray = [p for room in ROOMS for p in (ROOT / room).rglob("*.py") if not (p.parent / "__init__.py").exists()]
    assert stray == []


def test_importing_envs_is_light():
    heavy = (
        "torch transformers ortools stable_baselines3 sb3_contrib pandas matplotlib rich torch_geometric onnxruntime"
    )
    code = f"import sys, schedlab.envs; print(*[name for name in {heavy.split()} if name in sys.modules])"
    # an empty folder to stand in: nothing but the installation can make the import work
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
        env=_plain(),
    )
    assert run.stdout.split() == []


def test_no_machine_paths_in_the_files():
    # written in pieces, so that this file does not find itself
    home = re.compile(r"(?<![\w.:/~-])/(?:" + "|".join(["home", "root", "Users", "work", "mnt"]) + r")/\w")
    found = []
    for path in _text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if home.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert found == []


def _text_files() -> list[Path]:
    """Files that are, or would be, committed and hold text."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:  # an unpacked archive
        paths = [
            p for room in (*ROOMS, "tests", "docs") for p in (ROOT / room).rglob("*") if "__pycache__" not in p.parts
        ]
        paths += list(ROOT.glob("*"))
    return [p for p in paths if p.is_file() and not p.is_symlink() and b"\0" not in p.read_bytes()[:8192]]


def _plain() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
