"""Advice: what it shows, when, and that the rule by advice decides as it says."""

from __future__ import annotations

import numpy as np
import pytest

from schedlab.agents.expert_caching_rule import Knobs, advice_rule
from schedlab.baselines.expert_caching import RULES
from schedlab.envs.core.errors import InputError
from schedlab.envs.expert_caching.advice import Advice, run_with_advice
from schedlab.envs.expert_caching.env import ExpertCachingVectorEnv, Task
from schedlab.envs.expert_caching.sim import Simulator
from schedlab.envs.expert_caching.spec import CostModel, ExpertCachingSpec
from schedlab.envs.expert_caching.table import CANDIDATE_FEATURES, CONTEXT_FEATURES
from schedlab.envs.expert_caching.workload import Workload, generate

COST = CostModel("miniature", attention_s=1.0, expert_s=1.0, expert_bytes=2, bandwidth=1.0, chunk_bytes=1)
ADVISED = ExpertCachingSpec(cost=COST, layer_slots=(2, 2), max_prefetch=2, history_tokens=1)


def routing(*tokens: tuple[list[int], list[int]]) -> Workload:
    """Two layers of four experts, one sequence."""
    return Workload.from_arrays("by-hand", np.array(tokens), [len(tokens)], num_experts=4)


def advice(workload: Workload, keep: dict | None = None, above: dict | None = None) -> Advice:
    """Probabilities by (token, layer, expert), 0 for all others."""
    shape = (workload.num_tokens, workload.num_layers, workload.num_experts)
    out = Advice(np.zeros(shape, np.uint8), np.zeros(shape, np.uint8))
    for table, given in zip(out, (keep or {}, above or {}), strict=True):
        for place, p in given.items():
            table[place] = round(255 * np.sqrt(p))
    return out


def decided(spec: ExpertCachingSpec, workload: Workload, said: Advice, knobs: Knobs) -> tuple:
    """Loads on demand and by prefetch, experts bypassed, stall."""
    simulator = Simulator(spec)
    simulator.reset(workload)
    run_with_advice(simulator, advice_rule(knobs), said)
    engine = simulator.state().engine[0]
    assert engine["num_illegal"] == 0
    names = ("num_demand_loads", "num_prefetch_loads", "num_bypassed")
    return (*(int(engine[name]) for name in names), float(simulator.sim.books[0]["total_stall_s"]))


def test_the_expert_least_worth_keeping_goes():
    workload = routing(([0], [0]), ([1], [0]), ([2], [0]), ([0], [0]))
    likes_0 = advice(workload, {(2, 0, 0): 0.9, (2, 0, 1): 0.1})  # when expert 2 is missing, 0 and 1 are there
    likes_1 = advice(workload, {(2, 0, 0): 0.1, (2, 0, 1): 0.9})
    spec = ADVISED.replace(max_prefetch=0)
    assert decided(spec, workload, likes_0, Knobs())[0] == 4  # 0, 1, 2 of layer 0, and 0 of layer 1
    assert decided(spec, workload, likes_1, Knobs())[0] == 5


def test_bypass_streams_what_is_worth_less_than_all_that_is_there():
    workload = routing(([0], [0]), ([1], [0]), ([2], [0]), ([0], [0]), ([1], [0]))
    said = advice(workload, {(2, 0, 0): 0.5, (2, 0, 1): 0.5, (2, 0, 2): 0.2})
    spec = ADVISED.replace(max_prefetch=0, bypass=True)
    assert decided(spec, workload, said, Knobs(bypass_margin=0.0))[::2][:2] == (4, 1)
    assert decided(spec, workload, said, Knobs(bypass_margin=-1.0))[::2][:2] == (5, 0)


def test_prefetch_begins_where_it_saves_more_than_its_victim_is_worth():
    """A load takes 2 s, as long as an expert's computation and the next attention: it is there when asked for."""
    workload = routing(([0], [0]), ([0], [1]), ([0], [2]), ([0], [3]))
    said = advice(workload, above={(3, 0, 3): 0.6})
    assert decided(ADVISED, workload, said, Knobs(prefetch_margin=0.5)) == (4, 1, 0, 8.0)
    assert decided(ADVISED, workload, said, Knobs(prefetch_margin=0.7)) == (5, 0, 0, 10.0)
    kept = advice(workload, above={(3, 0, 3): 0.6, (3, 0, 1): 0.5, (3, 0, 2): 0.5})  # its victims are as likely needed
    assert decided(ADVISED, workload, kept, Knobs(prefetch_margin=0.5)) == (5, 0, 0, 10.0)


def test_the_env_shows_advice_of_the_present_epoch_only():
    workload = generate(seed=3)
    rng = np.random.default_rng(0)
    shape = (workload.num_tokens, workload.num_layers, workload.num_experts)
    said = Advice(*(rng.integers(1, 256, shape).astype(np.uint8) for _ in range(2)))
    spec = ExpertCachingSpec(max_prefetch=2, history_tokens=1)
    env = ExpertCachingVectorEnv(1, tasks=[Task(spec, workload, said)])
    env.reset(seed=0)
    kept, predicted = (np.zeros(shape[1:], np.float32) for _ in range(2))
    seen = -1
    for _ in range(400):
        engine, state = env.batch.engine[0, 0], env.state()
        token, layer = divmod(int(engine["epoch"]), workload.num_layers)
        for epoch in range(seen + 1, int(engine["epoch"]) + 1):
            t, at = divmod(epoch, workload.num_layers)
            kept[at] = (said.keep[t, at] / 255.0) ** 2
            predicted[at] = 0.0
            predicted[(at + 1) % workload.num_layers] = (said.above[t, at] / 255.0) ** 2
        seen = int(engine["epoch"])
        np.testing.assert_allclose(state.experts["keep"], kept, atol=1e-6)
        np.testing.assert_allclose(state.experts["predicted"], predicted, atol=1e-6)
        rows = env.batch.table_rows[0]
        live = np.flatnonzero(env.batch.table_open[0])
        column = CANDIDATE_FEATURES.index("root of a predictor's probability of a next use soon")
        expected = np.sqrt(kept[rows[live, 0], rows[live, 1]])
        np.testing.assert_allclose(env.candidates[0][live, column], expected, atol=1e-6)
        env.step(np.array([rng.choice(np.flatnonzero(env.action_mask[0]))]))
    assert len(CONTEXT_FEATURES) == env.context.shape[1] and token * layer > 0


def test_a_rule_by_advice_is_followed_row_by_row():
    """What the env builds from the rows that the teacher points at stalls as the rule itself does."""
    workload = generate(seed=4).head(60)
    shape = (workload.num_tokens, workload.num_layers, workload.num_experts)
    rng = np.random.default_rng(1)
    said = Advice(*(rng.integers(0, 256, shape).astype(np.uint8) for _ in range(2)))
    # warm: with free slots left the env gives them to missing experts in their order, the rule in that of `keep`
    spec = ExpertCachingSpec(max_prefetch=2, bypass=True, history_tokens=1, cost=COST, warm_start=True)
    rule = advice_rule(Knobs(-0.05, 0.3, 0.2))
    env = ExpertCachingVectorEnv(1, tasks=[Task(spec, workload, said)])
    env.reset(seed=0)
    total, done, prefetched = 0.0, False, 0
    while not done:
        prefetched = int(env.state().engine[0]["num_prefetch_loads"])
        _, reward, terminated, _, _ = env.step(env.rule_actions([rule]))
        total -= float(reward[0]) * COST.load_s
        done = bool(terminated[0])
    assert total == pytest.approx(decided(spec, workload, said, Knobs(-0.05, 0.3, 0.2))[3])
    assert prefetched > 0


def test_advice_of_another_workload_is_refused():
    workload = generate(seed=0)
    said = Advice(*(np.zeros((1, 2, 3), np.uint8) for _ in range(2)))
    with pytest.raises(InputError, match="Compute it for this very workload"):
        Task(ADVISED, workload, said)
    good = Advice(*(np.zeros((workload.num_tokens, workload.num_layers, workload.num_experts), np.uint8),) * 2)
    spec = ExpertCachingSpec()
    with pytest.raises(InputError, match="some tasks have advice, others none"):
        ExpertCachingVectorEnv(1, tasks=[Task(spec, workload, good), Task(spec, workload)])


def test_following_the_choice_that_is_shown_is_the_rule():
    """The marked row is legal and the only one, also after an episode; taking it stalls as the rule does."""
    workload = generate(seed=5).head(80)
    rng = np.random.default_rng(1)
    shape = (workload.num_tokens, workload.num_layers, workload.num_experts)
    said = Advice(*(rng.integers(1, 256, shape).astype(np.uint8) for _ in range(2)))
    spec = ExpertCachingSpec(cost=COST, max_prefetch=2, bypass=True, history_tokens=1)
    rule = advice_rule(Knobs(0.1, 0.3, 0.05))
    simulator = Simulator(spec)
    simulator.reset(workload)
    run_with_advice(simulator, rule, said)

    env = ExpertCachingVectorEnv(2, tasks=[Task(spec, workload, said)], shown=[rule])
    env.reset(seed=0)
    column = CANDIDATE_FEATURES.index("would be chosen by the rule that is shown")
    stall, episodes = 0.0, 0
    while episodes < 2:
        marks = env.candidates[:, :, column]
        actions = marks.argmax(1)
        assert (marks.sum(1) == 1.0).all() and env.action_mask[np.arange(2), actions].all()
        np.testing.assert_array_equal(actions, env.rule_actions([rule] * 2))
        _, reward, terminated, _, _ = env.step(actions)
        stall -= float(reward[0]) * COST.load_s
        if terminated[0]:
            assert stall == pytest.approx(float(simulator.sim.books[0]["total_stall_s"]), rel=1e-9)
            stall, episodes = 0.0, episodes + 1


def test_one_rule_is_shown_for_every_task_and_no_other_can_be_followed():
    workload = generate(seed=5).head(20)
    tasks = [Task(ExpertCachingSpec(history_tokens=1), workload)] * 2
    with pytest.raises(InputError, match="1 rules to show for 2 tasks"):
        ExpertCachingVectorEnv(1, tasks=tasks, shown=[RULES["lru"]])
    env = ExpertCachingVectorEnv(1, tasks=tasks, shown=[RULES["lru"]] * 2)
    env.reset(seed=0)
    with pytest.raises(InputError, match="followed while 'lru' is shown"):
        env.rule_actions([RULES["arc"]])
