"""The Hugging Face engine: right tokens under any schedule, the schedule that state.py defines, honest books."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("transformers")

from schedlab.envs.core.errors import InputError
from schedlab.envs.core.interface import Backend
from schedlab.envs.request_scheduling.sim import Simulator
from schedlab.envs.request_scheduling.spec import TWO_CLASSES, EngineSpec, RequestSchedulingSpec, SloClass
from schedlab.envs.request_scheduling.state import FINISHED, NO_LIMIT, REFUSED, RUNNING, WAITING
from schedlab.envs.request_scheduling.workload import Workload
from schedlab.real_backend import hf_internals
from schedlab.real_backend.hf import HFEngine, build_llama, prompt_token_ids

BLOCK = 8
VOCAB = 64


@pytest.fixture(scope="module")
def model():
    return build_llama(hidden=32, layers=2, heads=2, kv_heads=1, vocab=VOCAB, max_positions=256)


def make_engine(model, prefix_cache=False, kv_blocks=24, **kwargs):
    spec = EngineSpec(
        kv_blocks=kv_blocks, block_tokens=BLOCK, max_batch_tokens=64, max_running=8, prefix_cache=prefix_cache
    )
    return HFEngine(spec, model, **kwargs)


def burst(prompts, outputs, prefixes=None, **kwargs):
    """Requests at time zero. `prefixes[i]` are the hash ids of request i's first blocks."""
    n = len(prompts)
    if prefixes is not None:
        kwargs |= {
            "hash_offsets": np.cumsum([0] + [len(p) for p in prefixes]),
            "hash_ids": np.array([h for p in prefixes for h in p], np.int64),
            "hash_block_tokens": BLOCK,
        }
    return Workload.from_arrays("burst", np.zeros(n), prompts, outputs, predicted_output_tokens=np.ones(n), **kwargs)


def random_workload(rng, with_prefixes, n=16):
    prompts, outputs = rng.integers(1, 70, n), rng.integers(1, 25, n)
    if not with_prefixes:
        return burst(prompts, outputs)
    ids: dict[tuple[int, int], int] = {}
    prefixes = []
    for prompt in prompts:
        document = int(rng.integers(3))
        depth = min(int(prompt) // BLOCK, int(rng.integers(8)))
        prefixes.append([ids.setdefault((document, block), len(ids)) for block in range(depth)])
    return burst(prompts, outputs, prefixes)


def decide_at_random(state, decision, rng):
    engine, levers = state.engine[0], decision.levers[0]
    levers["prefill_tokens"] = rng.choice([0, 1, 5, 16, 40, 64, 1000])
    levers["chunk_tokens"] = rng.choice([1, 7, 16, NO_LIMIT])
    levers["max_running"] = rng.choice([1, 3, 8, 8, 8])
    levers["kv_reserve_blocks"] = rng.choice([0, 0, 3])
    levers["whole_prompts"], levers["admit_rest"] = rng.integers(2), rng.integers(2)
    waiting, running = state.waiting[: engine["num_waiting"]], state.running[: engine["num_running"]]
    levers["num_order"] = rng.integers(len(waiting) + 1)
    decision.order[: levers["num_order"]] = rng.permutation(waiting)[: levers["num_order"]]
    if rng.random() < 0.15:
        levers["num_preempt"] = rng.integers(len(running) + 1)
        decision.preempt[: levers["num_preempt"]] = rng.permutation(running)[: levers["num_preempt"]]


def greedy_tokens(model, workload, request, seed):
    import torch

    ids = torch.tensor(prompt_token_ids(workload, request, seed, VOCAB))[None]
    count = int(workload.output_tokens[request])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return output[0, ids.shape[1] :].tolist()


def assert_books_balance(engine):
    """Every block is unused, cached or referenced, and the State says so."""
    state, hf = engine.state(), engine._hf
    free = int(state.engine[0]["kv_blocks_free"])
    referenced = {block for table in hf.allocator.block_table.values() for block in table}
    assert free == hf.free_blocks == engine.capacity.kv_blocks - len(referenced)
    assert set(hf.ledger.cached_blocks).isdisjoint(referenced)
    running = state.running[: state.engine[0]["num_running"]]
    assert (state.requests["status"][running] == RUNNING).all()
    assert len(hf.scheduler.active_requests) == len(running)
    assert len(hf.scheduler.waiting_requests) == state.engine[0]["num_waiting"]
    for request in running.tolist():
        assert len(hf.allocator.block_table[str(request)]) == state.requests["kv_blocks"][request]


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_canary_tokens_equal_generate_under_random_schedules(model, prefix_cache):
    engine = make_engine(model, prefix_cache)
    preemptions = hit_tokens = 0
    for seed in range(2):
        workload = random_workload(np.random.default_rng(seed), prefix_cache)
        engine.reset(workload, seed)
        rng, done = np.random.default_rng(100 + seed), False
        while not done:
            decision = engine.default_decision()
            decide_at_random(engine.state(), decision, rng)
            done = engine.step(decision).done
            assert_books_balance(engine)
        assert engine.state().engine[0]["kv_blocks_free"] == engine.capacity.kv_blocks
        preemptions += engine.state().engine[0]["num_preemptions"]
        hit_tokens += engine.state().requests["cached_tokens"].sum()
        for request in range(len(workload)):
            assert engine.generated_tokens(request) == greedy_tokens(model, workload, request, seed)
    assert preemptions > 20 and (hit_tokens > 100) == prefix_cache
    engine.close()


@pytest.mark.parametrize(
    "prefix_cache",
    [
        False,
        True,
    ],
)
def test_simulator_makes_the_same_schedule(model, prefix_cache):
    engine = make_engine(model, prefix_cache)
    simulator = Simulator(RequestSchedulingSpec(engine=engine.capacity, prefill_choices=(0,)))
    assert isinstance(engine, Backend) and isinstance(simulator, Backend)
    for seed in range(3):
        workload = random_workload(np.random.default_rng(seed), prefix_cache)
        engine.reset(workload, seed)
        simulator.reset(workload)
        rng, done = np.random.default_rng(200 + seed), False
        while not done:
            assert_same_state(engine.state(), simulator.state())
            ours, theirs = engine.default_decision(), simulator.default_decision()
            decide_at_random(engine.state(), ours, rng)
            for mine, other in zip(ours, theirs, strict=True):
                other[:] = mine
            done = engine.step(ours).done
            assert simulator.step(theirs).done == done
        mine, other = engine.timeline(), simulator.timeline()
        for name in ("prefill_tokens", "decode_requests", "kv_blocks_used", "segments", "preemptions", "refused"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(other, name), err_msg=name)
    engine.close()


def assert_same_state(mine, other):
    """Everything but times."""
    for name in mine.engine.dtype.names:
        if not name.endswith("_s"):
            assert mine.engine[0][name] == other.engine[0][name], name
    for name in mine.requests.dtype.names:
        if name not in ("first_token_s", "last_token_s", "pad"):
            np.testing.assert_array_equal(mine.requests[name], other.requests[name], err_msg=name)
    for name, count in (("waiting", "num_waiting"), ("running", "num_running")):
        live = mine.engine[0][count]
        np.testing.assert_array_equal(getattr(mine, name)[:live], getattr(other, name)[:live], err_msg=name)


def step(engine, **levers):
    decision = engine.default_decision()
    for name, value in levers.items():
        decision.levers[name] = value
    return engine.step(decision)


def test_miniature_chunked_prefill_and_decode(model):
    engine = make_engine(model, slo_classes=TWO_CLASSES)
    engine.reset(burst([10, 3], [2, 1], slo_class=[0, 1]))
    state = engine.state()
    row, head = state.requests, state.engine[0]
    assert list(row["status"]) == [WAITING, WAITING] and head["num_waiting"] == 2
    np.testing.assert_array_equal(row["ttft_slo_s"], [1.0, 10.0])
    assert np.isnan(row["first_token_s"]).all() and list(row["admission"]) == [-1, -1]

    outcome = step(engine, prefill_tokens=8)  # 8 of the 10 tokens of request 0, nothing left for request 1
    assert outcome.info["features"] == (1.0, 8, 0, 0, 8 * 8, 8 * 8, 1)
    assert list(row["computed_tokens"]) == [8, 0] and list(row["kv_blocks"]) == [2, 0]
    assert head["kv_blocks_free"] == 22 and head["num_decoding"] == 0 and row["admission"][0] == 0

    outcome = step(engine, prefill_tokens=8)  # the other 2 and all 3 of request 1, which ends with its first token
    assert outcome.info["features"] == (1.0, 5, 0, 0, 2 * 10 + 3 * 3, 5 * 13, 1)
    assert list(row["status"]) == [RUNNING, FINISHED] and list(row["generated_tokens"]) == [1, 1]
    assert head["kv_blocks_free"] == 22 and head["num_decoding"] == 1 and head["num_finished"] == 1
    assert row["first_token_s"][0] == row["last_token_s"][1] == head["now_s"]

    outcome = step(engine)
    assert outcome.info["features"] == (1.0, 0, 1, 11, 0, 11, 0) and outcome.done
    assert head["kv_blocks_free"] == 24 and row["last_token_s"][0] > row["first_token_s"][0]
    assert head["ema_iteration_s"] > 0 and engine.features().shape == (3, 7)
    timeline = engine.timeline()
    assert timeline.segments.tolist() == [[1, 1, 1], [0, 1, 2]]
    assert timeline.kv_blocks_used.tolist() == [2, 3, 2]
    np.testing.assert_allclose(timeline.iteration_end_s[-1], head["now_s"])
    assert engine.step(engine.default_decision()).seconds == 0
    engine.close()


def test_miniature_prefix_cache(model):
    engine = make_engine(model, prefix_cache=True, kv_blocks=12)
    # 0 and 1: the same two blocks, admitted together. 2: a third block behind them. 3: fills the pool.
    engine.reset(burst([20, 20, 30, 90], [3, 3, 1, 2], [[0, 1], [0, 1], [0, 1, 2], []]))
    state = engine.state()
    row, head, cached = state.requests, state.engine[0], engine._hf.ledger.cached_blocks
    assert head["prefix_cache"] == 1

    step(engine, max_running=2)  # both compute their prompt; the second then adopts the first's two blocks
    assert list(row["kv_blocks"]) == [3, 3, 0, 0] and head["kv_blocks_free"] == 12 - (2 + 1 + 1)
    assert list(row["cached_tokens"]) == [0, 0, 16, 0] and len(cached) == 0

    step(engine, max_running=3)  # request 2 takes 2 shared and 2 new blocks, computes 14 tokens, ends
    assert row["status"][2] == FINISHED and row["cached_tokens"][2] == 16
    assert engine.features()[-1][1] == 14
    assert len(cached) == 1 and head["kv_blocks_free"] == 12 - 4  # its third block stays, unreferenced

    step(engine, max_running=3)  # requests 0 and 1 end, the shared blocks stay: 2 before 1 before 0
    assert head["kv_blocks_free"] == 12 and len(cached) == 3 and engine._hf.unused_blocks == 9
    by_hash = engine._hf.ledger.hash_to_block
    chain = [by_hash[h] for h in engine._hashes_by_id[0] + engine._hashes_by_id[1] + engine._hashes_by_id[2]]
    assert list(cached) == chain[::-1]

    step(engine)  # request 3 needs 12 blocks: all three are evicted
    assert head["kv_blocks_free"] == 0 and len(cached) == 0 and not by_hash
    engine.close()


def test_prefix_blocks_are_evicted_one_by_one_from_the_tail(model):
    engine = make_engine(model, prefix_cache=True, kv_blocks=6)
    engine.reset(burst([26, 30, 26], [1, 1, 1], [[0, 1, 2], [], [0, 1, 2]]))
    row = engine.state().requests
    step(engine, max_running=1)
    assert row["cached_tokens"][2] == 24  # 3 cached, 3 unused
    step(engine, max_running=1)  # 30 tokens take 4 blocks: one is evicted, the last of the chain
    assert row["cached_tokens"][2] == 16
    engine.close()


def test_a_hit_leaves_a_token_to_compute(model):
    engine = make_engine(model, prefix_cache=True)
    engine.reset(burst([16, 16], [1, 1], [[0, 1], [0, 1]]))
    step(engine, max_running=1)
    assert engine.state().requests["cached_tokens"][1] == 8
    step(engine)
    assert engine.features()[-1][1] == 8
    assert engine.generated_tokens(0) == engine.generated_tokens(1)
    engine.close()


def test_requests_that_cannot_fit_are_refused_and_the_others_go_on(model):
    engine = make_engine(model, kv_blocks=40)  # 320 tokens, the model has 256 positions
    engine.reset(burst([5, 400, 200, 250, 7], [2, 1, 57, 7, 1]))
    assert engine.state().requests["status"].tolist() == [WAITING, REFUSED, WAITING, WAITING, WAITING]
    while not step(engine).done:
        pass
    assert engine.state().requests["status"].tolist() == [FINISHED, REFUSED, FINISHED, FINISHED, FINISHED]
    assert engine.timeline().refused.tolist() == [False, True, False, False, False]
    engine.reset(burst([5, 250], [2, 8]))  # one position too many
    assert engine.state().requests["status"].tolist() == [WAITING, REFUSED]
    engine.close()


def test_time_jumps_to_the_next_arrival(model):
    engine = make_engine(model)
    workload = Workload.from_arrays("gaps", [0.0, 100.0, 300.0], [4, 4, 4], [1, 2, 1])
    engine.reset(workload)
    head = engine.state().engine[0]
    assert step(engine).seconds < 100 and head["now_s"] == 100.0 and head["num_waiting"] == 1
    assert engine.state().requests["status"].tolist() == [FINISHED, WAITING, 0]
    assert head["ema_arrival_gap_s"] == 100.0
    step(engine)
    assert not step(engine).done and head["now_s"] == 300.0
    assert head["ema_arrival_gap_s"] == pytest.approx(0.98 * 100 + 0.02 * 200)
    assert step(engine).done and head["num_arrived"] == head["num_finished"] == 3
    starts = engine.timeline().iteration_start_s
    assert starts[0] == 0 and starts[1] == 100.0 and starts[3] == 300.0
    engine.close()


def test_equal_hash_ids_are_equal_tokens():
    workload = burst([20, 20, 9], [1, 1, 1], [[0, 1], [0, 2], [0]])
    a, b, c = (prompt_token_ids(workload, request, 3, VOCAB) for request in range(3))
    assert (a[:8] == b[:8]).all() and (a[:8] == c[:8]).all()
    assert (a[8:16] != b[8:16]).any() and (a[16:] != b[16:]).any()
    assert a.min() >= 0 and a.max() < VOCAB
    np.testing.assert_array_equal(a, prompt_token_ids(workload, 0, 3, VOCAB))
    assert (a != prompt_token_ids(workload, 0, 4, VOCAB)).any()


def test_bad_input_is_named(model, monkeypatch, tmp_path):
    spec = EngineSpec(kv_blocks=8, block_tokens=BLOCK, max_batch_tokens=16, max_running=2, prefix_cache=True)
    with pytest.raises(InputError, match="clock 'device'"):
        HFEngine(spec, model, clock="device")
    with pytest.raises(InputError, match="at least 4 tokens"):
        HFEngine(EngineSpec(kv_blocks=8, block_tokens=2, max_batch_tokens=16, max_running=2), model)
    with pytest.raises(InputError, match="cannot load"):
        HFEngine(spec, tmp_path)
    huge = EngineSpec(kv_blocks=10**9, block_tokens=BLOCK, max_batch_tokens=16, max_running=2)
    with pytest.raises(InputError, match="do not fit into memory"):
        HFEngine(huge, model)
    engine = HFEngine(spec, model, slo_classes=(SloClass(),))
    with pytest.raises(RuntimeError, match="reset"):
        engine.state()
    with pytest.raises(InputError, match="SLO classes"):
        engine.reset(burst([4], [1], slo_class=[1]))
    with pytest.raises(InputError, match="hashes blocks of 12"):
        engine.reset(
            Workload.from_arrays("odd", [0], [12], [1], hash_offsets=[0, 1], hash_ids=[0], hash_block_tokens=12)
        )
    engine.close()
    import transformers

    monkeypatch.setattr(transformers, "__version__", "5.20.1")
    with pytest.raises(InputError, match=r"5\.20\.1 is installed.*pip install"):
        hf_internals.check_transformers()
    monkeypatch.undo()
    monkeypatch.setitem(hf_internals._REQUIRED, "scheduler.Scheduler", ("gone",))
    with pytest.raises(InputError, match="lacks"):
        hf_internals.check_transformers()


def test_checkpoint_folder_is_served(model, tmp_path):
    model.save_pretrained(tmp_path)
    engine = make_engine(str(tmp_path))
    workload = burst([9, 4], [5, 3])
    engine.reset(workload, 1)
    while not step(engine).done:
        pass
    assert [engine.generated_tokens(i) for i in range(2)] == [greedy_tokens(model, workload, i, 1) for i in range(2)]
    engine.close()


def test_import_is_light():
    code = (
        "import sys, schedlab.real_backend.hf, schedlab.real_backend.guard, schedlab.real_backend.calibrate;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
