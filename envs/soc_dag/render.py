"""Pictures: a Gantt chart by PE of a finished run, the schedule of a running one, and task graphs.

Figures are drawn with matplotlib's Agg canvas, never through pyplot: no display is needed and no global state is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .spec import Soc
from .state import BOUND, BUSY, FETCHING, FINISHED, RUNNING, State
from .timeline import Timeline
from .workload import Dag, Workload

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

JOB_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8c6bb1")
"""Jobs take turns in these (Okabe and Ito's, told apart with any colour vision, and one more)."""
FETCH_COLOR, TEXT_COLOR, GRID_COLOR = "#d4d4d8", "#27272a", "#e4e4e7"
MAX_TASKS = 1500
"""Most tasks that a chart shows, the first ones to start."""
MAX_NAMES = 60
"""Most tasks whose names are written into their bars."""


def draw_gantt(timeline: Timeline, workload: Workload, soc: Soc, *, title: str = "") -> Figure:
    """A row for each PE: executions in the colour of their job, the wait for data in grey; deadlines below."""
    of_job = np.repeat(np.arange(len(workload)), np.diff(timeline.first_task))
    names = [name for dag in workload.dag_of_job for name in workload.dags[dag].task_names]
    ran = np.flatnonzero(np.isfinite(timeline.finish))
    shown = ran[np.argsort(timeline.start[ran], kind="stable")][:MAX_TASKS]
    figure = _figure(11.0, 1.3 + 0.32 * soc.num_pes)
    axis = figure.subplots()
    before: dict[int, float] = {}
    for task in shown:
        pe = int(timeline.pe[task])
        fetched_from = max(float(timeline.bound_at[task]), before.get(pe, 0.0))
        before[pe] = float(timeline.finish[task])
        axis.barh(pe, timeline.start[task] - fetched_from, left=fetched_from, height=0.35, color=FETCH_COLOR)
        _bar(axis, pe, timeline.start[task], timeline.finish[task], int(of_job[task]))
        if len(shown) <= MAX_NAMES:
            middle = (timeline.start[task] + timeline.finish[task]) / 2
            axis.text(middle, pe, names[task], ha="center", va="center", fontsize=6, color=TEXT_COLOR, clip_on=True)
    due = timeline.deadline[
        np.isfinite(timeline.deadline) & (timeline.arrival <= timeline.start[shown].max(initial=0.0))
    ]
    axis.vlines(due, soc.num_pes - 0.5, soc.num_pes - 0.2, color=JOB_COLORS[5], linewidth=1.0)
    _rows(axis, soc)
    axis.set_title(
        title or f"{workload.name}: {len(shown)} of {len(timeline.start)} tasks",
        loc="left",
        fontsize=9,
        color=TEXT_COLOR,
    )
    return figure


def draw_state(state: State, soc: Soc, *, title: str = "") -> Figure:
    """The schedule so far: what ran and runs on each PE, and how much waits; hatched: expected to run on."""
    engine, tasks = state.engine[0], state.tasks[: state.engine[0]["num_tasks"]]
    now = float(engine["now"])
    figure = _figure(9.0, 1.3 + 0.3 * soc.num_pes)
    axis = figure.subplots()
    started = np.flatnonzero((tasks["status"] == FINISHED) | (tasks["status"] == RUNNING))
    for task in started[np.argsort(-tasks["start"][started], kind="stable")][:MAX_TASKS]:
        row = tasks[task]
        _bar(axis, int(row["pe"]), row["start"], min(row["finish"], now), int(row["job"]))
    for pe, row in enumerate(state.pes[: soc.num_pes]):
        if row["status"] in (FETCHING, BUSY):
            end = max(float(row["expected_end"]), now)
            color = (
                FETCH_COLOR if row["status"] == FETCHING else JOB_COLORS[tasks[row["task"]]["job"] % len(JOB_COLORS)]
            )
            axis.barh(pe, end - now, left=now, height=0.7, color="none", edgecolor=color, hatch="////", linewidth=0.6)
    axis.axvline(now, color=TEXT_COLOR, linewidth=0.8)
    _rows(axis, soc)
    bound = int((tasks["status"] == BOUND).sum())
    told = f"{now:.0f} us   live jobs {engine['num_live']}   finished {engine['num_finished']}"
    axis.set_title(
        f"{title + '   ' if title else ''}{told}   tasks ready {engine['num_ready']}, bound {bound}",
        loc="left",
        fontsize=9,
        color=TEXT_COLOR,
    )
    return figure


def draw_dag(dag: Dag, *, kind_names: tuple[str, ...] = (), title: str = "") -> Figure:
    """The graph from left to right by depth; a task's colour is the kind of PE that runs it fastest."""
    depth = np.zeros(dag.num_tasks, int)
    for source, target in dag.edges:
        depth[target] = max(depth[target], depth[source] + 1)
    height = np.zeros(dag.num_tasks)
    for level in range(depth.max() + 1):
        here = np.flatnonzero(depth == level)
        height[here] = (np.arange(len(here)) + 0.5) / len(here)
    widest = np.bincount(depth).max()
    figure = _figure(2.0 + 0.9 * (depth.max() + 1), 1.2 + 0.45 * widest)
    axis = figure.subplots()
    largest = max(float(dag.volumes.max(initial=0.0)), 1e-9)
    for (source, target), volume in zip(dag.edges, dag.volumes, strict=True):
        width = 0.4 + 1.6 * float(volume) / largest
        axis.plot(
            depth[[source, target]],
            height[[source, target]],
            color=FETCH_COLOR,
            linewidth=width,
            solid_capstyle="round",
        )
    fastest = dag.times.argmin(1)
    for kind in np.unique(fastest):
        chosen = fastest == kind
        name = kind_names[kind] if kind < len(kind_names) else f"kind {kind}"
        color = JOB_COLORS[kind % len(JOB_COLORS)]
        axis.scatter(depth[chosen], height[chosen], s=60, color=color, label=f"fastest on {name}", zorder=2)
    if dag.num_tasks <= MAX_NAMES:
        for task, name in enumerate(dag.task_names):
            axis.annotate(
                name, (depth[task], height[task]), (0, 7), textcoords="offset points", ha="center", fontsize=6
            )
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), frameon=False, fontsize=7, ncols=4)
    axis.set_axis_off()
    axis.set_title(
        title or f"{dag.name}: {dag.num_tasks} tasks, {len(dag.edges)} edges", loc="left", fontsize=9, color=TEXT_COLOR
    )
    return figure


def rgb_array(figure: Figure, dpi: int = 100) -> np.ndarray:
    """uint8 (height, width, 3): the figure as pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _bar(axis: Axes, pe: int, start: float, end: float, job: int) -> None:
    color = JOB_COLORS[job % len(JOB_COLORS)]
    axis.barh(pe, end - start, left=start, height=0.7, color=color, edgecolor="white", linewidth=0.4)


def _rows(axis: Axes, soc: Soc) -> None:
    """A row for each PE, the first at the top."""
    axis.set_yticks(range(soc.num_pes), soc.pe_names, fontsize=7)
    axis.set_ylim(soc.num_pes - 0.2, -0.6)
    axis.set_xlabel("us")
    axis.grid(axis="x", color=GRID_COLOR)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
