"""The books of a real engine: those of the simulator, kept by the same kernels, with measured times."""

from __future__ import annotations

from ..envs.core.kernel import njit
from ..envs.expert_caching.sim import Sim, begin_epoch, cancel_queued, load_on_demand, queue_prefetches, swap_in
from ..envs.expert_caching.state import LOADING, Decision


@njit(cache=True)
def book_epoch(sim: Sim, decision: Decision, times, begun, ready_s, arrival_s) -> bool:
    """Execute a resolved decision in the books, with measured times, and go on to the next gate.

    This is `sim.run_epoch`, whose kernels keep the books; what they say of time is put right.

    Args:
        sim: the books; their routing is known up to the gate that just answered.
        decision: resolved, and executed.
        times: (end of the layer, its stall, answer of the next gate), seconds.
        begun: (Q,) chunks begun of each prefetch in flight, the late ones included, in the order of the queue.
        ready_s: (Q,) when each was there, inf: not yet.
        arrival_s: (E,) when each expert that was waited for was there.

    Returns:
        False when the workload is finished.
    """
    state, engine, books, cost = sim.state, sim.state.engine[0], sim.books[0], sim.cost[0]
    end_s, stall_s, gate_s = times
    if decision.plan[0].cancel_queued:
        cancel_queued(sim)
    if decision.plan[0].num_prefetch > 0:
        queue_prefetches(sim, decision)
    # The chunk that is being read now is half done, for all we know.
    reading_until_s = gate_s
    for place in range(books.num_queued):
        item = sim.queue[place]
        if ready_s[place] <= gate_s:
            item.chunks_left, item.ready_s = 0, ready_s[place]
        elif begun[place] > 0:
            item.chunks_left = cost.chunks - begun[place]
            state.experts[item.layer, item.expert].status = LOADING
            reading_until_s = gate_s + 0.5 * (cost.last_chunk_s if item.chunks_left == 0 else cost.chunk_s)
            item.ready_s = reading_until_s
    first_load, start_s = books.num_loads, engine.now_s
    load_on_demand(sim, decision)
    for i in range(first_load, books.num_loads):
        sim.loads[i].ready_s = arrival_s[sim.loads[i].expert]
    if engine.bypass:
        swap_in(sim, decision)
    epoch = sim.epochs[engine.epoch]
    epoch.start_s, epoch.end_s, epoch.stall_s = start_s, end_s, stall_s
    books.total_stall_s += stall_s
    engine.last_stall_s = stall_s
    engine.last_layer_s = gate_s - start_s
    engine.now_s = gate_s
    books.channel_s = reading_until_s
    return begin_epoch(sim)
