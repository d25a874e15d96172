"""Evict, bypass and prefetch by what a predictor wrote into the state: a rule of three knobs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..envs.core.kernel import njit_borrowed
from ..envs.expert_caching.rule import Rule, evict_lowest, prefetch
from ..envs.expert_caching.state import ABSENT, BYPASS, CANDIDATE, FREE, IN_USE, is_taken, slot_kind

LEAST_DONE = 0.5
"""Share of a load that must be done when the next gate answers: one begun later delays the loads on demand by a chunk,
which costs more than it saves (simulated at the measured cost of the CPU backend, on training tokens: 1.30 and 1.28
times LRU at 25% and 50% cache with up to two prefetches, against 1.17 without the limit)."""


class Knobs(NamedTuple):
    """What `by_advice` is decided by; tuned on real stalls (`experiments/expert_caching_stalls.py`)."""

    bypass_margin: float = 0.0
    """A missing expert is streamed if its `keep` does not exceed the lowest resident one by this much."""
    keep_weight: float = 0.5
    """Loads that a copy is worth, per unit of `keep`."""
    prefetch_margin: float = 0.2
    """Loads that a prefetch must be expected to save, net of its victim. In the simulator 0.05 is a little faster; on a
    real machine a read also slows down the attention that it hides behind, by some tenths of a millisecond."""


@njit_borrowed
def keep_best(state, keys, margin, decision):
    """Victims with bypass: keep the best by `keep` of what is there and what comes in, stream the rest.

    The missing experts, from the highest `keep` down, contend for the slots from the lowest key up (free ones first),
    and win while they exceed it by `margin`. Which of them gets which slot is all the same: the slots are handed out
    in the order of `missing`, so that a choice does not depend on those that are still to come. Experts in use may go:
    they are done with when the layer is.
    """
    engine, experts, slots = state.engine[0], state.experts, state.slots
    victims, missing = decision.victims, state.missing
    layer, first, end = engine.layer, state.layers[engine.layer].first_slot, state.layers[engine.layer].end_slot
    for slot in range(first, end):
        kind, held = slot_kind(experts, slots, layer, slot), slots[slot]
        keys[slot] = np.inf  # may not be taken
        if kind == FREE:
            keys[slot] = -np.inf
        elif kind in (CANDIDATE, IN_USE):
            keys[slot] = experts[held.layer, held.expert].keep
    num_kept, last = 0, -1  # the first victims are the slots won, `last` the lowest winner
    while num_kept < engine.num_missing and first < end:
        rival, lowest = -1, first
        for i in range(engine.num_missing):
            if (last < 0 or is_kept_before(experts[layer], missing, last, i)) and (
                rival < 0 or is_kept_before(experts[layer], missing, i, rival)
            ):
                rival = i
        for slot in range(first, end):
            lowest = slot if keys[slot] < keys[lowest] else lowest
        if keys[lowest] >= experts[layer, missing[rival]].keep - margin:
            break
        victims[num_kept] = lowest
        keys[lowest] = np.inf
        num_kept, last = num_kept + 1, rival
    for i in range(engine.num_missing - 1, -1, -1):
        if last >= 0 and not is_kept_before(experts[layer], missing, last, i):
            num_kept -= 1
            victims[i] = victims[num_kept]
        else:
            victims[i] = BYPASS


@njit_borrowed
def is_kept_before(row, missing, i, j):
    """True if missing expert i is worth more than j; ties go to the lower number. row: the layer's experts."""
    keep, other = row[missing[i]].keep, row[missing[j]].keep
    return keep > other or (keep == other and i < j)


@njit_borrowed
def prefetch_best(state, keep_weight, margin, decision):
    """Prefetch for the layer above as long as a load is expected to save more than its victim was worth.

    In loads: gain = P(needed) * share of the load that is done when it is asked for + keep_weight * keep, the victim's
    worth = P(needed) + keep_weight * keep. The channel is free for prefetches once it has read what is missing now,
    until the next gate.
    """
    engine, experts, slots, plan = state.engine[0], state.experts, state.slots, decision.plan[0]
    above = (engine.layer + 1) % engine.num_layers
    if above == engine.layer or engine.load_s <= 0.0:
        return
    compute_s = engine.num_needed * engine.expert_s
    busy_s = engine.channel_s + engine.num_missing * engine.load_s
    window_s = engine.attention_s + max(compute_s - busy_s, engine.expert_s if busy_s > 0.0 else compute_s)
    while plan.num_prefetch < engine.max_prefetch:
        done = min(1.0, window_s / engine.load_s - plan.num_prefetch)
        if done < LEAST_DONE:
            return
        best, gain = -1, -np.inf
        for e in range(engine.num_experts):
            row = experts[above, e]
            value = row.predicted * done + keep_weight * row.keep
            if row.status == ABSENT and value > gain and not is_asked(decision, above, e):
                best, gain = e, value
        victim, worth = -1, np.inf
        for slot in range(state.layers[above].first_slot, state.layers[above].end_slot):
            kind, held = slot_kind(experts, slots, engine.layer, slot), slots[slot]
            if kind > CANDIDATE or is_taken(
                decision.victims, engine.num_missing, decision.prefetch, plan.num_prefetch, slot
            ):
                continue
            row = experts[held.layer, held.expert]
            value = -np.inf if kind == FREE else row.predicted + keep_weight * row.keep
            if value < worth:
                victim, worth = slot, value
        if best < 0 or victim < 0 or gain - max(worth, 0.0) <= margin:
            return
        prefetch(state, decision, above, best, victim)


@njit_borrowed
def is_asked(decision, layer, expert):
    """True if the decision has this prefetch."""
    for j in range(decision.plan[0].num_prefetch):
        if decision.prefetch[j, 0] == layer and decision.prefetch[j, 1] == expert:
            return True
    return False


@njit_borrowed
def by_advice(state, params, memory, decision):
    """Evict, bypass and prefetch by what a predictor wrote into `keep` and `predicted`. params: `Knobs`."""
    engine, keys = state.engine[0], memory
    if engine.bypass:
        keep_best(state, keys, params[0], decision)
    elif engine.num_missing > 0:
        for slot in range(state.layers[engine.layer].first_slot, state.layers[engine.layer].end_slot):
            held = state.slots[slot]
            if held.expert >= 0:
                keys[slot] = state.experts[held.layer, held.expert].keep
        evict_lowest(state, keys, decision)
    prefetch_best(state, params[1], params[2], decision)


def advice_rule(knobs: Knobs | None = None) -> Rule:
    """`by_advice` as a `Rule`: it needs a state whose `keep` and `predicted` somebody writes."""
    knobs = knobs or Knobs()
    return Rule("advice", by_advice, tuple(knobs), memory_per_expert=1, source="the learned score")
