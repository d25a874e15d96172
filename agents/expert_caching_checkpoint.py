"""Checkpoints of learned scores: from torch to the kernels' weights, to a folder, and back.

A checkpoint is a folder of `policy.safetensors`, `config.json` and `card.md`, read without torch. The large tables are
kept as int8 with a scale for every row, all else as float16.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ..envs.core.errors import InputError
from ..envs.core.results import atomic_folder
from .expert_caching_features import FEATURE_VERSION
from .expert_caching_score import Weights

if TYPE_CHECKING:
    from .expert_caching_network import EvictionNetwork, NextLayerHead, PortableNetwork

FORMAT = "expert_caching/eviction/3"

WEIGHTS, CONFIG, CARD = "policy.safetensors", "config.json", "card.md"
TABLES = ("embedding", "own", "channels", "above_own", "above_channels")
"""Arrays that are stored as int8, and kept so; each has an array of scales, one for each row of the last axis."""

_COPY_AGAIN = "Copy the checkpoint folder again, or train again"


def pack_eviction(networks: Sequence[EvictionNetwork], head: NextLayerHead) -> Weights:
    """The weights of a committee of torch networks, and of the first one's head, for the kernels."""
    from .expert_caching_network import SHARES

    members = [_member_arrays(network) for network in networks]
    arrays = {name: np.stack([member[name] for member in members]) for name in members[0]}
    arrays["out_w"] /= len(networks)
    arrays["out_b"] /= len(networks)
    arrays["shares"] = np.array(SHARES)
    arrays |= _head_arrays(head)
    arrays |= {f"{name}_scale": np.ones(arrays[name].shape[:-1]) for name in TABLES}
    return Weights(**{name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()})


def _arrays_of(module: Any) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().numpy().astype(np.float32) for name, tensor in module.state_dict().items()}


def _member_arrays(network: EvictionNetwork) -> dict[str, np.ndarray]:
    """Those of `Weights` that a network has, without the leading axis."""
    state, recurrences = _arrays_of(network), range(network.config["num_recurrences"])

    def stacked(name: str) -> np.ndarray:
        return np.stack([state[name.format(i)].T for i in recurrences])

    return {
        "embedding": state["embedding"],
        "own": state["own"],
        "norm": np.stack([state["norm.weight"], state["norm.bias"]]),
        "token_w": state["token.weight"].T,
        "token_b": state["token.bias"],
        "gates_w": stacked("recurrences.{}.gates.weight"),
        "gates_b": stacked("recurrences.{}.gates.bias"),
        "mixer_w": stacked("mixers.{}.weight"),
        "mixer_b": stacked("mixers.{}.bias"),
        "history_w": state["from_history.weight"].T,
        "history_b": state["from_history.bias"],
        "prefix_scale": state["prefix_scale"],
        "layer_bias": state["layer_bias"],
        "middle_w": state["middle.weight"].T,
        "middle_b": state["middle.bias"],
        "channels": state["channels"].transpose(0, 3, 1, 2),
        "channel_bias": state["channel_bias"][:, :, 0].transpose(0, 2, 1),
        "hidden_w": state["unit_in"].T,
        "hidden_b": state["unit_bias"],
        "out_w": state["out"].T,
        "out_b": state["out_bias"],
    }


def _head_arrays(head: NextLayerHead) -> dict[str, np.ndarray]:
    state = _arrays_of(head)
    return {
        "above_own": state["own"],
        "above_prefix_w": state["from_prefix.weight"].T,
        "above_context_w": state["from_context.weight"].T,
        "above_bias": state["layer_bias"],
        "above_middle_w": state["middle.weight"].T,
        "above_middle_b": state["middle.bias"],
        "above_channels": state["channels"].transpose(0, 2, 1),
        "above_channel_bias": state["channel_bias"][:, 0],
        "above_hidden_w": state["hidden_in"],
        "above_hidden_b": state["hidden_bias"][:, :, 0],
        "above_out_w": state["hidden_out"][0],
        "above_feature_w": state["feature_out"][0],
    }


def pack_portable(network: PortableNetwork, num_layers: int, num_experts: int) -> Weights:
    """The weights of a network that knows no layer and no expert, for a model of any shape: all else is nothing."""
    from .expert_caching_network import EvictionNetwork, NextLayerHead

    whole = EvictionNetwork(num_layers, num_experts, width=1, hidden=network.hidden_in.out_features)
    weights = pack_eviction([whole], NextLayerHead(num_layers, num_experts, width=1, hidden=1))
    state = {name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}
    num_channels, num_features = weights.channel_bias.shape[3], state["hidden_in.weight"].shape[1]
    hidden_w = np.zeros_like(weights.hidden_w)
    hidden_w[0, :num_features] = state["hidden_in.weight"].T
    out_w = np.zeros_like(weights.out_w)
    out_w[0, :num_features] = state["feature_out.weight"].T
    out_w[0, num_features + num_channels :] = state["hidden_out.weight"].T
    nothing = {name: np.zeros_like(getattr(weights, name)) for name in ("channels", "channel_bias")}
    return weights._replace(
        hidden_w=hidden_w,
        hidden_b=np.tile(state["hidden_in.bias"], (1, num_layers, 1)),
        out_w=out_w,
        out_b=np.tile(state["hidden_out.bias"], (1, num_layers, 1)),
        **nothing,
    )


def save_eviction(
    folder: str | PathLike[str], weights: Weights, top_k: int, config: dict[str, Any], card: str = ""
) -> Path:
    """Write a checkpoint folder, replacing an older one of that name; written under a temporary name and renamed.

    Args:
        folder: its name.
        weights: what to save.
        top_k: experts a token of the model.
        config: what else to keep (JSON-able): training, split, versions.
        card: Markdown: what it was trained on and measured at.
    """
    folder = Path(folder)
    tensors: dict[str, np.ndarray] = {}
    for name, array in weights._asdict().items():
        if name in TABLES:
            rows = array * getattr(weights, f"{name}_scale")[..., None]
            scale = np.maximum(np.abs(rows).max(-1, keepdims=True), 1e-12) / 127.0
            tensors[f"{name}.int8"] = np.rint(rows / scale).astype(np.int8)
            tensors[f"{name}.scale"] = scale.astype(np.float32)
        elif name.removesuffix("_scale") not in TABLES:
            tensors[name] = array.astype(np.float16)
    _, num_layers, num_experts, _ = weights.embedding.shape
    model = {"num_layers": num_layers, "num_experts": num_experts, "top_k": top_k}
    text = json.dumps({"format": FORMAT, "feature_version": FEATURE_VERSION, "model": model, **config}, indent=2)
    with atomic_folder(folder) as temporary:
        (temporary / WEIGHTS).write_bytes(save(tensors))
        (temporary / CONFIG).write_text(text + "\n")
        (temporary / CARD).write_text(card)
    return folder


def load_weights(folder: str | PathLike[str]) -> tuple[Weights, int]:
    """The weights in a checkpoint folder, and the experts a token of the model that they are for.

    Raises:
        InputError: a file is missing, corrupt or of another format or feature version; weights do not fit together or
            are not finite.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError("no such file", file=path, remedy=_COPY_AGAIN)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"not readable as safetensors ({error})", file=path, remedy=_COPY_AGAIN) from error
    arrays = {}
    for field in Weights._fields:
        table = field.removesuffix("_scale")
        stored = f"{field}.int8" if field in TABLES else f"{table}.scale" if table in TABLES else field
        if stored not in tensors:
            raise InputError(f"lacks {stored!r}", file=path, remedy=_COPY_AGAIN)
        array = tensors[stored] if field in TABLES else tensors[stored].astype(np.float32)
        if not np.isfinite(array).all():
            raise InputError(f"{stored} holds values that are not finite", file=path, remedy="Train again")
        arrays[field] = np.ascontiguousarray(array[..., 0] if stored.endswith(".scale") else array)
    weights, model = Weights(**arrays), config["model"]
    for table in TABLES:
        if arrays[table].dtype != np.int8 or arrays[f"{table}_scale"].shape != arrays[table].shape[:-1]:
            raise InputError(f"{table}.int8 and {table}.scale do not fit together", file=path, remedy=_COPY_AGAIN)
    if weights.channels.shape[1:3] != (model["num_layers"], model["num_experts"]):
        raise InputError(
            f"weights are for {weights.channels.shape[1:3]} layers and experts, {CONFIG} says {model}",
            file=path,
            remedy=_COPY_AGAIN,
        )
    return weights, model["top_k"]


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError("no such file", file=path, remedy="Give a folder that holds an eviction policy")
    try:
        config = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"not readable as JSON ({error})", file=path, remedy=_COPY_AGAIN) from error
    for key, wanted in (("format", FORMAT), ("feature_version", FEATURE_VERSION)):
        if not isinstance(config, dict) or config.get(key) != wanted:
            found = config.get(key) if isinstance(config, dict) else config
            raise InputError(f"{key} is {found!r}, expected {wanted!r}", file=path, remedy="Train again")
    return config
