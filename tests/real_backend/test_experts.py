"""The expert engine: the right logits under any policy, the cache that state.py defines, loads that read the disk."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
import torch

from schedlab.envs.core.errors import InputError
from schedlab.envs.core.interface import Backend
from schedlab.envs.expert_caching.check import check_residency
from schedlab.envs.expert_caching.sim import Simulator
from schedlab.envs.expert_caching.spec import ExpertCachingSpec
from schedlab.envs.expert_caching.state import AUTO
from schedlab.envs.expert_caching.workload import Workload, generate, load_routing, save_routing
from schedlab.real_backend.experts import ExpertEngine, OffloadedModel, open_model, record_routing, unmeasured_cost
from schedlab.real_backend.experts_guard import GuardedCachePolicy
from schedlab.real_backend.experts_model import build_olmoe, load_olmoe
from schedlab.real_backend.experts_store import device_bytes_read, file_system_of

SHAPE = {
    "hidden": 32,
    "intermediate": 48,
    "layers": 3,
    "experts": 8,
    "top_k": 2,
    "heads": 2,
    "kv_heads": 1,
    "vocab": 64,
}
PROMPTS = [[5, 9, 2, 33, 7], [1, 2, 3], [60, 61, 62, 63, 0, 17, 40]]


@pytest.fixture(scope="module")
def model():
    model = OffloadedModel(build_olmoe(**SHAPE), folder=Path(__file__).parent)
    yield model
    model.close()


@pytest.fixture(scope="module")
def workload(model):
    """The prompts, 12 greedy tokens after each, and 4 predictions a layer."""
    return record_routing(model, PROMPTS, name="three", new_tokens=12, num_predicted=4)


@pytest.fixture(scope="module")
def logits(workload):
    """(T, vocab): what transformers' own model says of the workload's tokens, all experts in memory."""
    whole, rows = build_olmoe(**SHAPE), []
    with torch.inference_mode():
        for start, end in zip(workload.sequence_offsets[:-1], workload.sequence_offsets[1:], strict=True):
            past = None
            for token in workload.token_ids[start:end]:
                output = whole(torch.tensor([[token]]), past_key_values=past, use_cache=True)
                past = output.past_key_values
                rows.append(output.logits[0, -1])
    return torch.stack(rows)


def spec_for(model, chunk_bytes=1 << 20, **changes):
    cost = unmeasured_cost(model)
    changes = {"layer_slots": (4, 3, 5)} | changes
    return ExpertCachingSpec(type(cost)(**{**vars(cost), "chunk_bytes": chunk_bytes}), **changes)


class RandomPolicy:
    """Victims, bypasses, prefetches and cancellations at random, legal or not."""

    name = "random"
    is_oracle = False

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def reset(self, state):
        pass

    def decide(self, state, decision):
        engine, rng = state.engine[0], self.rng
        decision.victims[: engine["num_missing"]] = rng.integers(AUTO, len(state.slots), engine["num_missing"])
        asked = rng.integers(len(decision.prefetch) + 1)
        decision.plan["num_prefetch"] = asked
        decision.plan["cancel_queued"] = rng.random() < 0.3
        for row in decision.prefetch[:asked]:
            ahead = rng.integers(1, engine["prefetch_depth"] + 1)
            layer = (engine["layer"] + ahead) % engine["num_layers"]
            row[:] = layer, rng.integers(engine["num_experts"]), rng.integers(AUTO, len(state.slots))


def serve(engine, policy=None):
    done = False
    if policy is not None:
        policy.reset(engine.state())
    while not done:
        decision = engine.default_decision()
        if policy is not None:
            policy.decide(engine.state(), decision)
        done = engine.step(decision).done


def in_order(engine):
    """Kept logits (T, vocab), in the order of the workload's tokens."""
    tokens = np.concatenate([step[step >= 0] for step in engine.timeline().batches])
    return torch.cat(engine.logits)[np.argsort(tokens)]


# ------------------------------------------------------------------------------------------------- the results


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"warm_start": True, "max_prefetch": 2},
        {"bypass": True, "layer_slots": (1, 0, 3)},
        {"bypass": True, "max_prefetch": 3, "prefetch_depth": 2, "layer_slots": (2, 1, 4)},
        {"pooled": True, "max_prefetch": 3, "prefetch_depth": 2, "chunk_bytes": 4096},
    ],
    ids=["demand", "prefetch", "bypass", "all", "pooled-chunks"],
)
def test_logits_are_those_of_the_whole_model_and_misses_are_reads(model, workload, logits, changes):
    spec = spec_for(model, **changes)
    engine = ExpertEngine(model, spec, keep_logits=True)
    assert isinstance(engine, Backend) and engine.clock == "wall"
    engine.reset(workload)
    serve(engine, RandomPolicy())  # compiled kernels are read from the disk as well, once
    for seed in range(2):
        engine.reset(workload)
        before = device_bytes_read()
        serve(engine, RandomPolicy(seed))
        timeline = engine.timeline()
        assert torch.equal(in_order(engine), logits)
        assert check_residency(timeline, workload, spec) == []
        state = engine.state().engine[0]
        begun = timeline.loads["cancelled"] < 0
        assert state["num_demand_loads"] > 20 and begun.sum() == state["num_demand_loads"] + state["num_prefetch_loads"]
        read = device_bytes_read() - before
        if np.isfinite(timeline.loads["ready_s"][begun]).all() and not (~begun).any():
            assert read == begun.sum() * model.expert_bytes  # every miss is a read of the disk, and nothing else is
        assert np.isfinite(timeline.loads["ready_s"]).sum() * model.expert_bytes <= read
    engine.close()


def test_a_batch_gives_what_a_whole_cache_gives(model, workload):
    kept = {}
    for share in (0.5, 1.0):
        spec = spec_for(model, layer_slots=(), cache_share=share, num_sequences=2, max_prefetch=2)
        engine = ExpertEngine(model, spec, keep_logits=True)
        engine.reset(workload)
        serve(engine, RandomPolicy() if share < 1 else None)
        assert check_residency(engine.timeline(), engine.recorded(), spec) == []
        kept[share] = in_order(engine)
        engine.close()
    assert torch.equal(kept[0.5], kept[1.0])


def test_books_are_those_of_the_simulator(model, workload):
    """Without prefetches nothing depends on time: both serve the same, load the same, and remember the same."""
    spec = spec_for(model, bypass=True, num_sequences=2)
    runs = []
    for backend in (ExpertEngine(model, spec), Simulator(spec)):
        backend.reset(workload)
        serve(backend, RandomPolicy(3))
        runs.append((backend.timeline(), [array.copy() for array in backend.state()]))
        backend.close()
    (real, real_state), (simulated, simulated_state) = runs
    for name in ("used", "ready", "hits", "batches", "initial"):
        np.testing.assert_array_equal(getattr(real, name), getattr(simulated, name), err_msg=name)
    for name in ("epoch", "layer", "expert", "slot", "kind"):
        np.testing.assert_array_equal(real.loads[name], simulated.loads[name], err_msg=name)
    of_time = {"now_s", "last_stall_s", "last_layer_s", "channel_s"}
    for one, other in zip(real_state, simulated_state, strict=True):
        for field in one.dtype.names or (None,):
            if field not in of_time:
                np.testing.assert_array_equal(one[field] if field else one, other[field] if field else other)


def test_times_add_up(model, workload):
    engine = ExpertEngine(model, spec_for(model))
    engine.reset(workload)
    seconds, done = 0.0, False
    while not done:
        outcome = engine.step(engine.default_decision())
        seconds, done = seconds + outcome.seconds, outcome.done
    timeline = engine.timeline()
    assert seconds == pytest.approx(engine.state().engine[0]["now_s"])
    assert timeline.start_s[0] == 0.0
    assert (np.diff(timeline.start_s) > 0).all() and (timeline.end_s[:-1] < timeline.start_s[1:]).all()
    assert (timeline.stall_s >= 0).all() and (timeline.stall_s <= timeline.end_s - timeline.start_s).all()
    decision_s = engine.decision_s
    assert len(decision_s) == len(timeline.start_s) and decision_s[0] == 0.0 and (decision_s[1:] > 0).all()
    assert (decision_s + timeline.stall_s <= timeline.end_s - timeline.start_s + 1e-9).all()
    assert engine.step(engine.default_decision()).done
    engine.close()


def test_a_pause_is_no_part_of_the_run(model, workload):
    """Of two engines that take turns each does what it does alone, and its seconds are its own."""
    spec, policies = spec_for(model, max_prefetch=2, chunk_bytes=4096), [RandomPolicy(0), RandomPolicy(1)]
    engines = [ExpertEngine(model, spec, keep_logits=True) for _ in policies]
    begun_s = time.perf_counter()
    for engine in engines:
        engine.reset(workload)
    seconds, done = [0.0, 0.0], [False, False]
    while not all(done):
        for i, engine in enumerate(engines):
            engine.resume()
            decision = engine.default_decision()
            policies[i].decide(engine.state(), decision)
            outcome = engine.step(decision)
            seconds[i], done[i] = seconds[i] + outcome.seconds, outcome.done
            time.sleep(5e-4)  # so that loads end between a gate and a pause
            engine.pause()
            held = engine._channel.progress(list(engine._in_flight.values()))[1]
            time.sleep(1e-3)
            assert engine._channel.progress(list(engine._in_flight.values()))[1] == held
    assert sum(seconds) < time.perf_counter() - begun_s
    for engine, own_s in zip(engines, seconds, strict=True):
        timeline = engine.timeline()
        assert own_s == pytest.approx(engine.state().engine[0]["now_s"])
        assert (np.diff(timeline.start_s) > 0).all() and timeline.stall_s.sum() < own_s
        assert check_residency(timeline, workload, spec) == []
    assert torch.equal(in_order(engines[0]), in_order(engines[1]))
    for engine in engines:
        engine.close()


def test_greedy_tokens_are_those_of_the_whole_model(workload, logits):
    for start, end, prompt in zip(workload.sequence_offsets[:-1], workload.sequence_offsets[1:], PROMPTS, strict=True):
        assert workload.token_ids[start : start + len(prompt)].tolist() == prompt
        greedy = logits[start + len(prompt) - 1 : end - 1].argmax(-1)
        assert workload.token_ids[start + len(prompt) : end].tolist() == greedy.tolist()


def test_recorded_routing_is_a_workload_like_any_other(model, workload, tmp_path):
    assert workload.predicted.shape == (*workload.experts.shape[:2], 4)
    assert (workload.predicted[:, 0] == -1).all() and (workload.predicted[:, 1:] >= 0).all()
    save_routing(tmp_path / "routing.npz", workload)
    again = load_routing(tmp_path / "routing.npz")
    engine = ExpertEngine(model, spec_for(model))
    engine.reset(again)
    serve(engine)
    np.testing.assert_array_equal(engine.recorded().experts, workload.experts)
    np.testing.assert_array_equal(engine.recorded().token_ids, workload.token_ids)
    engine.close()


def test_a_trace_of_another_model_can_be_followed(model):
    other = generate(3, num_layers=3, num_experts=8, top_k=2, mean_length=8, prediction_noise=None, seed=1)
    other = Workload.from_arrays("untold", other.experts, other.lengths, num_experts=8)
    spec = spec_for(model, max_prefetch=2)
    engine = ExpertEngine(model, spec, routing="trace")
    engine.reset(other, seed=4)
    serve(engine, RandomPolicy())
    assert check_residency(engine.timeline(), other, spec) == []
    assert (engine.next_tokens >= 0).all()
    np.testing.assert_array_equal(engine.recorded().experts, other.experts)
    engine.close()


def test_an_opened_model_fits_its_workload(workload, tmp_path):
    build_olmoe(**SHAPE).save_pretrained(tmp_path)
    model, routing = open_model(workload, tmp_path, folder=tmp_path)
    assert routing == "gate" and model.expert_bytes == 20480
    model.close()
    other = generate(2, num_layers=2, num_experts=3, top_k=2, mean_length=5, prediction_noise=None)
    other = Workload.from_arrays("untold", other.experts, other.lengths, num_experts=3)
    model, routing = open_model(other, folder=tmp_path)
    assert routing == "trace" and model.expert_bytes == 3 << 20
    engine = ExpertEngine(model, spec_for(model, layer_slots=(2, 3)), routing=routing)
    engine.reset(other)
    serve(engine)
    np.testing.assert_array_equal(engine.recorded().experts, other.experts)
    engine.close()
    model.close()


def test_a_checkpoint_routes_like_the_model_it_was_saved_from(workload, tmp_path):
    build_olmoe(**SHAPE).save_pretrained(tmp_path)
    loaded = OffloadedModel(load_olmoe(tmp_path), folder=tmp_path)
    again = record_routing(loaded, PROMPTS, name="three", new_tokens=12, num_predicted=4)
    np.testing.assert_array_equal(again.experts, workload.experts)
    np.testing.assert_array_equal(again.predicted_probability, workload.predicted_probability)
    loaded.close()


# ------------------------------------------------------------------------------------------------- bad policies


class Broken(RandomPolicy):
    name = "broken"

    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def decide(self, state, decision):
        if self.fault == "raises":
            raise ZeroDivisionError("no")
        if self.fault == "scribbles":
            state.experts["status"][:] = 1
            state.slots["expert"][:] = -1
        decision.victims[:] = 99
        decision.plan["num_prefetch"] = 1000


@pytest.mark.parametrize("fault", ["raises", "illegal", "scribbles"])
def test_a_broken_policy_is_replaced_by_lru(model, workload, fault):
    spec = spec_for(model, max_prefetch=2)
    timelines = []
    for policy in (GuardedCachePolicy(Broken(fault), on_failure=lambda *_: None), None):
        engine = ExpertEngine(model, spec)
        engine.reset(workload)
        serve(engine, policy)
        timelines.append(engine.timeline())
        assert engine.state().engine[0]["num_illegal"] == 0
        engine.close()
        if policy is not None:
            assert policy.failures["raised" if fault == "raises" else "invalid"] == policy.num_decisions > 0
    np.testing.assert_array_equal(timelines[0].loads[["epoch", "slot"]], timelines[1].loads[["epoch", "slot"]])


def test_a_policy_that_hangs_is_left_behind(model, workload):
    """The run goes on with LRU and ends as it would have without the policy, which still hangs in its own thread."""

    class Hanging(RandomPolicy):
        name = "hanging"

        def decide(self, state, decision):
            if state.engine[0]["epoch"] == 5:
                release.wait(30)

    release, told, timelines = threading.Event(), [], []
    guard = GuardedCachePolicy(Hanging(), 0.2, on_failure=lambda kind, message: told.append((kind, message)))
    for policy in (guard, None):
        engine = ExpertEngine(model, spec_for(model, max_prefetch=2))
        engine.reset(workload)
        serve(engine, policy)
        timelines.append(engine.timeline())
        engine.close()
    release.set()
    assert told == [("timeout", "no answer within 0.2 s; the default decides for the rest of the run")]
    assert guard.is_fallback and guard.failures["timeout"] == 1 and len(guard.decision_cpu_s) == 5
    np.testing.assert_array_equal(timelines[0].loads[["epoch", "slot"]], timelines[1].loads[["epoch", "slot"]])


def test_a_sound_policy_passes_the_guard_and_a_failure_is_told_once(model, workload):
    spec = spec_for(model, max_prefetch=2, bypass=True)
    with pytest.warns(
        RuntimeWarning, match=r"'broken' failed \(raised: ZeroDivisionError: no\): LRU on demand"
    ) as told:
        engine = ExpertEngine(model, spec)
        engine.reset(workload)
        serve(engine, GuardedCachePolicy(Broken("raises")))
    assert len(told) == 1

    class Sound(RandomPolicy):
        def decide(self, state, decision):
            experts = state.experts[state.engine[0]["layer"]]  # what it noted of a layer is there at the next visit
            self.seen = self.seen * 31 + int((experts["keep"] * 1000).sum())
            experts["keep"] = experts["needed"] * 0.5 + self.seen % 7
            resident = np.flatnonzero(state.experts["status"][state.engine[0]["layer"]] == 1)
            self.seen = (self.seen * 31 + int(resident.sum())) % (1 << 40)
            needed = state.experts["needed"][state.engine[0]["layer"]]
            victims = [s for s in state.experts["slot"][state.engine[0]["layer"], resident] if s >= 0]
            free = [s for s, e in zip(victims, resident, strict=True) if not needed[e]]
            if state.engine[0]["num_missing"] and free:
                decision.victims[0] = free[-1]

    seen = []
    for guard in (False, True):
        policy = Sound()
        policy.seen = 1
        engine.reset(workload)
        serve(engine, GuardedCachePolicy(policy) if guard else policy)
        seen.append((policy.seen, engine.timeline().loads["slot"].tolist()))
    assert seen[0] == seen[1]  # it saw the same states, through the copies, and its decisions were executed
    engine.close()


# --------------------------------------------------------------------------------------------------- bad input


def test_a_folder_in_memory_is_refused():
    memory = Path("/dev/shm")
    if not memory.is_dir() or file_system_of(memory) != "tmpfs":
        pytest.skip("this system has no tmpfs at /dev/shm")
    with pytest.raises(InputError, match=r"/dev/shm: is on a tmpfs, in memory.*folder='\.'"):
        OffloadedModel(build_olmoe(**SHAPE), folder=memory)
    assert not list(memory.glob("experts-*"))


def test_the_file_of_experts_has_no_name(tmp_path):
    model = OffloadedModel(build_olmoe(**SHAPE), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    model.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_slots": (4, 1, 5)}, "cache of 1 slots is smaller than the 2 experts"),
        ({"memory_bytes": 1e5}, "slots of .* bytes exceed memory_bytes"),
        ({"host_share": 0.5}, "host_share is 0.5: only the simulator"),
        ({"known_steps": 2}, "known_steps is 2"),
        ({"eviction_only": True}, "eviction_only is True"),
        ({"chunk_bytes": 1000}, "chunk_bytes is 1000, not a multiple of 4096"),
    ],
)
def test_impossible_specs_are_refused(model, changes, message):
    with pytest.raises(InputError, match=message):
        ExpertEngine(model, spec_for(model, **changes))


def test_what_does_not_fit_the_model_is_refused(model, workload, tmp_path):
    with pytest.raises(InputError, match=r"experts of 17301504 bytes, the model's have 20480.*Calibrate"):
        ExpertEngine(model, ExpertCachingSpec())
    with pytest.raises(InputError, match="routing is 'both'"):
        ExpertEngine(model, spec_for(model), routing="both")
    with pytest.raises(InputError, match=r"take 20480\.00 GB"):
        model.store.open_slots(1_000_000_000, 4096)
    with pytest.raises(InputError, match="no such folder"):
        OffloadedModel(build_olmoe(**SHAPE), folder=tmp_path / "absent")
    with pytest.raises(InputError, match="is not available"):
        OffloadedModel(build_olmoe(**SHAPE), device="meta")
    engine = ExpertEngine(model, spec_for(model))
    with pytest.raises(RuntimeError, match="call reset"):
        engine.state()
    with pytest.raises(InputError, match=r"\(4, 32, 4\), the model has \(3, 8, 2\)"):
        engine.reset(generate(2))
    foreign = Workload.from_arrays("x", workload.experts, workload.lengths, num_experts=8)
    with pytest.raises(InputError, match=r"token_ids\[0\] of workload 'x' is -1"):
        engine.reset(foreign)
    foreign = Workload.from_arrays("x", workload.experts, workload.lengths, token_ids=workload.token_ids + 40)
    with pytest.raises(InputError, match=r"the model's tokens are 0\.\.63"):
        engine.reset(foreign)
    long = np.broadcast_to(workload.experts[:1], (2049, 3, 2))
    with pytest.raises(InputError, match="a sequence of 2049 tokens, the model reads 2048"):
        engine.reset(Workload.from_arrays("x", long, [2049], num_experts=8))
    with pytest.raises(InputError, match="serves token 1 of sequence 0 out of turn"):
        engine.reset(workload, batches=np.array([[1]]))
    engine.close()


def test_a_read_that_fails_is_told(workload, tmp_path):
    model = OffloadedModel(build_olmoe(**SHAPE), folder=tmp_path)
    engine = ExpertEngine(model, spec_for(model))
    engine.reset(workload)
    empty = os.open(tmp_path, os.O_RDONLY)
    os.dup2(empty, model.store._file)  # the file goes away under the running engine
    with pytest.raises(RuntimeError, match="could not be read"):
        serve(engine)
    engine.close()
    model.close()
    os.close(empty)


# -------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_sequences", [1, 2])
def test_cuda_gives_the_same_whatever_the_cache(workload, num_sequences):
    model = OffloadedModel(build_olmoe(**SHAPE), device="cuda")
    kept = {}
    for share in (0.5, 1.0):
        spec = spec_for(
            model, layer_slots=(), cache_share=share, num_sequences=num_sequences, max_prefetch=2, chunk_bytes=4096
        )
        engine = ExpertEngine(model, spec, keep_logits=True)
        engine.reset(workload)
        serve(engine, RandomPolicy() if share < 1 else None)
        assert check_residency(engine.timeline(), engine.recorded(), spec) == []
        kept[share] = in_order(engine)
        engine.close()
    assert torch.equal(kept[0.5], kept[1.0])
    model.close()
