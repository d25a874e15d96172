"""How many of a token's experts in the next layer are foreseen from routing alone, when a layer's gate has spoken.

Recall at k and at 2k: the share of the k experts that the token uses in layer l + 1 among the k (2k) best-scored ones,
over held-out tokens and the layers 0 .. L - 2, of which no later one is known to any score. Rows: popularity; EMA
.95 of layer l + 1; affinity P(e' at l + 1 | e at l) summed over what layer l uses; the copy kernel (what tokens of
similar routing used in layer l + 1); and the head of the shipped agent, as it is deployed.

Example:

  python -m schedlab.experiments.expert_caching_recall --out results/expert_caching_recall
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..agents.expert_caching import SHIPPED
from ..agents.expert_caching_checkpoint import load_weights
from ..agents.expert_caching_features import NUM_COPIES, copy_table
from ..agents.expert_caching_score import Memory, Weights, new_memory, observe, score_layer_above, weigh_row
from ..envs.core.errors import InputError
from ..envs.core.kernel import njit
from ..envs.core.results import atomic_path
from ..envs.expert_caching.affinity import Affinity
from ..envs.expert_caching.workload import Workload
from . import command
from .expert_traces import find_trace

CHUNK = 256
"""Tokens scored at once."""


@dataclass
class Args:
    """Arguments of the experiment."""

    out: Path = Path("results/expert_caching_recall")
    """Folder of recall.json."""
    trace: str = "deepseek_v2_lite"
    """Routing trace: a name in the data folder, or a file; it is split as the agent's training split it."""
    tokens: int | None = None
    """Held-out tokens; all, if not given."""
    scores: Path = SHIPPED
    """Checkpoint of the agent."""
    data_dir: Path | None = None
    """Folder with routing traces. Default: $SCHEDLAB_DATA, then the download cache."""


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


def by_copying(workload: Workload) -> Iterator[np.ndarray]:
    """What similar tokens used, by their similarity; ties by the blunter weights."""
    shape = (workload.num_tokens, workload.num_layers)
    copies = np.empty((*shape, NUM_COPIES, workload.num_experts), np.uint8)
    above = np.empty_like(copies)
    copy_table(workload.experts, workload.token_position, copies, above, np.empty(shape, np.float32))
    return in_chunks(workload, lambda chunk: above[chunk, :-1, 0] + above[chunk, :-1, 2] / np.float32(1e3))


def by_agent(workload: Workload, weights: Weights) -> Iterator[np.ndarray]:
    """The head of a checkpoint, compiled, as it is deployed."""
    memory = new_memory(weights, 1, workload.top_k)

    def of_chunk(chunk: slice) -> np.ndarray:
        experts = workload.experts[chunk]
        scores = np.empty((len(experts), workload.num_layers - 1, workload.num_experts), np.float32)
        foresee_chunk(weights, memory, experts, workload.token_position[chunk], scores)
        return scores

    return in_chunks(workload, of_chunk)


@njit(cache=True)
def foresee_chunk(weights: Weights, memory: Memory, experts, positions, scores) -> None:
    """Go on with experts (n, L, k); writes log-odds (n, L - 1, E) of the layers above."""
    num_tokens, num_layers, _ = experts.shape
    for t in range(num_tokens):
        for layer in range(num_layers):
            used = experts[t, layer]
            observe(weights, memory, 0, layer, positions[t], used)
            if layer + 1 < num_layers:
                num_past, match = weigh_row(memory, 0, layer)
                score_layer_above(weights, memory, 0, layer, used, num_past, match)
                scores[t, layer] = memory.above


def measure(args: Args) -> dict[str, Any]:
    """Measure all rows and return what recall.json holds. Raises InputError."""
    trace, (weights, top_k) = find_trace(args.trace, args.data_dir), load_weights(args.scores)
    train = trace.training
    test = trace.test.head(trace.test.num_tokens if args.tokens is None else args.tokens)
    shape = (test.num_layers, test.num_experts, test.top_k)
    if shape != (*weights.embedding.shape[1:3], top_k):
        raise InputError(
            f"the agent is of another model than the trace, which has (layers, experts, top k) {shape}",
            file=args.scores,
            remedy="Give --scores and --trace of one model",
        )
    popularity, affinity = train.popularity(), Affinity.fit(train)
    scorers: dict[str, Scorer] = {
        "popularity": lambda: by_popularity(test, popularity),
        "ema_95": lambda: by_frequency(test, 0.95),
        "affinity": lambda: by_affinity(test, affinity),
        "copy_kernel": lambda: by_copying(test),
        "agent": lambda: by_agent(test, weights),
    }
    rows = {}
    for name, scorer in scorers.items():
        command.say(f"measuring {name}")
        rows[name] = recall(test, scorer).tolist()
    return {"trace": test.source, "held_out_tokens": test.num_tokens, "top_k": test.top_k, "recall": rows}


def table(results: dict[str, Any]) -> str:
    """Means over the layers, and their range."""
    k = results["top_k"]
    lines = [f"{'recall':14}{f'at {k}':>8}{f'at {2 * k}':>8}  lowest and highest layer at {k}"]
    for name, values in results["recall"].items():
        of_layer = np.array(values)  # (2, L - 1)
        means, layers = of_layer.mean(1), of_layer[0]
        lines.append(f"{name:14}{means[0]:8.3f}{means[1]:8.3f}  {layers.min():.3f} {layers.max():.3f}")
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
