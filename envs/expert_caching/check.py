"""Is this record possible? An independent replay of a `Timeline`, in plain Python, one chunk at a time.

`check_residency` holds for every backend: what was needed was there, slots held what the loads put into them, victims
were legal. `check_times` holds for the simulator's clock: the channel and the layers took the time that the cost model
says. Both return a list of problems, empty if there is none.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .spec import CostModel, ExpertCachingSpec
from .timeline import BYPASSED, DEMAND, PREFETCH, SWAPPED, Timeline
from .workload import Workload

MOST_PROBLEMS = 20
"""Problems after which a check stops looking."""
TOLERANCE_S = 1e-9

Expert = tuple[int, int]
"""(layer, expert)."""


def needed_experts(timeline: Timeline, workload: Workload, epoch: int) -> dict[int, int]:
    """The experts that an epoch needs, each with the number of tokens that use it."""
    step, layer = divmod(epoch, timeline.num_layers)
    uses: dict[int, int] = defaultdict(int)
    for token in timeline.batches[step]:
        if token >= 0:
            for expert in workload.experts[token, layer]:
                uses[int(expert)] += 1
    return dict(uses)


def check_residency(timeline: Timeline, workload: Workload, spec: ExpertCachingSpec) -> list[str]:
    """Replay what the slots held; a prefetch counts as resident from the `ready_s` that was recorded."""
    problems: list[str] = []
    layers, num_experts = workload.num_layers, workload.num_experts
    ends = np.cumsum(spec.slots_of(layers, num_experts, workload.top_k))
    ranges = [(0, int(ends[-1]))] * layers if spec.pooled else list(zip([0, *ends[:-1]], ends, strict=True))
    holds: dict[int, Expert] = {
        slot: (int(layer), int(expert)) for slot, (layer, expert) in enumerate(timeline.initial) if expert >= 0
    }
    ready_at: dict[Expert, float] = dict.fromkeys(holds.values(), -math.inf)  # of what is in a slot or in flight
    unused: set[Expert] = set()  # prefetched copies without a use
    by_epoch, cancelled = _by_epoch(timeline)
    for epoch in range(len(timeline.end_s)):
        if len(problems) >= MOST_PROBLEMS:
            break
        layer, start_s = epoch % layers, timeline.start_s[epoch]
        needed = {(layer, expert) for expert in needed_experts(timeline, workload, epoch)}
        ready = {e for e in needed if ready_at.get(e, math.inf) <= start_s + TOLERANCE_S}
        hits = ready - unused
        unused -= needed
        told = (timeline.used[epoch], timeline.ready[epoch], timeline.hits[epoch])
        if told != (len(needed), len(ready), len(hits)):
            problems.append(f"epoch {epoch}: used, ready, hits {told}, not {(len(needed), len(ready), len(hits))}")
        for load in cancelled[epoch]:
            slot, expert = int(load["slot"]), (int(load["layer"]), int(load["expert"]))
            if holds.pop(slot, None) != expert or expert in needed:
                problems.append(f"epoch {epoch}: {expert} is cancelled, and is not in slot {slot} or is needed")
            ready_at.pop(expert, None)
        asked: set[Expert] = set()
        taken: set[int] = set()
        swaps: list[tuple[int, Expert]] = []
        missing = needed - set(ready_at)
        for load in by_epoch[epoch]:
            expert, slot, kind = (int(load["layer"]), int(load["expert"])), int(load["slot"]), int(load["kind"])
            where = f"epoch {epoch}: load of {expert} into slot {slot}"
            victim = holds.get(slot)
            if expert in ready_at or expert in asked:
                problems.append(f"{where}: it is there already")
            if kind == PREFETCH:
                distance = (expert[0] - layer) % layers
                if not 1 <= distance <= spec.prefetch_depth and layers > 1:
                    problems.append(f"{where}: prefetched {distance} layers ahead")
                unused.add(expert)
            elif expert not in missing:
                problems.append(f"{where}: nobody misses it")
            asked.add(expert)
            if kind == BYPASSED:
                continue
            first, end = ranges[expert[0]]
            if not first <= slot < end or slot in taken:
                problems.append(f"{where}: a slot of another layer, or taken twice")
            taken.add(slot)
            if victim is not None and ready_at[victim] > start_s + TOLERANCE_S:
                problems.append(f"{where}: {victim} is still being read into it")
            if victim is not None and (victim in needed) != (kind == SWAPPED):
                problems.append(f"{where}: {victim} is {'' if victim in needed else 'not '}needed now")
            if kind == SWAPPED:
                swaps.append((slot, expert))
                continue
            if victim is not None:
                del ready_at[victim]
                unused.discard(victim)
            holds[slot] = expert
            # cancelled and unfinished prefetches are in flight, for ever as far as this epoch knows
            ready_at[expert] = math.inf if math.isnan(load["ready_s"]) else float(load["ready_s"])
        absent = missing - asked
        if absent:
            problems.append(f"epoch {epoch}: {sorted(absent)} are needed, absent, and never loaded")
        for slot, expert in swaps:
            del ready_at[holds[slot]]
            holds[slot] = expert
            ready_at[expert] = float(timeline.end_s[epoch])
        late = [e for e in needed if ready_at.get(e, -math.inf) > timeline.end_s[epoch] + TOLERANCE_S]
        if late:
            problems.append(f"epoch {epoch}: computed before {sorted(late)} were there")
    return problems


@dataclass
class _Read:
    """A load that the channel has not finished: seconds of each chunk that it has not begun."""

    expert: Expert
    load: int
    chunks: list[float]
    ready_s: float = math.nan


@dataclass
class _Channel:
    """Reads chunk after chunk, first come first served, demand before prefetch."""

    free_s: float = 0.0
    queue: list[_Read] = field(default_factory=list)
    ready_s: dict[int, float] = field(default_factory=dict)

    def read_chunk(self, item: _Read) -> None:
        self.free_s += item.chunks.pop(0)
        if not item.chunks:
            item.ready_s = self.ready_s[item.load] = self.free_s
            if item in self.queue:
                self.queue.remove(item)

    def read_until(self, time_s: float) -> None:
        while self.queue and self.free_s < time_s - TOLERANCE_S * 1e-3:
            self.read_chunk(self.queue[0])


def check_times(timeline: Timeline, workload: Workload, spec: ExpertCachingSpec) -> list[str]:
    """Work out when every chunk was read and every layer computed, from what was asked for when."""
    problems: list[str] = []
    cost, layers = spec.cost, workload.num_layers
    channel, now_s = _Channel(), 0.0
    host = _Host(timeline, workload, spec)
    by_epoch, cancelled = _by_epoch(timeline)
    for epoch in range(len(timeline.end_s)):
        if len(problems) >= MOST_PROBLEMS:
            break
        step, layer = divmod(epoch, layers)
        now_s += cost.step_s if layer == 0 and step > 0 else 0.0
        now_s += cost.attention_s + cost.attention_token_s * int((timeline.batches[step] >= 0).sum())
        channel.read_until(now_s)
        uses = needed_experts(timeline, workload, epoch)
        host.use(epoch, [(layer, expert) for expert in uses])
        for load in cancelled[epoch]:
            expert = (int(load["layer"]), int(load["expert"]))
            channel.queue = [item for item in channel.queue if item.expert != expert]
            host.leave_slot(expert)
        prefetches: list[Any] = []
        demands: list[Any] = []
        for load in by_epoch[epoch]:
            index, expert = int(load["index"]), (int(load["layer"]), int(load["expert"]))
            if load["kind"] == PREFETCH:
                host.enter_slot(expert, int(load["slot"]), PREFETCH)
            item = _Read(expert, index, _chunks(cost, host.fetch(expert)))
            if load["kind"] != PREFETCH:  # what a load on demand evicts is in its slot until then
                host.enter_slot(expert, int(load["slot"]), int(load["kind"]))
            (prefetches if load["kind"] == PREFETCH else demands).append(item)
        host.end_epoch()
        if not channel.queue:
            channel.free_s = max(channel.free_s, now_s)
        channel.queue += prefetches
        late = [item for item in channel.queue if item.expert[0] == layer and item.expert[1] in uses]
        finishing = [index for index, ready_s in channel.ready_s.items() if ready_s > now_s + TOLERANCE_S]
        arrivals: dict[Expert, float] = {}
        for index in finishing:
            load = timeline.loads[index]
            if load["layer"] == layer and int(load["expert"]) in uses and load["kind"] == PREFETCH:
                arrivals[layer, int(load["expert"])] = channel.ready_s[index]
        channel.free_s = max(channel.free_s, now_s) if late or demands else channel.free_s
        for item in late + demands:
            while item.chunks:
                channel.read_chunk(item)
            arrivals[item.expert] = item.ready_s
        if prefetches and channel.queue == prefetches:
            channel.free_s = max(channel.free_s, now_s + cost.decision_s)
        times = {e: cost.expert_s + cost.expert_token_s * count for e, count in uses.items()}
        end_s, stall_s = _computed_s(cost, now_s, times, {e: ready_s for (_, e), ready_s in arrivals.items()})
        for name, told, found in (
            ("start_s", timeline.start_s[epoch], now_s),
            ("end_s", timeline.end_s[epoch], end_s),
            ("stall_s", timeline.stall_s[epoch], stall_s),
        ):
            if abs(told - found) > TOLERANCE_S + 1e-9 * abs(found):
                problems.append(f"epoch {epoch}: {name} is {told}, not {found}")
        now_s = end_s
    for index, ready_s in channel.ready_s.items():
        told = timeline.loads[index]["ready_s"]
        if not math.isnan(told) and abs(told - ready_s) > TOLERANCE_S + 1e-9 * ready_s:
            problems.append(f"load {index}: ready_s is {told}, not {ready_s}")
    return problems[:MOST_PROBLEMS]


def _computed_s(
    cost: CostModel, now_s: float, times: dict[int, float], arrivals: dict[int, float]
) -> tuple[float, float]:
    """When the last expert is computed, those at hand first, then the others as they arrive, and how long it waited."""
    decided_s = now_s + cost.decision_s
    if not cost.overlap:
        all_there_s = max([decided_s, *arrivals.values()])
        return all_there_s + sum(times.values()), all_there_s - decided_s
    at_hand_s = sum(seconds for e, seconds in times.items() if e not in arrivals)
    end_s, stall_s = decided_s + at_hand_s, 0.0
    for expert, ready_s in sorted(arrivals.items(), key=lambda arrival: arrival[1]):
        stall_s += max(ready_s - end_s, 0.0)
        end_s = max(end_s, ready_s) + times[expert]
    return end_s, stall_s


def _chunks(cost: CostModel, from_store: bool) -> list[float]:
    """Seconds of each chunk of an expert."""
    bandwidth = min(cost.bandwidth, cost.store_bandwidth) if from_store else cost.bandwidth
    last = cost.expert_bytes - (cost.chunks - 1) * cost.chunk_bytes
    sizes = [cost.chunk_bytes] * (cost.chunks - 1) + [last]
    return [cost.chunk_latency_s + size / bandwidth for size in sizes]


class _Host:
    """The tier behind the channel: which experts it holds, the least recently used outside the slots dropped first."""

    def __init__(self, timeline: Timeline, workload: Workload, spec: ExpertCachingSpec) -> None:
        everyone = [(layer, e) for layer in range(workload.num_layers) for e in range(workload.num_experts)]
        self.room = round(spec.host_share * len(everyone))
        self.slot_of: dict[Expert, int] = {
            (int(layer), int(e)): slot for slot, (layer, e) in enumerate(timeline.initial) if e >= 0
        }
        first = [e for e in everyone if e in self.slot_of] + [e for e in everyone if e not in self.slot_of]
        self.held = set(first[: self.room])
        self.last_use = dict.fromkeys(everyone, -1)
        self.swaps: list[tuple[Expert, int]] = []

    def use(self, epoch: int, needed: list[Expert]) -> None:
        self.last_use.update(dict.fromkeys(needed, epoch))

    def leave_slot(self, expert: Expert) -> None:
        self.slot_of.pop(expert, None)

    def enter_slot(self, expert: Expert, slot: int, kind: int) -> None:
        if kind == SWAPPED:
            self.swaps.append((expert, slot))
        elif kind in (DEMAND, PREFETCH):
            for holder in [e for e, at in self.slot_of.items() if at == slot]:
                del self.slot_of[holder]
            self.slot_of[expert] = slot

    def end_epoch(self) -> None:
        for expert, slot in self.swaps:
            self.enter_slot(expert, slot, DEMAND)
        self.swaps.clear()

    def fetch(self, expert: Expert) -> bool:
        """True if the expert has to come from the store below."""
        if expert in self.held:
            return False
        self.held.add(expert)
        if len(self.held) > self.room:
            outside = [e for e in self.held if e not in self.slot_of and e != expert]
            if outside:
                self.held.remove(min(outside, key=lambda e: (self.last_use[e], e)))
        return True


def _by_epoch(timeline: Timeline) -> tuple[dict[int, list[dict]], dict[int, list[dict]]]:
    """The loads asked for in each epoch, with their row as `index`, and those cancelled in each epoch."""
    asked: dict[int, list[dict]] = defaultdict(list)
    cancelled: dict[int, list[dict]] = defaultdict(list)
    names = timeline.loads.dtype.names or ()
    for index, row in enumerate(timeline.loads):
        load = {name: row[name] for name in names} | {"index": index}
        asked[int(row["epoch"])].append(load)
        if row["cancelled"] >= 0:
            cancelled[int(row["cancelled"])].append(load)
    return asked, cancelled
