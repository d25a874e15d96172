"""Make one self-contained HTML page from a results folder: tables, plots, and the timeline of a run.

Examples:

  schedlab report results/demo
  schedlab report results/goodput --out goodput.html
"""

from __future__ import annotations

import base64
import html
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from ..envs.core.errors import InputError
from . import command

if TYPE_CHECKING:
    import pandas as pd

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; font-size: .85rem; } .wide { overflow-x: auto; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #888; vertical-align: bottom; }
.best { font-weight: bold; color: #0a6b2d; } .oracle { color: #888; } .note { color: #666; font-size: .85rem; }
img { max-width: 100%; }
"""


@dataclass
class Args:
    """Arguments of `schedlab report`."""

    folder: Annotated[Path, tyro.conf.Positional]
    """What `schedlab evaluate --out` wrote: a folder with results.csv and schedules/."""
    out: Path | None = None
    """The page. Default: report.html in the folder."""
    title: str = ""
    """Of the page; default: the folder's name."""


def write_report(folder: Path, out: Path | None = None, title: str = "") -> Path:
    """Write the page of a results folder. Raises InputError if it holds no results."""
    from ..envs.core.results import CELL_COLUMNS, atomic_path, read_results, summary_table
    from .domain import domain_module
    from .evaluate import directions

    frame = read_results(folder / "results.csv")
    if frame.empty:
        raise InputError("holds no finished run", file=folder / "results.csv", remedy="Evaluate with --out first")
    summary = summary_table(frame)
    parts = []
    for key, cell in summary.groupby(list(CELL_COLUMNS), sort=False):
        name, workload, instance, backend, clock = map(str, key)
        domain = domain_module(name)
        better = directions(frame[frame["domain"] == name])
        oracles = {policy for policy in cell["policy"].unique() if domain.is_oracle(policy)}
        parts.append(f"<h2>{html.escape(f'{workload}, {instance}')}</h2>")
        seeds = int(cell["num_seeds"].max())
        parts.append(
            f'<p class="note">On {html.escape(backend)}, {html.escape(clock)} clock, {seeds} paired '
            f"seed{'s' if seeds != 1 else ''}; mean and 95% bootstrap interval; the best of each column in bold, "
            "oracles apart.</p>"
        )
        parts.append(table(cell, better, oracles))
        parts.append(figure(metric_plot(cell, domain.PLOTTED, better, oracles), "metrics by policy"))
        parts += timelines(folder, frame, cell, key)
    title = title or f"Results of {folder.resolve().name}"
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n"
        + "\n".join(parts)
        + '\n<p class="note">Every figure can be recomputed from the schedules beside results.csv: '
        f"<code>schedlab evaluate --validate {html.escape(str(folder))}</code></p></body></html>\n"
    )
    out = out or folder / "report.html"
    with atomic_path(out) as path:
        path.write_text(page)
    return out


def table(cell: pd.DataFrame, better: dict[str, bool | None], oracles: set[str]) -> str:
    """The policies of one cell in rows, their metrics in columns."""
    from ..envs.core.results import best_policies, format_value

    best = best_policies(cell, better, oracles)
    arrows = {True: " ↓", False: " ↑", None: ""}
    metrics = cell.drop_duplicates("metric")[["metric", "unit"]].to_numpy().tolist()
    head = "".join(f"<th>{html.escape(name)}{arrows[better[name]]}<br>[{html.escape(unit)}]</th>"
                   for name, unit in metrics)  # fmt: skip
    lines = []
    names = list(cell["policy"].unique())
    for policy in [p for p in names if p not in oracles] + [p for p in names if p in oracles]:
        rows = cell[cell["policy"] == policy].set_index("metric")
        cells = []
        for name, _ in metrics:
            if name not in rows.index:
                cells.append("<td>-</td>")
                continue
            row = rows.loc[name]
            text = format_value(row["mean"])
            if not np.isnan(row["low"]):
                text += f" [{format_value(row['low'])}, {format_value(row['high'])}]"
            kind = ' class="best"' if policy in best.get(name, ()) else ""
            cells.append(f"<td{kind}>{text}</td>")
        kind = ' class="oracle"' if policy in oracles else ""
        lines.append(f"<tr{kind}><td>{html.escape(policy)}</td>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><tr><th>policy</th>{head}</tr>{"".join(lines)}</table></div>'


def metric_plot(cell: pd.DataFrame, plotted: Sequence[str], better: dict[str, bool | None], oracles: set[str]) -> Any:
    """Bars of the chosen metrics by policy, with intervals."""
    from matplotlib.figure import Figure

    names = [name for name in plotted if (cell["metric"] == name).any()]
    policies = list(cell["policy"].unique())
    picture = Figure(figsize=(3.1 * len(names) + 1.5, 0.32 * len(policies) + 1.3), layout="constrained")
    axes = np.atleast_1d(picture.subplots(1, len(names), sharey=True))
    for axis, name in zip(axes, names, strict=True):
        rows = cell[cell["metric"] == name].set_index("policy").reindex(policies)
        mean = rows["mean"].to_numpy()
        low, high = (np.where(rows[side].isna(), mean, rows[side]) for side in ("low", "high"))
        colours = ["#bbbbbb" if policy in oracles else "#3b6ea5" for policy in policies]
        errors = np.nan_to_num(np.maximum(np.stack([mean - low, high - mean]), 0))
        axis.barh(range(len(policies)), mean, color=colours, xerr=errors, ecolor="#222222", capsize=2, height=0.7)
        arrow = {True: " (less is better)", False: " (more is better)", None: ""}[better[name]]
        axis.set_title(f"{name} [{rows['unit'].dropna().iloc[0]}]\n{arrow.strip()}", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(policies)), [p if len(p) < 40 else "..." + p[-37:] for p in policies])
    axes[0].invert_yaxis()
    return picture


def timelines(folder: Path, frame: pd.DataFrame, cell: pd.DataFrame, key: Any) -> list[str]:
    """A picture of the first seed under the cell's first policy, if there is a schedule."""
    import json

    from ..envs.core.results import RunKey, schedule_paths
    from .domain import domain_module

    domain, workload, instance, backend, clock = map(str, key)
    policy = str(cell["policy"].iloc[0])
    mine = frame[(frame["domain"] == domain) & (frame["workload"] == workload) & (frame["instance"] == instance)
                 & (frame["backend"] == backend) & (frame["policy"] == policy)]  # fmt: skip
    run = RunKey(domain, workload, instance, policy, backend, clock, int(mine["seed"].min()))
    npz, description = schedule_paths(folder, run)
    if not npz.exists() or not description.exists():
        return []
    picture = domain_module(domain).draw_run(npz, json.loads(description.read_text()))
    if picture is None:
        return []
    return [f'<p class="note">One run of {html.escape(policy)}, seed {run.seed}:</p>', figure(picture, "timeline")]


def figure(picture: Any, text: str) -> str:
    """A matplotlib figure, or an RGB array, as an inline PNG."""
    buffer = io.BytesIO()
    if isinstance(picture, np.ndarray):
        from matplotlib.image import imsave

        imsave(buffer, picture, format="png")
    else:
        picture.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="{html.escape(text)}" src="data:image/png;base64,{data}"></p>'


def report(args: Args) -> int:
    """Run `schedlab report`."""
    print(write_report(args.folder, args.out, args.title))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return command.run(Args, report, argv, "report", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
