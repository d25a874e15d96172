"""Train the eviction score on a routing trace, and measure what share of the LRU-to-Belady gap it closes on the rest.

One command trains every seed (a killed run goes on where it stopped), measures all rows on the same held-out sequences
(per-layer caches, unit sizes, demand loads, cold start, the cache carried from sequence to sequence), and writes
results.json with intervals: bootstrap over sequences, and over seeds where there are several.

Rows: EMA .95; FlashMoE's learned score and ridge regression on discounted future use, both fitted to the same training
sequences; a copy kernel without training; one trained network, over all seeds; the agent, which is the mean of a
committee's scores, over the committees that begin with each seed. Beside them the agent as deployed: the first
committee, compiled, from its rounded checkpoint, in the simulator.

Examples:

  python -m schedlab.experiments.expert_caching_gap --out results/expert_caching_gap
  python -m schedlab.experiments.expert_caching_gap --out results/expert_caching_gap --ship my_agent
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..baselines.expert_caching import RULES, belady
from ..baselines.expert_fitted import fit_learned_score, fit_ridge
from ..envs.core.errors import InputError
from ..envs.core.kernel import njit
from ..envs.core.results import atomic_path
from ..envs.expert_caching.rule import Rule
from ..envs.expert_caching.sim import Simulator
from ..envs.expert_caching.spec import ExpertCachingSpec
from ..envs.expert_caching.workload import Workload
from . import command
from .expert_traces import HELD_OUT, SPLIT_SEED, find_trace

if TYPE_CHECKING:
    from ..agents.expert_caching import LearnedEviction
    from ..agents.expert_caching_network import EvictionNetwork, NextLayerHead
    from ..agents.expert_caching_train import EvictionTraining, Trace

SHARES = (0.125, 0.25, 0.5, 0.75)
"""Cache sizes of the table, as shares of the experts of a layer."""

RIDGE_DISCOUNTS = (0.6, 0.85, 0.85, 0.95)
"""Discount of the future use that ridge regression predicts, by cache size."""

CHUNK = 256
"""Tokens scored at once."""


@dataclass
class Args:
    """Arguments of the experiment."""

    out: Path = Path("results/expert_caching_gap")
    """Folder of runs and results."""
    trace: str = "deepseek_v2_lite"
    """Routing trace: a name in the data folder, or a file."""
    seeds: int = 5
    """Networks that are trained."""
    members: int = 3
    """Networks of a committee: those of this many consecutive seeds (after the last one comes the first)."""
    steps: int = 2400
    """Optimizer steps of each."""
    head_steps: int = 4800
    """Optimizer steps of its head for the layer above."""
    held_out: float = HELD_OUT
    """Share of the sequences that the table is measured on; training sees the others."""
    split_seed: int = SPLIT_SEED
    bootstrap: int = 2000
    """Resamples of the intervals."""
    deployed_tokens: int = 8000
    """Held-out tokens on which the rounded checkpoint runs in the simulator, to compare and to time it."""
    ship: Path | None = None
    """Also write the checkpoint of the first committee there, with its card."""
    data_dir: Path | None = None
    """Folder with routing traces. Default: $SCHEDLAB_DATA, then the download cache."""


# ---------------------------------------------------------------------------------------------------- eviction


@njit(cache=True)
def evict(experts, scores, slots: int, resident, held, sequence, misses) -> None:
    """Serve tokens from per-layer caches of `slots` experts, evicting the lowest score that the token does not need.

    Args:
        experts: (n, L, k).
        scores: float32 (n, L, E), known after the gate of the layer.
        slots: of each layer.
        resident: bool (L, E), changed.
        held: int64 (L,): number of residents, changed.
        sequence: int64 (n,) of each token.
        misses: int64 (sequences,), added to.
    """
    num_tokens, num_layers, _ = experts.shape
    num_experts = resident.shape[1]
    needed = np.zeros(num_experts, np.bool_)
    for t in range(num_tokens):
        for layer in range(num_layers):
            used, here, score = experts[t, layer], resident[layer], scores[t, layer]
            for e in used:
                needed[e] = True
            for e in used:
                if here[e]:
                    continue
                misses[sequence[t]] += 1
                if held[layer] < slots:
                    held[layer] += 1
                else:
                    victim = -1
                    for other in range(num_experts):
                        if here[other] and not needed[other] and (victim < 0 or score[other] < score[victim]):
                            victim = other
                    here[victim] = False
                here[e] = True
            for e in used:
                needed[e] = False


Scorer = Callable[[], Iterator[np.ndarray]]
"""Yields scores float32 (1 or len(SHARES), n, L, E) of consecutive chunks of CHUNK tokens of the held-out trace."""


class MissCounter:
    """Serves the tokens of a workload, chunk by chunk, from a cache of each size.

    `misses` int64 (len(SHARES), sequences): experts loaded on demand so far.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload, self.sequence, self.served = workload, workload.token_sequence, 0
        self.misses = np.zeros((len(SHARES), len(workload)), np.int64)
        self._resident = np.zeros((len(SHARES), workload.num_layers, workload.num_experts), np.bool_)
        self._held = np.zeros((len(SHARES), workload.num_layers), np.int64)

    def serve(self, scores: np.ndarray) -> None:
        """The next tokens, under these scores (see `Scorer`)."""
        chunk = slice(self.served, self.served + scores.shape[1])
        for i, share in enumerate(SHARES):
            slots = round(share * self.workload.num_experts)
            of_share = np.ascontiguousarray(scores[i if len(scores) > 1 else 0])
            state = self._resident[i], self._held[i]
            evict(self.workload.experts[chunk], of_share, slots, *state, self.sequence[chunk], self.misses[i])
        self.served = chunk.stop


def count_misses(workload: Workload, scorer: Scorer) -> np.ndarray:
    """int64 (len(SHARES), sequences): experts loaded on demand under the scores, for each cache size."""
    counter = MissCounter(workload)
    for scores in scorer():
        counter.serve(scores)
    assert counter.served == workload.num_tokens
    return counter.misses


def committee_misses(
    workload: Workload, trace: Trace, networks: Sequence[EvictionNetwork], committees: Sequence[Sequence[int]]
) -> np.ndarray:
    """int64 (committees, len(SHARES), sequences): `count_misses` under the mean of some networks' scores."""
    counters = [MissCounter(workload) for _ in committees]
    for scores in zip(*(by_network(network, trace) for network in networks), strict=True):
        for counter, members in zip(counters, committees, strict=True):
            counter.serve(np.mean([scores[m] for m in members], axis=0))
    return np.stack([counter.misses for counter in counters])


def rule_misses(workload: Workload, rule_for: Callable[[ExpertCachingSpec, float], Rule]) -> np.ndarray:
    """int64 (len(SHARES), sequences): the same for rules, one for each cache size, run in the simulator."""
    misses = np.zeros((len(SHARES), len(workload)), np.int64)
    for i, share in enumerate(SHARES):
        spec = ExpertCachingSpec(cache_share=share, eviction_only=True)
        simulator = Simulator(spec)
        simulator.reset(workload)
        simulator.run(rule_for(spec, share))
        timeline = simulator.timeline()
        of_token = (timeline.used - timeline.ready).reshape(workload.num_tokens, workload.num_layers).sum(1)
        misses[i] = np.add.reduceat(of_token, workload.sequence_offsets[:-1])
    return misses


def by_copying(trace: Trace, row: int) -> Iterator[np.ndarray]:
    """The copy kernel of one of `COPY_DISCOUNTS`."""
    for first in range(0, len(trace.copies), CHUNK):
        yield trace.copies[None, first : first + CHUNK, :, row].astype(np.float32)


def head_of(trace: Trace, tokens: int) -> Trace:
    """The first tokens of a trace."""
    return trace._replace(**{name: array[:tokens] for name, array in trace._asdict().items()})


def by_network(network: EvictionNetwork, trace: Trace) -> Iterator[np.ndarray]:
    """One network, in torch: output i for cache size i."""
    import torch

    from ..agents.expert_caching_train import begin_counts, read_chunk

    num_tokens, num_layers, _ = trace.experts.shape
    counts, recurrence = begin_counts(trace, np.zeros(1, np.int64)), network.begin(1)
    for first in range(0, num_tokens, CHUNK):
        n = min(CHUNK, num_tokens - first)
        _, used, begins, features = read_chunk(trace, counts, n, np.arange(num_layers))
        with torch.no_grad():
            logits, recurrence = network(used, begins, recurrence, range(num_layers), features)
        yield logits.view(num_layers, len(SHARES), n, -1).permute(1, 2, 0, 3).numpy()


# --------------------------------------------------------------------------------------------------- the table


@dataclass
class Row:
    """A policy's misses on the held-out sequences."""

    policy: str
    misses: np.ndarray  # (seeds, len(SHARES), sequences) int64
    gap: list[float] = field(default_factory=list)  # percent of the gap closed, by share
    low: list[float] = field(default_factory=list)  # of the 95% interval
    high: list[float] = field(default_factory=list)
    hit_rate: list[float] = field(default_factory=list)


def percent_closed(closed: np.ndarray, possible: np.ndarray) -> np.ndarray:
    """Share of the gap in percent; nan where LRU is already as good as Belady."""
    return 100.0 * np.divide(closed, possible, out=np.full(closed.shape, np.nan), where=possible > 0)


def fill_in(rows: Sequence[Row], lru: np.ndarray, belady: np.ndarray, uses: np.ndarray, resamples: int) -> None:
    """Compute gap, interval and hit rate of every row.

    Args:
        rows: to fill in.
        lru: misses of LRU, (len(SHARES), sequences).
        belady: misses of Belady.
        uses: experts needed, (sequences,).
        resamples: of sequences, and of seeds where there are several.
    """
    rng = np.random.default_rng(0)
    draws = np.stack(
        [np.bincount(rng.integers(0, len(uses), len(uses)), minlength=len(uses)) for _ in range(resamples)]
    )
    possible = draws @ (lru - belady).T
    for row in rows:
        means = row.misses.mean(0)
        row.gap = [float(x) for x in percent_closed((lru - means).sum(1), (lru - belady).sum(1))]
        row.hit_rate = [float(x) for x in 1.0 - means.sum(1) / uses.sum()]
        num_seeds = len(row.misses)
        seeds = np.stack(
            [np.bincount(rng.integers(0, num_seeds, num_seeds), minlength=num_seeds) for _ in range(resamples)]
        )
        closed = np.einsum("rs,ncs,rn->rc", draws, lru - row.misses, seeds / num_seeds, optimize=True)
        spread = np.percentile(percent_closed(closed, possible), [2.5, 97.5], axis=0)
        row.low, row.high = ([float(x) for x in edge] for edge in spread)


def deployed(policy: LearnedEviction, workload: Workload) -> tuple[list[int], list[float]]:
    """The policy in the simulator: its loads, and CPU-microseconds a decision, simulator included, by cache size."""
    loads, microseconds = [], []
    for share in SHARES:
        simulator = Simulator(ExpertCachingSpec(cache_share=share, eviction_only=True), recording=False)
        simulator.reset(workload.head(32))
        policy.run(simulator)  # compiles
        simulator.reset(workload)
        begun_s = time.process_time()
        policy.run(simulator)
        spent_s = time.process_time() - begun_s
        loads.append(int(simulator.state().engine[0]["num_demand_loads"]))
        microseconds.append(1e6 * spent_s / (workload.num_tokens * workload.num_layers))
    return loads, microseconds


def split(args: Args) -> tuple[Workload, Workload]:
    """The training and the held-out sequences."""
    trace = find_trace(args.trace, args.data_dir, held_out=args.held_out, seed=args.split_seed)
    train, test = trace.training, trace.test
    command.say(f"{len(train)} sequences to train on ({train.num_tokens} tokens), {len(test)} held out")
    return train, test


def training_of(args: Args, seed: int) -> EvictionTraining:
    """How the network of a seed is trained."""
    from ..agents.expert_caching_train import EvictionTraining

    return EvictionTraining(steps=args.steps, head_steps=args.head_steps, seed=seed)


def reporter(what: str) -> Callable[[dict[str, Any]], None]:
    """Says how far a training is."""
    return lambda progress: command.say("{}: step {step}, loss {loss:.4f}, {cpu_s:.0f} CPU-s".format(what, **progress))


def train_networks(args: Args, trace: Trace) -> list[EvictionNetwork]:
    """One network a seed, taken from `args.out` where it was trained before."""
    from ..agents.expert_caching_train import train_eviction

    return [
        train_eviction(
            trace, training_of(args, seed), args.out / f"seed{seed}", resume=True, report=reporter(f"seed {seed}")
        )
        for seed in range(args.seeds)
    ]


def train_head_of(args: Args, trace: Trace, network: EvictionNetwork) -> NextLayerHead:
    """The head for the layer above of the first network, taken from `args.out` where it was trained before."""
    from ..agents.expert_caching_train import train_head

    config, folder = training_of(args, 0), args.out / "seed0"
    return train_head(trace, network, config, folder, resume=True, report=reporter("head"))


def committees_of(args: Args) -> list[list[int]]:
    """The networks of the committee that begins with each seed."""
    return [[(seed + i) % args.seeds for i in range(args.members)] for seed in range(args.seeds)]


def measure_rows(
    args: Args, train: Workload, test: Workload, trace: Trace, networks: Sequence[EvictionNetwork]
) -> dict[str, Row]:
    """The rows of the table by policy, filled in; `trace` is that of `test`."""
    singles = [[seed] for seed in range(args.seeds)]

    def of_rules(rule_for: Callable[[ExpertCachingSpec, float], Rule]) -> np.ndarray:
        return rule_misses(test, rule_for)[None]

    discounts = dict(zip(SHARES, RIDGE_DISCOUNTS, strict=True))
    learned_score = fit_learned_score(train)
    measures: dict[str, Callable[[], np.ndarray]] = {
        "lru": lambda: of_rules(lambda spec, share: RULES["lru"]),
        "ema_95": lambda: of_rules(lambda spec, share: RULES["ema_95"]),
        "learned_score": lambda: of_rules(lambda spec, share: learned_score),
        "ridge": lambda: of_rules(lambda spec, share: fit_ridge(train, discount=discounts[share])),
        "copy_kernel": lambda: count_misses(test, lambda: by_copying(trace, 1))[None],
        "belady": lambda: of_rules(lambda spec, share: belady(test, spec)),
    }
    rows = {}
    for name, misses in measures.items():
        command.say(f"measuring {name}")
        rows[name] = Row(name, misses())
    command.say("measuring the agent")
    of_networks = committee_misses(test, trace, networks, singles + committees_of(args))
    rows["one_network"] = Row("one_network", of_networks[: args.seeds])
    rows["agent"] = Row("agent", of_networks[args.seeds :])
    lru, best = rows["lru"].misses[0], rows["belady"].misses[0]
    fill_in(list(rows.values()), lru, best, test.lengths * test.num_layers * test.top_k, args.bootstrap)
    return rows


def measure(args: Args) -> dict[str, Any]:
    """Train what is missing in `args.out`, measure all rows and return what results.json holds. Raises InputError."""
    import torch

    from ..agents.expert_caching import load_eviction
    from ..agents.expert_caching_checkpoint import pack_eviction, save_eviction
    from ..agents.expert_caching_train import prepare_trace

    torch.set_num_threads(1)
    if args.seeds < 1 or not 0 < args.held_out < 1:
        raise InputError(
            f"{args.seeds} seeds, {args.held_out} of the sequences held out",
            remedy="Give at least one seed, and a share between 0 and 1",
        )
    if not 1 <= args.members <= args.seeds:
        raise InputError(
            f"committees of {args.members} out of {args.seeds} networks", remedy="Give at most as many members as seeds"
        )
    train, test = split(args)
    training_trace = prepare_trace(train, args.out)
    networks = train_networks(args, training_trace)
    head = train_head_of(args, training_trace, networks[0])  # the committee that is deployed begins with it
    trace = prepare_trace(test, args.out)
    rows = measure_rows(args, train, test, trace, networks)

    lru, best, agent = (rows[name].misses.sum(2) for name in ("lru", "belady", "agent"))
    config = {"training": asdict(training_of(args, 0)), "trace": test.source}
    config["split"] = {"seed": args.split_seed, "held_out": args.held_out, "held_out_sequences": len(test)}
    shipped = committees_of(args)[0]
    weights, beginning = pack_eviction([networks[m] for m in shipped], head), test.head(args.deployed_tokens)
    save_eviction(args.out / "agent", weights, test.top_k, config)
    loads, microseconds = deployed(load_eviction(args.out / "agent"), beginning)
    in_torch = committee_misses(beginning, head_of(trace, beginning.num_tokens), networks, [shipped])[0]
    results = {
        **config,
        "held_out_tokens": test.num_tokens,
        "shares": SHARES,
        "rows": [{k: v for k, v in asdict(row).items() if k != "misses"} for row in rows.values()],
        "agent_seeds": percent_closed(lru - agent, lru - best).tolist(),
        "deployed": {
            "tokens": beginning.num_tokens,
            "loads": loads,
            "loads_in_torch": in_torch.sum(1).tolist(),
            "decision_us": microseconds,
        },
    }
    if args.ship is not None:
        save_eviction(args.ship, weights, test.top_k, config, card(results, args))
    return results


def table(results: dict[str, Any]) -> str:
    """The rows as text."""
    lines = [f"{'gap closed, %':16}" + "".join(f"{share:>22.1%}" for share in results["shares"])]
    for row in results["rows"]:
        cells = zip(row["gap"], row["low"], row["high"], row["hit_rate"], strict=True)
        text = "".join(f"{g:7.1f} [{low:.1f}, {high:.1f}]".ljust(21) + " " for g, low, high, _ in cells)
        lines.append(f"{row['policy']:16} {text}")
    hits = {row["policy"]: row["hit_rate"] for row in results["rows"]}
    for name in ("lru", "agent", "belady"):
        lines.append(f"hit rate {name:8}" + "".join(f"{rate:>21.3f} " for rate in hits[name]))
    run = results["deployed"]
    for label, numbers in (("deployed", run["loads"]), ("in torch", run["loads_in_torch"])):
        lines.append(f"{'loads ' + label:17}" + "".join(f"{number:>21} " for number in numbers))
    lines.append(f"{'CPU-us a decision':17}" + "".join(f"{us:>21.1f} " for us in run["decision_us"]))
    return "\n".join(lines)


def card(results: dict[str, Any], args: Args) -> str:
    """The card of the shipped checkpoint."""
    split = results["split"]
    return (
        "# The shipped eviction score\n\n"
        f"The mean of {args.members} networks, the first ones of {args.seeds}, chosen before any was measured. Trained "
        f"on {results['trace']}: all "
        f"sequences but the {split['held_out_sequences']} held out by split seed {split['seed']}. It knows the layers "
        "and experts of that model, and refuses others.\n\n"
        "Share of the LRU-to-Belady gap closed on the held-out sequences, percent, with 95% intervals (bootstrap over "
        "sequences and seeds):\n\n"
        f"```\n{table(results)}\n```\n\n"
        f"Made by `python -m schedlab.experiments.expert_caching_gap --trace {args.trace} --seeds {args.seeds} "
        f"--members {args.members} --steps {args.steps} --ship DIR`.\n"
    )


def act(args: Args) -> int:
    """Measure, write results.json, print the table. Returns the exit status."""
    results = measure(args)
    with atomic_path(args.out / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1))
    print(table(results))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    return command.run(Args, act, argv, "expert_caching_gap", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
