"""Pictures: what they are computed from, and that every kind of run can be drawn."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from miniatures import tiny_spec, tiny_workload

from schedlab.envs.request_scheduling import render
from schedlab.envs.request_scheduling.sim import Simulator


def served(workload, **engine):
    simulator = Simulator(tiny_spec(**engine))
    simulator.reset(workload)
    while not simulator.step(simulator.default_decision()).done:
        pass
    return simulator.timeline()


def test_prefill_starts(miniature):
    """r1's two tokens and the first two of r2's share iteration 1; r2 is prefilled again in 3 and 4."""
    starts = render.prefill_starts(miniature)
    assert dict(zip(map(tuple, miniature.segments[:, :2].tolist()), starts.tolist(), strict=True)) == {
        (0, 0): 0,
        (1, 1): 1,
        (2, 2): 1,
        (2, 4): 3,
    }


def test_means_over_time(miniature):
    """Steps across iterations: [0, 2.25] is iteration 0 and a tenth of iteration 1."""
    edges = np.array([0.0, 2.25, 14.75, 20.0])
    decodes = render._over_time(miniature, miniature.decode_requests, edges)
    np.testing.assert_allclose(decodes * np.diff(edges), [0.25, 2.25 + 3.0 + 1.5 + 1.5, 0.0])


def test_idle_time_is_empty():
    timeline = served(tiny_workload([0, 7], [4, 4], [1, 1]))
    edges = render._edges(timeline)
    assert edges.tolist() == [0, 1, 7, 8]
    assert render._over_time(timeline, timeline.prefill_tokens, edges).tolist() == [4, 0, 4]


def test_long_runs_are_drawn_as_means():
    timeline = served(tiny_workload([0, 1], [4, 4], [2000, 1500]), kv_blocks=2000)
    edges = render._edges(timeline)
    assert len(edges) == render.MAX_STEPS + 1
    total = (render._over_time(timeline, timeline.decode_requests, edges) * np.diff(edges)).sum()
    assert total == pytest.approx(timeline.decode_requests.sum())  # one second an iteration


@pytest.mark.parametrize(
    "workload",
    [
        tiny_workload([0, 0, 1, 5], [4, 9, 3, 90], [5, 3, 9, 1]),
        tiny_workload(np.arange(80), [4] * 80, [2] * 80),  # too many for a row each
        tiny_workload([0, 1], [400, 400], [1, 1]),  # all refused
    ],
    ids=["few", "many", "refused"],
)
def test_every_timeline_can_be_drawn(workload, tmp_path):
    timeline = served(workload)
    figure = render.draw_timeline(timeline, 8, title="a run")
    assert len(figure.axes) == 4 + (len(workload) <= render.MAX_GANTT_REQUESTS)  # one for the decodes' scale
    render.save_timeline_png(timeline, tmp_path / "run.png", 8)
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_the_engine_can_be_drawn_at_any_moment():
    simulator = Simulator(tiny_spec(kv_blocks=6, prefix_cache=True))
    simulator.reset(tiny_workload([0] * 30, [4, 9, 3] * 10, [5, 3, 9] * 10, prefixes=["a", "ab", ""] * 10))
    seen, done, steps = set(), False, 0
    while not done:
        if steps % 25 == 0:
            frame = render.rgb_array(render.draw_engine(simulator.state(), title="engine"))
            assert frame.dtype == np.uint8 and frame.shape == (540, 900, 3)
            seen.add(frame.tobytes())
        done = simulator.step(simulator.default_decision()).done
        steps += 1
    assert len(seen) > 2
    render.draw_engine(simulator.state())  # empty


def test_no_display_and_no_global_state():
    code = (
        "import sys; import schedlab.envs.request_scheduling.render as r; assert 'matplotlib' not in sys.modules; "
        "r._figure(1, 1); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
