"""The action table of expert caching: which rows can be chosen now, what they look like, what choosing one does.

The same kernels serve the simulated env and the real engine: they read a `State` and write a `Decision`. In one epoch
the phases are

- VICTIM, once for each missing expert that finds no free slot: a row for each slot of the layer whose expert may go,
  and row 0 streams the missing one without caching it (with bypass). Experts in use may go only with bypass.
- PREFETCH, at most `max_prefetch` times: a row for each absent expert of the coming layers within `prefetch_depth` (the
  most promising ones, if there are more than rows), and row 0 for none, which ends the epoch.
- PREFETCH_VICTIM, after a prefetch was chosen whose layer has no free slot: as VICTIM; row 0 takes the choice back.

A phase without a choice (one victim only, nothing to prefetch) passes by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..core.kernel import njit_borrowed
from .affinity import Affinity
from .state import (
    ABSENT,
    AUTO,
    BYPASS,
    CANDIDATE,
    IN_USE,
    Decision,
    State,
    is_taken,
    resolve_decision,
    slot_kind,
)

VICTIM, PREFETCH, PREFETCH_VICTIM, DONE = 0, 1, 2, 3
"""Phases of an epoch."""

FEATURE_VERSION = 3
"""Raised whenever the meaning of a column below changes: checkpoints of another version are refused."""

CONTEXT_FEATURES = (
    "victim phase",
    "prefetch phase",
    "victim of a prefetch",
    "layer / layers",
    "slots of the layer / experts",
    "needed / experts",
    "missing / needed",
    "missing still to decide / needed",
    "miss rate of the layer",
    "seconds of a load / seconds of a layer, log10, / 2",
    "seconds until the channel is idle / seconds of a load (x / (1 + x))",
    "latest stall / seconds of a load (x / (1 + x))",
    "in flight / slots",
    "prefetches asked for / allowed",
    "row 0 may be chosen",
    "experts are the rows' layer's, per slot of it (top k / slots)",
    "incoming expert: frequency, d = 0.5",
    "incoming expert: frequency, d = 0.9",
    "incoming expert: frequency, d = 0.95",
    "incoming expert: frequency, d = 0.99",
    "incoming expert: prior",
    "incoming expert: uses in the sequences / their tokens",
    "incoming expert: predicted probability",
    "incoming expert: affinity to what is needed now",
    "incoming expert: root of a predictor's probability of a next use soon",
)
CANDIDATE_FEATURES = (
    "is row 0: bypass, or none",
    "steps since the last use: x / (4 + x)",
    "steps since the last use: x / (64 + x)",
    "never used",
    "frequency, d = 0.5",
    "frequency, d = 0.9",
    "frequency, d = 0.95",
    "frequency, d = 0.99",
    "prior",
    "uses in the sequences / their tokens",
    "predicted probability",
    "affinity to what is needed now (rows of this layer: at the next token)",
    "layers ahead / layers",
    "is needed now",
    "copy brought by a prefetch and not used yet",
    "steps since the copy was loaded: x / (16 + x)",
    "root of a predictor's probability of a next use soon",
    "would be chosen by the rule that is shown",
)
NUM_CONTEXT, NUM_CANDIDATE = len(CONTEXT_FEATURES), len(CANDIDATE_FEATURES)
INCOMING = NUM_CONTEXT - 9
"""First context column that describes the expert on its way into the cache."""
CHOSEN = CANDIDATE_FEATURES.index("would be chosen by the rule that is shown")
"""Candidate column that `show_choice` writes."""

TABLE_DTYPE = np.dtype(
    [
        ("phase", "i8"),
        ("place", "i8"),  # index of the missing expert to decide on
        ("num_rows", "i8"),  # rows that are filled, row 0 included
        ("num_open", "i8"),  # rows beyond row 0 that may still be chosen
        ("listed", "i8"),  # 1 if the rows are those of the present phase
        ("target_layer", "i8"),  # of the prefetch whose victim is sought
        ("target_expert", "i8"),
        ("tokens", "i8"),  # tokens of the sequences in the batch so far
    ],
    align=True,
)


class Table(NamedTuple):
    """The rows that can be chosen at one decision; K rows in all."""

    head: np.ndarray  # (1,) TABLE_DTYPE
    rows: np.ndarray  # (K, 3) int64: layer, expert and slot (-1 in PREFETCH) of each row; row 0 is not used
    open: np.ndarray  # (K,) bool: may still be chosen
    scores: np.ndarray  # (K,) float64: promise of the rows of PREFETCH
    affinity_now: np.ndarray  # (2, E) float32: mean affinity of what is needed to this layer's and the next one's


def empty_table(num_candidates: int, num_experts: int) -> Table:
    """A Table for K rows."""
    return Table(
        np.zeros(1, TABLE_DTYPE),
        np.zeros((num_candidates, 3), np.int64),
        np.zeros(num_candidates, np.bool_),
        np.zeros(num_candidates),
        np.zeros((2, num_experts), np.float32),
    )


# ------------------------------------------------------------------------------------------------- the phases


@njit_borrowed
def open_epoch(state: State, table: Table, affinity: Affinity) -> None:
    """Begin with the first phase of an epoch. `decision` holds the default."""
    head, engine, now = table.head[0], state.engine[0], table.affinity_now
    head.phase = VICTIM
    head.place = 0
    head.listed = 0
    head.tokens = 0
    for b in range(engine.num_sequences):
        if state.sequences[b].sequence >= 0:
            head.tokens += state.sequences[b].position + 1
    if engine.num_missing == 0 and engine.max_prefetch == 0:
        return
    sum_rows(affinity.same_layer[engine.layer], state.needed, engine.num_needed, now[0])
    if engine.max_prefetch > 0:
        sum_rows(affinity.next_layer[engine.layer], state.needed, engine.num_needed, now[1])


@njit_borrowed
def sum_rows(matrix, rows, num_rows: int, out) -> None:
    """Mean of the first `num_rows` rows named, into `out`."""
    out[:] = 0.0
    share = np.float32(1.0 / max(num_rows, 1))
    for i in range(num_rows):
        row = matrix[rows[i]]
        for e in range(len(out)):
            out[e] += share * row[e]


@njit_borrowed
def next_choice(state: State, table: Table, decision: Decision) -> bool:
    """Go to the next decision of this epoch, and decide where there is no choice. False: the epoch is decided."""
    head, engine, plan = table.head[0], state.engine[0], decision.plan[0]
    while head.phase == VICTIM:
        if head.place >= engine.num_missing:
            head.phase, head.listed = PREFETCH, 0
            break
        free = free_slot(state, decision, engine.layer, head.place, 0)
        if free >= 0:
            decision.victims[head.place] = free
            head.place += 1
            continue
        if not head.listed:
            list_slots(state, table, decision, engine.layer, head.place, 0, engine.bypass != 0)
        if head.num_open > 0 and (engine.bypass or head.num_open > 1):
            return True
        decision.victims[head.place] = only_slot(table)  # AUTO if there is none: what remains is to stream it
        if head.num_open > 0:
            close_row(table, only_row(table))
        head.place += 1
    while head.phase == PREFETCH:
        if plan.num_prefetch >= engine.max_prefetch:
            head.phase = DONE
            break
        if not head.listed:
            list_absent(state, table, decision)
        if head.num_open == 0:
            head.phase = DONE
            break
        return True
    return head.phase == PREFETCH_VICTIM


@njit_borrowed
def choose(state: State, table: Table, decision: Decision, action: int) -> None:
    """Take a row of the present phase."""
    head, plan = table.head[0], decision.plan[0]
    if head.phase == VICTIM:
        decision.victims[head.place] = BYPASS if action == 0 else table.rows[action, 2]
        head.place += 1
        if action > 0:
            close_row(table, action)
    elif head.phase == PREFETCH:
        if action == 0:
            head.phase = DONE
            return
        layer, expert = table.rows[action, 0], table.rows[action, 1]
        slot = free_slot(state, decision, layer, state.engine[0].num_missing, plan.num_prefetch)
        if slot >= 0:
            add_prefetch(decision, layer, expert, slot)
            close_row(table, action)
            return
        head.target_layer, head.target_expert = layer, expert
        list_slots(state, table, decision, layer, state.engine[0].num_missing, plan.num_prefetch, False)
        # without a slot that may go, the choice is without effect, and must not come again
        head.phase = PREFETCH_VICTIM if head.num_open > 0 else DONE
    else:
        if action > 0:
            add_prefetch(decision, head.target_layer, head.target_expert, table.rows[action, 2])
        head.phase, head.listed = (PREFETCH if action > 0 else DONE), 0


@njit_borrowed
def add_prefetch(decision: Decision, layer: int, expert: int, slot: int) -> None:
    """Write one more prefetch into the decision."""
    plan = decision.plan[0]
    decision.prefetch[plan.num_prefetch, 0] = layer
    decision.prefetch[plan.num_prefetch, 1] = expert
    decision.prefetch[plan.num_prefetch, 2] = slot
    plan.num_prefetch += 1


@njit_borrowed
def close_row(table: Table, row: int) -> None:
    """This row may not be chosen again."""
    table.open[row] = False
    table.head[0].num_open -= 1


@njit_borrowed
def only_row(table: Table) -> int:
    """The first row beyond row 0 that may be chosen, 0 if there is none."""
    for row in range(1, table.head[0].num_rows):
        if table.open[row]:
            return row
    return 0


@njit_borrowed
def only_slot(table: Table) -> int:
    """The slot of the first row that may be chosen, AUTO if there is none."""
    row = only_row(table)
    return table.rows[row, 2] if row > 0 else AUTO


@njit_borrowed
def free_slot(state: State, decision: Decision, layer: int, num_victims: int, num_prefetch: int) -> int:
    """The first free slot of the layer that is not taken, -1 if there is none."""
    slots, victims, prefetch = state.slots, decision.victims, decision.prefetch
    for slot in range(state.layers[layer].first_slot, state.layers[layer].end_slot):
        if slots[slot].expert < 0 and not is_taken(victims, num_victims, prefetch, num_prefetch, slot):
            return slot
    return -1


@njit_borrowed
def list_slots(state: State, table: Table, decision: Decision, layer, num_victims, num_prefetch, in_use: bool) -> None:
    """Rows: the slots of a layer whose experts may go; if there are too many, the least recently used ones.

    Where a predictor speaks, those that it least wants to keep.
    """
    head, rows, scores = table.head[0], table.rows, table.scores
    experts, slots, victims, prefetch = state.experts, state.slots, decision.victims, decision.prefetch
    present = state.engine[0].layer
    head.num_rows = 1
    for slot in range(state.layers[layer].first_slot, state.layers[layer].end_slot):
        kind = slot_kind(experts, slots, present, slot)
        if kind != CANDIDATE and not (in_use and kind == IN_USE):
            continue
        if is_taken(victims, num_victims, prefetch, num_prefetch, slot):
            continue
        held = slots[slot]
        keep = experts[held.layer, held.expert].keep
        score = -float(keep) if keep > 0 else float(state.engine[0].epoch - experts[held.layer, held.expert].last_use)
        row = row_for(head.num_rows, scores, score)
        if row > 0:
            rows[row, 0], rows[row, 1], rows[row, 2] = held.layer, held.expert, slot
            scores[row] = score
            head.num_rows = max(head.num_rows, row + 1)
    open_rows(table)


@njit_borrowed
def list_absent(state: State, table: Table, decision: Decision) -> None:
    """Rows: the absent experts of the coming layers that were not asked for; if too many, the most promising ones."""
    head, engine, plan, rows, scores = table.head[0], state.engine[0], decision.plan[0], table.rows, table.scores
    head.num_rows = 1
    for ahead in range(1, engine.prefetch_depth + 1):
        layer = (engine.layer + ahead) % engine.num_layers
        if layer == engine.layer:
            break
        for e in range(engine.num_experts):
            expert = state.experts[layer, e]
            if expert.status != ABSENT:
                continue
            is_asked = False
            for j in range(plan.num_prefetch):
                is_asked = is_asked or (decision.prefetch[j, 0] == layer and decision.prefetch[j, 1] == e)
            if is_asked:
                continue
            promise = expert.predicted + expert.frequency_95
            if ahead == 1:
                promise += table.affinity_now[1, e]
            row = row_for(head.num_rows, scores, promise / ahead)
            if row > 0:
                rows[row, 0], rows[row, 1], rows[row, 2] = layer, e, -1
                scores[row] = promise / ahead
                head.num_rows = max(head.num_rows, row + 1)
    open_rows(table)


@njit_borrowed
def row_for(num_rows: int, scores, score: float) -> int:
    """The next row, or the row of lowest score if all are filled and it is lower; 0 if the expert gets none."""
    if num_rows < len(scores):
        return num_rows
    lowest = 1
    for row in range(2, num_rows):
        lowest = row if scores[row] < scores[lowest] else lowest
    return lowest if scores[lowest] < score else 0


@njit_borrowed
def open_rows(table: Table) -> None:
    """All rows listed may be chosen."""
    head = table.head[0]
    table.open[:] = False
    table.open[1 : head.num_rows] = True
    head.num_open = head.num_rows - 1
    head.listed = 1


# ------------------------------------------------------------------------------------------------ observation


@njit_borrowed
def write_mask(state: State, table: Table, mask) -> None:
    """Legal rows, bool (K,)."""
    head = table.head[0]
    for row in range(len(mask)):
        mask[row] = table.open[row]
    mask[0] = head.phase != VICTIM or state.engine[0].bypass != 0


@njit_borrowed
def write_context(state: State, table: Table, decision: Decision, context) -> None:
    """The columns of CONTEXT_FEATURES, float32 (C,)."""
    head, engine = table.head[0], state.engine[0]
    target = engine.layer
    if head.phase == PREFETCH:
        target = (engine.layer + 1) % engine.num_layers
    elif head.phase == PREFETCH_VICTIM:
        target = head.target_layer
    layer = state.layers[target]
    num_slots = layer.end_slot - layer.first_slot
    layer_s = engine.attention_s + engine.top_k * engine.expert_s
    needed = max(engine.num_needed, 1)
    context[0] = head.phase == VICTIM
    context[1] = head.phase == PREFETCH
    context[2] = head.phase == PREFETCH_VICTIM
    context[3] = target / engine.num_layers
    context[4] = num_slots / (engine.num_experts * (engine.num_layers if engine.pooled else 1))
    context[5] = engine.num_needed / engine.num_experts
    context[6] = engine.num_missing / needed
    context[7] = (engine.num_missing - head.place) / needed
    context[8] = layer.miss_rate
    context[9] = np.log10(engine.load_s / layer_s) / 2.0 if engine.load_s > 0.0 and layer_s > 0.0 else 0.0
    context[10] = saturating(engine.channel_s, engine.load_s)
    context[11] = saturating(engine.last_stall_s, engine.load_s)
    context[12] = engine.num_in_flight / max(engine.num_slots, 1)
    context[13] = decision.plan[0].num_prefetch / max(engine.max_prefetch, 1)
    context[14] = head.phase != VICTIM or engine.bypass != 0
    context[15] = engine.top_k / max(num_slots, 1)
    context[INCOMING:] = 0.0
    if head.phase == VICTIM:
        write_incoming(state, table, engine.layer, state.missing[head.place], context)
    elif head.phase == PREFETCH_VICTIM:
        write_incoming(state, table, head.target_layer, head.target_expert, context)


@njit_borrowed
def write_incoming(state: State, table: Table, layer: int, expert: int, context) -> None:
    """What the context says of the expert on its way in."""
    row = state.experts[layer, expert]
    context[INCOMING] = row.frequency_50
    context[INCOMING + 1] = row.frequency_90
    context[INCOMING + 2] = row.frequency_95
    context[INCOMING + 3] = row.frequency_99
    context[INCOMING + 4] = row.prior
    context[INCOMING + 5] = row.count / max(table.head[0].tokens, 1)
    context[INCOMING + 6] = row.predicted
    context[INCOMING + 7] = affinity_to(state, table, layer, expert)
    context[INCOMING + 8] = np.sqrt(row.keep)


@njit_borrowed
def affinity_to(state: State, table: Table, layer: int, expert: int) -> float:
    """Mean affinity of what is needed now to an expert of this layer or the next one, 0 beyond."""
    engine = state.engine[0]
    if layer == engine.layer:
        return table.affinity_now[0, expert]
    if (layer - engine.layer) % engine.num_layers == 1:
        return table.affinity_now[1, expert]
    return 0.0


@njit_borrowed
def saturating(value: float, unit: float) -> float:
    """x / (1 + x) for x = value / unit; 0 without a unit."""
    return value / (unit + value) if unit > 0.0 else 0.0


@njit_borrowed
def write_candidates(state: State, table: Table, num_filled: int, candidates) -> None:
    """The columns of CANDIDATE_FEATURES, float32 (K, F). `num_filled` rows were filled before: the rest is cleared."""
    head, engine, experts, rows, now = table.head[0], state.engine[0], state.experts, table.rows, table.affinity_now
    candidates[0] = 0.0
    candidates[0, 0] = 1.0
    for row in range(1, head.num_rows):
        write_expert(engine, experts, now, head.tokens, rows[row, 0], rows[row, 1], candidates[row])
    for row in range(head.num_rows, num_filled):
        candidates[row] = 0.0


@njit_borrowed
def write_expert(engine, experts, affinity_now, tokens: int, layer: int, e: int, out) -> None:
    """The columns of CANDIDATE_FEATURES for one expert, float32 (F,). Takes arrays: it runs for every row."""
    expert = experts[layer, e]
    per_step = np.float32(1.0 / engine.num_layers)
    age = np.float32(engine.epoch - expert.last_use) * per_step
    loaded = np.float32(engine.epoch - expert.loaded) * per_step
    ahead = (layer - engine.layer) % engine.num_layers
    out[0] = 0.0
    out[1] = age / (np.float32(4.0) + age)
    out[2] = age / (np.float32(64.0) + age)
    out[3] = expert.last_use < 0
    out[4] = expert.frequency_50
    out[5] = expert.frequency_90
    out[6] = expert.frequency_95
    out[7] = expert.frequency_99
    out[8] = expert.prior
    out[9] = expert.count * np.float32(1.0 / max(tokens, 1))
    out[10] = expert.predicted
    out[11] = affinity_now[ahead, e] if ahead < 2 else 0.0
    out[12] = ahead * per_step
    out[13] = expert.needed
    out[14] = expert.slot >= 0 and expert.loaded > expert.last_use
    out[15] = loaded / (np.float32(16.0) + loaded) if expert.slot >= 0 else np.float32(0.0)
    out[16] = np.sqrt(expert.keep)
    out[CHOSEN] = 0.0


# ------------------------------------------------------------------------------------------------------ graph

SAME_LAYER, NEXT_LAYER = 0, 1
"""Types of edges: from a needed expert to those that most often follow it at the next token, or in the next layer."""
EDGES_PER_NODE = 4
"""Edges of each type that leave a needed expert."""


def strongest(affinity: Affinity) -> np.ndarray:
    """int32 (2, L, E, EDGES_PER_NODE): for each type of edge, the experts that follow each expert most often."""
    most = min(EDGES_PER_NODE, affinity.same_layer.shape[2])
    tables = (affinity.same_layer, affinity.next_layer)  # in the order of SAME_LAYER, NEXT_LAYER
    ordered = [np.argsort(-table, axis=2, kind="stable")[:, :, :most] for table in tables]
    return np.stack(ordered).astype(np.int32)


@njit_borrowed
def write_graph(state: State, table: Table, following, nodes, edges, edge_type, edge_mask) -> None:
    """The experts of this layer and of the coming ones within `prefetch_depth`, and who follows those needed now.

    Node (ahead * E + e) is expert e of the layer `ahead` layers on; its columns are CANDIDATE_FEATURES. All decisions
    of an epoch see the same nodes and edges.
    """
    head, engine, experts, now = table.head[0], state.engine[0], state.experts, table.affinity_now
    num_experts = engine.num_experts
    reach = len(nodes) // num_experts
    for ahead in range(reach):
        layer = (engine.layer + ahead) % engine.num_layers
        for e in range(num_experts):
            write_expert(engine, experts, now, head.tokens, layer, e, nodes[ahead * num_experts + e])
    edge = 0
    for i in range(engine.num_needed):
        for kind in range(2):
            if kind >= reach:
                continue
            for j in range(following.shape[3]):
                edges[0, edge] = state.needed[i]
                edges[1, edge] = kind * num_experts + following[kind, engine.layer, state.needed[i], j]
                edge_type[edge] = kind
                edge += 1
    for other in range(len(edge_type)):
        edge_mask[other] = other < edge
        if other >= edge:
            edges[0, other] = 0
            edges[1, other] = 0
            edge_type[other] = 0


@njit_borrowed
def write_candidate_nodes(state: State, table: Table, num_nodes: int, candidate_node) -> None:
    """The node that each row is about, int32 (K,): -1 for row 0, and for experts of layers beyond those in the graph.

    (A pooled cache may offer such.)
    """
    engine, rows = state.engine[0], table.rows
    num_rows, num_experts = table.head[0].num_rows, engine.num_experts
    candidate_node[0] = -1
    for row in range(1, num_rows):
        node = (rows[row, 0] - engine.layer) % engine.num_layers * num_experts + rows[row, 1]
        candidate_node[row] = node if node < num_nodes else -1
    candidate_node[num_rows:] = -1


# ------------------------------------------------------------------------------------------------- following


@njit_borrowed
def resolve_wanted(state: State, wanted: Decision) -> None:
    """Make what a rule wants legal. What it wanted illegally is not the policy's to count."""
    illegal = state.engine[0].num_illegal
    resolve_decision(state, wanted)
    state.engine[0].num_illegal = illegal


@njit_borrowed
def show_choice(candidates, row: int) -> None:
    """Mark in candidates (K, F) the row that a rule would choose, and no other."""
    for other in range(len(candidates)):
        candidates[other, CHOSEN] = 0.0
    candidates[row, CHOSEN] = 1.0


@njit_borrowed
def action_of(state: State, table: Table, wanted: Decision, decision: Decision) -> int:
    """The row that builds `wanted`, a resolved decision, in the present phase; 0 if no row does."""
    head, num_asked = table.head[0], decision.plan[0].num_prefetch
    if head.phase == PREFETCH:
        if num_asked < wanted.plan[0].num_prefetch:
            for row in range(1, head.num_rows):
                same_layer = table.rows[row, 0] == wanted.prefetch[num_asked, 0]
                if table.open[row] and same_layer and table.rows[row, 1] == wanted.prefetch[num_asked, 1]:
                    return row
        return 0
    slot = wanted.victims[head.place] if head.phase == VICTIM else wanted.prefetch[num_asked, 2]
    for row in range(1, head.num_rows):
        if table.open[row] and table.rows[row, 2] == slot:
            return row
    if head.phase == VICTIM and state.engine[0].bypass == 0:
        return only_row(table)
    return 0
