"""The offloaded model, simulated: numba kernels over plain arrays. `state.py` says what one epoch does.

`Sim` holds one run: what a policy may see (`state`), what it may not (the routing), and the record of the run. Kernels
change it in place.

The channel reads one chunk at a time. `books.channel_s` is the time until which chunks are committed; as long as
prefetches are queued the channel is busy, so whatever starts before the present time is committed when that time is
reached (`read_prefetches`), and loads on demand start at `channel_s` at the earliest. They never outlive their epoch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..core.errors import InputError
from ..core.interface import Outcome
from ..core.kernel import UNCOUNTED, njit, njit_borrowed, njit_inlined
from .rule import Rule
from .spec import ExpertCachingSpec
from .state import (
    ABSENT,
    BYPASS,
    IN_USE,
    LOADING,
    QUEUED,
    RESIDENT,
    WAITING,
    Decision,
    State,
    empty_decision,
    empty_state,
    reset_decision,
    resolve_decision,
    slot_kind,
)
from .timeline import BYPASSED, DEMAND, LOAD_DTYPE, PREFETCH, SWAPPED, Timeline
from .workload import Workload, interleave

COST_DTYPE = np.dtype(
    [
        ("attention_s", "f8"),
        ("attention_token_s", "f8"),
        ("expert_s", "f8"),
        ("expert_token_s", "f8"),
        ("step_s", "f8"),
        ("decision_s", "f8"),
        ("chunk_s", "f8"),  # a whole chunk from the tier behind the channel
        ("last_chunk_s", "f8"),  # the last chunk of an expert
        ("store_chunk_s", "f8"),  # the same from the store below
        ("store_last_chunk_s", "f8"),
        ("chunks", "i8"),
        ("overlap", "i8"),
        ("eviction_only", "i8"),
        ("host_experts", "i8"),  # experts that the tier behind the channel holds
    ],
    align=True,
)

BOOKS_DTYPE = np.dtype(
    [
        ("channel_s", "f8"),  # chunks are committed until then
        ("num_steps", "i8"),
        ("num_queued", "i8"),  # live length of `queue`
        ("num_in_host", "i8"),
        ("recording", "i8"),
        ("num_loads", "i8"),  # live length of `loads`
        ("total_stall_s", "f8"),
        ("done", "i8"),
    ],
    align=True,
)

QUEUE_DTYPE = np.dtype(
    [
        ("chunk_s", "f8"),
        ("last_chunk_s", "f8"),
        ("layer", "i8"),
        ("expert", "i8"),
        ("ready_s", "f8"),  # end of its last chunk, once that is committed (chunks_left is 0)
        ("chunks_left", "i8"),
        ("load", "i8"),  # its row of `loads`, -1 if not recording
    ],
    align=True,
)

EPOCH_DTYPE = np.dtype(
    [("start_s", "f8"), ("end_s", "f8"), ("stall_s", "f8"), ("used", "i8"), ("ready", "i8"), ("hits", "i8")], align=True
)


class Sim(NamedTuple):
    """One simulated run. T tokens of routing, Q slots, I epochs."""

    state: State
    experts: np.ndarray  # (T, L, k) int16, the future
    predicted: np.ndarray  # (T, L, M) int16
    predicted_probability: np.ndarray  # (T, L, M) float32
    token_ids: np.ndarray  # (T,) int64
    token_sequence: np.ndarray  # (T,) int64
    token_position: np.ndarray  # (T,) int64
    batches: np.ndarray  # (steps, B) int64
    cost: np.ndarray  # (1,) COST_DTYPE
    books: np.ndarray  # (1,) BOOKS_DTYPE
    uses: np.ndarray  # (E,) int64: tokens of the batch that use each expert of the layer
    queue: np.ndarray  # (Q,) QUEUE_DTYPE: prefetches in flight, in order
    loads: np.ndarray  # (N,) LOAD_DTYPE (only if recording)
    epochs: np.ndarray  # (I,) EPOCH_DTYPE (only if recording)


# ----------------------------------------------------------------------------------------------- the channel


@njit_borrowed
def remaining_s(item) -> float:
    """Seconds that the channel needs for the chunks of a queued prefetch that it has not begun."""
    if item.chunks_left == 0:
        return 0.0
    return (item.chunks_left - 1) * item.chunk_s + item.last_chunk_s


@njit_borrowed
def remove_queued(sim: Sim, place: int) -> None:
    """Take a prefetch out of the queue."""
    books = sim.books[0]
    for i in range(place, books.num_queued - 1):
        sim.queue[i] = sim.queue[i + 1]
    books.num_queued -= 1
    sim.state.engine[0].num_in_flight -= 1


@njit_borrowed
def become_resident(sim: Sim, layer: int, expert: int, load: int, ready_s: float) -> None:
    """The expert is in its slot."""
    row = sim.state.experts[layer, expert]
    row.status = RESIDENT
    row.seconds_left = 0.0
    sim.state.layers[layer].num_resident += 1
    if load >= 0:
        sim.loads[load].ready_s = ready_s


@njit_borrowed
def read_prefetches(sim: Sim, until_s: float) -> None:
    """Let the channel read prefetches: every chunk that begins before `until_s` is committed."""
    books = sim.books[0]
    while books.num_queued > 0:
        item = sim.queue[0]
        if item.chunks_left == 0:
            if item.ready_s > until_s:
                return
            become_resident(sim, item.layer, item.expert, item.load, item.ready_s)
            remove_queued(sim, 0)
            continue
        if books.channel_s >= until_s:
            return
        sim.state.experts[item.layer, item.expert].status = LOADING
        begun = min(item.chunks_left, max(1, int(np.ceil((until_s - books.channel_s) / item.chunk_s))))
        books.channel_s += begun * item.chunk_s
        if begun == item.chunks_left:
            books.channel_s += item.last_chunk_s - item.chunk_s
            item.ready_s = books.channel_s
        item.chunks_left -= begun


@njit_borrowed
def fetch_to_host(sim: Sim, layer: int, expert: int) -> bool:
    """Make sure that the tier behind the channel holds the expert. True if it had to come from the store below.

    Where that tier is full, its least recently used expert that is in no slot is dropped.
    """
    state, books = sim.state, sim.books[0]
    row = state.experts[layer, expert]
    if row.in_host:
        return False
    row.in_host = 1
    books.num_in_host += 1
    if books.num_in_host > sim.cost[0].host_experts:
        oldest, of_layer, of_expert = np.int64(1 << 62), -1, -1
        for other in range(state.experts.shape[0]):
            for e in range(state.experts.shape[1]):
                held = state.experts[other, e]
                if held.in_host and held.slot < 0 and held.last_use < oldest and not (other == layer and e == expert):
                    oldest, of_layer, of_expert = held.last_use, other, e
        if of_layer >= 0:
            state.experts[of_layer, of_expert].in_host = 0
            books.num_in_host -= 1
    return True


@njit_borrowed
def record_load(sim: Sim, layer: int, expert: int, slot: int, kind: int) -> int:
    """Note a load that is asked for now. Returns its row of `loads`, -1 if not recording."""
    books = sim.books[0]
    if not books.recording:
        return -1
    load = sim.loads[books.num_loads]
    load.epoch = sim.state.engine[0].epoch
    load.ready_s = np.nan
    load.cancelled = -1
    load.layer = layer
    load.expert = expert
    load.slot = slot
    load.kind = kind
    books.num_loads += 1
    return books.num_loads - 1


# ------------------------------------------------------------------------------------------------- the slots


@njit_borrowed
def vacate(experts, slots, layers, slot: int) -> None:
    """Forget what the slot holds. (Arrays of the State: these two run for every load.)"""
    held = slots[slot]
    if held.expert >= 0:
        row = experts[held.layer, held.expert]
        if row.status == RESIDENT:
            layers[held.layer].num_resident -= 1
        row.status = ABSENT
        row.slot = -1
        row.seconds_left = 0.0
        held.expert = -1


@njit_borrowed
def occupy(experts, slots, layers, slot: int, layer: int, expert: int, status: int, epoch: int) -> None:
    """Give a slot to an expert, and forget what it held."""
    vacate(experts, slots, layers, slot)
    slots[slot].layer = layer
    slots[slot].expert = expert
    row = experts[layer, expert]
    row.slot = slot
    row.status = status
    row.loaded = epoch
    if status == RESIDENT:
        layers[layer].num_resident += 1


@njit_borrowed
def cancel_queued(sim: Sim) -> None:
    """Drop the prefetches that were not begun and are not needed now."""
    state = sim.state
    place = 0
    while place < sim.books[0].num_queued:
        item = sim.queue[place]
        slot = state.experts[item.layer, item.expert].slot
        if slot_kind(state.experts, state.slots, state.engine[0].layer, slot) == WAITING:
            if item.load >= 0:
                sim.loads[item.load].cancelled = state.engine[0].epoch
            vacate(state.experts, state.slots, state.layers, slot)
            remove_queued(sim, place)
            state.engine[0].num_prefetch_loads -= 1
        else:
            place += 1


# ------------------------------------------------------------------------------------------------- one epoch


@njit_inlined
def load_on_demand(sim: Sim, decision: Decision) -> float:
    """Load the late and the missing experts, and compute what is needed. Returns the stall in seconds.

    Sets `engine.now_s` to the end of the layer.
    """
    state, engine, books, cost = sim.state, sim.state.engine[0], sim.books[0], sim.cost[0]
    experts, slots, layers, uses, needed = state.experts, state.slots, state.layers, sim.uses, state.needed
    layer, epoch, now_s = engine.layer, engine.epoch, engine.now_s
    compute_s = 0.0
    decided_s = now_s + cost.decision_s
    computed_s = decided_s  # end of the experts computed so far
    for i in range(engine.num_needed):
        seconds = cost.expert_s + cost.expert_token_s * uses[needed[i]]
        compute_s += seconds
        if experts[layer, needed[i]].status == RESIDENT:
            computed_s += seconds
    channel_s = max(books.channel_s, now_s)
    last_ready_s = now_s
    place = 0
    while engine.num_late > 0 and place < books.num_queued:
        item = sim.queue[place]
        if item.layer != layer or experts[layer, item.expert].needed == 0:
            place += 1
            continue
        channel_s += remaining_s(item)
        last_ready_s = item.ready_s if item.chunks_left == 0 else channel_s
        computed_s = max(computed_s, last_ready_s) + cost.expert_s + cost.expert_token_s * uses[item.expert]
        become_resident(sim, layer, item.expert, item.load, last_ready_s)
        remove_queued(sim, place)
    for i in range(engine.num_missing):
        expert, slot = state.missing[i], decision.victims[i]
        if cost.eviction_only == 0:
            from_store = fetch_to_host(sim, layer, expert)
            channel_s += (cost.chunks - 1) * (cost.store_chunk_s if from_store else cost.chunk_s)
            channel_s += cost.store_last_chunk_s if from_store else cost.last_chunk_s
            last_ready_s = channel_s
        computed_s = max(computed_s, last_ready_s) + cost.expert_s + cost.expert_token_s * uses[expert]
        kind = DEMAND
        if slot == BYPASS:
            kind = BYPASSED
            engine.num_bypassed += 1
        elif slot_kind(experts, slots, layer, slot) == IN_USE:
            kind = SWAPPED  # takes the slot when the layer is computed: `swap_in`
        else:
            occupy(experts, slots, layers, slot, layer, expert, RESIDENT, epoch)
        if books.recording:
            sim.loads[record_load(sim, layer, expert, slot, kind)].ready_s = last_ready_s
    engine.num_demand_loads += engine.num_missing
    if channel_s > now_s:
        books.channel_s = channel_s
    if cost.overlap == 0:
        computed_s = max(decided_s, last_ready_s) + compute_s
    engine.now_s = computed_s
    return max(computed_s - decided_s - compute_s, 0.0)


@njit_borrowed
def swap_in(sim: Sim, decision: Decision) -> None:
    """Give slots of needed experts to the missing ones that were loaded apart for them."""
    state, engine = sim.state, sim.state.engine[0]
    for i in range(engine.num_missing):
        expert, slot = state.missing[i], decision.victims[i]
        if slot != BYPASS and state.slots[slot].expert != expert:
            occupy(state.experts, state.slots, state.layers, slot, engine.layer, expert, RESIDENT, engine.epoch)


@njit_borrowed
def queue_prefetches(sim: Sim, decision: Decision) -> None:
    """Queue the decision's prefetches behind those in flight; their slots are theirs from now on."""
    state, engine, books, cost = sim.state, sim.state.engine[0], sim.books[0], sim.cost[0]
    for j in range(decision.plan[0].num_prefetch):
        layer, expert, slot = decision.prefetch[j, 0], decision.prefetch[j, 1], decision.prefetch[j, 2]
        occupy(state.experts, state.slots, state.layers, slot, layer, expert, QUEUED, engine.epoch)
        from_store = fetch_to_host(sim, layer, expert)
        if books.num_queued == 0:
            books.channel_s = max(books.channel_s, engine.now_s)
        item = sim.queue[books.num_queued]
        item.layer = layer
        item.expert = expert
        item.chunks_left = cost.chunks
        item.chunk_s = cost.store_chunk_s if from_store else cost.chunk_s
        item.last_chunk_s = cost.store_last_chunk_s if from_store else cost.last_chunk_s
        item.load = record_load(sim, layer, expert, slot, PREFETCH)
        books.num_queued += 1
        engine.num_in_flight += 1
        engine.num_prefetch_loads += 1


@njit_borrowed
def await_decision(sim: Sim, decision: Decision, decided_s: float) -> None:
    """Keep the channel from reading the decision's prefetches before it is made, if it has nothing else to read."""
    books, num_new = sim.books[0], decision.plan[0].num_prefetch
    num_left = 0
    for place in range(books.num_queued - num_new):
        num_left += sim.queue[place].chunks_left
    if num_new > 0 and num_left == 0:
        books.channel_s = max(books.channel_s, decided_s)


@njit_borrowed
def run_epoch(sim: Sim, decision: Decision) -> bool:
    """Execute one decision and go on to the next gate. False when the workload is finished."""
    state, engine, books = sim.state, sim.state.engine[0], sim.books[0]
    start_s = engine.now_s
    resolve_decision(state, decision)
    if decision.plan[0].cancel_queued:
        cancel_queued(sim)
    if decision.plan[0].num_prefetch > 0:  # queued first, and overtaken at once by the loads on demand
        queue_prefetches(sim, decision)
    stall_s = load_on_demand(sim, decision)
    await_decision(sim, decision, start_s + sim.cost[0].decision_s)
    if engine.bypass:
        swap_in(sim, decision)
    engine.last_stall_s = stall_s
    books.total_stall_s += stall_s
    if books.recording:
        epoch = sim.epochs[engine.epoch]
        epoch.start_s = start_s
        epoch.end_s = engine.now_s
        epoch.stall_s = stall_s
    more = begin_epoch(sim)
    engine.last_layer_s = engine.now_s - start_s
    return more


@njit_inlined
def begin_epoch(sim: Sim) -> bool:
    """Attention and gate of the next epoch: its needed and missing experts. False when there is none."""
    state, engine, books, cost = sim.state, sim.state.engine[0], sim.books[0], sim.cost[0]
    for i in range(engine.num_needed):
        state.experts[engine.layer, state.needed[i]].needed = 0
    engine.num_needed = 0
    engine.num_missing = 0
    engine.num_late = 0
    engine.epoch += 1
    engine.layer = engine.epoch % engine.num_layers
    engine.step = engine.epoch // engine.num_layers
    if engine.step >= books.num_steps:
        books.done = 1
        return False
    if engine.layer == 0:
        if engine.step > 0:
            engine.now_s += cost.step_s
        begin_step(sim)
    engine.now_s += cost.attention_s + cost.attention_token_s * engine.num_active
    read_prefetches(sim, engine.now_s)
    ask_gate(sim)
    book_uses(sim)
    if sim.predicted.shape[2] > 0:
        show_predictions(sim)
    show_channel(sim)
    return True


@njit_borrowed
def begin_step(sim: Sim) -> None:
    """Bring the rows of the batch to their next tokens; forget the counts of sequences that ended."""
    state, engine = sim.state, sim.state.engine[0]
    engine.num_active = 0
    window = state.history.shape[1]
    for b in range(engine.num_sequences):
        row = state.sequences[b]
        token = sim.batches[engine.step, b]
        sequence = -1 if token < 0 else sim.token_sequence[token]
        if sequence != row.sequence:
            if row.sequence >= 0:
                for layer in range(engine.num_layers):
                    for e in range(engine.num_experts):
                        state.experts[layer, e].count -= state.counts[b, layer, e]
                        state.counts[b, layer, e] = 0
            row.sequence = sequence
        if token < 0:
            row.token_id = -1
            continue
        row.position = sim.token_position[token]
        row.token_id = sim.token_ids[token]
        state.history[b, row.served % window] = -1
        row.served += 1
        engine.num_active += 1
    for ahead in range(state.known.shape[0]):
        for b in range(engine.num_sequences):
            step = engine.step + 1 + ahead
            token = sim.batches[step, b] if step < sim.books[0].num_steps else -1
            for layer in range(engine.num_layers):
                for i in range(engine.top_k):
                    state.known[ahead, b, layer, i] = -1 if token < 0 else sim.experts[token, layer, i]


@njit_inlined
def ask_gate(sim: Sim) -> None:
    """List the needed experts, count how many tokens use each, and write them into the history."""
    state, engine = sim.state, sim.state.engine[0]
    uses, needed, history, counts, routing = sim.uses, state.needed, state.history, state.counts, sim.experts
    layer, window = engine.layer, history.shape[1]
    uses[:] = 0
    num_needed = 0
    for b in range(engine.num_sequences):
        token = sim.batches[engine.step, b]
        if token < 0:
            continue
        place = (state.sequences[b].served - 1) % window
        for i in range(engine.top_k):
            expert = routing[token, layer, i]
            history[b, place, layer, i] = expert
            counts[b, layer, expert] += 1
            if uses[expert] == 0:
                at = num_needed
                while at > 0 and needed[at - 1] > expert:
                    needed[at] = needed[at - 1]
                    at -= 1
                needed[at] = expert
                num_needed += 1
            uses[expert] += 1
    engine.num_needed = num_needed


@njit_inlined
def book_uses(sim: Sim) -> None:
    """Update what the state says of the layer's experts, and list the missing ones."""
    state, engine = sim.state, sim.state.engine[0]
    layer, experts, needed, missing = (
        state.layers[engine.layer],
        state.experts[engine.layer],
        state.needed,
        state.missing,
    )
    for e in range(len(experts)):
        row = experts[e]
        row.frequency_50 *= np.float32(0.5)
        row.frequency_90 *= np.float32(0.9)
        row.frequency_95 *= np.float32(0.95)
        row.frequency_99 *= np.float32(0.99)
    used, ready, hits, num_missing = engine.num_needed, 0, 0, 0
    for i in range(used):
        row = experts[needed[i]]
        row.frequency_50 += np.float32(0.5)
        row.frequency_90 += np.float32(0.1)
        row.frequency_95 += np.float32(0.05)
        row.frequency_99 += np.float32(0.01)
        if row.status == RESIDENT:
            ready += 1
            hits += row.loaded <= row.last_use or row.loaded < 0
        elif row.status == ABSENT:
            missing[num_missing] = needed[i]
            num_missing += 1
        row.needed = 1
        row.last_use = engine.epoch
        row.count += sim.uses[needed[i]]
    engine.num_missing = num_missing
    engine.num_late = used - ready - num_missing
    engine.num_used += used
    engine.num_ready += ready
    engine.num_hits += hits
    layer.num_used += used
    layer.num_missed += used - ready
    if used > 0:
        layer.miss_rate += 0.05 * ((used - ready) / used - layer.miss_rate)
    if sim.books[0].recording:
        epoch = sim.epochs[engine.epoch]
        epoch.used = used
        epoch.ready = ready
        epoch.hits = hits


@njit_borrowed
def show_predictions(sim: Sim) -> None:
    """Show what the predictor says of the next layer; forget what it said of this one."""
    state, engine = sim.state, sim.state.engine[0]
    experts = state.experts[engine.layer]
    for e in range(engine.num_experts):
        experts[e].predicted = 0.0
    target = engine.layer + 1
    if target == engine.num_layers:
        return
    for b in range(engine.num_sequences):
        token = sim.batches[engine.step, b]
        if token < 0:
            continue
        for i in range(sim.predicted.shape[2]):
            expert = sim.predicted[token, target, i]
            if expert >= 0:
                row = state.experts[target, expert]
                row.predicted = max(row.predicted, sim.predicted_probability[token, target, i])


@njit_inlined
def show_channel(sim: Sim) -> None:
    """Bring up to date what the state says of the channel and of what is in flight."""
    engine, books = sim.state.engine[0], sim.books[0]
    left_s = max(books.channel_s - engine.now_s, 0.0)
    for place in range(books.num_queued):
        item = sim.queue[place]
        left_s += remaining_s(item)
        own_s = item.ready_s - engine.now_s if item.chunks_left == 0 else left_s
        sim.state.experts[item.layer, item.expert].seconds_left = own_s
    engine.channel_s = left_s


# ----------------------------------------------------------------------------------------------- whole runs


@njit_inlined
def has_room(sim: Sim) -> bool:
    """True if the record has room for one more epoch."""
    most = len(sim.state.missing) + sim.state.engine[0].max_prefetch
    return not sim.books[0].recording or sim.books[0].num_loads + most <= len(sim.loads)


@njit(**UNCOUNTED)
def run_rule(sim: Sim, decide, params, memory, decision: Decision) -> bool:
    """Run to the end under a compiled rule `decide(state, params, memory, decision)`.

    Returns False when the record is full: make room and call again.
    """
    state, books = sim.state, sim.books
    while not books[0].done:
        if not has_room(sim):
            return False
        reset_decision(state, decision)
        decide(state, params, memory, decision)
        run_epoch(sim, decision)
    return True


@njit_borrowed
def start(sim: Sim, warm: bool) -> None:
    """Empty the cache, or fill it with the experts of highest prior, and go to the first epoch.

    The caller has filled the routing, the cost, and limits and priors of the state.
    """
    state, engine, books = sim.state, sim.state.engine[0], sim.books[0]
    books.num_queued = 0
    books.num_loads = 0
    books.channel_s = 0.0
    books.total_stall_s = 0.0
    books.done = 0
    for slot in range(len(state.slots)):
        state.slots[slot].expert = -1
    for layer in range(engine.num_layers):
        for e in range(engine.num_experts):
            row = state.experts[layer, e]
            row.last_use = -1
            row.loaded = -1
            row.frequency_50 = 0.0
            row.frequency_90 = 0.0
            row.frequency_95 = 0.0
            row.frequency_99 = 0.0
            row.predicted = 0.0
            row.keep = 0.0
            row.seconds_left = 0.0
            row.count = 0
            row.slot = -1
            row.status = ABSENT
            row.needed = 0
        of_layer = state.layers[layer]
        of_layer.num_resident = 0
        of_layer.num_used = 0
        of_layer.num_missed = 0
        of_layer.miss_rate = 0.0
    for b in range(engine.num_sequences):
        row = state.sequences[b]
        row.sequence = -1
        row.position = 0
        row.served = 0
        row.token_id = -1
    state.history[:] = -1
    state.counts[:] = 0
    if warm:
        fill(state)
    fill_host(sim)
    engine.now_s = 0.0
    engine.last_stall_s = 0.0
    engine.last_layer_s = 0.0
    engine.epoch = -1
    engine.layer = 0
    engine.num_needed = 0
    engine.num_in_flight = 0
    engine.num_hits = 0
    engine.num_ready = 0
    engine.num_used = 0
    engine.num_demand_loads = 0
    engine.num_prefetch_loads = 0
    engine.num_bypassed = 0
    engine.num_illegal = 0
    begin_epoch(sim)


@njit_borrowed
def fill(state: State) -> None:
    """Fill all slots with the experts of highest prior; ties go to the lower layer and id."""
    engine = state.engine[0]
    slot = 0
    groups = 1 if engine.pooled else engine.num_layers
    for group in range(groups):
        end = engine.num_slots if engine.pooled else state.layers[group].end_slot
        first = 0 if engine.pooled else group
        last = engine.num_layers if engine.pooled else group + 1
        while slot < end:
            best_layer, best, highest = -1, -1, np.float32(-1.0)
            for layer in range(first, last):
                for e in range(engine.num_experts):
                    row = state.experts[layer, e]
                    if row.status == ABSENT and row.prior > highest:
                        best_layer, best, highest = layer, e, row.prior
            if best < 0:
                slot = end
                break
            occupy(state.experts, state.slots, state.layers, slot, best_layer, best, RESIDENT, -1)
            slot += 1


@njit_borrowed
def fill_host(sim: Sim) -> None:
    """Fill the tier behind the channel: what is in slots, then in order of layer and id."""
    state, books = sim.state, sim.books[0]
    books.num_in_host = 0
    for in_slot in (True, False):
        for layer in range(state.experts.shape[0]):
            for e in range(state.experts.shape[1]):
                row = state.experts[layer, e]
                if (row.slot >= 0) == in_slot:
                    row.in_host = books.num_in_host < sim.cost[0].host_experts
                    books.num_in_host += row.in_host


class Simulator:
    """The simulated model as a `Backend`, clock "model".

    Args:
        spec: slots, what may be done with them, cost model.
        recording: keep the record that `timeline` returns.
    """

    clock = "model"

    def __init__(self, spec: ExpertCachingSpec, *, recording: bool = True) -> None:
        self.spec = spec
        self.capacity = spec
        self.recording = recording
        self._sim: Sim | None = None

    def reset(self, workload: Workload, seed: int = 0, *, batches: np.ndarray | None = None) -> None:
        """Load a workload and go to its first epoch (the simulator draws nothing: `seed` is for other backends).

        Args:
            workload: the routing.
            seed: not used.
            batches: int (steps, B) tokens of each step, -1 idle; default `interleave`. For policies that regroup.
        """
        self.workload = workload
        self._sim = new_sim(self.spec, workload, self.recording, batches)
        self._initial = np.stack([self._sim.state.slots["layer"], self._sim.state.slots["expert"]], 1).astype(np.int64)
        self._decision = empty_decision(self._sim.state, self.spec.max_prefetch)

    @property
    def sim(self) -> Sim:
        """The arrays of the simulation."""
        if self._sim is None:
            raise RuntimeError("no workload loaded: call reset(workload) first")
        return self._sim

    def state(self) -> State:
        """The live State."""
        return self.sim.state

    def default_decision(self) -> Decision:
        """This backend's Decision, filled with the default (LRU, no prefetch)."""
        reset_decision(self.sim.state, self._decision)
        return self._decision

    def step(self, decision: Decision) -> Outcome:
        """One epoch, then attention and gate of the next."""
        if self.sim.books[0]["done"]:
            return Outcome(0.0, True)
        if not has_room(self.sim):
            self.make_room()
        more = run_epoch(self.sim, decision)
        return Outcome(float(self.sim.state.engine[0]["last_layer_s"]), not more)

    def run(self, rule: Rule) -> None:
        """Run the rest of the workload under a compiled rule."""
        check_shape(rule, self.workload)
        memory = rule.new_memory(self.sim.state)
        while not run_rule(self.sim, rule.decide_kernel, rule.param_array, memory, self._decision):
            self.make_room()

    def make_room(self) -> None:
        """Double the room of the record."""
        loads = self.sim.loads
        self._sim = self.sim._replace(loads=np.concatenate([loads, np.empty_like(loads)]))

    def timeline(self) -> Timeline:
        """The record of the run so far."""
        epochs = self.sim.epochs[: int(self.sim.state.engine[0]["epoch"])]
        return Timeline(
            num_layers=self.workload.num_layers,
            batches=self.sim.batches.copy(),
            initial=self._initial.copy(),
            **{name: epochs[name].copy() for name in EPOCH_DTYPE.names or ()},
            loads=self.sim.loads[: int(self.sim.books[0]["num_loads"])].copy(),
            expert_bytes=self.spec.cost.expert_bytes,
        )

    def close(self) -> None:
        self._sim = None


def check_shape(rule: Rule, workload: Workload) -> None:
    """Raise InputError if the rule's tables belong to a model of another shape."""
    shape = (workload.num_layers, workload.num_experts, workload.top_k)
    if rule.shape is not None and rule.shape != shape:
        raise InputError(
            f"rule {rule.name!r} was fitted to a model of (layers, experts, top k) {rule.shape}, workload "
            f"{workload.name!r} has {shape}",
            remedy="Fit it on sequences of the same model",
        )


def cost_rows(spec: ExpertCachingSpec, workload: Workload) -> np.ndarray:
    """(1,) COST_DTYPE: the spec's cost model, with the times of chunks worked out."""
    cost = spec.cost
    rows = np.zeros(1, COST_DTYPE)
    row = rows[0]
    times = ("attention_s", "attention_token_s", "expert_s", "expert_token_s", "step_s", "decision_s")
    for name in (*times, "chunks", "overlap"):
        row[name] = getattr(cost, name)
    last_bytes = cost.expert_bytes - (cost.chunks - 1) * cost.chunk_bytes
    slow = min(cost.bandwidth, cost.store_bandwidth)
    row["chunk_s"] = cost.chunk_bytes / cost.bandwidth + cost.chunk_latency_s
    row["last_chunk_s"] = last_bytes / cost.bandwidth + cost.chunk_latency_s
    row["store_chunk_s"] = cost.chunk_bytes / slow + cost.chunk_latency_s
    row["store_last_chunk_s"] = last_bytes / slow + cost.chunk_latency_s
    row["eviction_only"] = spec.eviction_only
    row["host_experts"] = round(spec.host_share * workload.num_layers * workload.num_experts)
    return rows


def set_limits(state: State, spec: ExpertCachingSpec, prior: np.ndarray) -> None:
    """Write the spec's limits and costs, and the priors, into a State."""
    engine = state.engine[0]
    engine["attention_s"], engine["expert_s"] = spec.cost.attention_s, spec.cost.expert_s
    engine["load_s"] = 0.0 if spec.eviction_only else spec.cost.load_s
    engine["bypass"], engine["max_prefetch"] = spec.bypass, spec.max_prefetch
    engine["prefetch_depth"], engine["known_steps"] = spec.prefetch_depth, spec.known_steps
    state.experts["prior"] = prior


def new_sim(spec: ExpertCachingSpec, workload: Workload, recording: bool, batches: np.ndarray | None = None) -> Sim:
    """Allocate and start the simulation of one workload. Raises InputError if the configuration is impossible."""
    slots = spec.slots_of(workload.num_layers, workload.num_experts, workload.top_k)
    state = empty_state(
        slots,
        workload.num_experts,
        workload.top_k,
        num_sequences=spec.num_sequences,
        history_tokens=spec.history_tokens,
        known_steps=spec.known_steps,
        pooled=spec.pooled,
    )
    set_limits(state, spec, workload.prior)
    if batches is None:
        batches = interleave(workload.lengths, spec.num_sequences)
    batches = np.ascontiguousarray(batches, np.int64)
    if batches.ndim != 2 or batches.shape[1] != spec.num_sequences or batches.max(initial=-1) >= workload.num_tokens:
        raise InputError(
            f"batches of shape {batches.shape} up to token {batches.max(initial=-1)}, for {workload.num_tokens} tokens "
            f"and {spec.num_sequences} sequences",
            remedy="Give (steps, num_sequences) token numbers",
        )
    room = len(batches) * workload.num_layers if recording else 0
    sim = Sim(
        state=state,
        experts=workload.experts,
        predicted=workload.predicted,
        predicted_probability=workload.predicted_probability,
        token_ids=workload.token_ids,
        token_sequence=workload.token_sequence,
        token_position=workload.token_position,
        batches=batches,
        cost=cost_rows(spec, workload),
        books=np.zeros(1, BOOKS_DTYPE),
        uses=np.zeros(workload.num_experts, np.int64),
        queue=np.zeros(len(state.slots), QUEUE_DTYPE),
        loads=np.empty(room + len(state.missing) + spec.max_prefetch if recording else 0, LOAD_DTYPE),
        epochs=np.zeros(room, EPOCH_DTYPE),
    )
    sim.books[0]["num_steps"] = len(batches)
    sim.books[0]["recording"] = recording
    start(sim, spec.warm_start)
    return sim
