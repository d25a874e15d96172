"""The learned eviction score as a cache policy over `State`: compiled, streaming, strictly causal.

`LearnedEviction` runs the network of `expert_caching_network` one epoch at a time: a token costs one step of the
recurrence, an epoch the bookkeeping of its features, and only an epoch that must evict runs the copy kernel and scores
its candidates. Where the batch interleaves sequences, each row has its own stream, and an expert is kept by the chance
that any row needs it.

A checkpoint is a folder of `policy.safetensors`, `config.json` and `card.md`, read without torch. The three large
tables are kept as int8 with a scale for every row, all else as float16.
"""

from __future__ import annotations

import json
import os
import shutil
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numba import njit
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ..envs.core.errors import InputError
from ..envs.expert_caching.rule import evict_lowest
from ..envs.expert_caching.sim import Simulator, run_rule
from ..envs.expert_caching.state import Decision, State
from .expert_caching_features import (
    FEATURE_VERSION,
    NUM_COPIES,
    NUM_FEATURES,
    Stream,
    begin_token,
    copy_future,
    empty_stream,
    observe_layer,
    write_features,
)

if TYPE_CHECKING:
    from .expert_caching_network import EvictionNetwork

FORMAT = "expert_caching/eviction/1"
WEIGHTS, CONFIG, CARD = "policy.safetensors", "config.json", "card.md"
TABLES = ("embedding", "own", "channels")
"""Arrays that are stored as int8; scales run along the last axis."""


class Weights(NamedTuple):
    """Weights of an `EvictionNetwork`, matrices as (inputs, outputs), all float32 and C-contiguous.

    L layers, E experts, D width, I recurrences, K channels, H hidden, F features, O outputs.
    """

    embedding: np.ndarray  # (L, E, D)
    own: np.ndarray  # (L, E, D)
    norm: np.ndarray  # (2, D): scale, shift
    token_w: np.ndarray  # (D, D)
    token_b: np.ndarray  # (D,)
    gates_w: np.ndarray  # (I, D, 2 D): keep, value
    gates_b: np.ndarray  # (I, 2 D)
    mixer_w: np.ndarray  # (I, D, D)
    mixer_b: np.ndarray  # (I, D)
    history_w: np.ndarray  # ((I + 1) D, D)
    history_b: np.ndarray  # (D,)
    prefix_scale: np.ndarray  # (L,)
    layer_bias: np.ndarray  # (L, D)
    middle_w: np.ndarray  # (D, D)
    middle_b: np.ndarray  # (D,)
    channels: np.ndarray  # (L, E, K, D)
    channel_bias: np.ndarray  # (L, E, K)
    hidden_w: np.ndarray  # (F + K, H)
    hidden_b: np.ndarray  # (L, H)
    out_w: np.ndarray  # (F + K + H, O)
    out_b: np.ndarray  # (L, O)
    shares: np.ndarray  # (O,): cache sizes that the outputs are for, increasing


class Memory(NamedTuple):
    """What the policy remembers during a run. B rows of the batch, S slots."""

    streams: Stream  # every array with a leading axis B
    hidden: np.ndarray  # (B, I, D) float32: state of the recurrences
    context: np.ndarray  # (B, D) float32: what the tokens before say
    prefix: np.ndarray  # (B, D) float32: sum of the present token's embeddings so far
    vector: np.ndarray  # (D,) float32: of the present token and layer
    scratch: np.ndarray  # (4, 2 D + E) float32
    inputs: np.ndarray  # (F + K + H,) float32 of one expert
    copied: np.ndarray  # (NUM_COPIES, E) float32
    table: np.ndarray  # (F, E) float32
    logits: np.ndarray  # (O,) float32
    scores: np.ndarray  # (L, E) float64: at the last visit of each layer
    keys: np.ndarray  # (S,) float64


def new_memory(weights: Weights, num_rows: int, top_k: int, num_slots: int) -> Memory:
    """The Memory of a run that has seen nothing."""
    num_layers, num_experts, width = weights.embedding.shape
    stream = empty_stream(num_layers, num_experts, top_k)
    return Memory(
        Stream(*(np.repeat(array[None], num_rows, 0) for array in stream)),
        np.zeros((num_rows, len(weights.gates_b), width), np.float32),
        np.zeros((num_rows, width), np.float32),
        np.zeros((num_rows, width), np.float32),
        np.zeros(width, np.float32),
        np.zeros((4, 2 * width + num_experts), np.float32),
        np.zeros(len(weights.out_w), np.float32),
        np.zeros((NUM_COPIES, num_experts), np.float32),
        np.zeros((NUM_FEATURES, num_experts), np.float32),
        np.zeros(weights.out_w.shape[1], np.float32),
        np.zeros((num_layers, num_experts)),
        np.zeros(num_slots),
    )


@njit(cache=True)
def row_of(streams: Stream, b: int) -> Stream:
    """The Stream of one row, as views."""
    return Stream(
        streams.frequency[b],
        streams.in_sequence[b],
        streams.age[b],
        streams.masks[b],
        streams.used[b],
        streams.overlap[b],
        streams.context[b],
        streams.weight[b],
        streams.powers[b],
        streams.place[b],
    )


@njit(cache=True, fastmath=True)
def add_product(x, matrix, out) -> None:
    """out += x @ matrix."""
    for i in range(len(x)):
        factor, row = x[i], matrix[i]
        for j in range(len(out)):
            out[j] += factor * row[j]


@njit(cache=True, fastmath=True)
def silu(x) -> None:
    """x = x * sigmoid(x), in place."""
    for i in range(len(x)):
        x[i] = x[i] / (np.float32(1.0) + np.exp(-x[i]))


@njit(cache=True, fastmath=True)
def end_token(weights: Weights, hidden, context, whole, scratch) -> None:
    """One step of the recurrence: the token whose embeddings sum to `whole` (D,) is past. Writes hidden and context."""
    width, num_recurrences = len(whole), len(hidden)
    x, below, gates, normed = scratch[0, :width], scratch[1, :width], scratch[2, : 2 * width], scratch[3, :width]
    mean, square = np.float32(0.0), np.float32(0.0)
    for i in range(width):
        mean += whole[i]
    mean /= np.float32(width)
    for i in range(width):
        square += (whole[i] - mean) ** 2
    scale = np.float32(1.0) / np.sqrt(square / np.float32(width) + np.float32(1e-5))
    for i in range(width):
        normed[i] = (whole[i] - mean) * scale * weights.norm[0, i] + weights.norm[1, i]
    x[:] = weights.token_b
    add_product(normed, weights.token_w, x)
    silu(x)
    context[:] = weights.history_b
    add_product(x, weights.history_w[:width], context)
    below[:] = x
    for r in range(num_recurrences):
        gates[:] = weights.gates_b[r]
        add_product(below, weights.gates_w[r], gates)
        h = hidden[r]
        for i in range(width):
            keep = np.float32(1.0) / (np.float32(1.0) + np.exp(-gates[i]))
            h[i] = keep * h[i] + (np.float32(1.0) - keep) * gates[width + i]
        add_product(h, weights.history_w[(r + 1) * width : (r + 2) * width], context)
        below[:] = weights.mixer_b[r]
        add_product(h, weights.mixer_w[r], below)
        silu(below)
        for i in range(width):
            below[i] += x[i]


@njit(cache=True)
def observe(weights: Weights, memory: Memory, b: int, layer: int, position: int, used) -> None:
    """The gate of `layer` chose `used` (k,) for the token of row b, which is at `position` in its sequence."""
    stream = row_of(memory.streams, b)
    hidden, context, prefix = memory.hidden[b], memory.context[b], memory.prefix[b]
    if layer == 0:
        if position == 0:
            hidden[:] = 0
            context[:] = 0
        else:
            end_token(weights, hidden, context, prefix, memory.scratch)
        prefix[:] = 0
        begin_token(stream, position)
    observe_layer(stream, layer, used)
    for e in used:
        if e >= 0:
            row = weights.embedding[layer, e]
            for i in range(len(prefix)):
                prefix[i] += row[i]


@njit(cache=True, fastmath=True)
def prepare_scores(weights: Weights, memory: Memory, b: int, layer: int, used) -> None:
    """Write the token's vector and the feature table of row b, from which `score_expert` works."""
    stream = row_of(memory.streams, b)
    prefix, context, vector = memory.prefix[b], memory.context[b], memory.vector
    scale, width = weights.prefix_scale[layer], len(vector)
    for i in range(width):
        vector[i] = prefix[i] * scale + weights.layer_bias[layer, i] + context[i]
    for e in used:
        if e >= 0:
            row = weights.own[layer, e]
            for i in range(width):
                vector[i] += row[i]
    silu(vector)
    more = memory.scratch[0, :width]
    more[:] = weights.middle_b
    add_product(vector, weights.middle_w, more)
    silu(more)
    for i in range(width):
        vector[i] += more[i]
    match = copy_future(stream, layer, memory.copied)
    write_features(
        stream.frequency[layer],
        stream.in_sequence[layer],
        stream.age[layer],
        stream.place[2],
        memory.copied,
        match,
        memory.scratch[0, : memory.table.shape[1]],
        memory.table,
    )


@njit(cache=True, fastmath=True)
def score_expert(weights: Weights, memory: Memory, layer: int, expert: int) -> None:
    """Write the outputs for one expert into `memory.logits` (O,), after `prepare_scores`."""
    inputs, vector, num_channels = memory.inputs, memory.vector, weights.channel_bias.shape[2]
    for f in range(NUM_FEATURES):
        inputs[f] = memory.table[f, expert]
    for k in range(num_channels):
        row, total = weights.channels[layer, expert, k], weights.channel_bias[layer, expert, k]
        for i in range(len(vector)):
            total += vector[i] * row[i]
        inputs[NUM_FEATURES + k] = total
    known = NUM_FEATURES + num_channels
    hidden = inputs[known:]
    hidden[:] = weights.hidden_b[layer]
    add_product(inputs[:known], weights.hidden_w, hidden)
    for i in range(len(hidden)):
        hidden[i] = max(hidden[i], np.float32(0.0))
    memory.logits[:] = weights.out_b[layer]
    add_product(inputs, weights.out_w, memory.logits)


@njit(cache=True)
def for_share(logits, shares, share: float) -> float:
    """The output for a cache of this share of the experts, interpolated between the sizes that outputs are for."""
    last = len(shares) - 1
    if share <= shares[0]:
        return logits[0]
    for i in range(last):
        if share < shares[i + 1]:
            part = (share - shares[i]) / (shares[i + 1] - shares[i])
            return (1 - part) * logits[i] + part * logits[i + 1]
    return logits[last]


@njit(cache=True)
def decide_learned(state: State, weights: Weights, memory: Memory, decision: Decision) -> None:
    """Evict the candidate that is least likely to be needed soon by any row. Called in every epoch, in order."""
    engine, experts, slots, history = state.engine[0], state.experts, state.slots, state.history
    layer, num_experts, scores = engine.layer, experts.shape[1], memory.scores[engine.layer]
    window, pooled = history.shape[1], engine.pooled != 0
    for b in range(engine.num_sequences):
        row = state.sequences[b]
        if row.sequence >= 0:
            observe(weights, memory, b, layer, row.position, history[b, (row.served - 1) % window, layer])
    if engine.num_missing == 0 and not pooled:
        return
    first, end = state.layers[layer].first_slot, state.layers[layer].end_slot
    share = (end - first) / (experts.size if pooled else num_experts)
    scores[:] = 0
    for b in range(engine.num_sequences):
        row = state.sequences[b]
        if row.sequence < 0:
            continue
        prepare_scores(weights, memory, b, layer, history[b, (row.served - 1) % window, layer])
        for e in range(num_experts):
            if pooled or (experts[layer, e].slot >= 0 and experts[layer, e].needed == 0):
                score_expert(weights, memory, layer, e)
                logit = for_share(memory.logits, weights.shares, share)
                scores[e] += np.log1p(np.exp(logit))  # -log P(no row needs it soon), up to rounding of the product
    for slot in range(first, end):
        held = slots[slot]
        if held.expert >= 0:
            memory.keys[slot] = memory.scores[held.layer, held.expert]
    evict_lowest(state, memory.keys, decision)


class LearnedEviction:
    """The learned eviction score as a `Policy`. It neither prefetches nor bypasses.

    Args:
        name: shown in results.
        weights: from `load_eviction` or `pack_eviction`.
        top_k: experts a token of the model that the weights are for.
    """

    is_oracle = False

    def __init__(self, name: str, weights: Weights, top_k: int) -> None:
        self.name = name
        self.weights = weights
        self.shape = (*weights.embedding.shape[:2], top_k)

    def reset(self, state: State) -> None:
        """Forget the previous run. Raises InputError if the weights are for a model of another shape."""
        engine = state.engine[0]
        shape = (int(engine["num_layers"]), int(engine["num_experts"]), int(engine["top_k"]))
        if shape != self.shape:
            raise InputError(
                f"policy {self.name!r} knows the routing of {_told(self.shape)}, the workload is of {_told(shape)}",
                remedy="Train one on a trace of this model: python -m schedlab.experiments.expert_caching_gap --help",
            )
        self.memory = new_memory(self.weights, len(state.sequences), shape[2], len(state.slots))

    def decide(self, state: State, decision: Decision) -> None:
        """Write the decision for `state` into `decision`; to be called in every epoch."""
        decide_learned(state, self.weights, self.memory, decision)

    def run(self, simulator: Simulator) -> None:
        """Serve the simulator's whole workload, compiled."""
        self.reset(simulator.state())
        while not run_rule(simulator.sim, decide_learned, self.weights, self.memory, simulator.default_decision()):
            simulator.make_room()


def _told(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]} layers x {shape[1]} experts, top {shape[2]}"


# ------------------------------------------------------------------------------------------------- checkpoints


def pack_eviction(network: EvictionNetwork) -> Weights:
    """The weights of a torch network for the kernels."""
    from .expert_caching_network import SHARES

    state = {name: tensor.detach().cpu().numpy().astype(np.float32) for name, tensor in network.state_dict().items()}
    recurrences = range(network.config["num_recurrences"])

    def stacked(name: str, transpose: bool) -> np.ndarray:
        return np.stack([state[name.format(i)].T if transpose else state[name.format(i)] for i in recurrences])

    arrays = {
        "embedding": state["embedding"],
        "own": state["own"],
        "norm": np.stack([state["norm.weight"], state["norm.bias"]]),
        "token_w": state["token.weight"].T,
        "token_b": state["token.bias"],
        "gates_w": stacked("recurrences.{}.gates.weight", True),
        "gates_b": stacked("recurrences.{}.gates.bias", False),
        "mixer_w": stacked("mixers.{}.weight", True),
        "mixer_b": stacked("mixers.{}.bias", False),
        "history_w": state["from_history.weight"].T,
        "history_b": state["from_history.bias"],
        "prefix_scale": state["prefix_scale"],
        "layer_bias": state["layer_bias"],
        "middle_w": state["middle.weight"].T,
        "middle_b": state["middle.bias"],
        "channels": state["channels"].transpose(0, 3, 1, 2),
        "channel_bias": state["channel_bias"][:, :, 0].transpose(0, 2, 1),
        "hidden_w": np.concatenate([state["feature_in"], state["channel_in"]], 1).T,
        "hidden_b": state["hidden_bias"][:, :, 0],
        "out_w": np.concatenate([state["feature_out"], state["channel_out"], state["hidden_out"]], 1).T,
        "out_b": state["out_bias"][:, :, 0],
        "shares": np.array(SHARES),
    }
    return Weights(**{name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()})


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
            scale = np.maximum(np.abs(array).max(-1, keepdims=True), 1e-12) / 127.0
            tensors[f"{name}.int8"] = np.rint(array / scale).astype(np.int8)
            tensors[f"{name}.scale"] = scale.astype(np.float32)
        else:
            tensors[name] = array.astype(np.float16)
    num_layers, num_experts, _ = weights.embedding.shape
    model = {"num_layers": num_layers, "num_experts": num_experts, "top_k": top_k}
    text = json.dumps({"format": FORMAT, "feature_version": FEATURE_VERSION, "model": model, **config}, indent=2)
    temporary, replaced = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    temporary.mkdir(parents=True)
    try:
        (temporary / WEIGHTS).write_bytes(save(tensors))
        (temporary / CONFIG).write_text(text + "\n")
        (temporary / CARD).write_text(card)
        if folder.exists():
            os.rename(folder, replaced)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    return folder


def load_eviction(folder: str | PathLike[str], name: str | None = None) -> LearnedEviction:
    """The policy of a checkpoint folder.

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
        parts = [f"{field}.int8", f"{field}.scale"] if field in TABLES else [field]
        if any(part not in tensors for part in parts):
            raise InputError(f"lacks {parts[0]!r}", file=path, remedy=_COPY_AGAIN)
        array = tensors[parts[0]].astype(np.float32)
        if field in TABLES:
            array *= tensors[parts[1]]
        if not np.isfinite(array).all():
            raise InputError(f"{field} holds values that are not finite", file=path, remedy="Train again")
        arrays[field] = np.ascontiguousarray(array)
    weights, model = Weights(**arrays), config["model"]
    if weights.channels.shape[:2] != (model["num_layers"], model["num_experts"]):
        raise InputError(
            f"weights are for {weights.channels.shape[:2]} layers and experts, {CONFIG} says {model}",
            file=path,
            remedy=_COPY_AGAIN,
        )
    return LearnedEviction(name or folder.name, weights, model["top_k"])


_COPY_AGAIN = "Copy the checkpoint folder again, or train again"


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
