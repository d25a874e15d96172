"""The rules that the shipped agent imitates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from schedlab.envs.request_scheduling.generate import generate
from schedlab.envs.request_scheduling.rule import Rule
from schedlab.envs.request_scheduling.spec import RequestSchedulingSpec
from schedlab.envs.request_scheduling.state import WAITING, empty_decision, empty_state, reset_decision
from schedlab.envs.request_scheduling.workload import Workload
from schedlab.experiments.cells import all_cells
from schedlab.experiments.engine_cells import engine_cells
from schedlab.experiments.teachers import load_teachers, paced, search_paced

PLAIN = (0.0, 0.0, 0.1, 0.0, 9.0, 0.0, 0.0, 0.0, 64.0)
"""1,000 tokens of prefill take 0.1 s; a budget of 512."""


def decide(params: tuple[float, ...], prompts: list[int], waited_s: list[float], decoding: int = 0):
    """What `paced` does with requests that wait for these prompts, with a limit of 1 s."""
    n = len(prompts)
    state, decision = empty_state(n), empty_decision(n)
    engine = state.engine[0]
    engine["now_s"], engine["num_waiting"], engine["num_decoding"] = 100.0, n, decoding
    engine["max_batch_tokens"], engine["max_running"] = 8192, 256
    state.requests["prompt_tokens"], state.requests["arrival_s"] = prompts, 100.0 - np.array(waited_s)
    state.requests["ttft_slo_s"], state.requests["status"] = 1.0, WAITING
    state.waiting[:] = np.arange(n)
    rule = Rule("paced", paced, params, memory_per_request=1)
    reset_decision(state, decision)
    rule.reset(state)
    rule.decide(state, decision)
    levers = decision.levers[0]
    return levers["prefill_tokens"], decision.order[: levers["num_order"]].tolist()


def test_paced_puts_those_last_who_cannot_meet_their_limit():
    _, order = decide((*PLAIN[:4], 14.0, *PLAIN[5:]), [4000, 6000, 2000, 100], [0.5, 0.5, 0.5, 2.0])
    assert order == [2, 0, 3, 1]  # 6,000 tokens take 0.6 s more, and the last is too late already
    _, order = decide((0.0, 0.0, 0.1, -1e6, 14.0, *PLAIN[5:]), [4000, 6000, 2000, 100], [0.5, 0.5, 0.5, 2.0])
    assert order == [3, 2, 0, 1]


def test_paced_budget_follows_the_queue():
    growing = (*PLAIN[:5], 0.5, 1.0, 2.0, 64.0)  # half a doubling with every doubling of the queue beyond 1
    budgets = [decide(growing, [9000] * n, [0.0] * n)[0] for n in (1, 3, 7)]
    assert budgets == [512, pytest.approx(512 * 2**0.5, abs=1), 1024]
    assert decide(growing, [9000], [0.0], decoding=6)[0] == 500
    assert decide(growing, [9000], [0.0], decoding=1000)[0] == 64


@dataclass(frozen=True)
class TinyCell:
    """What `search_paced` reads of a cell."""

    load: float
    metric = "slo_goodput"
    lower_is_better = False
    spec = RequestSchedulingSpec(objective="slo_goodput")

    @property
    def name(self) -> str:
        return f"tiny/{self.load}"

    def train_workloads(self, repetition: int = 0) -> list[Workload]:
        return [generate("azure_conv", 80, seed=repetition).at_rate(4.0 * self.load)]


def test_search_of_paced_is_repeatable_and_never_loses_what_it_found():
    cells = [TinyCell(0.9), TinyCell(1.3)]
    found, worth = search_paced(cells, 0, generations=2, population=4, elite=2)
    assert (found, worth) == search_paced(cells, 0, generations=2, population=4, elite=2)
    _, of_start = search_paced(cells, 0, generations=1, population=2, elite=1)  # two samples: both are the start
    assert worth > of_start


def test_every_cell_has_a_teacher():
    assert set(load_teachers()) == {cell.name for cell in all_cells()} | {cell.name for cell in engine_cells()}
