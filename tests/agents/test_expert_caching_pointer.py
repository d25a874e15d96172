"""The pointer policy over the learned scores decides as the env in which it is trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from schedlab.agents.compiled import deepsets_batch, pack_weights
from schedlab.agents.expert_caching import advice_for
from schedlab.agents.expert_caching_checkpoint import pack_eviction
from schedlab.agents.expert_caching_network import EvictionNetwork, NextLayerHead
from schedlab.agents.expert_caching_pointer import PointerCaching
from schedlab.agents.expert_caching_rule import Knobs, advice_rule
from schedlab.agents.networks import PointerNetwork
from schedlab.envs.expert_caching.affinity import Affinity
from schedlab.envs.expert_caching.env import ExpertCachingVectorEnv, Task
from schedlab.envs.expert_caching.sim import Simulator
from schedlab.envs.expert_caching.spec import CostModel, ExpertCachingSpec
from schedlab.envs.expert_caching.table import NUM_CANDIDATE, NUM_CONTEXT
from schedlab.envs.expert_caching.workload import generate
from schedlab.experiments import expert_caching_presets as presets

COST = CostModel("miniature", attention_s=1.0, expert_s=1.0, expert_bytes=2, bandwidth=1.0, chunk_bytes=1)


def test_the_policy_stalls_as_its_actions_do_in_the_env():
    torch.manual_seed(0)
    workload = generate(seed=6).head(40)
    shape = (workload.num_layers, workload.num_experts)
    network = EvictionNetwork(*shape, width=16, hidden=8).eval()
    weights = pack_eviction([network], NextLayerHead(*shape, width=16, hidden=8).eval())
    spec = ExpertCachingSpec(cost=COST, max_prefetch=2, bypass=True, history_tokens=1, num_candidates=9)
    pointer, knobs = pack_weights(PointerNetwork(NUM_CONTEXT, NUM_CANDIDATE, hidden=16), 9), Knobs(0.02, 0.4, 0.01)

    simulator = Simulator(spec)
    simulator.reset(workload)
    PointerCaching("pointer", weights, workload.top_k, pointer, 9, knobs).run(simulator)
    stall_s, engine = float(simulator.sim.books[0]["total_stall_s"]), simulator.state().engine[0]
    assert engine["num_illegal"] == 0

    task = Task(spec, workload, advice_for(weights, workload, spec.cache_share))
    env = ExpertCachingVectorEnv(1, tasks=[task], affinity=Affinity.unknown(*shape), shown=[advice_rule(knobs)])
    env.reset(seed=0)
    total, done = 0.0, False
    logits, values = np.zeros((1, 9), np.float32), np.zeros(1, np.float32)
    while not done:
        deepsets_batch(pointer, env.context, env.candidates, env.action_mask, logits, values)
        _, reward, terminated, _, _ = env.step(logits.argmax(1))
        total -= float(reward[0]) * COST.load_s
        done = bool(terminated[0])
    assert total == pytest.approx(stall_s, rel=0.03)  # advice is rounded: a near tie may fall otherwise


@pytest.mark.slow
def test_the_tiny_preset_needs_no_public_trace(monkeypatch):
    monkeypatch.delenv("SCHEDLAB_DATA", raising=False)
    recipe = presets.tiny(0, None)
    env = recipe.make_env(4, 1)
    for _ in range(30):
        actions = recipe.teacher(env)
        assert env.action_mask[np.arange(4), actions].all()
        env.step(actions)
    assert recipe.config.spec["scores"] == "moe"
