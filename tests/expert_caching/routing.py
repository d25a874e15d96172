"""Small routing and policies that tests of the expert caching rooms share."""

from __future__ import annotations

import numpy as np

from schedlab.envs.expert_caching.sim import Simulator
from schedlab.envs.expert_caching.spec import CostModel, ExpertCachingSpec
from schedlab.envs.expert_caching.state import AUTO, BYPASS, Decision, State
from schedlab.envs.expert_caching.workload import Workload

ODD_COST = CostModel(
    name="odd",
    attention_s=0.013,
    attention_token_s=0.0017,
    expert_s=0.0071,
    expert_token_s=0.0011,
    step_s=0.019,
    expert_bytes=1000,
    bandwidth=31_000.0,
    chunk_bytes=300,
    chunk_latency_s=0.00037,
    store_bandwidth=9_000.0,
)
"""An expert takes four chunks, the last one shorter; loads and computing are of one order; no two times coincide."""


def routing_of(*tokens: list[list[int]], num_experts: int = 4) -> Workload:
    """One sequence; a token is a list of layers, each a list of experts."""
    return Workload.from_arrays("by-hand", np.array(tokens), [len(tokens)], num_experts=num_experts)


def random_routing(rng: np.random.Generator, *, layers: int, experts: int, k: int, lengths: list[int]) -> Workload:
    """Uniform routing."""
    tokens = sum(lengths)
    ids = np.argsort(rng.random((tokens, layers, experts)), axis=2)[:, :, :k]
    return Workload.from_arrays("random", ids, lengths, num_experts=experts)


class RandomPolicy:
    """Asks for anything, legal or not."""

    name, is_oracle = "random", False

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def reset(self, state: State) -> None:
        pass

    def decide(self, state: State, decision: Decision) -> None:
        rng, engine = self.rng, state.engine[0]
        for i in range(engine["num_missing"]):
            decision.victims[i] = rng.choice([AUTO, BYPASS, int(rng.integers(-3, len(state.slots) + 2))])
        plan = decision.plan[0]
        plan["cancel_queued"] = rng.random() < 0.2
        plan["num_prefetch"] = rng.integers(0, len(decision.prefetch) + 1)
        for j in range(plan["num_prefetch"]):
            layer = (engine["layer"] + rng.choice([0, 1, 1, 1, 2])) % engine["num_layers"]
            slot = AUTO if rng.random() < 0.8 else rng.integers(-3, len(state.slots) + 2)
            decision.prefetch[j] = layer, rng.integers(0, engine["num_experts"] + 1), slot


def run_policy(spec: ExpertCachingSpec, workload: Workload, policy) -> Simulator:
    """Step a policy through a workload, decision by decision."""
    simulator = Simulator(spec)
    simulator.reset(workload)
    policy.reset(simulator.state())
    done = False
    while not done:
        decision = simulator.default_decision()
        policy.decide(simulator.state(), decision)
        done = simulator.step(decision).done
    return simulator
