"""How many of a token's experts in the next layer are foreseen from routing alone, when a layer's gate has spoken.

Recall at k and at 2k: the share of the k experts that the token uses in layer l + 1 among the k (2k) best-scored ones,
over the held-out tokens and the layers 0 .. L - 2, of which no later one is known to any score. Rows: popularity; EMA
.95 of layer l + 1; affinity P(e' at l + 1 | e at l) summed over what layer l uses; the copy kernel (what tokens of
similar routing used in layer l + 1); and the agent's head, in torch, over the networks that
`expert_caching_gap` trained in the same folder.

Example:

  python -m schedlab.experiments.expert_caching_recall --out results/expert_caching_gap
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..envs.core.results import atomic_path
from ..envs.expert_caching.affinity import Affinity
from ..envs.expert_caching.workload import Workload
from . import command
from .expert_caching_gap import CHUNK, split, train_heads, train_networks
from .expert_caching_gap import Args as GapArgs

if TYPE_CHECKING:
    from ..agents.expert_caching_network import EvictionNetwork, NextLayerHead
    from ..agents.expert_caching_train import Trace


@dataclass
class Args(GapArgs):
    """Arguments of the experiment: those of `expert_caching_gap`."""

    out: Path = Path("results/expert_caching_gap")
    """Folder of the runs of `expert_caching_gap`, and of recall.json."""


Scorer = Callable[[], Iterator[np.ndarray]]
"""Yields scores float32 (n, L - 1, E) of the layers above layers 0 .. L - 2, for consecutive chunks of tokens."""


def recall(workload: Workload, scorer: Scorer) -> np.ndarray:
    """float64 (2, L - 1): recall at k and at 2k of the experts of layers 1 .. L - 1."""
    k, hits, first = workload.top_k, np.zeros((2, workload.num_layers - 1)), 0
    for scores in scorer():
        experts = workload.experts[first : first + len(scores), 1:].astype(np.int64)
        own = np.take_along_axis(scores, experts, 2)  # an expert is found if fewer than k (2k) others score as high
        rank = (scores[:, :, None, :] >= own[:, :, :, None]).sum(3) - 1
        for i in range(2):
            hits[i] += (rank < (i + 1) * k).sum((0, 2))
        first += len(scores)
    return hits / (workload.num_tokens * k)


def in_chunks(workload: Workload, of_chunk: Callable[[slice], np.ndarray]) -> Iterator[np.ndarray]:
    """Scores made chunk by chunk."""
    for first in range(0, workload.num_tokens, CHUNK):
        yield of_chunk(slice(first, first + CHUNK))


def by_affinity(workload: Workload, affinity: Affinity) -> Iterator[np.ndarray]:
    """Mean affinity of what the layer below uses."""
    layers = np.arange(workload.num_layers - 1)[:, None]
    return in_chunks(workload, lambda chunk: affinity.next_layer[layers, workload.experts[chunk, :-1]].sum(2))


def by_popularity(workload: Workload, popularity: np.ndarray) -> Iterator[np.ndarray]:
    """The share of training tokens that use an expert."""

    def of_chunk(chunk: slice) -> np.ndarray:
        tokens = len(workload.experts[chunk])
        return np.repeat(popularity[None, 1:], tokens, 0)

    return in_chunks(workload, of_chunk)


def by_frequency(workload: Workload, decay: float) -> Iterator[np.ndarray]:
    """Decayed frequency over the tokens before."""
    frequency = np.zeros((workload.num_layers - 1, workload.num_experts), np.float32)
    rows = np.arange(workload.num_layers - 1)[:, None]

    def of_chunk(chunk: slice) -> np.ndarray:
        scores = np.empty((len(workload.experts[chunk]), *frequency.shape), np.float32)
        for i, experts in enumerate(workload.experts[chunk, 1:]):
            scores[i] = frequency
            frequency[...] *= decay
            frequency[rows, experts] += 1.0 - decay
        return scores

    return in_chunks(workload, of_chunk)


def by_copying(workload: Workload, trace: Trace) -> Iterator[np.ndarray]:
    """What similar tokens used, by their similarity; ties by the blunter weights."""
    return in_chunks(workload, lambda chunk: trace.above[chunk, :-1, 0] + trace.above[chunk, :-1, 2] / np.float32(1e3))


def by_head(workload: Workload, trace: Trace, network: EvictionNetwork, head: NextLayerHead) -> Iterator[np.ndarray]:
    """The agent's head, in torch."""
    import torch

    from ..agents.expert_caching_train import begin_counts, read_chunk

    layers = np.arange(workload.num_layers)
    counts, recurrence = begin_counts(trace, np.zeros(1, np.int64)), network.begin(1)
    for first in range(0, workload.num_tokens, CHUNK):
        n = min(CHUNK, workload.num_tokens - first)
        _, used, begins, features = read_chunk(trace, counts, n, layers, above=True)
        used = used.flatten(0, 1)
        with torch.no_grad():
            prefix, context, recurrence = network.remember(used, begins, recurrence, layers.tolist())
            logits = head(prefix, context, used, layers.tolist(), features)
        yield logits[:-1].transpose(0, 1).numpy()


def measure(args: Args) -> dict[str, Any]:
    """Train what is missing, measure all rows and return what recall.json holds. Raises InputError."""
    import torch

    from ..agents.expert_caching_train import prepare_trace

    torch.set_num_threads(1)
    train, test = split(args)
    training_trace = prepare_trace(train, args.out)
    networks = train_networks(args, training_trace)
    heads = train_heads(args, training_trace, networks)
    trace, popularity, affinity = prepare_trace(test, args.out), train.popularity(), Affinity.fit(train)
    scorers: dict[str, list[Scorer]] = {
        "popularity": [lambda: by_popularity(test, popularity)],
        "ema_95": [lambda: by_frequency(test, 0.95)],
        "affinity": [lambda: by_affinity(test, affinity)],
        "copy_kernel": [lambda: by_copying(test, trace)],
        "agent": [partial(by_head, test, trace, *pair) for pair in zip(networks, heads, strict=True)],
    }
    rows = {}
    for name, of_seeds in scorers.items():
        command.say(f"measuring {name}")
        rows[name] = np.stack([recall(test, scorer) for scorer in of_seeds]).tolist()
    return {"held_out_tokens": test.num_tokens, "top_k": test.top_k, "recall": rows}


def table(results: dict[str, Any]) -> str:
    """Means over the layers, and the range over seeds."""
    k = results["top_k"]
    lines = [f"{'recall':14}{f'at {k}':>8}{f'at {2 * k}':>8}  lowest and highest layer at {k}, seeds"]
    for name, values in results["recall"].items():
        of_seed = np.array(values)  # (seeds, 2, L - 1)
        means, layers, seeds = of_seed.mean((0, 2)), of_seed.mean(0)[0], of_seed[:, 0].mean(1)
        spread = f"  {seeds.min():.4f} to {seeds.max():.4f} over {len(seeds)} seeds" if len(seeds) > 1 else ""
        lines.append(f"{name:14}{means[0]:8.3f}{means[1]:8.3f}  {layers.min():.3f} {layers.max():.3f}{spread}")
    return "\n".join(lines)


def act(args: Args) -> int:
    """Measure, write recall.json, print the table. Returns the exit status."""
    results = measure(args)
    with atomic_path(args.out / "recall.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1))
    print(table(results))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    return command.run(Args, act, argv, "expert_caching_recall", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
