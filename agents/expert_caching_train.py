"""Training of the eviction score: soft cross-entropy on the discounted next use, over a routing trace. Resumable.

Then of the head for the layer above, on the memory of the trained network: cross-entropy on what the token uses there.

Sixteen streams walk through the trace, each from its own place, in chunks of a few tokens, with their recurrent state
and frequencies carried along (truncated backpropagation through time). Each step scores a few layers, drawn anew, of
every token of the chunk. Randomness depends on the seed and the step alone: a resumed run ends at the same weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from ..envs.core.errors import InputError
from ..envs.core.kernel import njit
from ..envs.expert_caching.workload import Workload
from .checkpoint import (
    RESUME_JSON,
    RESUME_TENSORS,
    flatten_optimizer,
    load_resume,
    restore_optimizer,
    write_atomically,
)
from .expert_caching_features import (
    FEATURE_VERSION,
    NEVER,
    NUM_COPIES,
    NUM_DECAYS,
    NUM_FEATURES,
    copy_table,
    count_use,
    distances,
    restore_copies,
    write_features,
)
from .expert_caching_network import DISCOUNTS, EvictionNetwork, NextLayerHead, PortableNetwork, Recurrence

HEAD = "head.safetensors"
"""File of the trained head in a run's folder."""

IN_USE = 0.25
"""Weight of an expert that the token itself uses, in the loss."""

FAR = 255
"""Tokens to the next use beyond which targets no longer tell."""


@dataclass(frozen=True)
class EvictionTraining:
    """How an eviction score is trained."""

    steps: int = 2400
    num_streams: int = 16
    chunk_tokens: int = 32
    layers_per_step: int = 4
    """Layers scored in each step, drawn anew; all of them, if the model has fewer."""
    learning_rate: float = 6e-3
    """Peak; rises linearly over the first tenth of the steps, then falls along a cosine to nothing."""
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    width: int = 128
    hidden: int = 24
    num_channels: int = 4
    dropout: float = 0.2
    """Of the token's vector; as often, whole layers of a token are hidden."""
    seed: int = 0
    checkpoint_every: int = 500
    head_steps: int = 4800
    """Optimizer steps of the head for the layer above."""
    head_layers: int = 3
    """Layers scored in each of them."""
    head_hidden: int = 16

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "num_streams",
            "chunk_tokens",
            "layers_per_step",
            "checkpoint_every",
            "head_steps",
            "head_layers",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"EvictionTraining.{name} is {getattr(self, name)}", remedy="Give at least 1")

    def learning_rate_at(self, step: int, steps: int | None = None) -> float:
        """The learning rate of a step, of `steps` in all."""
        steps = self.steps if steps is None else steps
        warm = max(1, steps // 10)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Trace(NamedTuple):
    """A routing trace with what is computed from it once. T tokens, L layers, E experts, k a token."""

    experts: np.ndarray  # (T, L, k) int16
    positions: np.ndarray  # (T,) int64 in the sequence
    copies: np.ndarray  # (T, L, NUM_COPIES, E) uint8: `copy_table`
    above: np.ndarray  # (T, L, NUM_COPIES, E) uint8: `copy_table`
    matches: np.ndarray  # (T, L) float32: `copy_table`
    ahead: np.ndarray  # (T, L, E) uint8: tokens to the next use, at most FAR; the future


class Counts(NamedTuple):
    """Frequencies that S streams carry from chunk to chunk (see `expert_caching_features.Stream`)."""

    frequency: np.ndarray  # (S, L, NUM_DECAYS, E) float32
    in_sequence: np.ndarray  # (S, L, E) float32
    age: np.ndarray  # (S, L, E) float32
    at: np.ndarray  # (S,) int64: next token of each stream


def prepare_trace(workload: Workload, cache_dir: str | PathLike[str] | None = None) -> Trace:
    """The `Trace` of a workload: 20 CPU-microseconds a (token, layer), unless its copies are kept in `cache_dir`."""
    shape = (workload.num_tokens, workload.num_layers)
    copies = np.empty((*shape, NUM_COPIES, workload.num_experts), np.uint8)
    above = np.empty_like(copies)
    matches = np.empty(shape, np.float32)
    positions = workload.token_position.astype(np.int64)
    path = None
    if cache_dir is not None:
        digest = hashlib.sha256(workload.experts.tobytes() + positions.tobytes() + bytes([FEATURE_VERSION]))
        path = Path(cache_dir) / f"copies-{digest.hexdigest()[:16]}.npz"
    if path is not None and path.is_file():
        with np.load(path) as data:
            copies, above, matches = data["copies"], data["above"], data["matches"]
    else:
        copy_table(workload.experts, positions, copies, above, matches)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{os.getpid()}.{path.name}")
            np.savez(temporary, copies=copies, above=above, matches=matches)
            os.replace(temporary, path)
    ahead = np.empty((*shape, workload.num_experts), np.uint8)
    distances(workload.experts, workload.num_experts, FAR, ahead)
    return Trace(workload.experts, positions, copies, above, matches, ahead)


def begin_counts(trace: Trace, at: np.ndarray) -> Counts:
    """Counts of streams that begin at the tokens `at`, having seen nothing."""
    num_layers, num_experts = trace.ahead.shape[1:]
    shape = (len(at), num_layers, num_experts)
    return Counts(
        np.zeros((len(at), num_layers, NUM_DECAYS, num_experts), np.float32),
        np.zeros(shape, np.float32),
        np.full(shape, NEVER, np.float32),
        np.asarray(at, np.int64).copy(),
    )


@njit(cache=True)
def advance(trace: Trace, counts: Counts, length: int, layers, above: bool, tables) -> None:
    """Walk `length` tokens on. tables float32 (n, NUM_FEATURES, S * length, E), those of `layers` (n,), are written.

    With `above` they are the tables of the layers above, as they are when the gates of `layers` have spoken.
    """
    num_tokens, num_layers, _ = trace.experts.shape
    num_experts = trace.ahead.shape[2]
    copied = np.zeros((NUM_COPIES, num_experts), np.float32)
    table = np.zeros((NUM_FEATURES, num_experts), np.float32)
    for s in range(len(counts.at)):
        for i in range(length):
            t = counts.at[s]
            position = trace.positions[t]
            frequency, in_sequence, age = counts.frequency[s], counts.in_sequence[s], counts.age[s]
            if position == 0:
                in_sequence[:] = 0
            n = 0
            for layer in range(num_layers):
                count_use(frequency[layer], in_sequence[layer], age[layer], trace.experts[t, layer])
                if n < len(layers) and layers[n] == layer:
                    at = (layer + 1) % num_layers if above else layer
                    restore_copies(trace.above[t, layer] if above else trace.copies[t, layer], copied)
                    match = trace.matches[t, layer]
                    write_features(frequency[at], in_sequence[at], age[at], position, copied, match, table)
                    tables[n, :, s * length + i] = table
                    n += 1
            counts.at[s] = (t + 1) % num_tokens


def read_chunk(
    trace: Trace, counts: Counts, length: int, layers: np.ndarray, above: bool = False
) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
    """The next tokens of every stream: ids (S, T), and `used`, `begins`, `features` as the network takes them.

    With `above` the features are those of the layers above, as `NextLayerHead` takes them.
    """
    num_tokens, num_layers, _ = trace.experts.shape
    num_experts = trace.ahead.shape[2]
    tokens = (counts.at[:, None] + np.arange(length)) % num_tokens
    tables = np.empty((len(layers), NUM_FEATURES, tokens.size, num_experts), np.float32)
    advance(trace, counts, length, layers, above, tables)
    ids = torch.from_numpy(trace.experts[tokens].astype(np.int64))
    used = torch.zeros(*tokens.shape, num_layers, num_experts).scatter_(3, ids, 1.0)
    begins = torch.from_numpy(trace.positions[tokens] == 0)
    return tokens, used, begins, torch.from_numpy(tables).view(len(layers), NUM_FEATURES, -1)


def next_use_targets(trace: Trace, tokens: np.ndarray, layers: np.ndarray) -> Tensor:
    """discount ** (tokens to the next use - 1) for every output: float32 (n, outputs, S * T * E)."""
    ahead = torch.from_numpy(trace.ahead[tokens.reshape(-1, 1), layers].astype(np.float32))
    ahead = ahead.transpose(0, 1).reshape(len(layers), 1, -1)
    return torch.exp((ahead - 1) * torch.log(torch.tensor(DISCOUNTS)).unsqueeze(1))


def eviction_loss(logits: Tensor, targets: Tensor, used: Tensor, layers: np.ndarray) -> Tensor:
    """Soft cross-entropy; experts that the token itself uses count less: only a bypass may ever evict them."""
    own = used.flatten(0, 1)[:, torch.from_numpy(layers)].transpose(0, 1)
    weight = (1 - (1 - IN_USE) * own).reshape(len(layers), 1, -1)
    return F.binary_cross_entropy_with_logits(logits, targets, weight=weight)


def train_eviction(
    trace: Trace,
    config: EvictionTraining,
    folder: str | PathLike[str] | None = None,
    *,
    resume: bool = False,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> EvictionNetwork:
    """Train a network on the trace.

    Args:
        trace: from `prepare_trace`.
        config: how.
        folder: where the state is kept to go on from, every `checkpoint_every` steps.
        resume: go on from `folder`, if something is there.
        report: called every 100 steps with `step`, `loss` (mean of the 100) and `cpu_s`.

    Raises:
        InputError: the folder was written with another configuration.
    """
    num_layers, num_experts = trace.ahead.shape[1:]
    torch.manual_seed(config.seed)
    network = EvictionNetwork(
        num_layers,
        num_experts,
        width=config.width,
        num_channels=config.num_channels,
        hidden=config.hidden,
        dropout=config.dropout,
    ).train()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=config.weight_decay, betas=(0.9, 0.98), fused=True)
    places = np.random.default_rng(config.seed).integers(0, len(trace.positions), config.num_streams)
    counts, recurrence, first = begin_counts(trace, places), network.begin(config.num_streams), 0
    folder = None if folder is None else Path(folder)
    if resume and folder is not None and (folder / RESUME_JSON).is_file():
        recurrence, first = _restore(folder, config, network, optimizer, counts)
    begun_s, losses = time.process_time(), []
    for step in range(first, config.steps):
        torch.manual_seed((config.seed << 32) + step)
        rng = np.random.default_rng((config.seed, step))
        layers = np.sort(rng.choice(num_layers, min(config.layers_per_step, num_layers), replace=False))
        tokens, used, begins, features = read_chunk(trace, counts, config.chunk_tokens, layers)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        logits, recurrence = network(used, begins, recurrence, layers.tolist(), features)
        loss = eviction_loss(logits, next_use_targets(trace, tokens, layers), used, layers)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0 and report is not None:
            mean = float(np.mean(losses[-100:]))
            report({"step": step + 1, "loss": mean, "cpu_s": time.process_time() - begun_s})
        if folder is not None and ((step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps):
            _keep(folder, config, network, optimizer, counts, recurrence, step + 1)
    return network.eval()


# ---------------------------------------------------------------------------------------------- the layer above


def layer_above_targets(trace: Trace, tokens: np.ndarray, layers: np.ndarray) -> Tensor:
    """What each token uses in the layers above, float32 (n, S * T, E), ones and zeros.

    Above the last layer comes the first one of the token after. That is another sequence's where one ends, and at the
    end of the trace its beginning: a token in a hundred.
    """
    num_tokens, num_layers, _ = trace.experts.shape
    flat = tokens.reshape(-1, 1) + (layers == num_layers - 1)
    ids = torch.from_numpy(trace.experts[flat % num_tokens, (layers + 1) % num_layers].astype(np.int64))
    return torch.zeros(*ids.shape[:2], trace.ahead.shape[2]).scatter_(2, ids, 1.0).transpose(0, 1)


def train_head(
    trace: Trace,
    network: EvictionNetwork,
    config: EvictionTraining,
    folder: str | PathLike[str] | None = None,
    *,
    resume: bool = False,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> NextLayerHead:
    """Train the head for the layer above on what the network remembers; the network stays as it is.

    Args:
        trace: from `prepare_trace`.
        network: trained by `train_eviction`.
        config: the same.
        folder: where the result is kept.
        resume: take it from `folder`, if it is there. (It takes a minute or two: what is half done is not kept.)
        report: called every 100 steps with `step`, `loss` (mean of the 100) and `cpu_s`.
    """
    num_layers, num_experts = trace.ahead.shape[1:]
    torch.manual_seed(config.seed)
    head = NextLayerHead(num_layers, num_experts, config.width, config.head_hidden).train()
    path = None if folder is None else Path(folder) / HEAD
    if resume and path is not None and path.is_file():
        head.load_state_dict(load_file(path))
        return head.eval()
    network = network.eval()
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=config.weight_decay, betas=(0.9, 0.98), fused=True)
    rng = np.random.default_rng((config.seed, 1))
    counts = begin_counts(trace, rng.integers(0, len(trace.positions), config.num_streams))
    recurrence, losses, begun_s = network.begin(config.num_streams), [], time.process_time()
    for step in range(config.head_steps):
        layers = np.sort(rng.choice(num_layers, min(config.head_layers, num_layers), replace=False))
        tokens, used, begins, features = read_chunk(trace, counts, config.chunk_tokens, layers, above=True)
        used = used.flatten(0, 1)
        with torch.no_grad():
            prefix, context, recurrence = network.remember(used, begins, recurrence, layers.tolist())
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step, config.head_steps)
        logits = head(prefix, context, used, layers.tolist(), features)
        loss = F.binary_cross_entropy_with_logits(logits, layer_above_targets(trace, tokens, layers))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), config.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0 and report is not None:
            mean = float(np.mean(losses[-100:]))
            report({"step": step + 1, "loss": mean, "cpu_s": time.process_time() - begun_s})
    if path is not None:
        temporary = path.with_name(f".{os.getpid()}.{path.name}")
        temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in head.state_dict().items()}))
        os.replace(temporary, path)
    return head.eval()


# ------------------------------------------------------------------------------------------------- other models


def train_portable(trace: Trace, config: EvictionTraining) -> PortableNetwork:
    """Train the score that knows no layer and no expert, by the loss of `train_eviction`."""
    num_layers = trace.ahead.shape[1]
    torch.manual_seed(config.seed)
    network = PortableNetwork(config.hidden)
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.98), fused=True)
    rng = np.random.default_rng((config.seed, 2))
    counts = begin_counts(trace, rng.integers(0, len(trace.positions), config.num_streams))
    for step in range(config.head_steps):
        layers = np.sort(rng.choice(num_layers, min(config.layers_per_step, num_layers), replace=False))
        tokens, used, _, features = read_chunk(trace, counts, config.chunk_tokens, layers)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step, config.head_steps)
        loss = eviction_loss(network(features), next_use_targets(trace, tokens, layers), used, layers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


# --------------------------------------------------------------------------------------------------- resuming


def _keep(
    folder: Path,
    config: EvictionTraining,
    network: EvictionNetwork,
    optimizer: torch.optim.Optimizer,
    counts: Counts,
    recurrence: Recurrence,
    step: int,
) -> None:
    """Write all that training goes on from."""
    tensors, groups = flatten_optimizer(optimizer)
    tensors |= {f"network.{name}": tensor.detach() for name, tensor in network.state_dict().items()}
    tensors |= {f"counts.{name}": torch.from_numpy(array) for name, array in counts._asdict().items()}
    tensors |= {f"recurrence.{name}": tensor for name, tensor in recurrence._asdict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{os.getpid()}.{RESUME_TENSORS}"
    temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    os.replace(temporary, folder / RESUME_TENSORS)
    write_atomically(folder / RESUME_JSON, json.dumps({"config": asdict(config), "step": step, "groups": groups}))


def _restore(
    folder: Path,
    config: EvictionTraining,
    network: EvictionNetwork,
    optimizer: torch.optim.Optimizer,
    counts: Counts,
) -> tuple[Recurrence, int]:
    """Read what `_keep` wrote. Returns the recurrence and the step."""
    tensors, values = load_resume(folder)
    if values["config"] != asdict(config):
        raise InputError(
            "the run in this folder has another configuration",
            file=folder / RESUME_JSON,
            remedy="Resume with the same one, or train into another folder",
        )

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): tensor for k, tensor in tensors.items() if k.startswith(prefix)}

    network.load_state_dict(part("network."))
    restore_optimizer(optimizer, tensors, values["groups"])
    for name, tensor in part("counts.").items():
        getattr(counts, name)[...] = tensor.numpy()
    return Recurrence(**part("recurrence.")), values["step"]
