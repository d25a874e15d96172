"""Calibration of the expert engine recovers a known cost, and writes a file that the simulator reads."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

from schedlab.envs.core.errors import InputError
from schedlab.envs.expert_caching.sim import Simulator
from schedlab.envs.expert_caching.spec import CostModel, ExpertCachingSpec
from schedlab.envs.expert_caching.workload import generate
from schedlab.real_backend.calibrate_experts import (
    ExpertCalibration,
    epochs_of,
    errors_of,
    fit_line,
    fit_times,
    half_of,
    joined,
    serve,
    with_decisions,
    write_cost,
)
from schedlab.real_backend.experts import OffloadedModel, record_routing
from schedlab.real_backend.experts_model import build_olmoe

COST = CostModel(
    "known",
    attention_s=5e-4,
    attention_token_s=2e-4,
    expert_s=6e-5,
    expert_token_s=2e-5,
    step_s=3e-4,
    expert_bytes=1 << 20,
    chunk_bytes=1 << 18,
    chunk_latency_s=2e-5,
    bandwidth=1e9,
)
COMPUTATIONS = {rows: [COST.expert_s + COST.expert_token_s * rows] * 3 for rows in (1, 2, 4)}


@pytest.fixture(scope="module")
def model():
    model = OffloadedModel(
        build_olmoe(hidden=32, intermediate=64, layers=2, experts=8, top_k=2, heads=2, kv_heads=1, vocab=64),
        folder=Path(__file__).parent,
    )
    yield model
    model.close()


def simulated_epochs():
    work = generate(24, num_layers=3, num_experts=8, top_k=2, mean_length=40, seed=2)
    runs = []
    for batch in (1, 3):
        for share in (0.75, 1.0):
            simulator = Simulator(ExpertCachingSpec(COST, cache_share=share, num_sequences=batch))
            simulator.reset(work)
            serve(simulator)
            runs.append(epochs_of(simulator.timeline(), work.top_k))
    return joined(runs)


def test_fit_recovers_the_cost_of_simulated_runs():
    epochs = simulated_epochs()
    assert (epochs.misses > 1).any() and (epochs.next_tokens == 3).any()
    reads = {size: [COST.chunk_latency_s + size / COST.bandwidth] * 3 for size in (1 << 16, 1 << 17, 1 << 18)}
    base = replace(COST, attention_s=1.0, expert_s=1.0, bandwidth=1.0, chunk_latency_s=1.0)
    fitted = fit_times(epochs, base, COMPUTATIONS, reads)
    for name in ("attention_s", "attention_token_s", "step_s", "expert_s", "expert_token_s", "bandwidth"):
        assert getattr(fitted, name) == pytest.approx(getattr(COST, name), rel=1e-4), name
    # in a batch experts differ in their uses; the fit takes each for the mean of its layer
    assert fitted.load_s == pytest.approx(COST.load_s, rel=0.01)
    assert fitted.chunk_latency_s == pytest.approx(COST.chunk_latency_s, rel=0.1)
    for figures in errors_of(fitted, epochs).values():
        assert abs(figures["mean"]) < 1e-4 and figures["median"] < 0.02


def test_loads_faster_than_the_reads_say_raise_the_bandwidth():
    """A bandwidth that alone takes longer than the stalls allow cannot be: no negative latency makes up for it."""
    slow = {size: [size / 1e8] for size in (1 << 16, 1 << 18)}
    fitted = fit_times(simulated_epochs(), COST, COMPUTATIONS, slow)
    assert fitted.chunk_latency_s == pytest.approx(0.0, abs=1e-9)
    assert fitted.load_s == pytest.approx(COST.load_s, rel=0.01)


def test_line_through_medians_is_never_negative():
    assert fit_line({1: [3.0, 99.0, 3.0], 2: [5.0], 4: [9.0, 9.0]}) == pytest.approx((1.0, 2.0))
    assert fit_line({1: [4.0], 2: [2.0]})[1] == 0.0
    assert fit_line({1: [1.0], 2: [9.0]})[0] == 0.0


def test_a_decision_delays_the_layers_that_wait_for_no_longer_load():
    work, seconds = generate(3, num_layers=3, num_experts=8, top_k=2, mean_length=10, seed=2), []
    for decision_s in (0.0, 3e-4, 3e-4 + COST.load_s):
        simulator = Simulator(ExpertCachingSpec(with_decisions(COST, decision_s), cache_share=0.5))
        simulator.reset(work)
        seconds.append(serve(simulator))
    misses = simulator.timeline().used - simulator.timeline().ready
    assert set(misses) == {0, 1, 2}
    assert seconds[1] - seconds[0] == pytest.approx((misses == 0).sum() * 3e-4)
    # a single load is over by then, and what is at hand comes after it; of two loads the second is still waited for
    expert_s = COST.expert_s + COST.expert_token_s
    late_s = (misses == 0).sum() * (3e-4 + COST.load_s) + (misses == 1).sum() * (3e-4 + expert_s)
    assert seconds[2] - seconds[0] == pytest.approx(late_s)


def test_calibration_in_passes_writes_what_the_simulator_reads(model, tmp_path):
    rng = np.random.default_rng(0)
    work = record_routing(model, rng.integers(0, 64, (6, 70)).tolist(), name="noise")
    calibration = ExpertCalibration(model, work, tokens=400, num_sequences=(1, 2), chunk_bytes=4096)
    with pytest.raises(InputError, match="nothing was measured"):
        calibration.fit()
    assert calibration.num_runs == 3  # a quarter of 8 experts holds one token's two, not those of two sequences
    for _ in range(2):
        assert sum(1 for _ in calibration.measure_runs()) == 3
    for one, other in calibration.repeats:
        np.testing.assert_array_equal(one.misses, other.misses)  # what is averaged is the same epochs
        assert (one.compute_s > 0).mean() > 0.9 and not np.array_equal(one.stall_s, other.stall_s)
    cost, report = calibration.fit()
    assert cost.expert_bytes == model.expert_bytes and cost.chunks == 6 and cost.load_s > 0
    assert cost.attention_s + cost.attention_token_s + cost.expert_s + cost.expert_token_s > 0
    assert set(report["held_out"]) == set(report["fit"]) == {"layer", "stall", "time"}
    (alone, of_one), parts = calibration.fit(runs=[1]), report["fit"]
    assert of_one["runs"] == report["runs"][1:2] and of_one["repeats"] == 2 and alone.load_s != cost.load_s
    assert parts["time"]["seconds"] == pytest.approx(parts["layer"]["seconds"] + parts["stall"]["seconds"])
    assert report["repeats"] == 2 and report["machine"]["device_name"] in cost.source
    path = tmp_path / "new" / "experts.json"
    write_cost(path, cost, report)
    assert CostModel.load(path) == cost
    assert json.loads(path.read_text())["report"] == json.loads(json.dumps(report))
    assert [p.name for p in path.parent.iterdir()] == ["experts.json"]
    with pytest.raises(TypeError):
        write_cost(path, cost, {"not json": object()})
    assert CostModel.load(path) == cost and [p.name for p in path.parent.iterdir()] == ["experts.json"]


def test_a_run_in_turns_is_a_repeat_of_one_in_a_piece(model):
    """Slices with pauses between them, as in `fidelity experts`: the same epochs, and the pauses are not counted."""
    rng = np.random.default_rng(1)
    work = record_routing(model, rng.integers(0, 64, (4, 70)).tolist(), name="noise")
    calibration = ExpertCalibration(model, work, tokens=250, cache_shares=(0.5,), chunk_bytes=4096)
    calibration.measure_pass()
    engine, done, paused_s, start_s = calibration.open_run(0), False, 0.0, time.perf_counter()
    while not done:
        engine.resume()
        for _ in range(100):
            if not done:
                done = engine.step(engine.default_decision()).done
        engine.pause()
        time.sleep(0.05)
        paused_s += 0.05
    calibration.book_run(0, engine)
    engine.close()
    one, other = calibration.repeats[0]
    np.testing.assert_array_equal(one.misses, other.misses)
    measured_s = other.layer_s.sum() + other.decision_s.sum() + other.stall_s.sum()
    assert paused_s > 0.2 and measured_s < time.perf_counter() - start_s - paused_s
    assert calibration.fit()[1]["repeats"] == 2


def test_the_halves_of_a_run_share_no_epoch():
    epochs = simulated_epochs()
    halves = [half_of(epochs, half) for half in (0, 1)]
    for column, whole in zip(joined(halves), epochs, strict=True):
        np.testing.assert_array_equal(column, whole)
    assert abs(len(halves[0].used) - len(halves[1].used)) <= 1


def test_what_cannot_be_measured_is_refused(model):
    work = generate(2, num_layers=2, num_experts=8, top_k=2)
    with pytest.raises(InputError, match=r"10 tokens are too few.*at least 200 tokens of 2 layers"):
        ExpertCalibration(model, work, tokens=10)
    work = generate(40, num_layers=2, num_experts=8, top_k=2)
    with pytest.raises(InputError, match=r"no cache of .* holds what a layer may need"):
        ExpertCalibration(model, work, tokens=1000, cache_shares=(0.125,))
