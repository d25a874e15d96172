"""Serve the same inputs under several policies and compare them.

Seeds are paired: a seed draws the inputs, the same for every policy. The table shows the mean over seeds and its 95%
bootstrap interval, and marks the best row. The first argument is the domain; each has options of its own, which
`schedlab evaluate DOMAIN --help` lists.

Examples:

  schedlab evaluate request_scheduling --policies fcfs sarathi_512 srpt agent --workload azure_conv --load 1.1
  schedlab evaluate request_scheduling --policies srpt knobs runs/mine --objective goodput --out results/goodput
  schedlab evaluate request_scheduling --policies fcfs srpt --backend hf --window 60 --seeds 3
  schedlab evaluate expert_caching --policies lru ema_95 arc agent belady --cache 0.25
  schedlab evaluate expert_caching --policies lru fate agent --objective tokens_per_s --backend experts
  schedlab evaluate soc_dag --policies eft late_rank heft --workload cholesky_8 --backend threads --tile 256
  schedlab evaluate --validate results/goodput
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..envs.core.errors import InputError
from . import command
from .domain import DECISION_UNITS, DOMAINS, Comparison, domain_module, pick

if TYPE_CHECKING:
    import pandas as pd

    from ..envs.core.interface import Policy
    from ..envs.core.results import RunKey

CELLS_FILE = "evaluate.json"
"""Beside results.csv: what each comparison was, so that a resumed evaluation cannot mix two."""


@dataclass
class Args:
    """Arguments of `schedlab evaluate` in every domain."""

    policies: tuple[str, ...] = ()
    """Names of rules, `agent` (the shipped one), or checkpoint folders."""
    seeds: int = 5
    """Number of paired seeds."""
    seed: int = 0
    """The first of them."""
    metrics: tuple[str, ...] = ()
    """Columns to print; all metrics are in results.csv."""
    out: Path | None = None
    """Folder for results.csv and schedules/. Without it the table is printed and nothing is kept."""
    resume: bool = False
    """Go on with the results that are in --out."""
    validate: Path | None = None
    """Evaluate nothing; re-check every figure in this results folder from its schedules."""
    data_dir: Path | None = None
    """Folder with trace files. Default: $SCHEDLAB_DATA, then the download cache."""


@dataclass
class Evaluation:
    """Runs of several policies in one comparison, written to a results folder as they end."""

    comparison: Comparison
    out: Path
    resume: bool = False
    fingerprints: dict[str, str | None] = field(default_factory=dict)
    """policy -> digest of its weights."""

    def __post_init__(self) -> None:
        from ..envs.core.results import ResultsFile

        self.file = ResultsFile(self.out / "results.csv", resume=self.resume)
        if self.file.dropped:
            command.say(f"dropped {self.file.dropped} from {self.file.path}")
        self._check_cell()

    def key(self, policy: str, seed: int) -> RunKey:
        """The run of a policy and a seed."""
        from ..envs.core.results import RunKey

        c = self.comparison
        return RunKey(c.domain, c.workload, c.instance, policy, c.backend_name, c.backend.clock, seed)

    def run(self, policies: Sequence[Policy], seeds: Sequence[int]) -> pd.DataFrame:
        """Run what is not in the file yet; the rows of this evaluation's runs."""
        done = self.file.done_runs()
        todo = [(seed, policy) for seed in seeds for policy in policies if self.key(policy.name, seed) not in done]
        is_measured = self.comparison.backend.clock != "model"
        with command.progress("evaluating", max(len(todo), 1), is_still=is_measured) as bar:
            drawn: dict[int, Any] = {}
            for count, (seed, policy) in enumerate(todo):
                bar(count, f"{policy.name}, seed {seed}")
                if seed not in drawn:
                    drawn = {seed: self.comparison.draw(seed)}

                def moved(share: float, count: int = count) -> None:
                    bar(count + share)

                served = self.comparison.serve(policy, drawn[seed], seed, moved)
                self._keep(policy, drawn[seed], seed, served)
        return self.rows([policy.name for policy in policies], seeds)

    def _keep(self, policy: Policy, workload: Any, seed: int, served: Any) -> None:
        from ..envs.core.results import save_schedule

        metrics, units = self.comparison.measure(served, policy, workload)
        key = self.key(policy.name, seed)
        about = self.comparison.about(policy, workload, seed, self.out)
        about |= {"policy": getattr(policy, "source", ""), "weights": self.fingerprints.get(policy.name)}
        save_schedule(self.out, key, served.timeline, **about)
        self.file.append(key, metrics, units)

    def rows(self, policies: Sequence[str], seeds: Sequence[int]) -> pd.DataFrame:
        """Rows of these runs, in the order of the policies."""
        import pandas as pd

        frame = self.file.read()
        key = self.key("x", 0)
        mine = frame[
            (frame["domain"] == key.domain)
            & (frame["workload"] == key.workload)
            & (frame["instance"] == key.instance)
            & (frame["backend"] == key.backend)
            & (frame["clock"] == key.clock)
            & frame["seed"].isin(list(seeds))
        ]
        return pd.concat([mine[mine["policy"] == name] for name in policies], ignore_index=True)

    def _check_cell(self) -> None:
        """Refuse to mix runs of unlike engines, or of a checkpoint that has changed, under one name."""
        from ..envs.core.results import atomic_path

        path = self.out / CELLS_FILE
        cells = read_cells(self.out)
        comparison = self.comparison
        name = f"{comparison.workload}: {comparison.instance} on {comparison.backend_name}"
        spec = json.loads(json.dumps(comparison.spec.to_dict()))
        cell = cells.setdefault(name, {"spec": spec, "weights": {}})
        if cell["spec"] != spec:
            changed = [key for key in spec if cell["spec"].get(key) != spec[key]]
            raise InputError(
                f"the runs there are of another engine: {', '.join(changed)} differ",
                file=path,
                remedy="Choose another folder with --out",
            )
        for policy, digest in self.fingerprints.items():
            if digest != cell["weights"].get(policy, digest):
                raise InputError(
                    f"the runs of {policy!r} there are of other weights",
                    file=path,
                    remedy="Choose another folder with --out",
                )
            cell["weights"][policy] = digest
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(cells, indent=1) + "\n")


def read_cells(out: Path) -> dict[str, Any]:
    """What `CELLS_FILE` of a results folder holds; nothing if there is none."""
    path = out / CELLS_FILE
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise InputError(
            f"not readable as JSON ({error})", file=path, remedy="Choose another folder with --out"
        ) from error


def show(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """Print the table of the runs in `frame`, which are of one domain."""
    from ..envs.core.results import print_summary, summary_table

    is_oracle = domain_module(str(frame["domain"].iloc[0])).is_oracle
    oracles = [name for name in frame["policy"].unique() if is_oracle(name)]
    console = command.console()
    print_summary(summary_table(frame), directions(frame), metrics=columns, oracles=oracles, console=console)


def directions(frame: pd.DataFrame) -> dict[str, bool | None]:
    """metric -> lower is better, for the metrics in `frame`, which are of one domain."""
    metric_info = domain_module(str(frame["domain"].iloc[0])).metric_info
    names = frame["metric"].unique()
    return {name: None if name in DECISION_UNITS else metric_info(name)[1] for name in names}


# ----------------------------------------------------------------------------------------------- command


def evaluate(args: Any) -> int:
    """Run `schedlab evaluate` for the domain's arguments."""
    if args.validate is not None:
        return validate(args.validate)
    domain = domain_module(args.domain)
    check_output(domain, args)
    comparison, policies, fingerprints = domain.open_comparison(args)
    command.say(comparison.source)
    seeds = range(args.seed, args.seed + args.seeds)
    with tempfile.TemporaryDirectory() as scratch:
        evaluation = Evaluation(comparison, args.out or Path(scratch), args.resume, fingerprints)
        show(evaluation.run(policies, seeds), args.metrics or comparison.columns)
    comparison.backend.close()
    if args.out is not None:
        command.say(f"wrote {args.out / 'results.csv'}; `schedlab evaluate --validate {args.out}` re-checks it")
    return 0


def check_output(domain: Any, args: Any) -> None:
    """Raise InputError for a folder that cannot take the results, or metrics that do not exist; before any run."""
    from ..envs.core.results import ResultsFile

    if args.seeds < 1:
        raise InputError(f"--seeds is {args.seeds}", remedy="Give at least 1")
    for name in getattr(args, "metrics", ()):
        if name not in DECISION_UNITS:
            domain.metric_info(name)
    if args.out is not None:
        ResultsFile(args.out / "results.csv", resume=args.resume)
        read_cells(args.out)


def validate(folder: Path) -> int:
    """Re-check a results folder; exit status 1 if anything does not agree."""
    from .validate import validate_folder

    report = validate_folder(folder, progress=True)
    print(report)
    return 0 if report.ok else 1


def args_for(argv: Sequence[str]) -> type:
    """The arguments of the domain that is named first."""
    return domain_module(pick(argv, list(DOMAINS))).EvaluateArgs


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return command.run(args_for, evaluate, argv, "evaluate", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
