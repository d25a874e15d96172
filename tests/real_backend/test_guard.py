"""A policy that raises, talks nonsense or hangs slows the real engine down, and never loses a request."""

import threading
import warnings

import numpy as np
import pytest

pytest.importorskip("transformers")

from schedlab.envs.core.errors import InputError
from schedlab.envs.request_scheduling.spec import EngineSpec
from schedlab.envs.request_scheduling.workload import Workload
from schedlab.real_backend.guard import GuardedPolicy, problem_with
from schedlab.real_backend.hf import HFEngine, build_llama


@pytest.fixture(scope="module")
def engine():
    model = build_llama(hidden=32, layers=1, heads=2, kv_heads=2, vocab=64)
    engine = HFEngine(EngineSpec(kv_blocks=32, block_tokens=8, max_batch_tokens=64, max_running=6), model)
    yield engine
    engine.close()


def small_workload(n=12):
    rng = np.random.default_rng(0)
    return Workload.from_arrays("small", np.zeros(n), rng.integers(1, 40, n), rng.integers(1, 12, n))


def serve(engine, policy):
    workload = small_workload()
    engine.reset(workload, seed=0)
    policy.reset(engine.state())
    done = False
    while not done:
        decision = engine.default_decision()
        policy.decide(engine.state(), decision)
        done = engine.step(decision).done
    return workload, engine.timeline()


def assert_all_served(engine, workload):
    for request in range(len(workload)):
        assert len(engine.generated_tokens(request)) == workload.output_tokens[request]


class Shortest:
    name, is_oracle = "shortest", False

    def reset(self, state):
        pass

    def decide(self, state, decision):
        waiting = state.waiting[: state.engine[0]["num_waiting"]]
        decision.order[: len(waiting)] = waiting[np.argsort(state.requests["prompt_tokens"][waiting], kind="stable")]
        decision.levers[0]["num_order"] = len(waiting)


class Raising(Shortest):
    def decide(self, state, decision):
        decision.levers[0]["prefill_tokens"] = 0  # must not leak out
        raise KeyError("no such feature")


def write(field, value):
    def decide(self, state, decision):
        state.requests[:] = 0  # scribbling over the snapshot must not matter either
        state.engine[:] = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NaN cast to an integer
            decision.levers[field] = np.float64(value).astype(np.int64)

    return decide


GARBAGE = {
    "nan": write("prefill_tokens", np.nan),
    "negative": write("chunk_tokens", -1),
    "zero_chunk": write("chunk_tokens", 0),
    "long_order": write("num_order", 10_000),
    "flag": write("admit_rest", 7),
}


def test_a_sound_policy_passes_through(engine):
    workload, plain = serve(engine, Shortest())
    guarded = GuardedPolicy(Shortest())
    _, timeline = serve(engine, guarded)
    np.testing.assert_array_equal(timeline.segments, plain.segments)
    assert not guarded.failures and guarded.num_decisions == len(timeline.prefill_tokens)
    assert guarded.report()["decision_wall_p99_s"] >= guarded.report()["decision_wall_p50_s"] > 0
    assert_all_served(engine, workload)


@pytest.mark.parametrize("budget_s", [None, 5.0])
def test_a_raising_policy_is_counted_and_replaced(engine, budget_s):
    guarded = GuardedPolicy(Raising(), budget_s)
    with pytest.warns(RuntimeWarning, match="KeyError") as caught:
        workload, timeline = serve(engine, guarded)
    assert len(caught) == 1
    assert guarded.failures == {"raised": len(timeline.prefill_tokens)}
    assert_all_served(engine, workload)


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_counted_and_replaced(engine, kind):
    guarded = GuardedPolicy(type("Garbage", (Shortest,), {"decide": GARBAGE[kind]})(), None)
    with pytest.warns(RuntimeWarning, match="invalid"):
        workload, timeline = serve(engine, guarded)
    assert guarded.failures == {"invalid": len(timeline.prefill_tokens)}
    assert_all_served(engine, workload)
    np.testing.assert_array_equal(timeline.segments, serve(engine, GuardedPolicy(Nothing(), None))[1].segments)


class Nothing(Shortest):
    def decide(self, state, decision):
        pass


def test_a_hanging_policy_is_given_up_for_the_run(engine):
    release = threading.Event()

    class Hanging(Shortest):
        decisions = 0

        def decide(self, state, decision):
            Hanging.decisions += 1
            if Hanging.decisions == 3:
                release.wait()
                state.requests[:] = 0
                decision.levers[:] = 0
                decision.order[:] = 99

    guarded = GuardedPolicy(Hanging(), 0.5)
    with pytest.warns(RuntimeWarning, match="rest of the run"):
        workload, timeline = serve(engine, guarded)
    assert guarded.failures == {"timeout": 1} and guarded.is_fallback and Hanging.decisions == 3
    assert len(timeline.prefill_tokens) == guarded.num_decisions > 3
    assert_all_served(engine, workload)
    serve(engine, guarded)
    assert guarded.is_fallback  # it still hangs: not asked again
    release.set()


def test_problem_with_names_bad_ids(engine):
    engine.reset(small_workload(), 0)
    state, decision = engine.state(), engine.default_decision()
    assert problem_with(state, decision) is None
    decision.levers["num_order"] = 2
    decision.order[:2] = 3
    assert "twice" in problem_with(state, decision)
    decision.order[:2] = 3, len(state.requests)
    assert "outside" in problem_with(state, decision)
    decision.levers["num_preempt"] = 1
    assert "num_preempt" in problem_with(state, decision)  # nothing runs yet
    engine.step(engine.default_decision())
    decision = engine.default_decision()
    decision.levers["num_order"], decision.order[0] = 1, state.running[0]
    assert "does not wait" in problem_with(state, decision)
    decision.levers["num_preempt"], decision.preempt[0] = 1, state.running[0]
    assert problem_with(state, decision) is None  # preempted now, so it waits


def test_a_budget_must_be_positive():
    with pytest.raises(InputError, match="time_budget_s"):
        GuardedPolicy(Shortest(), 0.0)
