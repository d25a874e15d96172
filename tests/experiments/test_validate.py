from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedlab.envs.core import InputError
from schedlab.envs.core.results import ResultsFile, RunKey, save_schedule, schedule_paths
from schedlab.envs.request_scheduling.metrics import compute_metrics, metric_info
from schedlab.envs.request_scheduling.timeline import Timeline
from schedlab.experiments.validate import is_close, validate_folder
from schedlab.experiments.validate_request_scheduling import check_schedule, recompute

KEY = RunKey("request_scheduling", "by-hand", "all", "fcfs", "sim", "model", 0)


def write_run(folder, timeline, spec, key=KEY, metrics=None):
    save_schedule(folder, key, timeline, spec=spec.to_dict(), kv_blocks=spec.engine.kv_blocks)
    metrics = metrics or compute_metrics(timeline, spec.engine.kv_blocks)
    ResultsFile(folder / "results.csv").append(key, metrics, {name: metric_info(name)[0] for name in metrics})


def as_lists(timeline):
    return {name: getattr(timeline, name).tolist() for name in timeline.__dataclass_fields__}


def about(spec, backend="sim"):
    return {"run": {"backend": backend}, "kv_blocks": spec.engine.kv_blocks, "spec": spec.to_dict()}


def test_valid_folder(tmp_path, miniature, miniature_spec):
    write_run(tmp_path, miniature, miniature_spec)
    write_run(tmp_path, miniature, miniature_spec, replace(KEY, policy="srpt"))
    report = validate_folder(tmp_path)
    assert report.ok, str(report)
    assert report.num_runs == 2 and report.num_values == 2 * 24
    assert "valid" in str(report)


def test_every_changed_number_is_found(tmp_path, miniature, miniature_spec):
    write_run(tmp_path, miniature, miniature_spec)
    path = tmp_path / "results.csv"
    lines = path.read_text().splitlines(keepends=True)
    for i in range(1, len(lines)):
        fields = lines[i].split(",")
        fields[8] = repr(float(fields[8]) * (1 + 1e-6) + 1e-6)
        path.write_text("".join([*lines[:i], ",".join(fields), *lines[i + 1 :]]))
        report = validate_folder(tmp_path)
        assert [m.check for m in report.mismatches] == [fields[7]]


def test_missing_doubled_and_unknown_rows(tmp_path, miniature, miniature_spec):
    metrics = compute_metrics(miniature, 10)
    del metrics["p99_tbt_s"]
    metrics["slo_goodput"] = 0.5
    write_run(tmp_path, miniature, miniature_spec, metrics=metrics)
    path = tmp_path / "results.csv"
    lines = path.read_text().splitlines(keepends=True)
    run = "request_scheduling,by-hand,all,fcfs,sim,model,0"
    path.write_text("".join([*lines, lines[1], f"{run},decision_us,3.5,us\n"]))
    report = validate_folder(tmp_path)
    assert {m.check for m in report.mismatches} == {"p99_tbt_s", "slo_goodput", "mean_e2e_s", "num_metrics"}
    assert report.unchecked == {"decision_us": 1}


def test_missing_and_foreign_schedules(tmp_path, miniature, miniature_spec):
    write_run(tmp_path, miniature, miniature_spec)
    npz, description = schedule_paths(tmp_path, KEY)
    told = description.read_text()
    description.write_text(told.replace('"fcfs"', '"srpt"'))
    assert [m.check for m in validate_folder(tmp_path).mismatches] == ["run key"]
    description.write_text(told)
    npz.write_bytes(npz.read_bytes()[:-100])
    assert [m.check for m in validate_folder(tmp_path).mismatches] == ["schedule"]
    npz.unlink()
    assert [m.check for m in validate_folder(tmp_path).mismatches] == ["schedule"]
    with pytest.raises(InputError, match="cannot be read"):
        validate_folder(tmp_path / "nowhere")


def test_policies_must_serve_the_same_requests(tmp_path, miniature, miniature_spec):
    write_run(tmp_path, miniature, miniature_spec)
    other = replace(miniature, prompt_tokens=np.array([4, 2, 8, 99]))
    write_run(tmp_path, other, miniature_spec, replace(KEY, policy="srpt"))
    assert [m.check for m in validate_folder(tmp_path).mismatches] == ["same inputs"]


TAMPERINGS = {
    "tokens of a request": dict(segments=[[1, 1, 1], [0, 0, 3], [2, 2, 1], [2, 4, 2]]),
    "segment range": dict(segments=[[1, 1, 1], [0, 0, 3], [2, 2, 1], [2, 5, 3]]),
    "one token an iteration": dict(segments=[[1, 1, 1], [0, 0, 2], [0, 1, 1], [2, 2, 1], [2, 4, 3]]),
    "iteration times": dict(iteration_end_s=[2.0, 4.5, 7.5, 9.75, 11.75, 13.25, 13.0]),
    "iterations overlap": dict(iteration_start_s=[0.0, 2.0, 4.4, 7.5, 9.75, 11.75, 13.25]),
    "first token after arrival": dict(arrival_s=[2.0, 0.5, 1.0, 5.0]),
    "start after arrival": dict(arrival_s=[0.0, 0.5, 4.6, 5.0]),
    "tokens of an iteration": dict(decode_requests=[0, 1, 1, 0, 0, 1, 2]),
    "iteration counts": dict(kv_blocks_used=[1, 5, 4, 3, 3, 3, -1]),
    "kv blocks": dict(kv_blocks_used=[1, 11, 4, 3, 3, 3, 3]),
    "batch tokens": dict(prefill_tokens=[4, 8, 6, 1, 4, 0, 0]),
    "iteration cost": dict(iteration_end_s=[2.0, 4.5, 7.5, 9.75, 11.75, 13.2, 14.75]),
    "preemptions": dict(preemptions=[1, 0, 0, 0]),
    "prefill tokens": dict(prefill_tokens=[4, 4, 6, 4, 4, 0, 0]),
    "prefills": dict(preemptions=[0, 0, 0, 0], decode_requests=[0, 1, 1, 0, 0, 1, 1]),
}


@pytest.mark.parametrize("check", TAMPERINGS)
def test_every_invariant_can_break(check, miniature, miniature_spec):
    assert check_schedule(as_lists(miniature), about(miniature_spec)) == []
    broken = check_schedule(as_lists(miniature) | TAMPERINGS[check], about(miniature_spec))
    assert check in dict(broken)


def test_too_few_blocks_for_the_contexts(miniature, miniature_spec):
    tampered = as_lists(miniature) | dict(kv_blocks_used=[1, 2, 4, 3, 3, 3, 3])
    assert "kv blocks" in dict(check_schedule(tampered, about(miniature_spec)))


def test_changed_segment_in_a_folder(tmp_path, miniature, miniature_spec):
    write_run(tmp_path, miniature, miniature_spec)
    shifted = replace(miniature, segments=np.array([[1, 2, 1], [0, 0, 3], [2, 2, 1], [2, 4, 3]]))
    shifted.save(schedule_paths(tmp_path, KEY)[0])
    checks = {m.check for m in validate_folder(tmp_path).mismatches}
    assert {"mean_ttft_s", "kv blocks"} <= checks
    outside = replace(miniature, segments=np.array([[1, 99, 1]]))
    outside.save(schedule_paths(tmp_path, KEY)[0])
    assert "segment range" in {m.check for m in validate_folder(tmp_path).mismatches}


def test_description_is_needed(tmp_path, miniature, miniature_spec):
    write_run(tmp_path, miniature, miniature_spec)
    _, description = schedule_paths(tmp_path, KEY)
    description.write_text(json.dumps({"kv_blocks": 10}))
    assert [m.check for m in validate_folder(tmp_path).mismatches] == ["schedule"]


COST = (0.01, 1e-3, 2e-3)
BLOCK_TOKENS = 4


def random_timeline(seed: int) -> Timeline:
    """A run of a small engine that admits, decodes and preempts at random; whole prompts are prefilled at once."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 9))
    arrival_s = np.concatenate([[0.0], np.cumsum(rng.exponential(0.05, n - 1))])
    prompt, output = rng.integers(1, 20, n), rng.integers(1, 9, n)
    refused = rng.random(n) < 0.15
    classes = rng.integers(0, rng.integers(1, 4), n).astype(np.int32)
    generated, preemptions = np.zeros(n, int), np.zeros(n, int)
    is_running = np.zeros(n, bool)
    iterations, segments, open_segment = [], [], {}
    now_s = 0.0
    while np.any(~refused & (generated < output)):
        present = np.flatnonzero(~refused & (generated < output) & (arrival_s <= now_s))
        if len(present) == 0:
            now_s = arrival_s[~refused & (generated < output)].min()
            continue
        prefill = decodes = blocks = 0
        yielding = []
        for request in present:
            if is_running[request]:
                if rng.random() < 0.1:
                    is_running[request] = False
                    preemptions[request] += 1
                    continue
                decodes += 1
            elif rng.random() < 0.5:
                prefill += prompt[request] + generated[request]
                is_running[request] = True
            else:
                continue
            blocks += -(-(prompt[request] + generated[request]) // BLOCK_TOKENS)
            yielding.append(request)
        end_s = now_s + COST[0] + COST[1] * prefill + COST[2] * decodes + rng.choice([0.0, 0.003])
        i = len(iterations)
        iterations.append((now_s, end_s, prefill, decodes, blocks))
        for request in yielding:
            generated[request] += 1
            if request in open_segment and sum(open_segment[request][1:]) == i:
                open_segment[request][2] += 1
            else:
                open_segment[request] = [request, i, 1]
                segments.append(open_segment[request])
        now_s = end_s
    table = np.array(iterations, float).reshape(-1, 5)
    return Timeline(
        arrival_s=arrival_s,
        prompt_tokens=prompt,
        output_tokens=output,
        slo_class=classes,
        ttft_slo_s=np.array([0.02, 0.05, 0.2])[classes],
        tpot_slo_s=np.array([0.02, 0.04, 0.03])[classes],
        slo_weight=np.array([1.0, 2.0, 0.5])[classes],
        refused=refused,
        preemptions=preemptions,
        iteration_start_s=table[:, 0],
        iteration_end_s=table[:, 1],
        prefill_tokens=table[:, 2].astype(np.int64),
        decode_requests=table[:, 3].astype(np.int64),
        kv_blocks_used=table[:, 4].astype(np.int64),
        segments=np.array(segments, np.int64).reshape(-1, 3),
    )


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_metrics_equal_the_independent_recomputation(seed):
    timeline = random_timeline(seed)
    schedule = as_lists(timeline)
    kv_blocks = max(schedule["kv_blocks_used"], default=1)
    description = {
        "run": {"backend": "sim"},
        "kv_blocks": kv_blocks,
        "spec": {
            "engine": {"block_tokens": BLOCK_TOKENS, "prefix_cache": False, "max_batch_tokens": 1000},
            "cost": {"coefficients_s": [*COST, 0, 0, 0, 0]},
        },
    }
    assert check_schedule(schedule, description) == []
    metrics, expected = compute_metrics(timeline, kv_blocks), recompute(schedule, kv_blocks)
    assert metrics.keys() == expected.keys()
    for name, (value, unit) in expected.items():
        assert is_close(metrics[name], value), name
        assert metric_info(name)[0] == unit
