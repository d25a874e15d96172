"""Small runs of the simulated engine with every iteration written down.

Blocks hold 4 tokens unless said otherwise, and an iteration takes one second unless the test gives another cost.
"""

from __future__ import annotations

import pytest
from miniatures import ONE_SECOND, tell, tiny_spec, tiny_workload, write_plan
from reference import Plan

from schedlab.envs.core.errors import InputError
from schedlab.envs.request_scheduling.metrics import compute_metrics
from schedlab.envs.request_scheduling.sim import Simulator
from schedlab.envs.request_scheduling.spec import CostModel, SloClass


class Planned:
    """A policy that has one plan for all iterations, or a list with one for each of the first."""

    def __init__(self, *plans: Plan, then: Plan | None = None) -> None:
        self.plans, self.then = plans, then or Plan()

    def reset(self, state) -> None:
        self.left = list(self.plans)

    def decide(self, state, decision) -> None:
        write_plan(self.left.pop(0) if self.left else self.then, decision)


def always(**levers) -> Planned:
    return Planned(then=Plan(**levers))


DEFAULT = always()


def test_decodes_go_first_and_prefill_fills_the_budget():
    spec = tiny_spec(max_batch_tokens=6, cost=CostModel("by hand", (1.0, 0.25, 0.5, 0.0, 0.0, 0.0, 0.0)))
    workload = tiny_workload([0, 0.5, 4], prompt_tokens=[10, 3, 6], output_tokens=[3, 2, 1])
    assert tell(spec, workload, DEFAULT) == [
        "2.5s: r0 +6 | 3 blocks",  # 1 + 6/4; all blocks of the prompt at once
        "5s: r0 +4, r1 +2 | 4 blocks",
        "7.75s: r0 d, r1 +1, r2 +4 | 6 blocks",  # 1 + 5/4 + 1/2; r0 fits into its third block until 12 tokens
        "10.25s: r0 d end, r1 d end, r2 +2 end | 6 blocks",  # 1 + 2/4 + 2/2
    ]


def test_cost_counts_context():
    """A decode context token = 1 s, query x context = 1/8 s, query x KV = 1/64 s, any prefill 1/2 s; else nothing."""
    spec = tiny_spec(max_batch_tokens=6, cost=CostModel("context", (0.0, 0.0, 0.0, 1.0, 1 / 8, 1 / 64, 1 / 2)))
    workload = tiny_workload([0, 0], prompt_tokens=[4, 6], output_tokens=[2, 1])
    ends = [float(line.split("s:")[0]) for line in tell(spec, workload, DEFAULT)]
    first = (4 * 4 + 2 * 2) / 8 + 6 * (4 + 2) / 64 + 1 / 2  # chunks of 4 and 2 over contexts of 4 and 2
    second = 5 + 4 * 6 / 8 + 5 * (5 + 6) / 64 + 1 / 2  # a decode over 5 tokens, a chunk of 4 up to context 6
    assert ends == pytest.approx([first, first + second])


def test_chunk_limit_lets_two_prompts_run_together():
    workload = tiny_workload([0, 0], [6, 6], [1, 1])
    assert tell(tiny_spec(), workload, always(chunk_tokens=4)) == [
        "1s: r0 +4, r1 +4 | 4 blocks",
        "2s: r0 +2 end, r1 +2 end | 4 blocks",
    ]


def test_memory_runs_out_and_the_last_admitted_recomputes():
    spec = tiny_spec(kv_blocks=4, block_tokens=2, max_batch_tokens=8)
    assert tell(spec, tiny_workload([0, 0], [3, 2], [4, 4]), DEFAULT) == [
        "1s: r0 +3, r1 +2 | 3 blocks",
        "2s: r0 d, r1 d | 4 blocks",  # r1's only block was full
        "3s: r0 d, r1 out | 3 blocks",  # r0 takes one of r1's two; the other is too little for r1's 4 tokens
        "4s: r0 d end | 3 blocks",
        "5s: r1 +4 | 2 blocks",  # its prompt and the two tokens that it had: the third token
        "6s: r1 d end | 3 blocks",
    ]


def test_preemption_by_decision_goes_to_the_front():
    workload = tiny_workload([0, 0, 0], [4, 4, 4], [3, 3, 1])
    policy = Planned(Plan(max_running=2), Plan(preempt=[0], max_running=1), Plan())
    assert tell(tiny_spec(), workload, policy) == [
        "1s: r0 +4, r1 +4 | 2 blocks",
        "2s: r0 out, r1 d | 2 blocks",  # r0 may not come back: one may run
        "3s: r0 +5, r1 d end, r2 +4 end | 5 blocks",  # r0 before r2, which never ran
        "4s: r0 d end | 2 blocks",
    ]


def test_reserve_holds_back_unless_nothing_runs():
    workload = tiny_workload([0, 0, 0], [4, 4, 4], [2, 1, 1])
    assert tell(tiny_spec(kv_blocks=4), workload, always(kv_reserve_blocks=2)) == [
        "1s: r0 +4, r1 +4 end | 2 blocks",  # r2 would leave 1
        "2s: r0 d end | 2 blocks",  # 2 free, r2 would leave 1
        "3s: r2 +4 end | 1 blocks",
    ]
    assert tell(tiny_spec(kv_blocks=4), workload, always(kv_reserve_blocks=99))[0] == "1s: r0 +4 | 1 blocks"


def test_the_first_that_does_not_fit_ends_admission():
    workload = tiny_workload([0, 0, 0], [8, 12, 4], [3, 1, 1])
    story = tell(tiny_spec(kv_blocks=4, max_batch_tokens=32), workload, DEFAULT)
    assert story == [
        "1s: r0 +8 | 2 blocks",  # 2 free: r1 needs 3, and r2, which would fit, is behind it
        "2s: r0 d | 3 blocks",
        "3s: r0 d end | 3 blocks",
        "4s: r1 +12 end, r2 +4 end | 4 blocks",
    ]
    picked = Planned(Plan(order=[2]))
    assert tell(tiny_spec(kv_blocks=4, max_batch_tokens=32), workload, picked)[0] == "1s: r0 +8, r2 +4 end | 3 blocks"


def test_whole_prompts():
    workload = tiny_workload([0, 0, 0], [5, 4, 12], [2, 2, 1])
    assert tell(tiny_spec(kv_blocks=20, max_batch_tokens=8), workload, always(whole_prompts=True)) == [
        "1s: r0 +5 | 2 blocks",  # r1's 4 do not fit into the 3 that are left
        "2s: r0 d end, r1 +4 | 3 blocks",
        "3s: r1 d end, r2 +7 | 5 blocks",  # longer than any budget, but the first: cut
        "4s: r2 +5 end | 3 blocks",
    ]


def test_an_iteration_in_which_nothing_would_run_is_the_default_one():
    workload = tiny_workload([0, 0], [4, 4], [2, 1])
    assert tell(tiny_spec(), workload, always(prefill_tokens=0, admit_rest=False)) == [
        "1s: r0 +4, r1 +4 end | 2 blocks",
        "2s: r0 d end | 2 blocks",
    ]
    assert tell(tiny_spec(), workload, Planned(Plan(order=[1], admit_rest=False), Plan(prefill_tokens=0))) == [
        "1s: r1 +4 end | 1 blocks",
        "2s: r0 +4 | 1 blocks",
        "3s: r0 d end | 2 blocks",
    ]


def test_a_request_that_can_never_fit_is_refused():
    limits = (SloClass(ttft_s=1.0, tpot_s=1.0),)
    spec = tiny_spec(kv_blocks=3, slo_classes=limits)  # 12 tokens; the last token of an answer needs no place
    workload = tiny_workload([0, 0, 0], [4, 10, 9], [2, 4, 4])
    assert tell(spec, workload, DEFAULT) == [
        "1s: r0 +4 | 1 blocks",
        "2s: r0 d end | 2 blocks",
        "3s: r2 +9 | 3 blocks",
        "4s: r2 d | 3 blocks",
        "5s: r2 d | 3 blocks",
        "6s: r2 d end | 3 blocks",
    ]
    simulator = Simulator(spec)
    simulator.reset(workload)
    while not simulator.step(simulator.default_decision()).done:
        pass
    timeline = simulator.timeline()
    assert timeline.refused.tolist() == [False, True, False]
    assert compute_metrics(timeline)["slo_goodput"] == 1 / 3  # r1 was refused, r2 waited 2 s


def test_nothing_but_refusals_is_done_at_once():
    simulator = Simulator(tiny_spec(kv_blocks=1))
    simulator.reset(tiny_workload([1, 2], [9, 9], [1, 1]))
    assert simulator.step(simulator.default_decision()).done
    assert len(simulator.timeline().iteration_end_s) == 0


def test_idle_time_is_jumped_over_before_the_first_decision():
    simulator = Simulator(tiny_spec())
    simulator.reset(tiny_workload([3, 9], [4, 4], [1, 1]))
    assert simulator.state().engine[0]["num_waiting"] == 1
    outcome = simulator.step(simulator.default_decision())
    assert (outcome.seconds, outcome.done) == (1.0, False)
    assert simulator.state().engine[0]["now_s"] == 9.0


# ------------------------------------------------------------------------------------------------ prefix cache


def test_prefix_hits():
    spec = tiny_spec(kv_blocks=8, prefix_cache=True)
    workload = tiny_workload([0, 1, 5], [9, 9, 8], [2, 2, 1], prefixes=["ab", "ac", "ab"])
    assert tell(spec, workload, DEFAULT) == [
        "1s: r0 +9 | 3 blocks",
        "2s: r0 d end, r1 +5 | 5 blocks",  # block a is shared
        "3s: r1 d end | 3 blocks",
        "6s: r2 +4 end | 2 blocks",  # all 8 tokens are cached, but at least one must be computed: half of them
    ]
    off = tiny_spec(kv_blocks=8)
    assert [line.split(" |")[0] for line in tell(off, workload, DEFAULT)] == [
        "1s: r0 +9",
        "2s: r0 d end, r1 +9",
        "3s: r1 d end",
        "6s: r2 +8 end",
    ]


def test_prompts_computed_side_by_side_end_up_on_one_copy():
    """r0 leaves; the blocks that r1 goes on using must stay findable, whatever is evicted in the meantime."""
    spec = tiny_spec(kv_blocks=7, prefix_cache=True)
    workload = tiny_workload([0, 0, 1, 1], [8, 8, 8, 12], [1, 6, 1, 1], prefixes=["ab", "ab", "cd", "abe"])
    assert tell(spec, workload, DEFAULT) == [
        "1s: r0 +8 end, r1 +8 | 4 blocks",  # neither could hit: two copies while the iteration runs
        "2s: r1 d, r2 +8 end, r3 +4 end | 6 blocks",  # r1 three, r2 two, r3 one beside r1's a and b
        "3s: r1 d | 3 blocks",
        "4s: r1 d | 3 blocks",
        "5s: r1 d | 3 blocks",
        "6s: r1 d end | 4 blocks",
    ]


def test_cached_blocks_are_evicted_least_recently_used_last_block_first():
    spec = tiny_spec(kv_blocks=4, prefix_cache=True, max_running=1)
    workload = tiny_workload([0, 1, 2, 3, 4], [9, 5, 8, 9, 9], [1] * 5, prefixes=["ab", "c", "de", "ab", "ab"])
    assert tell(spec, workload, DEFAULT) == [
        "1s: r0 +9 end | 3 blocks",  # leaves, least recently used first: b a, and two unused
        "2s: r1 +5 end | 2 blocks",  # the unused ones: b a c, one unused
        "3s: r2 +8 end | 2 blocks",  # the unused one and b: a c e d
        "4s: r3 +5 end | 3 blocks",  # finds a, evicts c and e: d b a, one unused
        "5s: r4 +1 end | 3 blocks",  # finds a and b
    ]


def test_a_hit_of_the_waiting_shrinks_when_its_blocks_are_evicted():
    spec = tiny_spec(kv_blocks=3, prefix_cache=True, max_running=1)
    simulator = Simulator(spec)
    simulator.reset(tiny_workload([0, 1, 1], [9, 12, 9], [1, 1, 1], prefixes=["ab", "", "ab"]))
    cached = []
    done = False
    while not done:
        cached.append(int(simulator.state().requests[2]["cached_tokens"]))
        done = simulator.step(simulator.default_decision()).done
    assert cached == [0, 8, 0]  # r1 takes the whole pool


# ------------------------------------------------------------------------------------------------ the record


def test_the_record_grows_with_the_run():
    """One long request, preempted in every iteration, then a burst that ends at once: far more segments than room."""
    burst, long = 40, 1400
    spec = tiny_spec(kv_blocks=800, max_batch_tokens=4000, max_running=256, cost=ONE_SECOND, prefill_choices=(0,))
    workload = tiny_workload([0, *[1185.0] * burst], [4] * (burst + 1), [long, *[1] * burst])
    simulator = Simulator(spec)
    simulator.reset(workload)
    done = False
    while not done:
        decision = simulator.default_decision()
        if simulator.state().engine[0]["num_running"]:
            write_plan(Plan(preempt=[0]), decision)
        done = simulator.step(decision).done
    timeline = simulator.timeline()
    compute_metrics(timeline)
    assert timeline.preemptions[0] == long - 1
    assert len(timeline.segments) == long + burst


def test_a_workload_of_other_blocks_is_told_so():
    workload = tiny_workload([0], [8], [1], prefixes=["ab"])
    with pytest.raises(InputError, match="hashes blocks of 4 tokens, the engine has blocks of 8"):
        Simulator(tiny_spec(block_tokens=8, prefix_cache=True)).reset(workload)


def test_state_before_reset():
    with pytest.raises(RuntimeError, match="call reset"):
        Simulator(tiny_spec()).state()


def test_the_state_holds_no_future():
    simulator = Simulator(tiny_spec())
    simulator.reset(tiny_workload([0, 5], [4, 4], [3, 9], predicted_output_tokens=[2.5, 2.5]))
    state = simulator.state()
    assert "output_tokens" not in state.requests.dtype.names
    assert state.requests[1].tobytes() == b"\0" * state.requests.dtype.itemsize
