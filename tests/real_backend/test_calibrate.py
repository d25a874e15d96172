"""Calibration recovers a known cost, and writes a file that the simulator reads."""

import json

import numpy as np
import pytest

pytest.importorskip("transformers")

from schedlab.envs.core.errors import InputError
from schedlab.envs.request_scheduling.spec import CostModel, EngineSpec
from schedlab.real_backend.calibrate import Calibration, errors, fit_cost, write_calibration
from schedlab.real_backend.hf import HFEngine, build_llama


@pytest.fixture(scope="module")
def engine():
    model = build_llama(hidden=32, layers=1, heads=2, kv_heads=2, vocab=64)
    engine = HFEngine(EngineSpec(kv_blocks=64, block_tokens=8, max_batch_tokens=64, max_running=8), model)
    yield engine
    engine.close()


def test_fit_recovers_known_coefficients_without_bias():
    rng = np.random.default_rng(0)
    true = np.array([5e-3, 1e-4, 5e-5, 2e-6, 0.0, 3e-8])
    features = np.column_stack([np.ones(4000)] + [rng.uniform(0, top, 4000) for top in (512, 32, 5000, 1e5, 1e6)])
    exact = features @ true
    np.testing.assert_allclose(fit_cost(features, exact), true, rtol=1e-6, atol=1e-12)
    noisy = exact * rng.gamma(10, 0.1, 4000)  # mean 1, skewed
    fitted = fit_cost(features, noisy)
    assert abs((features @ fitted).sum() / exact.sum() - 1) < 0.01
    assert errors([features @ true], [exact])["p90"] < 1e-12


def test_calibration_writes_what_the_simulator_reads(engine, tmp_path):
    calibration = Calibration(engine, seed=1, num_iterations=60)
    calibration.measure_pass()
    calibration.measure_pass()
    model, report = calibration.fit()
    assert report["repeats"] == 2
    assert report["runs"] >= 6 and report["fit"]["iterations"] + report["held_out"]["iterations"] >= 60
    assert set(report["versions"]) == {"python", "torch", "transformers", "numpy", "scipy"}
    assert report["machine"]["device"] == "cpu" and report["clock"] == "cpu"
    path = tmp_path / "new" / "hf.json"
    write_calibration(path, model, report)
    assert CostModel.load(path) == model
    assert json.loads(path.read_text())["report"] == report
    assert [p.name for p in path.parent.iterdir()] == ["hf.json"]
    with pytest.raises(TypeError):
        write_calibration(path, model, {"not json": object()})
    assert CostModel.load(path) == model and [p.name for p in path.parent.iterdir()] == ["hf.json"]


def test_schedules_of_a_calibration_depend_on_the_seed_alone(engine):
    from schedlab.real_backend.calibrate import _measure_run

    first, second = (_measure_run(engine, 3, index=2)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first[:, 1].max() > 0 and first[:, 2].max() > 0


def test_too_few_iterations_are_refused(engine):
    with pytest.raises(InputError, match="at least 60"):
        Calibration(engine, num_iterations=5)
