"""What the tests of this folder share: tiny engines, random workloads, and one way to step a simulator."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import strategies as st

from schedlab.envs.request_scheduling.sim import Simulator
from schedlab.envs.request_scheduling.spec import CostModel, EngineSpec, RequestSchedulingSpec, SloClass
from schedlab.envs.request_scheduling.state import FINISHED, NO_LIMIT, RUNNING, Decision
from schedlab.envs.request_scheduling.workload import Workload, dense_ids

# Fractions of two: sums of them are exact in floating point, whatever their order.
DYADIC = CostModel("dyadic", (1.0, 1 / 16, 1 / 8, 1 / 256, 1 / 1024, 1 / 4096, 1 / 2))
ONE_SECOND = CostModel("one second an iteration", (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))


def tiny_spec(
    kv_blocks: int = 8,
    block_tokens: int = 4,
    max_batch_tokens: int = 16,
    max_running: int = 4,
    prefix_cache: bool = False,
    cost: CostModel = ONE_SECOND,
    prefill_choices: tuple[int, ...] = (0, 4, 16),
    num_candidates: int = 8,
    **changes,
) -> RequestSchedulingSpec:
    engine = EngineSpec(kv_blocks, block_tokens, max_batch_tokens, max_running, prefix_cache)
    choices = (*(c for c in prefill_choices if c < max_batch_tokens), max_batch_tokens)
    return RequestSchedulingSpec(
        engine, cost, prefill_choices=choices, num_candidates=max(num_candidates, len(choices) + 2), **changes
    )


def tiny_workload(arrival_s, prompt_tokens, output_tokens, *, prefixes=None, block_tokens=4, **columns) -> Workload:
    """`prefixes`: for each request its prompt blocks as a list of labels; equal beginnings are shared."""
    if prefixes is not None:
        chains = [tuple(tuple(p[: i + 1]) for i in range(len(p))) for p in prefixes]
        names = sorted({c for chain in chains for c in chain})
        ids = [names.index(c) for chain in chains for c in chain]
        columns["hash_ids"] = dense_ids(np.array(ids, np.int64)) if ids else []
        columns["hash_offsets"] = np.cumsum([0, *map(len, chains)])
        columns["hash_block_tokens"] = block_tokens
    columns.setdefault("predicted_output_tokens", np.asarray(output_tokens, np.float64))
    return Workload.from_arrays("tiny", arrival_s, prompt_tokens, output_tokens, **columns)


@st.composite
def problems(draw, prefix_cache: bool | None = None, longest: int = 14) -> tuple[RequestSchedulingSpec, Workload]:
    """A small engine, often short of memory, and up to `longest` requests, with or without shared prefixes."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    block = rng.choice((1, 2, 4, 5))
    max_batch = rng.choice((4, 8, 13, 32))
    prefix = draw(st.booleans()) if prefix_cache is None else prefix_cache
    spec = tiny_spec(
        kv_blocks=draw(st.integers(2, 24)),
        block_tokens=block,
        max_batch_tokens=max_batch,
        max_running=rng.randint(1, min(6, max_batch)),
        prefix_cache=prefix,
        cost=DYADIC,
        slo_classes=(SloClass(8.0, 2.0, 1.0), SloClass(40.0, 4.0, 2.5)),
    )
    n = draw(st.integers(1, longest))
    calm = rng.choice((0.0, 0.5, 3.0, 20.0))
    arrivals = np.cumsum([rng.choice((0, 1, 2, 7)) * calm for _ in range(n)])
    prompts = [rng.randint(1, 24) for _ in range(n)]
    outputs = [rng.choice((1, 1, 2, 5, 20)) for _ in range(n)]
    prefixes = None
    if draw(st.booleans()) or prefix:
        labels = rng.choice((1, 2, 3))
        prefixes = [[rng.randrange(labels) for _ in range(rng.randint(0, p // block))] for p in prompts]
    workload = tiny_workload(
        arrivals,
        prompts,
        outputs,
        prefixes=prefixes,
        block_tokens=block,
        predicted_output_tokens=[max(o * rng.uniform(0.3, 3.0), 1.0) for o in outputs],
        slo_class=[rng.randrange(2) for _ in range(n)],
        priority=[rng.randrange(3) for _ in range(n)],
        client=[rng.randrange(3) for _ in range(n)],
    )
    return spec, workload


def write_plan(plan, decision: Decision) -> None:
    """Copy a plain plan of the reference into the simulator's decision."""
    levers = decision.levers[0]
    levers["prefill_tokens"] = min(plan.prefill_tokens, NO_LIMIT)
    levers["chunk_tokens"] = min(plan.chunk_tokens, NO_LIMIT)
    levers["max_running"] = min(plan.max_running, NO_LIMIT)
    levers["kv_reserve_blocks"] = plan.kv_reserve_blocks
    levers["whole_prompts"] = plan.whole_prompts
    levers["admit_rest"] = plan.admit_rest
    levers["num_order"] = len(plan.order)
    levers["num_preempt"] = len(plan.preempt)
    decision.order[: len(plan.order)] = plan.order
    decision.preempt[: len(plan.preempt)] = plan.preempt


def serve(simulator: Simulator, policy) -> None:
    """Step a policy over a simulator from Python, the way a real engine is driven."""
    policy.reset(simulator.state())
    done = False
    while not done:
        decision = simulator.default_decision()
        policy.decide(simulator.state(), decision)
        done = simulator.step(decision).done


def assert_same_run(one, other) -> None:
    """Two timelines are equal in every field."""
    for name in one.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def assert_no_block_leaked(simulator: Simulator) -> None:
    engine, books = simulator.sim.state.engine[0], simulator.sim.books[0]
    assert engine["kv_blocks_free"] == engine["kv_blocks_total"]
    assert books["blocks_unused"] + books["blocks_idle"] == engine["kv_blocks_total"]
    assert engine["num_running"] == engine["num_waiting"] == engine["num_decoding"] == 0
    assert not simulator.sim.block_refs.any() and not simulator.sim.hash_held.any()
    assert simulator.sim.block_cached.sum() == books["blocks_idle"]


def watch(simulator: Simulator, policy) -> list[str]:
    """Step a policy over a simulator and tell what each iteration did, such as `2s: r0 d, r1 +4 | 3 blocks`.

    The time is the iteration's end; `+4` prefills four tokens, `d` decodes one, `end` marks the request's last token,
    `out` is a preemption; then the blocks in use while the iteration ran.
    """
    policy.reset(simulator.state())
    story: list[str] = []
    done = False
    while not done:
        decision = simulator.default_decision()
        policy.decide(simulator.state(), decision)
        before = simulator.sim.state.requests.copy()
        count = int(simulator.sim.state.engine[0]["iterations"])
        done = simulator.step(decision).done
        after, events = simulator.sim.state.requests, []
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            if new["preemptions"] > old["preemptions"]:
                events.append(f"r{i} out")
                old = dict(zip(old.dtype.names, old, strict=True), computed_tokens=0, admission=-1)
            start = new["cached_tokens"] if new["admission"] > old["admission"] else old["computed_tokens"]
            if new["computed_tokens"] == start:
                continue
            decodes = old["status"] == RUNNING and old["computed_tokens"] >= old["prefill_target"]
            what = "d" if decodes else f"+{new['computed_tokens'] - start}"
            events.append(f"r{i} {what}" + " end" * bool(new["status"] == FINISHED))
        record = simulator.timeline()
        story.append(
            f"{record.iteration_end_s[count]:.12g}s: {', '.join(events)} | {record.kv_blocks_used[count]} blocks"
        )
    return story


def tell(spec: RequestSchedulingSpec, workload: Workload, policy) -> list[str]:
    """`watch` on a fresh simulator."""
    simulator = Simulator(spec)
    simulator.reset(workload)
    story = watch(simulator, policy)
    assert_no_block_leaked(simulator)
    return story
