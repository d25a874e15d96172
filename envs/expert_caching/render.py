"""Pictures: what the cache of a running model holds, and the loads of a finished run.

Figures are drawn with matplotlib's Agg canvas, never through pyplot: no display is needed and no global state is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .state import ABSENT, LOADING, QUEUED, RESIDENT, State
from .timeline import BYPASSED, PREFETCH, Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABSENT_COLOR, RESIDENT_COLOR, FLIGHT_COLOR, MISSING_COLOR = "#f4f4f5", "#0072b2", "#e69f00", "#d55e00"
"""Colours of what an expert is (Okabe and Ito's, told apart with any colour vision)."""
STALL_COLOR, TEXT_COLOR = "#d55e00", "#27272a"
MAX_EPOCHS = 400
"""Epochs that `draw_timeline` shows at most, the first ones."""


def draw_cache(state: State, *, title: str = "") -> Figure:
    """A cell for each expert of each layer: absent, resident (paler the longer unused), in flight, missing now."""
    from matplotlib.colors import to_rgb

    engine = state.engine[0]
    status = state.experts["status"]
    picture = np.empty((*status.shape, 3))
    picture[:] = to_rgb(ABSENT_COLOR)
    picture[(status == QUEUED) | (status == LOADING)] = to_rgb(FLIGHT_COLOR)
    age = (engine["epoch"] - state.experts["last_use"]) / max(engine["num_layers"], 1)
    fresh = (0.35 + 0.65 / (1.0 + np.maximum(age, 0.0) / 16.0))[..., None]
    resident = fresh * np.array(to_rgb(RESIDENT_COLOR)) + (1.0 - fresh)
    picture[status == RESIDENT] = resident[status == RESIDENT]
    missing = (state.experts["needed"] != 0) & (status == ABSENT)
    picture[missing] = to_rgb(MISSING_COLOR)
    layers, experts = status.shape
    figure = _figure(3.0 + 0.09 * experts, 1.6 + 0.16 * layers)
    axis = figure.subplots()
    axis.imshow(picture, aspect="auto", interpolation="nearest")
    axis.axhline(engine["layer"], color=TEXT_COLOR, linewidth=0.6, alpha=0.4)
    axis.set_xlabel("expert")
    axis.set_ylabel("layer")
    used = max(int(engine["num_used"]), 1)
    axis.set_title(
        f"{title + '   ' if title else ''}step {engine['step']}, layer {engine['layer']}   "
        f"hit rate {engine['num_hits'] / used:.3f}   in flight {engine['num_in_flight']}",
        loc="left",
        fontsize=9,
        color=TEXT_COLOR,
    )
    return figure


def draw_timeline(timeline: Timeline, *, title: str = "") -> Figure:
    """Loads as bars from the decision to the time they were there, by layer, over the stalls of the layers."""
    shown = min(len(timeline.end_s), MAX_EPOCHS)
    figure = _figure(10.0, 2.5 + 0.12 * timeline.num_layers)
    top, bottom = figure.subplots(2, sharex=True, gridspec_kw={"height_ratios": (3, 1)})
    loads = timeline.loads[(timeline.loads["epoch"] < shown) & np.isfinite(timeline.loads["ready_s"])]
    kinds = (
        ("on demand", RESIDENT_COLOR, (loads["kind"] != PREFETCH) & (loads["kind"] != BYPASSED)),
        ("streamed past the cache", MISSING_COLOR, loads["kind"] == BYPASSED),
        ("ahead of need", FLIGHT_COLOR, loads["kind"] == PREFETCH),
    )
    for label, color, chosen in kinds:
        begin_s = timeline.start_s[loads["epoch"][chosen]]
        width_s = loads["ready_s"][chosen] - begin_s
        top.barh(loads["layer"][chosen], width_s, left=begin_s, height=0.7, color=color, alpha=0.6, label=label)
    top.set_ylabel("layer of the load")
    top.legend(loc="upper right", frameon=False, fontsize=8, ncols=3)
    bottom.vlines(timeline.start_s[:shown], 0.0, timeline.stall_s[:shown], color=STALL_COLOR, linewidth=1.0)
    bottom.set_ylabel("stall, s")
    bottom.set_xlabel("seconds")
    figure.suptitle(title or f"{shown} of {len(timeline.end_s)} epochs", x=0.01, ha="left", color=TEXT_COLOR)
    return figure


def draw_placement(placement: np.ndarray, num_devices: int, *, kept: float | None = None) -> Figure:
    """A cell for each expert of each layer, coloured by its device; -1: not placed yet. `kept`: share of the flow."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    picture = colormaps["turbo"](np.maximum(placement, 0) / max(num_devices - 1, 1))[..., :3]
    picture[placement < 0] = to_rgb(ABSENT_COLOR)
    layers, experts = placement.shape
    figure = _figure(3.0 + 0.09 * experts, 1.6 + 0.16 * layers)
    axis = figure.subplots()
    axis.imshow(picture, aspect="auto", interpolation="nearest")
    axis.set_xlabel("expert")
    axis.set_ylabel("layer")
    told = "" if kept is None else f"   flow kept {kept:.3f}"
    axis.set_title(f"{num_devices} devices{told}", loc="left", fontsize=9, color=TEXT_COLOR)
    return figure


def rgb_array(figure: Figure, dpi: int = 100) -> np.ndarray:
    """uint8 (height, width, 3): the figure as pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
