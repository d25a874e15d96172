"""The compiled simulator against a plain-Python engine, on random workloads under random decisions."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from miniatures import assert_no_block_leaked, assert_same_run, problems, write_plan
from reference import UNLIMITED, Plan, ReferenceEngine

from schedlab.envs.request_scheduling.metrics import compute_metrics
from schedlab.envs.request_scheduling.sim import Simulator, fast_forward, skip_idle
from schedlab.envs.request_scheduling.state import ENGINE_DTYPE, FINISHED, REFUSED, RUNNING, WAITING

MEANS = [name for name in ENGINE_DTYPE.names or () if name.startswith("mean_")]
SETTINGS = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def random_plan(seed: int, iteration: int, waiting: list[int], running: list[int], most: int) -> Plan:
    """Any decision, sensible or not, with lists of at most `most`; a function of the arguments alone."""
    rng = random.Random(f"{seed}/{iteration}")
    if rng.random() < 0.2:
        return Plan()
    order = rng.sample(waiting, rng.randint(0, len(waiting)))
    if rng.random() < 0.2:  # picks that are void: running, doubled, unknown
        order += [*running, *order, -1, 10_000]
        rng.shuffle(order)
    return Plan(
        prefill_tokens=rng.choice((0, 1, 3, 8, 20, UNLIMITED)),
        chunk_tokens=rng.choice((1, 2, 5, UNLIMITED, UNLIMITED)),
        max_running=rng.choice((1, 2, 3, UNLIMITED, UNLIMITED)),
        kv_reserve_blocks=rng.choice((0, 0, 1, 3, 50)),
        whole_prompts=rng.random() < 0.3,
        admit_rest=rng.random() < 0.6,
        order=order[:most],
        preempt=[*rng.sample(running, 1), -1] if most > 1 and running and rng.random() < 0.12 else [],
    )


def compare(simulator: Simulator, reference: ReferenceEngine) -> None:
    """Every number that both know is the same."""
    state, books = simulator.state(), simulator.sim.books[0]
    engine = state.engine[0]
    waiting = state.waiting[: engine["num_waiting"]].tolist()
    running = state.running[: engine["num_running"]].tolist()
    assert waiting == [r.id for r in reference.waiting]
    assert running == [r.id for r in reference.running]
    assert engine["now_s"] == reference.now_s
    assert engine["iterations"] == len(reference.iterations)
    assert engine["num_decoding"] == sum(r.decodes for r in reference.running)
    assert engine["num_arrived"] == len(reference.requests) - len(reference.future)
    assert engine["num_finished"] == len(reference.finished)
    assert engine["num_preemptions"] == sum(r.preemptions for r in reference.requests)
    assert engine["kv_blocks_free"] == reference.free
    np.testing.assert_allclose([engine[name] for name in MEANS], reference.means(), rtol=1e-9, atol=1e-9)
    assert (books["blocks_unused"], books["blocks_idle"]) == (len(reference.unused), len(reference.idle))
    assert books["num_refused"] == len(reference.refused)
    status = dict.fromkeys(waiting, WAITING) | dict.fromkeys(running, RUNNING)
    status |= {r.id: FINISHED for r in reference.finished} | {r.id: REFUSED for r in reference.refused}
    for request in reference.requests:
        row = state.requests[request.id]
        assert row["status"] == status.get(request.id, 0)
        if request.id in waiting or request.id in running:
            assert row["computed_tokens"] == request.computed
            assert row["kv_blocks"] == len(request.blocks)
            assert row["prefill_target"] == request.target
            assert row["admission"] == request.admission
        if request.id in waiting:
            assert row["cached_tokens"] == reference.hits(request) * reference.size
        assert row["generated_tokens"] == request.generated
        assert row["preemptions"] == request.preemptions
        if request.token_s:
            assert (row["first_token_s"], row["last_token_s"]) == (request.token_s[0], request.token_s[-1])


@SETTINGS
@given(problems(), st.integers(0, 2**32))
def test_every_iteration_equals_the_reference(problem, seed):
    spec, workload = problem
    simulator, reference = Simulator(spec), ReferenceEngine(spec, workload)
    simulator.reset(workload)
    for iteration in range(3000):
        alive = reference.jump()
        assert skip_idle(simulator.sim) == alive
        compare(simulator, reference)
        reference.check()
        if not alive:
            break
        waiting, running = [r.id for r in reference.waiting], [r.id for r in reference.running]
        # random play may thrash for ever: after a while the engine's default lets everything end
        plan = random_plan(seed, iteration, waiting, running, len(workload)) if iteration < 400 else Plan()
        decision = simulator.default_decision()
        write_plan(plan, decision)
        reference.iterate(plan)
        simulator.step(decision)
    else:
        raise AssertionError("the workload did not end")
    assert_no_block_leaked(simulator)

    timeline = simulator.timeline()
    recorded = zip(
        timeline.iteration_start_s,
        timeline.iteration_end_s,
        timeline.prefill_tokens,
        timeline.decode_requests,
        timeline.kv_blocks_used,
        strict=True,
    )
    assert list(recorded) == reference.iterations
    for request in reference.requests:
        mine = timeline.segments[timeline.segments[:, 0] == request.id]
        times = [timeline.iteration_end_s[first + i] for _, first, count in mine for i in range(count)]
        assert times == request.token_s
    assert timeline.refused.sum() == len(reference.refused)
    served = [r for r in reference.requests if r.token_s]
    latency_s = sum(r.token_s[-1] - r.arrival_s for r in served)
    books = simulator.sim.books[0]
    np.testing.assert_allclose(books["latency_s"], latency_s, atol=1e-9)
    np.testing.assert_allclose(books["ttft_s"], sum(r.token_s[0] - r.arrival_s for r in served), atol=1e-9)
    metrics = compute_metrics(timeline, spec.engine.kv_blocks)
    if served:
        np.testing.assert_allclose(metrics["mean_e2e_s"] * len(served), latency_s)
        met = metrics["slo_goodput"] * timeline.slo_weight.sum()
        np.testing.assert_allclose(books["slo_met"], met, atol=1e-9)


def run_to_the_end(simulator: Simulator, seed: int, forward: bool) -> int:
    """Random decisions that depend on the state alone. Returns how many iterations were fast-forwarded."""
    skipped = 0
    while skip_idle(simulator.sim):
        if forward and (steps := fast_forward(simulator.sim)) > 0:
            skipped += steps
            continue
        engine = simulator.state().engine[0]
        state, iteration = simulator.sim.state, int(engine["iterations"])
        waiting = state.waiting[: engine["num_waiting"]].tolist()
        running = state.running[: engine["num_running"]].tolist()
        # where a fast-forward is possible, no decision but a preemption changes anything
        calm = not waiting and engine["num_decoding"] == len(running)
        plan = (
            random_plan(seed, iteration, waiting, running, len(simulator.workload))
            if not calm and iteration < 400
            else Plan()
        )
        decision = simulator.default_decision()
        write_plan(plan, decision)
        simulator.step(decision)
    return skipped


def test_fast_forward_equals_single_iterations():
    skipped = []

    @SETTINGS
    @given(problems(), st.integers(0, 2**32))
    def prove(problem, seed):
        spec, workload = problem
        single, together = Simulator(spec), Simulator(spec)
        single.reset(workload)
        together.reset(workload)
        run_to_the_end(single, seed, forward=False)
        skipped.append(run_to_the_end(together, seed, forward=True))
        assert_same_run(single.timeline(), together.timeline())
        for name in ("requests", "engine"):
            assert getattr(single.sim.state, name).tobytes() == getattr(together.sim.state, name).tobytes()
        assert single.sim.books.tobytes() == together.sim.books.tobytes()

    prove()
    assert np.mean([s > 3 for s in skipped]) > 0.15  # it was worth proving
