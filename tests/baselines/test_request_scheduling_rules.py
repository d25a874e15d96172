"""The field's rules: each serves every workload, compiled or stepped, and does by hand what its paper says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from miniatures import assert_no_block_leaked, assert_same_run, problems, serve, tell, tiny_spec, tiny_workload

from schedlab.baselines.request_scheduling import (
    FCFS,
    HOPELESS_LAST,
    PRIORITY,
    RULES,
    SJF,
    SJF_PROMPT,
    SRPT,
    linear,
    ordered_rule,
    preemptive_srpt,
)
from schedlab.envs.request_scheduling.metrics import compute_metrics
from schedlab.envs.request_scheduling.rule import Rule
from schedlab.envs.request_scheduling.sim import Simulator
from schedlab.envs.request_scheduling.spec import SloClass

# The same kernels with knobs so small that they bind on tiny engines.
SMALL = (
    RULES["static_batching"].with_params(2.0, name="static_batching_2"),
    RULES["fastserve"].with_params(2.0, 30.0, 3.0, name="fastserve_2"),
    RULES["fastserve"].with_params(4.0, 5.0, 256.0, name="fastserve_4"),
    RULES["p_pas"].with_params(2.0, 12.0, 30.0, name="p_pas_12"),
    RULES["qwen_chunks"].with_params(300.0, 10.0, name="qwen_chunks_300"),
    ordered_rule("sarathi_5", FCFS, token_budget=5),
    ordered_rule("orca_6", FCFS, token_budget=6, whole_prompts=True),
    ordered_rule("priority_7", PRIORITY, token_budget=7, max_running=2),
    ordered_rule("srpt_8", SRPT, token_budget=8, kv_reserve=0.2, ageing=1.0),
    ordered_rule("hopeless_8", HOPELESS_LAST, token_budget=8, margin_s=1.0, longest_wait_s=30.0),
    Rule("srpt_preemptive_8", preemptive_srpt, (*ordered_rule("", SRPT, token_budget=8).params, 1.2), 0, 1),
    Rule("linear", linear, (1.0, 1.0, 0.5, 0.2, 0.1, 0.5, 11.0, 1.0, 1.0, 0.05, 0.2, 0.3, 0.1), 0, 1),
    Rule("linear_3", linear, (0.5, 2.0, 2.0, 0.2, 0.0, 0.5, 3.0, 0.5, 0.008, 0.2, 0.5, 0.6, 0.1), 0, 1),
)
EVERY = {rule.name: rule for rule in (*RULES.values(), *SMALL)}
SETTINGS = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.mark.parametrize("rule", EVERY.values(), ids=EVERY)
def test_every_workload_is_served(rule):
    """Compiled with fast-forward, compiled in single iterations, and stepped from Python: one and the same run."""

    @SETTINGS
    @given(problems())
    def prove(problem):
        spec, workload = problem
        forward, single, stepped = Simulator(spec), Simulator(spec), Simulator(spec)
        for simulator in (forward, single, stepped):
            simulator.reset(workload)
        forward.run(rule)
        single.run(rule, forward=False)
        serve(stepped, rule)
        timeline = forward.timeline()
        assert_same_run(single.timeline(), stepped.timeline())
        assert_same_run(timeline, stepped.timeline())
        assert_no_block_leaked(forward)

        compute_metrics(timeline)  # raises unless every request has all of its tokens
        served = ~timeline.refused
        tokens = workload.output_tokens[served].sum()
        decodes = timeline.decode_requests.sum()
        assert decodes <= tokens - served.sum()  # the first token is a prefill's
        if not timeline.preemptions.any():
            assert decodes == tokens - served.sum()
            computed = timeline.prefill_tokens.sum()
            if spec.engine.prefix_cache:
                assert served.sum() <= computed <= workload.prompt_tokens[served].sum()
            else:
                assert computed == workload.prompt_tokens[served].sum()
        batch = timeline.prefill_tokens + timeline.decode_requests
        assert (batch > 0).all() and batch.max(initial=0) <= spec.engine.max_batch_tokens
        assert timeline.kv_blocks_used.max(initial=0) <= spec.engine.kv_blocks
        assert np.isfinite(timeline.iteration_end_s).all()

    prove()


def test_names():
    assert all(name == rule.name and rule.source for name, rule in RULES.items())
    assert not any(rule.is_oracle for rule in RULES.values())


# ----------------------------------------------------------------------- by hand: one second an iteration, blocks of 4


def one_at_a_time(**changes):
    return tiny_spec(**{"kv_blocks": 40, "max_running": 1, **changes})


def served_in_order(spec, workload, rule) -> list[int]:
    """Requests in order of their last token."""
    return [
        int(event.split()[0][1:])
        for line in tell(spec, workload, rule)
        for event in line.split("s: ")[1].split(", ")
        if "end" in event
    ]


def test_static_batching():
    workload = tiny_workload([0, 0, 0, 1], [4] * 4, [1, 3, 2, 1])
    assert tell(tiny_spec(kv_blocks=20), workload, RULES["static_batching"].with_params(2.0)) == [
        "1s: r0 +4 end, r1 +4 | 2 blocks",
        "2s: r1 d | 2 blocks",  # r0's place stays empty
        "3s: r1 d end | 2 blocks",
        "4s: r2 +4, r3 +4 end | 2 blocks",
        "5s: r2 d end | 2 blocks",
    ]


def test_static_batching_takes_a_preempted_member_back():
    workload = tiny_workload([0, 0, 0], [4] * 3, [6, 3, 1])
    assert tell(tiny_spec(kv_blocks=3), workload, RULES["static_batching"].with_params(2.0)) == [
        "1s: r0 +4, r1 +4 | 2 blocks",
        "2s: r0 d, r1 out | 2 blocks",
        "3s: r0 d | 2 blocks",
        "4s: r0 d | 2 blocks",
        "5s: r0 d | 2 blocks",
        "6s: r0 d end | 3 blocks",
        "7s: r1 +5, r2 +4 end | 3 blocks",
        "8s: r1 d end | 2 blocks",
    ]


def test_orca_and_fcfs():
    spec, workload = tiny_spec(kv_blocks=20, max_batch_tokens=8), tiny_workload([0, 0, 0], [5, 4, 12], [2, 2, 1])
    assert tell(spec, workload, RULES["orca"]) == [
        "1s: r0 +5 | 2 blocks",  # no part of a prompt
        "2s: r0 d end, r1 +4 | 3 blocks",
        "3s: r1 d end, r2 +7 | 5 blocks",
        "4s: r2 +5 end | 3 blocks",
    ]
    assert tell(spec, workload, RULES["fcfs"]) == [
        "1s: r0 +5, r1 +3 | 3 blocks",
        "2s: r0 d end, r1 +1, r2 +6 | 6 blocks",
        "3s: r1 d end, r2 +6 end | 5 blocks",
    ]


def test_sarathi_budget_counts_decodes():
    workload = tiny_workload([0, 0], [4, 9], [4, 1])
    assert tell(tiny_spec(kv_blocks=20), workload, ordered_rule("sarathi_4", FCFS, token_budget=4)) == [
        "1s: r0 +4 | 1 blocks",
        "2s: r0 d, r1 +3 | 5 blocks",
        "3s: r0 d, r1 +3 | 5 blocks",
        "4s: r0 d end, r1 +3 end | 5 blocks",
    ]


def test_sjf_orders():
    workload = tiny_workload([0] * 4, [6, 2, 4, 3], [1] * 4, predicted_output_tokens=[1, 9, 1, 6])
    spec = one_at_a_time()
    assert served_in_order(spec, workload, RULES["sjf_prompt"]) == [1, 3, 2, 0]
    assert served_in_order(spec, workload, ordered_rule("sjf", SJF)) == [2, 0, 3, 1]  # 5, 7, 9, 11
    assert served_in_order(spec, workload, ordered_rule("sjf", SJF, decode_weight=0.25)) == [1, 2, 3, 0]
    assert served_in_order(spec, workload, RULES["learning_to_rank"]) == [0, 2, 3, 1]


def test_srpt_counts_the_work_left():
    """r0 was preempted after 20 tokens of a predicted 10: 28 tokens to recompute and a fifth of 20, plus 1, to come."""
    spec, orders = one_at_a_time(max_running=2), {}
    for kind in (SJF, SRPT):
        simulator = Simulator(spec)
        simulator.reset(tiny_workload([0, 0], [8, 16], [30, 30], predicted_output_tokens=[10, 12]))
        state, decision = simulator.state(), simulator.default_decision()
        state.requests["generated_tokens"][0] = 20
        rule = ordered_rule("", kind)
        rule.reset(state)
        rule.decide(state, decision)
        orders[kind] = decision.order[: decision.levers["num_order"][0]].tolist()
    assert orders == {SJF: [0, 1], SRPT: [1, 0]}  # 18 < 28, but 33 > 28


def test_ageing_and_starvation():
    workload = tiny_workload([0, 0, 1, 2], [4, 8, 4, 6], [1] * 4)
    spec = one_at_a_time()
    assert served_in_order(spec, workload, ordered_rule("sjf", SJF_PROMPT)) == [0, 2, 3, 1]
    # at 2 s r1 has waited two seconds: 8 - 3 x 2 < 6
    assert served_in_order(spec, workload, ordered_rule("sjf", SJF_PROMPT, ageing=3)) == [0, 2, 1, 3]
    assert served_in_order(spec, workload, ordered_rule("sjf", SJF_PROMPT, longest_wait_s=1.5)) == [0, 2, 1, 3]
    assert served_in_order(spec, workload, ordered_rule("sjf", SJF_PROMPT, longest_wait_s=0.5)) == [0, 1, 2, 3]


def test_residual_prompt():
    spec = one_at_a_time(prefix_cache=True)
    workload = tiny_workload([0, 0.5, 0.5], [9, 6, 9], [1] * 3, prefixes=["ab", "c", "ab"])
    assert tell(spec, workload, RULES["residual_sjf"]) == [
        "1s: r0 +9 end | 3 blocks",
        "2s: r2 +1 end | 3 blocks",  # 8 of its 9 tokens are cached: before r1's 6
        "3s: r1 +6 end | 2 blocks",
    ]


def test_hopeless_last():
    """r0 is relaxed, the others must have their first token within 3 s."""
    spec = one_at_a_time(slo_classes=(SloClass(3.0, 9.0), SloClass(50.0, 9.0)))
    workload = tiny_workload([0] * 5, [9, 5, 6, 7, 8], [1] * 5, slo_class=[1, 0, 0, 0, 0])
    # a request admitted at 3 s is judged hopeless only after its limit: r4 at 4 s
    assert served_in_order(spec, workload, ordered_rule("hopeless", HOPELESS_LAST)) == [1, 2, 3, 4, 0]
    # with a margin of 1.5 s the requests that are left at 2 s are
    assert served_in_order(spec, workload, ordered_rule("hopeless", HOPELESS_LAST, margin_s=1.5)) == [1, 2, 0, 3, 4]


def test_earliest_deadline_first():
    spec = one_at_a_time(slo_classes=(SloClass(3.0, 9.0), SloClass(50.0, 9.0)))
    workload = tiny_workload([0, 0, 1, 1], [4] * 4, [1] * 4, slo_class=[0, 1, 1, 0])
    assert served_in_order(spec, workload, RULES["edf"]) == [0, 3, 1, 2]


def test_priority():
    workload = tiny_workload([0, 0, 0, 1], [4] * 4, [1] * 4, priority=[2, 1, 1, 0])
    assert served_in_order(one_at_a_time(), workload, RULES["vllm_priority"]) == [1, 3, 2, 0]


def test_qwen_chunks_shrink_with_the_context():
    """300 / (1 + context / 300) tokens: 300, 150, 120, ..."""
    spec = one_at_a_time(kv_blocks=400, max_batch_tokens=1000)
    workload = tiny_workload([0], [1000], [1])
    simulator = Simulator(spec)
    simulator.reset(workload)
    simulator.run(RULES["qwen_chunks"].with_params(300.0, 300.0))
    assert simulator.timeline().prefill_tokens.tolist() == [300, 150, 120, 103, 92, 84, 78, 73]


def test_p_pas_budget_follows_the_load():
    """4 tokens with nothing queued, 12 with 32 tokens queued or more; decodes are counted in."""
    spec = tiny_spec(kv_blocks=400, max_batch_tokens=64, max_running=9)
    workload = tiny_workload([0, 1, 1, 1], [4, 16, 16, 8], [2, 1, 1, 1])
    assert tell(spec, workload, RULES["p_pas"].with_params(4.0, 12.0, 32.0)) == [
        "1s: r0 +4 | 1 blocks",  # 4 queued: 5
        "2s: r0 d end, r1 +11 | 6 blocks",  # 40 queued: 12
        "3s: r1 +5 end, r2 +6 | 8 blocks",  # 29 queued: 11
        "4s: r2 +8 | 4 blocks",  # 18 queued: 8
        "5s: r2 +2 end, r3 +4 | 6 blocks",  # 10 queued: 6
        "6s: r3 +4 end | 2 blocks",
    ]


def test_preemptive_srpt_takes_the_place_of_longer_work():
    workload = tiny_workload([0, 1], [8, 4], [5, 1], predicted_output_tokens=[20, 1])
    rule = Rule("srpt_preemptive", preemptive_srpt, (*ordered_rule("", SRPT).params, 2.0), 0, 1)
    took_over = [
        "1s: r0 +8 | 2 blocks",
        "2s: r0 out, r1 +4 end | 1 blocks",  # 2 x (4 + 1) < 19
        "3s: r0 +9 | 3 blocks",
        "4s: r0 d | 3 blocks",
        "5s: r0 d | 3 blocks",
        "6s: r0 d end | 3 blocks",
    ]
    assert tell(tiny_spec(kv_blocks=3), workload, rule) == took_over  # no block left
    assert tell(tiny_spec(kv_blocks=40, max_running=1), workload, rule) == took_over  # no place left
    assert tell(tiny_spec(kv_blocks=40), workload, rule)[1] == "2s: r0 d, r1 +4 end | 4 blocks"
    patient = rule.with_params(*rule.params[:-1], 4.0)
    assert tell(tiny_spec(kv_blocks=3), workload, patient)[1] == "2s: r0 d | 3 blocks"


def test_fastserve_joins_the_level_that_covers_the_prompt():
    """Quanta of 4, 8, 16: r0 (9) joins the third level, r1 (4) the first, r2 (5) the second."""
    workload = tiny_workload([0, 0, 0], [9, 4, 5], [1] * 3)
    assert served_in_order(one_at_a_time(), workload, RULES["fastserve"].with_params(4.0, 100.0, 1.0)) == [1, 2, 0]


def test_fastserve_demotes_and_preempts():
    workload = tiny_workload([0, 1, 2], [3, 2, 2], [5, 1, 1])
    assert tell(one_at_a_time(), workload, RULES["fastserve"].with_params(4.0, 100.0, 1.0)) == [
        "1s: r0 +3 | 1 blocks",
        "2s: r0 d | 1 blocks",  # 4 tokens of service are within the quantum: r1, of the same level, waits
        "3s: r0 out, r1 +2 end | 1 blocks",  # 5 are not: r0 goes down a level
        "4s: r2 +2 end | 1 blocks",
        "5s: r0 +5 | 2 blocks",
        "6s: r0 d | 2 blocks",
        "7s: r0 d end | 2 blocks",
    ]


def test_fastserve_promotes_who_waited():
    workload = tiny_workload([0, 0, 0, 1, 2, 3], [4, 4, 9, 4, 4, 4], [1] * 6)
    rule = RULES["fastserve"].with_params(4.0, 2.5, 1.0)
    assert served_in_order(one_at_a_time(), workload, rule) == [0, 1, 3, 2, 4, 5]  # r2 goes up at 3 s
    patient = RULES["fastserve"].with_params(4.0, 100.0, 1.0)
    assert served_in_order(one_at_a_time(), workload, patient) == [0, 1, 3, 4, 5, 2]


def test_vtc_alternates_between_clients():
    """Clients 0 and 1, equal requests, all of client 0's first: counters grow by 4 + 2 for each."""
    workload = tiny_workload([0] * 6, [4] * 6, [1] * 6, client=[0, 0, 0, 1, 1, 1])
    assert served_in_order(one_at_a_time(), workload, RULES["vtc"]) == [0, 3, 1, 4, 2, 5]
    spec = tiny_spec(kv_blocks=40, max_batch_tokens=8, max_running=4)
    assert [line.split(" |")[0] for line in tell(spec, workload, RULES["vtc"])] == [
        "1s: r0 +4 end, r3 +4 end",  # within one iteration too
        "2s: r1 +4 end, r4 +4 end",
        "3s: r2 +4 end, r5 +4 end",
    ]


def test_vtc_charges_output_twice():
    """r0 costs client 0 4 + 2 x 4 = 12, r2 client 1 8 + 2 = 10: r3 goes before r1."""
    workload = tiny_workload([0] * 4, [4, 4, 8, 8], [4, 1, 1, 1], client=[0, 0, 1, 1])
    assert served_in_order(one_at_a_time(), workload, RULES["vtc"]) == [0, 2, 3, 1]


def test_vtc_gives_no_credit_for_absence():
    """Client 1 comes at 2 s: its counter is lifted from 0 to the 20 of client 0, and 26 and 30 follow."""
    workload = tiny_workload([0, 0, 0, 0, 2, 2], [8, 8, 8, 8, 4, 4], [1] * 6, client=[0, 0, 0, 0, 1, 1])
    assert served_in_order(one_at_a_time(), workload, RULES["vtc"]) == [0, 1, 2, 4, 5, 3]
