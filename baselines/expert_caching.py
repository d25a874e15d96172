"""The field's expert caches as rules over `State`: compiled in the simulator, unchanged on a real engine.

`RULES` maps names to rules with their published or default knobs. Rules that need tables (ridge regression, learned
scores, affinities, predicted paths) are fitted to training sequences by the functions of `expert_fitted.py`. Belady's
rules are oracles: they are built from the workload that they will serve.

Ages and frequencies count steps. Keys rank what is in the slots of a layer: the lowest is evicted first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..envs.core.errors import InputError
from ..envs.core.kernel import njit, njit_borrowed
from ..envs.expert_caching.rule import Rule, evict_lowest, lowest_slot, prefetch
from ..envs.expert_caching.spec import ExpertCachingSpec
from ..envs.expert_caching.state import ABSENT, AUTO, BYPASS, CANDIDATE, FREE, IN_USE, QUEUED, is_taken, slot_kind
from ..envs.expert_caching.workload import Workload, interleave

# ---------------------------------------------------------------------------------------- replacement by a key

LRU, LFU, LRFU, EMA_50, EMA_90, EMA_95, EMA_99, FIFO, STATIC, RANDOM = range(10)
"""Orders of the kernel `keyed`. LRU decides what AUTO means; all at once, which is faster."""


@njit_borrowed
def count_uses(state, memory, decay):
    """Book this epoch's uses in memory[: L * E]: sums of decay ** age, as of the last use, whose step follows."""
    engine, experts = state.engine[0], state.experts
    size = experts.size
    for i in range(engine.num_needed):
        place = engine.layer * experts.shape[1] + state.needed[i]
        memory[place] = memory[place] * decay ** (engine.step - memory[size + place]) + 1.0
        memory[size + place] = engine.step


@njit_borrowed
def next_random(memory, place):
    """A number in (0, 1) from MINSTD (Park and Miller 1988), whose state a float64 holds exactly."""
    memory[place] = (memory[place] * 48271.0) % 2147483647.0
    return memory[place] / 2147483647.0


@njit_borrowed
def keyed(state, params, memory, decision):
    """Evict by a fixed order. params: order, decay a step (LRFU), seed (RANDOM)."""
    engine, experts, slots = state.engine[0], state.experts, state.slots
    kind, decay, size = int(params[0]), params[1], experts.size
    if kind in (LFU, LRFU):
        count_uses(state, memory, decay)
    if engine.num_missing == 0:
        return
    if kind == RANDOM and memory[2 * size] == 0.0:
        memory[2 * size] = params[2] + 1.0
    keys = memory[2 * size + 1 :]
    layer = state.layers[engine.layer]
    for slot in range(layer.first_slot, layer.end_slot):
        held = slots[slot]
        if held.expert < 0:
            continue
        row = experts[held.layer, held.expert]
        if kind == LRU:
            keys[slot] = row.last_use
        elif kind in (LFU, LRFU):
            place = held.layer * experts.shape[1] + held.expert
            keys[slot] = memory[place] * decay ** (engine.step - memory[size + place])
        elif kind == EMA_50:
            keys[slot] = row.frequency_50
        elif kind == EMA_90:
            keys[slot] = row.frequency_90
        elif kind == EMA_95:
            keys[slot] = row.frequency_95
        elif kind == EMA_99:
            keys[slot] = row.frequency_99
        elif kind == FIFO:
            keys[slot] = row.loaded
        elif kind == STATIC:
            keys[slot] = row.prior
        else:
            keys[slot] = next_random(memory, 2 * size)
    evict_lowest(state, keys, decision)


def keyed_rule(name: str, order: int, *, decay: float = 1.0, seed: int = 0, source: str = "") -> Rule:
    """A rule of the kernel `keyed`."""
    return Rule(name, keyed, (order, decay, seed), memory_size=1, memory_per_expert=3, source=source)


def lrfu_rule(half_life: float) -> Rule:
    """LRFU (Lee et al. 2001) with F(x) = (1/2) ** (x / half_life), x in steps: between LFU (inf) and LRU (0).

    With the step as its clock it orders as the decayed frequency with d = (1/2) ** (1 / half_life) does.
    """
    if not half_life > 0:
        raise InputError(f"half_life is {half_life}", remedy="Give a positive number of steps")
    return keyed_rule(
        f"lrfu_{half_life:g}", LRFU, decay=0.5 ** (1.0 / half_life), source="Lee et al., IEEE Trans. Computers 2001"
    )


# ------------------------------------------------------------------------------------------------------- ARC

_NOWHERE, _T1, _T2, _B1, _B2 = 0.0, 1.0, 2.0, 3.0, 4.0
"""Lists of ARC: in the cache and used once, used again; evicted from either (ghosts)."""


@njit_borrowed
def arc_length(lists, which):
    """Experts of the layer on a list of ARC."""
    length = 0
    for e in range(len(lists)):
        length += lists[e] == which
    return length


@njit_borrowed
def arc_oldest(lists, stamps, which):
    """The least recently used expert of the layer on a list of ARC, -1 if it is empty."""
    oldest = -1
    for e in range(len(lists)):
        if lists[e] == which and (oldest < 0 or stamps[e] < stamps[oldest]):
            oldest = e
    return oldest


@njit_borrowed
def arc_victim(state, decision, lists, stamps, which, num_victims):
    """The slot of the least recently used candidate of the layer on a list of ARC, AUTO if there is none."""
    layer, best, oldest = state.engine[0].layer, AUTO, np.inf
    experts, slots, victims, asked = state.experts, state.slots, decision.victims, decision.prefetch
    for slot in range(state.layers[layer].first_slot, state.layers[layer].end_slot):
        held = slots[slot]
        if held.layer == layer and slot_kind(experts, slots, layer, slot) == CANDIDATE:
            e = held.expert
            if lists[e] == which and stamps[e] < oldest and not is_taken(victims, num_victims, asked, 0, slot):
                best, oldest = slot, stamps[e]
    return best


@njit_borrowed
def arc_layer(state, memory, decision):
    """ARC (Megiddo and Modha, FAST 2003) for the experts of the present layer.

    memory: lists (L * E), stamps (L * E), targets for the length of T1 (L). The requests of an epoch are the needed
    experts in increasing order; a victim may not be needed, so that the next in line, or the other list, may have to
    give one. Copies that others brought (prefetches, a warm start) count as used once.
    """
    engine, experts, num_experts = state.engine[0], state.experts, state.experts.shape[1]
    size, layer = experts.size, engine.layer
    lists = memory[layer * num_experts : (layer + 1) * num_experts]
    stamps = memory[size + layer * num_experts : size + (layer + 1) * num_experts]
    room = state.layers[layer].end_slot - state.layers[layer].first_slot
    target = memory[2 * size + layer]
    for e in range(num_experts):
        here = experts[layer, e].status != ABSENT
        if here and not 1.0 <= lists[e] <= 2.0:
            lists[e], stamps[e] = _T1, experts[layer, e].loaded
        elif not here and 1.0 <= lists[e] <= 2.0:
            lists[e] += 2.0
    missing = 0
    for i in range(engine.num_needed):
        e = state.needed[i]
        if missing < engine.num_missing and state.missing[missing] == e:
            was, prefer_t2 = lists[e], False
            num_b1, num_b2 = arc_length(lists, _B1), arc_length(lists, _B2)
            if was == _B1:
                target = min(float(room), target + max(1.0, num_b2 / num_b1))
            elif was == _B2:
                target = max(0.0, target - max(1.0, num_b1 / num_b2))
            num_t1 = arc_length(lists, _T1)
            ghost = True
            if was == _NOWHERE:
                if num_t1 + num_b1 >= room:
                    if num_t1 < room:
                        lists[arc_oldest(lists, stamps, _B1)] = _NOWHERE
                    else:
                        ghost = False  # the whole cache is T1: its oldest goes without a trace
                elif num_t1 + num_b1 + num_b2 + arc_length(lists, _T2) >= 2 * room and num_b2 > 0:
                    lists[arc_oldest(lists, stamps, _B2)] = _NOWHERE
            prefer_t2 = not (num_t1 > 0 and (num_t1 > target or (was == _B2 and num_t1 == target)))
            if decision.victims[missing] == AUTO and not has_free_slot(state, decision, missing):
                slot = arc_victim(state, decision, lists, stamps, _T2 if prefer_t2 and ghost else _T1, missing)
                if slot == AUTO:
                    slot = arc_victim(state, decision, lists, stamps, _T1 if prefer_t2 and ghost else _T2, missing)
                decision.victims[missing] = slot
                if slot >= 0:
                    gone = state.slots[slot].expert
                    lists[gone] = lists[gone] + 2.0 if ghost else _NOWHERE
            lists[e] = _T1 if was == _NOWHERE else _T2
            missing += 1
        else:
            lists[e] = _T2
        stamps[e] = engine.epoch
    memory[2 * size + layer] = target


@njit_borrowed
def has_free_slot(state, decision, num_victims):
    """True if the present layer has a free slot that the first victims leave."""
    layer = state.layers[state.engine[0].layer]
    for slot in range(layer.first_slot, layer.end_slot):
        if state.slots[slot].expert < 0 and not is_taken(decision.victims, num_victims, decision.prefetch, 0, slot):
            return True
    return False


@njit_borrowed
def arc(state, params, memory, decision):
    """ARC in every layer. Pooled caches get LRU, as its lists are a layer's."""
    if not state.engine[0].pooled:
        arc_layer(state, memory, decision)


# ------------------------------------------------------------------------------------------------------ Belady


def next_use_table(workload: Workload, spec: ExpertCachingSpec, batches: np.ndarray | None = None) -> np.ndarray:
    """float64: where the uses of each (layer, expert) begin in this very array (L * E + 1), then their epochs.

    Epochs of one (layer, expert) are increasing. Counts up to 2 ** 53 are exact in a float64.
    """
    if batches is None:
        batches = interleave(workload.lengths, spec.num_sequences)
    num_layers, num_experts = workload.num_layers, workload.num_experts
    counts, epochs = [], []
    steps, rows = np.nonzero(batches >= 0)
    for layer in range(num_layers):
        ids = workload.experts[batches[steps, rows], layer].astype(np.int64)
        uses = np.unique(ids * len(batches) + steps[:, None])  # by expert, then step; a batch uses an expert once
        counts.append(np.bincount(uses // len(batches), minlength=num_experts))
        epochs.append(uses % len(batches) * num_layers + layer)
    begins = num_layers * num_experts + 1 + np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    return np.concatenate([begins, *epochs]).astype(np.float64)


@njit_borrowed
def next_use(params, memory, place, epoch):
    """Epoch of an expert's first use after `epoch`, inf if there is none. memory[place] remembers where to look on."""
    at, end = int(max(memory[place], params[place])), int(params[place + 1])
    while at < end and params[at] <= epoch:
        at += 1
    memory[place] = at
    return params[at] if at < end else np.inf


@njit_borrowed
def farthest(state, params, memory, decision):
    """Evict the candidate whose next use is farthest (Belady 1966). params: `next_use_table`."""
    engine, experts, slots = state.engine[0], state.experts, state.slots
    if engine.num_missing == 0:
        return
    keys = memory[experts.size :]
    layer = state.layers[engine.layer]
    for slot in range(layer.first_slot, layer.end_slot):
        held = slots[slot]
        if held.expert >= 0:
            keys[slot] = -next_use(params, memory, held.layer * experts.shape[1] + held.expert, engine.epoch)
    evict_lowest(state, keys, decision)


@njit_borrowed
def nearest_kept(state, params, memory, decision):
    """Keep the nearest next uses among what is there and what comes in; stream the rest. params: `next_use_table`.

    Missing experts are taken in order of their next use, each into the slot of the farthest next use (experts in use
    included: they are done with when the layer is), as long as that is farther than its own.
    """
    engine, experts, slots = state.engine[0], state.experts, state.slots
    missing, victims, num_experts = state.missing, decision.victims, experts.shape[1]
    first, end = state.layers[engine.layer].first_slot, state.layers[engine.layer].end_slot
    keys, own = memory[experts.size :], memory[2 * experts.size :]
    if engine.num_missing == 0:
        return
    for slot in range(first, end):
        kind, held = slot_kind(experts, slots, engine.layer, slot), slots[slot]
        keys[slot] = -1.0  # may not be taken
        if kind == FREE:
            keys[slot] = np.inf
        elif kind in (CANDIDATE, IN_USE):
            keys[slot] = next_use(params, memory, held.layer * num_experts + held.expert, engine.epoch)
    for i in range(engine.num_missing):
        own[i] = next_use(params, memory, engine.layer * num_experts + missing[i], engine.epoch)
        victims[i] = BYPASS
    for _ in range(engine.num_missing):
        nearest, best = 0, first
        for i in range(engine.num_missing):
            nearest = i if own[i] < own[nearest] else nearest
        for slot in range(first, end):
            best = slot if keys[slot] > keys[best] else best
        if first == end or keys[best] <= own[nearest] or own[nearest] == np.inf:
            return
        victims[nearest] = best
        keys[best], own[nearest] = -1.0, np.inf


def belady(workload: Workload, spec: ExpertCachingSpec, batches: np.ndarray | None = None) -> Rule:
    """Belady's rule for this very workload: the fewest loads that any policy without prefetch and bypass can reach.

    With `spec.bypass` it is another rule, which keeps the nearest next uses: the fewest loads where experts may be
    streamed without being cached. Both are exact, also for pooled caches (tests search exhaustively).
    """
    return Rule(
        "belady_bypass" if spec.bypass else "belady",
        nearest_kept if spec.bypass else farthest,
        next_use_table(workload, spec, batches),
        memory_per_expert=3,
        source="Belady, IBM Systems Journal 1966",
        is_oracle=True,
        shape=(workload.num_layers, workload.num_experts, workload.top_k),
    )


def belady_loads(workload: Workload, slots: tuple[int, ...], *, bypass: bool = False) -> np.ndarray:
    """int64 (L,): the fewest loads of each layer of a cache with `slots[l]` slots, one sequence after the other.

    What the rules of `belady` reach in the simulator, by a loop that does nothing else: for long traces and bounds.
    """
    loads = np.zeros(workload.num_layers, np.int64)
    for layer in range(workload.num_layers):
        routing = np.ascontiguousarray(workload.experts[:, layer])
        loads[layer] = _layer_loads(routing, workload.num_experts, slots[layer], bypass)
    return loads


@njit(cache=True)
def _layer_loads(routing, num_experts, room, bypass):
    """Fewest loads of one layer; `routing` (T, k)."""
    tokens, k = routing.shape
    never = np.int64(1) << 60
    following = np.empty((tokens, k), np.int64)  # the next token that uses the same expert
    coming = np.full(num_experts, never)
    for t in range(tokens - 1, -1, -1):
        for i in range(k):
            following[t, i] = coming[routing[t, i]]
            coming[routing[t, i]] = t
    next_use = np.full(num_experts, never)
    place = np.full(num_experts, -1)  # in `held`
    held = np.empty(room + k, np.int64)
    num_held, loads = 0, 0
    for t in range(tokens):
        for i in range(k):
            expert = routing[t, i]
            next_use[expert] = following[t, i] if bypass else -1  # without bypass, what is needed now stays
            if place[expert] < 0:
                loads += 1
                place[expert] = num_held
                held[num_held] = expert
                num_held += 1
        while num_held > room:
            out = 0
            for j in range(1, num_held):
                out = j if next_use[held[j]] > next_use[held[out]] else out
            num_held -= 1
            place[held[out]] = -1
            held[out] = held[num_held]
            place[held[out]] = out if out < num_held else -1
        for i in range(k):
            next_use[routing[t, i]] = following[t, i]
    return loads


# ---------------------------------------------------------------------------------------- prefetch by a predictor


SPARED = 1e15
"""Added to the key of a slot that a prefetch may not take."""


@njit_borrowed
def recency_keys(state, target, keys):
    """Keys of LRU for the slots of a layer."""
    for slot in range(state.layers[target].first_slot, state.layers[target].end_slot):
        held = state.slots[slot]
        if held.expert >= 0:
            keys[slot] = state.experts[held.layer, held.expert].last_use


@njit_borrowed
def prefetch_predicted(state, decision, most, keys):
    """Prefetch those of the `most` experts of the next layer that are predicted most which are absent.

    They take the slots of lowest key, but never one that holds another of the predicted experts.
    """
    engine, slots = state.engine[0], state.slots
    target = (engine.layer + 1) % engine.num_layers
    if target == engine.layer:
        return
    experts = state.experts[target]
    for slot in range(state.layers[target].first_slot, state.layers[target].end_slot):
        if slots[slot].expert >= 0 and slots[slot].layer == target and experts[slots[slot].expert].predicted > 0.0:
            keys[slot] += SPARED
    last, last_expert = np.inf, -1
    for _ in range(most):  # in order of probability, ties by id: those at hand count as well
        best, highest = -1, 0.0
        for e in range(engine.num_experts):
            p = experts[e].predicted
            if p > highest and (p < last or (p == last and e > last_expert)):
                best, highest = e, p
        if best < 0:
            return
        last, last_expert = highest, best
        if experts[best].status == ABSENT:
            slot = lowest_slot(state, keys, decision, target, engine.num_missing, decision.plan[0].num_prefetch)
            if slot == AUTO or (slots[slot].expert >= 0 and keys[slot] >= SPARED):
                return
            prefetch(state, decision, target, best, slot)


@njit_borrowed
def mixtral_offloading(state, params, memory, decision):
    """LRU; the next layer's gate applied to this layer's hidden state tells what to load ahead. params: how many."""
    recency_keys(state, (state.engine[0].layer + 1) % state.engine[0].num_layers, memory)
    prefetch_predicted(state, decision, int(params[0]), memory)


@njit_borrowed
def fate(state, params, memory, decision):
    """ARC; all experts that the next gate would choose now are loaded ahead. Slots are `fate_slots`."""
    engine, keys = state.engine[0], memory[3 * state.experts.size :]
    arc(state, params, memory, decision)
    recency_keys(state, (engine.layer + 1) % engine.num_layers, keys)
    prefetch_predicted(state, decision, engine.top_k * engine.num_active, keys)


def fate_slots(num_layers: int, num_experts: int, top_k: int, total: int) -> tuple[int, ...]:
    """Fate's split of `total` slots: every expert of the shallow layers, whose gates nobody can see coming, then equal.

    As many layers are held whole, from the first one on, as leave `top_k` slots for each of the others, but at most a
    quarter of all layers.
    """
    whole = 0
    while 4 * (whole + 1) <= num_layers and total - (whole + 1) * num_experts >= (num_layers - whole - 1) * top_k:
        whole += 1
    rest = num_layers - whole
    left = min(total - whole * num_experts, rest * num_experts)
    shares = [left // rest + (i < left % rest) for i in range(rest)]
    return (num_experts,) * whole + tuple(shares)


# --------------------------------------------------------------------------------------------- layers as they come


@njit_borrowed
def stream_layers(state, params, memory, decision):
    """Load every expert of the coming layers, whatever the gate will say, into a ring of layer buffers.

    params: layers ahead D. The epoch's layer is computed from buffer (epoch mod (D + 1)); the buffers of the next D
    epochs are read meanwhile. Nothing outlives its epoch. A load that the channel did not reach in time is dropped: its
    expert is loaded on demand if the gate wants it.
    """
    engine, slots, num_experts = state.engine[0], state.slots, state.experts.shape[1]
    depth, plan = int(params[0]), decision.plan[0]
    plan.cancel_queued = 1
    for i in range(engine.num_missing):
        decision.victims[i] = engine.epoch % (depth + 1) * num_experts + state.missing[i]
    for ahead in range(1, depth + 1):
        target = (engine.layer + ahead) % engine.num_layers
        for e in range(num_experts):
            slot = (engine.epoch + ahead) % (depth + 1) * num_experts + e
            row = state.experts[target, e]
            # in place already, or being read; elsewhere (a ring longer than the model): never asked for twice
            if slots[slot].expert == e and slots[slot].layer == target and row.status != QUEUED:
                continue
            if row.status == ABSENT or row.status == QUEUED:
                prefetch(state, decision, target, e, slot)


def layer_streaming(depth: int, name: str, source: str) -> Rule:
    """A rule of `stream_layers`; `stream_spec` gives the slots and prefetches that it needs."""
    return Rule(name, stream_layers, (depth,), source=source)


def stream_spec(spec: ExpertCachingSpec, num_layers: int, num_experts: int, depth: int) -> ExpertCachingSpec:
    """The spec of a ring of depth + 1 layer buffers: pooled slots, prefetches of whole layers."""
    if not 1 <= depth < num_layers:
        raise InputError(
            f"a ring of {depth + 1} buffers for {num_layers} layers", remedy=f"Give a depth of 1 to {num_layers - 1}"
        )
    slots = np.bincount(np.arange((depth + 1) * num_experts) % num_layers, minlength=num_layers)
    return spec.replace(
        pooled=True,
        layer_slots=tuple(int(n) for n in slots),
        max_prefetch=depth * num_experts,
        prefetch_depth=depth,
        eviction_only=False,
    )


@njit_borrowed
def sliding_window(state, params, memory, decision):
    """Keep what the last w steps used and load only the difference. params: w.

    Slots with experts outside the window go first, in their order; inside the window, the oldest.
    """
    engine, slots, keys = state.engine[0], state.slots, memory
    begin = engine.epoch - params[0] * engine.num_layers
    for slot in range(state.layers[engine.layer].first_slot, state.layers[engine.layer].end_slot):
        if slots[slot].expert >= 0:
            last_use = state.experts[slots[slot].layer, slots[slot].expert].last_use
            keys[slot] = last_use if last_use >= begin else -1.0
    evict_lowest(state, keys, decision)


@njit_borrowed
def least_stale(state, params, memory, decision):
    """Evict what this pass has not touched first: leftovers of earlier passes, then what is loaded for layers to come.

    A pass is a step. Among the leftovers those of layers that the pass is through with go first, oldest first (their
    next use is a whole pass away), then those of layers to come, the farthest first; what the pass used goes last,
    oldest first. Prefetches of the next layer come from the predictor where there is one.
    """
    engine, slots, keys = state.engine[0], state.slots, memory
    begin, span = engine.epoch - engine.layer, float(engine.num_layers)
    for slot in range(state.layers[engine.layer].first_slot, state.layers[engine.layer].end_slot):
        held = slots[slot]
        if held.expert < 0:
            continue
        row = state.experts[held.layer, held.expert]
        if row.last_use >= begin:
            keys[slot] = 2e12 + row.last_use
        elif held.layer <= engine.layer:
            keys[slot] = float(row.last_use)
        else:
            keys[slot] = 1e12 + (span - held.layer)
    evict_lowest(state, keys, decision)
    prefetch_predicted(state, decision, engine.top_k * engine.num_active, keys)


# ------------------------------------------------------------------------------------------------- copying the past


@njit_borrowed
def copy_past(state, params, memory, decision):
    """What followed the tokens that were routed like the present one? Keep that.

    Token u of the window resembles the present token t by the share of t's experts, of the layers known so far, that it
    used too; what t - j and u - j share counts as well, at context_weight * context_decay ** (j - 1). It gets the
    weight exp(sharpness * resemblance). Expert e of the layer scores the sum over u of its weight times discount **
    (v - u - 1) for each later token v that used e, over the sum of weights, plus a share of its own frequency
    (d = 0.95).

    params: sharpness, discount, frequency's share, context_weight, context_decay. memory: scores, flags and keys, then
    for each row of the batch what every token of the window shares with the present one, and their contexts.
    """
    engine, experts, history = state.engine[0], state.experts, state.history
    window, layer, k, num_experts = history.shape[1], engine.layer, engine.top_k, experts.shape[1]
    sharpness, discount = params[0], params[1]
    scores, is_now, keys = memory[:num_experts], memory[num_experts : 2 * num_experts], memory[2 * num_experts :]
    shared = memory[2 * num_experts + experts.size :]
    contexts = shared[engine.num_sequences * window :]
    scores[:] = 0.0
    for b in range(engine.num_sequences):
        served = state.sequences[b].served
        if state.sequences[b].sequence < 0:
            continue
        mine, context = shared[b * window : (b + 1) * window], contexts[b * window : (b + 1) * window]
        oldest, now = max(served - window, 0), served - 1
        if layer == 0:
            for u in range(now, oldest, -1):
                before = (u - 1) % window
                context[u % window] = mine[before] + params[4] * context[before]
            context[oldest % window] = 0.0
            mine[:] = 0.0
        is_now[:] = 0.0
        for i in range(k):
            is_now[history[b, now % window, layer, i]] = 1.0
        most = k * (layer + 1 + params[3] * engine.num_layers / (1.0 - params[4]))
        carried, total = 0.0, 1e-300
        for u in range(oldest, served):
            at = u % window
            for i in range(k):
                expert = history[b, at, layer, i]
                mine[at] += is_now[expert]
                scores[expert] += carried
            weight = np.exp(sharpness * ((mine[at] + params[3] * context[at]) / most - 1.0)) if u < now else 0.0
            carried = discount * carried + weight
            total += weight
        for e in range(num_experts):
            scores[e] /= total
    if engine.num_missing == 0:
        return
    for slot in range(state.layers[layer].first_slot, state.layers[layer].end_slot):
        held = state.slots[slot]
        if held.expert >= 0:
            frequency = experts[held.layer, held.expert].frequency_95
            keys[slot] = params[2] * frequency + (scores[held.expert] if held.layer == layer else 0.0)
    evict_lowest(state, keys, decision)


def copy_rule(
    sharpness: float = 25.0,
    discount: float = 0.75,
    frequency: float = 0.1,
    context_weight: float = 0.1,
    context_decay: float = 0.5,
    *,
    window: int = 1024,
    num_sequences: int = 1,
) -> Rule:
    """The copy kernel over the last `window` tokens (`spec.history_tokens`) of each interleaved sequence."""
    return Rule(
        "copy",
        copy_past,
        (sharpness, discount, frequency, context_weight, context_decay),
        memory_size=2 * window * num_sequences,
        memory_per_expert=3,
        source="attention over one's own past, as in kNN-LM (Khandelwal et al., ICLR 2020)",
    )


# ------------------------------------------------------------------------------------------------ a known queue


@njit_borrowed
def read_me(state, params, memory, decision):
    """Evict the expert whose next use in the known queue is farthest; experts that it does not name go first, by LRU.

    The queue is `state.known`: models whose router stands apart from the layers know it (`spec.known_steps`). Without
    it this is LRU.
    """
    engine, experts, slots = state.engine[0], state.experts, state.slots
    if engine.num_missing == 0:
        return
    coming, keys = memory[: experts.size], memory[experts.size :]
    coming[:] = np.inf
    for ahead in range(state.known.shape[0] - 1, -1, -1):
        for b in range(state.known.shape[1]):
            for layer in range(state.known.shape[2] if engine.pooled else 1):
                at = layer if engine.pooled else engine.layer
                for i in range(engine.top_k):
                    expert = state.known[ahead, b, at, i]
                    if expert >= 0:
                        coming[at * experts.shape[1] + expert] = (engine.step + 1 + ahead) * engine.num_layers + at
    for slot in range(state.layers[engine.layer].first_slot, state.layers[engine.layer].end_slot):
        held = slots[slot]
        if held.expert >= 0:
            next_epoch = coming[held.layer * experts.shape[1] + held.expert]
            unknown = next_epoch == np.inf
            keys[slot] = experts[held.layer, held.expert].last_use - 1e15 if unknown else -next_epoch
    evict_lowest(state, keys, decision)


def batch_by_experts(workload: Workload, num_sequences: int, limit: float, queue: int = 4) -> np.ndarray:
    """int64 (steps, B): Read-ME's batches: sequences whose next tokens share experts are served together.

    `queue` * B sequences are open; of their next tokens, whose routing the pre-gate knows, the longest waiting one is
    taken, then greedily the one that adds fewest experts, while rows are left and the mean number of distinct experts a
    layer stays within `limit`. For models whose router stands apart from the layers.
    """
    if limit < workload.top_k:
        raise InputError(f"limit of {limit} experts, a token needs {workload.top_k}", remedy="Give at least that many")
    heads = _Heads(workload, queue * num_sequences)
    batches: list[Any] = []
    while heads.tokens:
        first = min(heads.tokens, key=heads.waits_since)
        chosen, used = [first], heads.used(first)
        while len(chosen) < min(num_sequences, len(heads.tokens)):
            rest = [s for s in heads.tokens if s not in chosen]
            best = min(rest, key=lambda s: np.count_nonzero(used | heads.used(s)))
            union = used | heads.used(best)
            if np.count_nonzero(union) / workload.num_layers > limit:
                break
            chosen.append(best)
            used = union
        batches.append(heads.serve(chosen, len(batches)))
    return _padded(batches, num_sequences)


def regroup_by_paths(workload: Workload, paths: np.ndarray, num_sequences: int, queue: int = 2) -> np.ndarray:
    """int64 (steps, B): ExpertFlow's batches: the tokens of `queue` batches are regrouped by their predicted paths.

    `paths` bool (T, L * E): the experts that the predictor names for each token. Groups form around the token that
    waits longest, by Hamming distance of the paths.
    """
    heads = _Heads(workload, queue * num_sequences)
    batches: list[Any] = []
    while heads.tokens:
        first = min(heads.tokens, key=heads.waits_since)
        path = paths[heads.tokens[first]]
        near = sorted(heads.tokens, key=lambda s: (s != first, np.count_nonzero(paths[heads.tokens[s]] ^ path), s))
        batches.append(heads.serve(near[:num_sequences], len(batches)))
    return _padded(batches, num_sequences)


class _Heads:
    """The next token of every open sequence; a sequence that ends makes room for the next one of the workload."""

    def __init__(self, workload: Workload, most: int) -> None:
        self.workload, self.coming = workload, min(most, len(workload))
        self.tokens = {s: int(workload.sequence_offsets[s]) for s in range(self.coming)}  # sequence -> its next token
        self.since = dict.fromkeys(self.tokens, 0)

    def waits_since(self, sequence: int) -> tuple[int, int]:
        return self.since[sequence], sequence

    def used(self, sequence: int) -> np.ndarray:
        """bool (L, E): experts of the sequence's next token."""
        routing = self.workload.experts[self.tokens[sequence]]
        mask = np.zeros((self.workload.num_layers, self.workload.num_experts), bool)
        mask[np.arange(len(routing))[:, None], routing] = True
        return mask

    def serve(self, sequences: list[int], step: int) -> list[int]:
        """The tokens of a batch; their sequences go on."""
        served = [self.tokens[s] for s in sequences]
        for s in sequences:
            self.tokens[s] += 1
            self.since[s] = step + 1
            if self.tokens[s] == self.workload.sequence_offsets[s + 1]:
                del self.tokens[s]
                if self.coming < len(self.workload):
                    self.tokens[self.coming] = int(self.workload.sequence_offsets[self.coming])
                    self.since[self.coming] = step + 1
                    self.coming += 1
        return served


def _padded(batches: list[list[int]], width: int) -> np.ndarray:
    return np.array([batch + [-1] * (width - len(batch)) for batch in batches], np.int64)


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        keyed_rule("lru", LRU),
        keyed_rule("lfu", LFU),
        lrfu_rule(13.5),
        keyed_rule("ema_50", EMA_50),
        keyed_rule("ema_90", EMA_90),
        keyed_rule("ema_95", EMA_95),
        keyed_rule("ema_99", EMA_99),
        keyed_rule("fifo", FIFO),
        keyed_rule("static", STATIC),
        keyed_rule("random", RANDOM),
        Rule("arc", arc, memory_per_expert=3, source="Megiddo and Modha, FAST 2003"),
        Rule("sliding_window", sliding_window, (5,), memory_per_expert=1, source="LLM in a flash, arXiv 2312.11514"),
        Rule("least_stale", least_stale, memory_per_expert=1, source="SpecMD, arXiv 2602.03921"),
        Rule(
            "mixtral_offloading",
            mixtral_offloading,
            (2,),
            memory_per_expert=1,
            source="Eliseev and Mazur, arXiv 2312.17238",
        ),
        Rule("fate", fate, memory_per_expert=4, source="Fate, arXiv 2502.12224"),
        Rule("read_me", read_me, memory_per_expert=2, source="Read-ME, NeurIPS 2024, arXiv 2410.19123"),
        layer_streaming(1, "layer_streaming", "ZeRO-Inference, arXiv 2207.00032"),
        layer_streaming(2, "se_moe_ring", "SE-MoE, arXiv 2205.10034"),
    )
}
"""The rules that need no training and no oracle, by name."""


def system_spec(rule: Rule, spec: ExpertCachingSpec, workload: Workload) -> ExpertCachingSpec:
    """The spec under which a published system runs.

    Systems that load ahead get their prefetches, Fate its shallow layers, Least-Stale one pool of slots, Read-ME a
    known queue of 16 steps (an oracle's, unless the model is pre-gated). A ring has the slots of its layer buffers,
    whatever `spec` has. Other rules get `spec` itself.
    """
    layers, experts, k = workload.num_layers, workload.num_experts, workload.top_k
    total = sum(spec.slots_of(layers, experts, k))
    if rule.name == "mixtral_offloading":
        return spec.replace(max_prefetch=int(rule.params[0]), eviction_only=False)
    if rule.name == "fate":
        slots = fate_slots(layers, experts, k, total)
        return spec.replace(layer_slots=slots, max_prefetch=k * spec.num_sequences, eviction_only=False)
    if rule.name == "least_stale":
        return spec.replace(pooled=True)
    if rule.name == "read_me":
        return spec.replace(known_steps=16)
    if rule.decide_kernel is stream_layers:
        return stream_spec(spec, layers, experts, int(rule.params[0]))
    return spec
