"""A checkpoint is a folder; it is written whole or not at all, and nothing in it is ever unpickled.

- `policy.safetensors`: weights and input scaling
- `config.json`: env id, spec, feature version, network, training, versions
- `policy.onnx`: the decision as one file (`export.py`)
- `card.md`: what it was trained on and measured at

A folder that training resumes from has `resume.safetensors` and `resume.json` beside these.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..envs.core.errors import InputError
from ..envs.core.results import atomic_folder
from .networks import PointerNetwork
from .policy import PointerPolicy

FORMAT = 1
"""Layout of the folder; a reader refuses another one."""

WEIGHTS, CONFIG, ONNX, CARD = "policy.safetensors", "config.json", "policy.onnx", "card.md"
RESUME_TENSORS, RESUME_JSON = "resume.safetensors", "resume.json"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    folder: Path
    network: PointerNetwork
    config: dict[str, Any]
    """`env_id`, `spec`, `feature_version`, `network`, `training`, `versions`."""
    card: str

    @property
    def onnx_path(self) -> Path:
        """The ONNX file of this checkpoint, for `export.OnnxPolicy`."""
        return self.folder / ONNX


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    found = {}
    for package in ("schedlab", "torch", "numpy", "numba", "gymnasium", "stable-baselines3", "sb3-contrib"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def write_atomically(path: str | PathLike[str], text: str) -> None:
    """Write a file under a temporary name and rename it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def save_checkpoint(
    folder: str | PathLike[str],
    policy: PointerPolicy | PointerNetwork,
    config: dict[str, Any],
    card: str = "",
    *,
    with_onnx: bool = True,
    resume: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
) -> Path:
    """Write a checkpoint folder, replacing an older one of that name.

    Args:
        folder: its name; written under a temporary name beside it and renamed.
        policy: what to save.
        config: `env_id` (str), `spec` (dict) and `feature_version` (int), and what else should be kept, such as
            `training`. Must be JSON-able. The network's own configuration and the versions are added.
        card: Markdown: what it was trained on and measured at.
        with_onnx: also export `policy.onnx`; periodic checkpoints of a training run do without.
        resume: tensors and JSON-able values that training goes on from.

    Raises:
        InputError: `config` lacks an entry or is not JSON-able.
    """
    folder = Path(folder)
    network = policy.network if isinstance(policy, PointerPolicy) else policy
    missing = [key for key in ("env_id", "spec", "feature_version") if key not in config]
    if missing:
        raise InputError(f"checkpoint config lacks {missing}", file=folder, remedy="Add them to the config dict")
    config = {"format": FORMAT, **config, "network": network.config, "versions": versions()}
    try:
        text = json.dumps(config, indent=2)
    except TypeError as error:
        raise InputError(
            f"checkpoint config is not JSON-able ({error})", file=folder, remedy="Use dicts, lists, numbers and text"
        ) from error

    with atomic_folder(folder) as temporary:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
        (temporary / WEIGHTS).write_bytes(save(tensors))  # save_file makes files that only the owner can read
        (temporary / CONFIG).write_text(text)
        (temporary / CARD).write_text(card)
        if with_onnx:
            from .export import onnx_bytes  # onnx and onnxruntime are needed only here

            metadata = {key: config[key] for key in ("env_id", "feature_version")}
            (temporary / ONNX).write_bytes(onnx_bytes(network, metadata))
        if resume is not None:
            state = {name: tensor.contiguous() for name, tensor in resume[0].items()}
            (temporary / RESUME_TENSORS).write_bytes(save(state))
            (temporary / RESUME_JSON).write_text(json.dumps(resume[1]))
    return folder


def load_checkpoint(
    folder: str | PathLike[str],
    *,
    env_id: str | None = None,
    feature_version: int | None = None,
    context_size: int | None = None,
    candidate_size: int | None = None,
) -> Checkpoint:
    """Read a checkpoint and make sure that it fits; arguments left out are not checked.

    Raises:
        InputError: a file is missing or corrupt, or the checkpoint is for another env, feature version or size.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("no such checkpoint folder", file=folder, remedy="Give a folder that `schedlab train` wrote")
    config = _read_json(folder / CONFIG)
    path = folder / CONFIG
    if config.get("format") != FORMAT:
        raise InputError(
            f"checkpoint format is {config.get('format')!r}, expected {FORMAT}",
            file=path,
            remedy="Load it with the version of schedlab that wrote it, or train again",
        )
    for name, wanted, remedy in (
        ("env_id", env_id, "Choose a checkpoint that was trained in this env"),
        ("feature_version", feature_version, "The meaning of the features changed: train again"),
    ):
        if wanted is not None and config.get(name) != wanted:
            raise InputError(f"{name} is {config.get(name)!r}, expected {wanted!r}", file=path, remedy=remedy)
    try:
        network = PointerNetwork(**config["network"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"'network' does not describe a pointer network ({error})", file=path, remedy=_COPY_AGAIN
        ) from error
    for name, wanted in (("context_size", context_size), ("candidate_size", candidate_size)):
        if wanted is not None and network.config[name] != wanted:
            raise InputError(
                f"{name} of the network is {network.config[name]}, the env has {wanted}",
                file=path,
                remedy="Use the spec that the checkpoint was trained with, or train again",
            )
    tensors = _read_tensors(folder / WEIGHTS)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(
            f"weights do not fit the network of {CONFIG} ({_first_line(error)})",
            file=folder / WEIGHTS,
            remedy=_COPY_AGAIN,
        ) from error
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise InputError(
            f"{broken[0]} holds values that are not finite",
            file=folder / WEIGHTS,
            remedy="Take an earlier checkpoint, or train again with a lower learning rate",
        )
    card = folder / CARD
    return Checkpoint(folder, network.eval(), config, card.read_text() if card.is_file() else "")


_COPY_AGAIN = "Copy the checkpoint folder again, or train again"


def load_resume(folder: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The training state beside a checkpoint: tensors and values, as given to `save_checkpoint`. Raises InputError."""
    return _read_tensors(Path(folder) / RESUME_TENSORS), _read_json(Path(folder) / RESUME_JSON)


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's state as named tensors and JSON-able parameter groups."""
    state = optimizer.state_dict()
    tensors = {
        f"optimizer.{index}.{name}": torch.as_tensor(value).detach().cpu()
        for index, entries in state["state"].items()
        for name, value in entries.items()
    }
    return tensors, state["param_groups"]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Put the state of `flatten_optimizer` back."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = tensor
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in groups]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def rng_state() -> tuple[dict[str, Tensor], list[Any]]:
    """State of the global generators of torch and numpy, which PPO draws from."""
    state: Any = np.random.get_state()  # noqa: NPY002 - the generator that SB3 uses
    name, keys, position, has_gauss, cached = state
    tensors = {"rng.torch": torch.get_rng_state(), "rng.numpy": torch.from_numpy(keys.astype(np.int64))}
    return tensors, [name, int(position), int(has_gauss), float(cached)]


def restore_rng(tensors: dict[str, Tensor], numpy_state: list[Any]) -> None:
    """Put the state of `rng_state` back."""
    torch.set_rng_state(tensors["rng.torch"])
    name, position, has_gauss, cached = numpy_state
    keys = tensors["rng.numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, cached))  # noqa: NPY002


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError("no such file", file=path, remedy=_COPY_AGAIN)
    try:
        data = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        line = getattr(error, "lineno", None)
        raise InputError(f"not readable as JSON ({error})", file=path, line=line, remedy=_COPY_AGAIN) from error
    if not isinstance(data, dict):
        raise InputError(f"holds a {type(data).__name__}, expected an object", file=path, remedy=_COPY_AGAIN)
    return data


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError("no such file", file=path, remedy=_COPY_AGAIN)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"not readable as safetensors ({error})", file=path, remedy=_COPY_AGAIN) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else lines[0]
