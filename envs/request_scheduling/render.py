"""Pictures of a run: the timeline of a finished one, and the engine of a running one.

Figures are drawn with matplotlib's Agg canvas, never through pyplot: no display is needed and no global state is left.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from .state import State
from .timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WAITING_COLOR, PREFILL_COLOR, DECODE_COLOR, PREEMPTED_COLOR = "#d4d4d8", "#0072b2", "#009e73", "#d55e00"
"""Colours of what a request is doing (Okabe and Ito's, told apart with any colour vision)."""
KV_COLOR, TEXT_COLOR, GRID_COLOR = "#cc79a7", "#27272a", "#e4e4e7"

MAX_GANTT_REQUESTS = 60
"""Most requests for which `draw_timeline` adds a row each."""
MAX_STEPS = 1500
"""Runs of more iterations are drawn as time-weighted means over as many slices of time."""
MAX_BARS = 16
"""Most requests that `draw_engine` lists on either side."""


def draw_timeline(timeline: Timeline, kv_blocks: int, *, title: str = "") -> Figure:
    """Three aligned panels over the time of a run, and a row for each request if there are few.

    The panels: what the iterations ran (prefill tokens, decodes), KV blocks in use as a share of `kv_blocks`, and how
    many requests decode, or are still owed (part of) their prefill.
    """
    gantt = 0 < len(timeline.arrival_s) <= MAX_GANTT_REQUESTS
    gantt_height = 0.6 + 0.16 * len(timeline.arrival_s) if gantt else 0.0
    heights = [1.5, 1.1, 1.3] + ([gantt_height] if gantt else [])
    figure = _figure(10.0, sum(heights) + 1.2)
    axes = figure.subplots(len(heights), sharex=True, gridspec_kw={"height_ratios": heights})
    for axis in axes:
        _plain(axis)
    edges = _edges(timeline)
    _draw_batches(axes[0], timeline, edges)
    _draw_kv(axes[1], timeline, edges, kv_blocks)
    _draw_counts(axes[2], timeline, edges)
    if gantt:
        _draw_gantt(axes[3], timeline)
    axes[-1].set_xlabel("seconds")
    if len(edges) > 1:
        axes[-1].set_xlim(min(edges[0], timeline.arrival_s.min(initial=edges[0])), edges[-1])
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", color=TEXT_COLOR)
    figure.align_ylabels(axes)
    return figure


def save_timeline_png(
    timeline: Timeline, path: str | PathLike[str], kv_blocks: int, *, title: str = "", dpi: int = 120
) -> None:
    """Write `draw_timeline` as a PNG."""
    draw_timeline(timeline, kv_blocks, title=title).savefig(path, format="png", dpi=dpi)


def draw_engine(state: State, *, title: str = "") -> Figure:
    """The engine now: KV use, the running requests and how far they are, the waiting list and who is late."""
    engine = state.engine[0]
    figure = _figure(9.0, 5.4)
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 11))
    pool, running, waiting = (
        figure.add_subplot(grid[0, :]),
        figure.add_subplot(grid[1, 0]),
        figure.add_subplot(grid[1, 1]),
    )
    for axis in (pool, running, waiting):
        _plain(axis)
    _draw_pool(pool, state)
    _draw_running(running, state)
    _draw_waiting(waiting, state)
    figure.suptitle(
        f"{title + '   ' if title else ''}{engine['now_s']:.2f} s   iteration {engine['iterations']}   "
        f"{engine['num_finished']} finished",
        x=0.01,
        ha="left",
        fontweight="bold",
        color=TEXT_COLOR,
    )
    return figure


def rgb_array(figure: Figure, dpi: int = 100) -> np.ndarray:
    """uint8 (height, width, 3): the figure as pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


# ------------------------------------------------------------------------------------------------- the timeline


def prefill_starts(timeline: Timeline) -> np.ndarray:
    """int64 (S,): the iteration in which the prefill that ends with each segment's first token began.

    The record knows how many prefill tokens an iteration ran, not whose. They are handed out to the prefills in the
    order in which these were completed, to each from its end backwards: exact where prompts are prefilled one after
    the other, an estimate where several share an iteration or a prefix cache saved some.
    """
    segments = timeline.segments
    left = timeline.prefill_tokens.copy()
    starts = segments[:, 1].copy()
    generated = np.zeros(len(timeline.arrival_s), np.int64)
    available_from = np.searchsorted(timeline.iteration_start_s, timeline.arrival_s, side="left")
    for s in np.argsort(segments[:, 1], kind="stable"):
        request, first, tokens = segments[s]
        need = timeline.prompt_tokens[request] + generated[request]
        j = first
        while need > 0 and j >= available_from[request]:
            if left[j] > 0:
                taken = min(need, left[j])
                left[j] -= taken
                need -= taken
                starts[s] = j
            elif j < first:
                break
            j -= 1
        generated[request] += tokens
        available_from[request] = first + tokens
    return starts


def _edges(timeline: Timeline) -> np.ndarray:
    """Edges of the steps to draw: those of the iterations (idle time between), or equal slices of a long run."""
    start_s, end_s = timeline.iteration_start_s, timeline.iteration_end_s
    if len(end_s) > MAX_STEPS:
        return np.linspace(start_s[0], end_s[-1], MAX_STEPS + 1)
    return np.unique(np.concatenate([start_s, end_s]))


def _over_time(timeline: Timeline, values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(len(edges) - 1,): mean of a value of the iterations over each step, 0 while idle."""
    knots = np.stack([timeline.iteration_start_s, timeline.iteration_end_s], axis=1).ravel()
    area = np.zeros(len(knots))
    area[1::2] = np.cumsum(values * (timeline.iteration_end_s - timeline.iteration_start_s))
    area[2::2] = area[1:-1:2]
    return np.diff(np.interp(edges, knots, area)) / np.diff(edges)


def _draw_batches(axis: Axes, timeline: Timeline, edges: np.ndarray) -> None:
    if len(edges) > 1:
        prefill = _over_time(timeline, timeline.prefill_tokens, edges)
        axis.stairs(prefill, edges, fill=True, color=PREFILL_COLOR, alpha=0.85, linewidth=0)
        axis.set_ylim(0, max(prefill.max() * 1.08, 1))
    axis.set_ylabel("prefill tokens", color=PREFILL_COLOR)
    decodes = axis.twinx()
    _plain(decodes)
    decodes.grid(False)
    if len(edges) > 1:
        counts = _over_time(timeline, timeline.decode_requests, edges)
        decodes.stairs(counts, edges, color=DECODE_COLOR, linewidth=1.6)
        decodes.set_ylim(0, max(counts.max() * 1.08, 1))
    decodes.set_ylabel("decodes", color=DECODE_COLOR)
    axis.set_title("what an iteration runs", loc="left", fontsize=9, color=TEXT_COLOR)


def _draw_kv(axis: Axes, timeline: Timeline, edges: np.ndarray, kv_blocks: int) -> None:
    if len(edges) > 1:
        use = 100 * _over_time(timeline, timeline.kv_blocks_used, edges) / kv_blocks
        axis.stairs(use, edges, fill=True, color=KV_COLOR, alpha=0.55, linewidth=0)
        axis.stairs(use, edges, color=KV_COLOR, linewidth=1.2, baseline=None)
    axis.axhline(100, color=TEXT_COLOR, linewidth=0.8, linestyle=(0, (4, 3)))
    axis.set_ylim(0, 108)
    axis.set_ylabel("KV use, %")
    preemptions = int(timeline.preemptions.sum())
    told = f"{preemptions} preemption{'s' * (preemptions != 1)}"
    axis.set_title(f"KV cache of {kv_blocks} blocks, {told}", loc="left", fontsize=9, color=TEXT_COLOR)


def _draw_counts(axis: Axes, timeline: Timeline, edges: np.ndarray) -> None:
    served = ~timeline.refused
    arrival_s = np.sort(timeline.arrival_s[served])
    last = np.full(len(timeline.arrival_s), -1, np.int64)
    np.maximum.at(last, timeline.segments[:, 0], timeline.segments[:, 1] + timeline.segments[:, 2] - 1)
    finish_s = np.sort(timeline.iteration_end_s[last[served & (last >= 0)]])
    if len(edges) > 1:
        middle = (edges[:-1] + edges[1:]) / 2
        present = np.searchsorted(arrival_s, middle, side="right") - np.searchsorted(finish_s, middle, side="right")
        decoding = np.minimum(_over_time(timeline, timeline.decode_requests, edges), present)
        axis.stairs(decoding, edges, fill=True, color=DECODE_COLOR, alpha=0.85, linewidth=0, label="decoding")
        axis.stairs(
            present,
            edges,
            baseline=decoding,
            fill=True,
            color=WAITING_COLOR,
            linewidth=0,
            label="waiting or in prefill",
        )
        axis.set_ylim(0, max(present.max() * 1.15, 1))
        axis.legend(loc="upper right", frameon=False, fontsize=8, ncols=2, borderaxespad=0.2)
    axis.set_ylabel("requests")
    refused = int(timeline.refused.sum())
    told = f", {refused} refused" if refused else ""
    axis.set_title(f"requests in the system{told}", loc="left", fontsize=9, color=TEXT_COLOR)


def _draw_gantt(axis: Axes, timeline: Timeline) -> None:
    from matplotlib.patches import Patch

    start_s, end_s = timeline.iteration_start_s, timeline.iteration_end_s
    starts = prefill_starts(timeline)
    bars: dict[str, list[tuple[int, float, float]]] = {
        color: [] for color in (WAITING_COLOR, PREEMPTED_COLOR, PREFILL_COLOR, DECODE_COLOR)
    }
    free_s = timeline.arrival_s.copy()  # since when a request has been doing nothing
    is_fresh = np.ones(len(free_s), bool)
    for s in np.argsort(timeline.segments[:, 1], kind="stable"):
        request, first, tokens = timeline.segments[s]
        prefill_s, token_s = max(start_s[starts[s]], free_s[request]), end_s[first]
        bars[WAITING_COLOR if is_fresh[request] else PREEMPTED_COLOR].append((request, free_s[request], prefill_s))
        bars[PREFILL_COLOR].append((request, prefill_s, token_s))
        bars[DECODE_COLOR].append((request, token_s, end_s[first + tokens - 1]))
        free_s[request], is_fresh[request] = end_s[first + tokens - 1], False
    for color, spans in bars.items():
        axis.barh(
            [request for request, _, _ in spans],
            [end - begin for _, begin, end in spans],
            left=[begin for _, begin, _ in spans],
            height=0.72,
            color=color,
            linewidth=0,
        )
    refused = np.flatnonzero(timeline.refused)
    axis.plot(timeline.arrival_s[refused], refused, "x", color=PREEMPTED_COLOR, markersize=5, markeredgewidth=1.5)
    n = len(timeline.arrival_s)
    axis.set_ylim(n - 0.4, -0.6)
    step = 1 if n <= 12 else 5 if n <= 30 else 10
    axis.set_yticks(np.arange(0, n, step))
    axis.grid(False, axis="y")
    axis.set_ylabel("request")
    axis.set_title("every request", loc="left", fontsize=9, color=TEXT_COLOR)
    names = {WAITING_COLOR: "waiting", PREFILL_COLOR: "prefill", DECODE_COLOR: "decode", PREEMPTED_COLOR: "preempted"}
    axis.legend(
        handles=[Patch(color=color, label=name) for color, name in names.items()],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
        fontsize=8,
        ncols=4,
        borderaxespad=0.1,
    )


# --------------------------------------------------------------------------------------------- the running engine


def _draw_pool(axis: Axes, state: State) -> None:
    engine = state.engine[0]
    used = engine["kv_blocks_total"] - engine["kv_blocks_free"]
    axis.barh([0], [engine["kv_blocks_total"]], color=GRID_COLOR, height=0.9)
    axis.barh([0], [used], color=KV_COLOR, height=0.9)
    axis.set_xlim(0, engine["kv_blocks_total"])
    axis.set_yticks([])
    axis.grid(False)
    axis.set_title(f"KV blocks in use: {used} of {engine['kv_blocks_total']}", loc="left", fontsize=9, color=TEXT_COLOR)


def _draw_running(axis: Axes, state: State) -> None:
    engine = state.engine[0]
    ids = state.running[: engine["num_running"]]
    rows = state.requests[ids[:MAX_BARS]]
    places = np.arange(len(rows))
    complete = rows["computed_tokens"] >= rows["prefill_target"]
    prefilled = np.minimum(rows["computed_tokens"], rows["prompt_tokens"])
    owed = np.maximum(rows["prefill_target"] - rows["computed_tokens"], 0)
    to_come = np.maximum(rows["predicted_output_tokens"] - rows["generated_tokens"], 0)
    begin = np.zeros(len(rows))
    for label, tokens, color in (
        ("prompt in KV", prefilled, PREFILL_COLOR),
        ("prompt owed", np.where(complete, 0, owed), "#a6cee3"),
        ("generated", rows["generated_tokens"], DECODE_COLOR),
        ("predicted to come", to_come, "#b7e1d3"),
    ):
        axis.barh(places, tokens, left=begin, color=color, height=0.75, label=label)
        begin = begin + tokens
    _label_rows(axis, ids, f"running: {len(ids)}, {engine['num_decoding']} decoding")
    if len(rows):
        axis.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False, fontsize=8, ncols=4, columnspacing=1
        )


def _draw_waiting(axis: Axes, state: State) -> None:
    from matplotlib.patches import Patch

    engine = state.engine[0]
    ids = state.waiting[: engine["num_waiting"]]
    rows = state.requests[ids[:MAX_BARS]]
    tokens = rows["prompt_tokens"] + rows["generated_tokens"]
    late = (rows["generated_tokens"] == 0) & (engine["now_s"] - rows["arrival_s"] > rows["ttft_slo_s"])
    colors = np.where(rows["preemptions"] > 0, PREEMPTED_COLOR, np.where(late, "#71717a", WAITING_COLOR))
    axis.barh(np.arange(len(rows)), tokens, color=list(colors), height=0.75)
    axis.barh(np.arange(len(rows)), rows["cached_tokens"], color=PREFILL_COLOR, height=0.75)
    _label_rows(axis, ids, f"waiting: {len(ids)}")
    if len(rows):
        names = {
            WAITING_COLOR: "in time",
            "#71717a": "past its limit",
            PREEMPTED_COLOR: "preempted",
            PREFILL_COLOR: "cached",
        }
        axis.legend(
            handles=[Patch(color=color, label=name) for color, name in names.items()],
            loc="upper center",
            bbox_to_anchor=(0.5, -0.12),
            frameon=False,
            fontsize=8,
            ncols=4,
            columnspacing=1,
        )


def _label_rows(axis: Axes, ids: np.ndarray, title: str) -> None:
    shown = ids[:MAX_BARS]
    more = f" (the first {MAX_BARS} are shown)" if len(ids) > MAX_BARS else ""
    axis.set_title(title + more, loc="left", fontsize=9, color=TEXT_COLOR)
    axis.set_yticks(np.arange(len(shown)), [str(i) for i in shown])
    axis.set_ylim(MAX_BARS - 0.4, -0.6)
    axis.grid(False, axis="y")
    axis.set_xlabel("tokens", fontsize=8)
    axis.set_xlim(left=0)


# --------------------------------------------------------------------------------------------------------- house style


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(GRID_COLOR)
    axis.grid(True, color=GRID_COLOR, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, colors=TEXT_COLOR, length=0)
    axis.yaxis.label.set_fontsize(9)
