"""What a cache policy may know and what it may ask for, as numba-friendly record arrays.

The same `State` and `Decision` are filled by the simulator (compiled) and by the real engine (from Python), so a
rule written over them runs unchanged in both. A `State` never holds the future: at (step, layer) nothing of the
present tokens' higher layers is in it, except what a predictor said (`predicted`), and of coming steps only what a
pre-gated model knows (`known`).

A *step* serves one token of each of B interleaved sequences; an *epoch* is one (step, layer), numbered
`step * num_layers + layer`. A *slot* holds one expert. Slots are numbered through all layers; layer l may use the slots
`layers[l].first_slot` to `layers[l].end_slot` (all slots, if the cache is pooled).

One epoch, in this order:

1. Attention and gate of the layer run; meanwhile the channel reads prefetches. The gate says which experts are
   `needed`: the union over the batch. Use is booked: last_use, frequencies, counts, history include the present epoch.
2. Needed experts that are QUEUED or LOADING are *late*: they keep their slot and overtake every other prefetch. The
   other needed experts that are not RESIDENT are `missing`, in increasing order of expert id.
3. The policy decides. `resolve_decision` (below) then makes the decision legal; every backend calls it first. What is
   late or missing is already being loaded meanwhile: that needs no decision, which says where it stays.
4. `cancel_queued`: prefetches that are QUEUED and not late are dropped, and their slots are free.
5. Missing expert i is loaded, in this order, after the late ones, and takes the slot `victims[i]`. Whatever else was in
   the slot is gone. If that is a needed expert (allowed with `bypass` only), the missing one takes the slot at the end
   of the epoch. With BYPASS it is forgotten then.
6. Prefetches are queued behind those in flight, in order: `prefetch[j]` = (layer, expert, slot). Their slots lose what
   they held now, and hold the QUEUED expert.
7. Loads on demand overtake prefetches at the next end of a chunk. The needed experts are computed, each as soon as it
   is there (`CostModel.overlap`); the time in which none can be computed is the stall. Then comes the next epoch.

A prefetched expert is QUEUED until its first chunk is being read, then LOADING, and RESIDENT when the last is there.
Without a policy's wish (AUTO) a missing expert takes a free slot, else that of the least recently used expert.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..core.kernel import njit_borrowed

ABSENT, RESIDENT, QUEUED, LOADING = 0, 1, 2, 3
"""Values of `experts["status"]`. All but ABSENT hold a slot; QUEUED and LOADING are in flight."""

AUTO, BYPASS = -2, -1
"""Values of a victim that are no slot: the backend's own choice (a free slot, else LRU); stream without caching."""

FREE, CANDIDATE, WAITING, IN_USE, FIXED = 0, 1, 2, 3, 4
"""Kinds of slots (`slot_kind`): holds nothing; holds a RESIDENT expert that this epoch does not need; promised to a
QUEUED prefetch that it does not need, which may be cancelled; holds a RESIDENT expert that it needs; being read into,
or promised to a late expert."""

EXPERT_DTYPE = np.dtype(
    [
        ("last_use", "i8"),  # epoch of the last use, -1: never used
        ("loaded", "i8"),  # epoch in which the copy in the slot was asked for, -1: none or there from the start
        ("frequency_50", "f4"),  # decayed frequency of use: f <- d * f + (1 - d) * used, once a step; d = 0.5
        ("frequency_90", "f4"),  # d = 0.9
        ("frequency_95", "f4"),  # d = 0.95
        ("frequency_99", "f4"),  # d = 0.99
        ("prior", "f4"),  # share of tokens that use it, by the workload's prior (top_k / num_experts without one)
        ("predicted", "f4"),  # a predictor's probability that this step needs it; 0: none, or not predicted yet
        ("keep", "f4"),  # a predictor's probability, at its layer's last epoch, of a next use soon; 0: no predictor
        ("seconds_left", "f4"),  # until it is RESIDENT, if QUEUED or LOADING and nothing overtakes it; else 0
        ("count", "i4"),  # uses by the sequences now in the batch, since each began
        ("slot", "i4"),  # -1: none
        ("status", "i4"),  # ABSENT, RESIDENT, QUEUED or LOADING
        ("needed", "i4"),  # 1 if the present epoch needs it
        ("in_host", "i4"),  # 1 if the tier behind the channel holds it
    ],
    align=True,
)

LAYER_DTYPE = np.dtype(
    [
        ("first_slot", "i8"),
        ("end_slot", "i8"),
        ("num_resident", "i8"),  # experts of this layer that are RESIDENT
        ("num_used", "i8"),  # needed experts so far, over all epochs of this layer
        ("num_missed", "i8"),  # of these, the ones that were not RESIDENT
        ("miss_rate", "f8"),  # exponential mean of missed / needed, decay 0.95 a step
    ],
    align=True,
)

SLOT_DTYPE = np.dtype([("layer", "i4"), ("expert", "i4")], align=True)
"""What a slot holds, or is promised to (in flight); expert -1: free."""

SEQUENCE_DTYPE = np.dtype(
    [
        ("sequence", "i8"),  # number of the sequence in this row of the batch, -1: the row is idle
        ("position", "i8"),  # of the present token in its sequence
        ("served", "i8"),  # tokens served in this row so far, the present one included: it is history[(served - 1) % W]
        ("token_id", "i8"),  # of the present token, -1: not recorded
    ],
    align=True,
)

ENGINE_DTYPE = np.dtype(
    [
        ("now_s", "f8"),
        ("last_stall_s", "f8"),  # stall of the latest epoch
        ("last_layer_s", "f8"),  # from the latest decision to this one
        ("attention_s", "f8"),  # CostModel.attention_s
        ("expert_s", "f8"),  # CostModel.expert_s
        ("load_s", "f8"),  # CostModel.load_s
        ("channel_s", "f8"),  # seconds until the channel has read all that is queued
        ("epoch", "i8"),
        ("step", "i8"),
        ("layer", "i8"),
        ("num_layers", "i8"),
        ("num_experts", "i8"),
        ("top_k", "i8"),
        ("num_sequences", "i8"),  # B, rows of the batch
        ("num_active", "i8"),  # rows that have a token in this step
        ("num_needed", "i8"),  # live length of `needed`
        ("num_missing", "i8"),  # live length of `missing`
        ("num_late", "i8"),  # needed experts that are in flight
        ("num_in_flight", "i8"),  # prefetches QUEUED or LOADING, the late ones included
        ("num_slots", "i8"),
        ("pooled", "i8"),  # 0 or 1
        ("bypass", "i8"),  # 0 or 1
        ("max_prefetch", "i8"),  # prefetches allowed in an epoch
        ("prefetch_depth", "i8"),  # allowed for layers layer + 1 .. layer + depth, modulo num_layers
        ("known_steps", "i8"),  # live length of `known`
        (
            "num_hits",
            "i8",
        ),  # of num_ready, those whose copy no prefetch brought for this use
        ("num_ready", "i8"),  # needed experts that were RESIDENT, prefetched ones included
        ("num_used", "i8"),  # needed experts
        ("num_demand_loads", "i8"),  # loads of missing experts, bypassed ones included
        ("num_prefetch_loads", "i8"),  # prefetches queued, less those cancelled
        ("num_bypassed", "i8"),
        ("num_illegal", "i8"),  # parts of decisions that `resolve_decision` had to replace or drop
    ],
    align=True,
)

PLAN_DTYPE = np.dtype([("num_prefetch", "i8"), ("cancel_queued", "i8")], align=True)


class State(NamedTuple):
    """What a policy may know now. L layers, E experts a layer, k a token, B rows, S slots, W tokens of history."""

    engine: np.ndarray  # (1,) ENGINE_DTYPE
    layers: np.ndarray  # (L,) LAYER_DTYPE
    experts: np.ndarray  # (L, E) EXPERT_DTYPE
    slots: np.ndarray  # (S,) SLOT_DTYPE
    needed: np.ndarray  # (min(E, B * k),) int64 expert ids of this layer, increasing; the first num_needed are live
    missing: np.ndarray  # (min(E, B * k),) int64 expert ids of this layer, increasing; the first num_missing are live
    sequences: np.ndarray  # (B,) SEQUENCE_DTYPE
    history: np.ndarray  # (B, W, L, k) int16 expert ids of the last W tokens of each row, a ring; -1: not known (yet)
    counts: np.ndarray  # (B, L, E) int32 uses by the present sequence of each row
    known: np.ndarray  # (known_steps, B, L, k) int16 expert ids of the next steps, -1: no token


class Decision(NamedTuple):
    """What the policy asks for in this epoch. `reset_decision` gives the backend's own default: LRU, no prefetch."""

    plan: np.ndarray  # (1,) PLAN_DTYPE
    victims: np.ndarray  # (min(E, B * k),) int64: slot for missing[i], or AUTO, or BYPASS
    prefetch: np.ndarray  # (max_prefetch, 3) int64: layer, expert, slot (or AUTO); the first num_prefetch are live


def empty_state(
    slots: tuple[int, ...],
    num_experts: int,
    top_k: int,
    *,
    num_sequences: int = 1,
    history_tokens: int = 1,
    known_steps: int = 0,
    pooled: bool = False,
) -> State:
    """The State of an empty cache with `slots[l]` slots for layer l, before the first step.

    The caller fills the limits and costs of `engine` and the priors of the experts.
    """
    layers_, b, most = len(slots), num_sequences, min(num_experts, num_sequences * top_k)
    state = State(
        np.zeros(1, ENGINE_DTYPE),
        np.zeros(layers_, LAYER_DTYPE),
        np.zeros((layers_, num_experts), EXPERT_DTYPE),
        np.zeros(sum(slots), SLOT_DTYPE),
        np.zeros(most, np.int64),
        np.zeros(most, np.int64),
        np.zeros(b, SEQUENCE_DTYPE),
        np.full((b, history_tokens, layers_, top_k), -1, np.int16),
        np.zeros((b, layers_, num_experts), np.int32),
        np.full((known_steps, b, layers_, top_k), -1, np.int16),
    )
    engine = state.engine[0]
    engine["num_layers"], engine["num_experts"], engine["top_k"] = layers_, num_experts, top_k
    engine["num_sequences"], engine["num_slots"], engine["pooled"] = b, sum(slots), pooled
    ends = np.cumsum(slots)
    state.layers["first_slot"] = 0 if pooled else ends - slots
    state.layers["end_slot"] = sum(slots) if pooled else ends
    state.experts["slot"] = -1
    state.experts["last_use"] = -1
    state.experts["loaded"] = -1
    state.experts["in_host"] = 1
    state.experts["prior"] = top_k / num_experts
    state.slots["layer"] = -1 if pooled else np.repeat(np.arange(layers_), slots)
    state.slots["expert"] = -1
    state.sequences["sequence"] = -1
    state.sequences["token_id"] = -1
    return state


def empty_decision(state: State, max_prefetch: int) -> Decision:
    """A Decision for that State, zeroed."""
    return Decision(
        np.zeros(1, PLAN_DTYPE), np.zeros(len(state.missing), np.int64), np.zeros((max_prefetch, 3), np.int64)
    )


@njit_borrowed
def reset_decision(state: State, decision: Decision) -> None:
    """Fill `decision` with the backend's default: every victim AUTO, nothing prefetched."""
    decision.plan[0].num_prefetch = 0
    decision.plan[0].cancel_queued = 0
    for i in range(state.engine[0].num_missing):
        decision.victims[i] = AUTO


# What is called once a slot takes arrays, not a State, whose many fields would cost more to hand over than the work.


@njit_borrowed
def slot_kind(experts, slots, layer: int, slot: int) -> int:
    """FREE, CANDIDATE, WAITING, IN_USE or FIXED: what a decision at `layer` may do with a slot.

    Args:
        experts: `State.experts`.
        slots: `State.slots`.
        layer: the present layer, `engine.layer`.
        slot: its number.
    """
    held = slots[slot]
    if held.expert < 0:
        return FREE
    row = experts[held.layer, held.expert]
    needed = row.needed != 0 and held.layer == layer
    if row.status == RESIDENT:
        return IN_USE if needed else CANDIDATE
    return WAITING if row.status == QUEUED and not needed else FIXED


@njit_borrowed
def is_taken(victims, num_victims: int, prefetch, num_prefetch: int, slot: int) -> bool:
    """True if the first `num_victims` victims or the first `num_prefetch` prefetches have this slot."""
    for i in range(num_victims):
        if victims[i] == slot:
            return True
    for j in range(num_prefetch):  # noqa: SIM110 (numba compiles no generators)
        if prefetch[j, 2] == slot:
            return True
    return False


@njit_borrowed
def least_recently_used(state: State, decision: Decision, target: int, num_victims: int, num_prefetch: int) -> int:
    """A free slot of layer `target`, else that of its least recently used candidate; BYPASS if there is none.

    Slots of the first `num_victims` victims and `num_prefetch` prefetches are taken. Ties go to the lower slot.
    """
    experts, slots, victims, prefetch = state.experts, state.slots, decision.victims, decision.prefetch
    layer, of_target, cancel = state.engine[0].layer, state.layers[target], decision.plan[0].cancel_queued
    best, oldest = BYPASS, np.int64(0)
    for slot in range(of_target.first_slot, of_target.end_slot):
        kind = slot_kind(experts, slots, layer, slot)
        if kind == FREE or (kind == WAITING and cancel):
            if not is_taken(victims, num_victims, prefetch, num_prefetch, slot):
                return slot
        elif kind == CANDIDATE:
            last_use = experts[slots[slot].layer, slots[slot].expert].last_use
            if (best < 0 or last_use < oldest) and not is_taken(victims, num_victims, prefetch, num_prefetch, slot):
                best, oldest = slot, last_use
    return best


@njit_borrowed
def resolve_decision(state: State, decision: Decision) -> int:
    """Make the decision legal: AUTO becomes a slot, illegal victims become AUTO first, illegal prefetches are dropped.

    Legal victims are slots of the present layer that are FREE, WAITING if they are cancelled, CANDIDATE, or with bypass
    IN_USE, each taken once; BYPASS is legal with bypass, and is what remains when no slot is left. Legal prefetches are
    ABSENT experts of the layers within `prefetch_depth`, not asked for twice, into slots of their layer that are FREE,
    WAITING if they are cancelled, or CANDIDATE. Returns the number of illegal parts.
    """
    engine, plan = state.engine[0], decision.plan[0]
    experts, slots, victims, prefetch = state.experts, state.slots, decision.victims, decision.prefetch
    layer, num_missing = engine.layer, engine.num_missing
    first, end = state.layers[layer].first_slot, state.layers[layer].end_slot
    illegal = 0
    for i in range(num_missing):
        slot = victims[i]
        if slot == BYPASS and engine.bypass:
            continue
        if slot != AUTO:
            if first <= slot < end and not is_taken(victims, i, prefetch, 0, slot):
                kind = slot_kind(experts, slots, layer, slot)
                if kind <= CANDIDATE or (kind == WAITING and plan.cancel_queued) or (kind == IN_USE and engine.bypass):
                    continue
            illegal += 1
        victims[i] = least_recently_used(state, decision, layer, i, 0)
    asked = min(plan.num_prefetch, engine.max_prefetch)
    illegal += plan.num_prefetch - asked
    plan.num_prefetch = 0
    for j in range(asked):
        target, expert, slot = prefetch[j, 0], prefetch[j, 1], prefetch[j, 2]
        if not is_legal_prefetch(state, decision, target, expert):
            illegal += 1
            continue
        if slot == AUTO:
            slot = least_recently_used(state, decision, target, num_missing, plan.num_prefetch)
            if slot < 0:
                continue  # no room is no mistake
        elif not state.layers[target].first_slot <= slot < state.layers[target].end_slot or is_taken(
            victims, num_missing, prefetch, plan.num_prefetch, slot
        ):
            illegal += 1
            continue
        kind = slot_kind(experts, slots, layer, slot)
        if kind <= CANDIDATE or (kind == WAITING and plan.cancel_queued):
            prefetch[plan.num_prefetch, 0] = target
            prefetch[plan.num_prefetch, 1] = expert
            prefetch[plan.num_prefetch, 2] = slot
            plan.num_prefetch += 1
        else:
            illegal += 1
    engine.num_illegal += illegal
    return illegal


@njit_borrowed
def is_legal_prefetch(state: State, decision: Decision, target: int, expert: int) -> bool:
    """True if (layer `target`, expert) may be prefetched and is not among the first `num_prefetch` prefetches."""
    engine = state.engine[0]
    if not (0 <= target < engine.num_layers and 0 <= expert < engine.num_experts):
        return False
    distance = (target - engine.layer) % engine.num_layers
    if not 1 <= distance <= engine.prefetch_depth and engine.num_layers > 1:
        return False
    row = state.experts[target, expert]
    cancelled = decision.plan[0].cancel_queued and row.status == QUEUED
    if row.needed and target == engine.layer:
        return False
    if row.status != ABSENT and not cancelled:
        return False
    for j in range(decision.plan[0].num_prefetch):
        if decision.prefetch[j, 0] == target and decision.prefetch[j, 1] == expert:
            return False
    return True
