"""Training runs that leave a folder behind and survive a kill.

- `config.json`: the resolved configuration, seed, versions, commit
- `curve.csv`: one row an iteration: returns, losses, decisions per CPU second
- `tensorboard/`: the same for TensorBoard
- `clone/`: the policy after imitation and self-labelling, if there were any: start and reference of what follows
- `checkpoints/N/`: policy and everything needed to go on after N decisions (the latest two are kept)
- `best/`: the policy that `evaluate` liked best, if given
- `final/`: the result, with its ONNX file
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat
from stable_baselines3.common.utils import LinearSchedule

from ..envs.core.errors import InputError
from ..envs.core.sb3 import SB3VecEnv
from .checkpoint import (
    flatten_optimizer,
    load_checkpoint,
    load_resume,
    restore_optimizer,
    restore_rng,
    rng_state,
    save_checkpoint,
    versions,
    write_atomically,
)
from .clone import LabelledStates, Teacher, clone, student_alone
from .group_gradient import Player, group_gradient
from .policy import PointerPolicy
from .ppo import FastMaskablePPO, Profile
from .self_label import Labeller, self_label

MakeEnv = Callable[[int, int], gym.vector.VectorEnv]
"""make_env(num_envs, seed) builds the training env."""

Evaluate = Callable[[PointerPolicy], dict[str, float]]
"""Measures a policy; `score` among the figures is what `best/` is chosen by, higher is better."""

CURVE_COLUMNS = {
    "decisions": "time/total_timesteps",
    "cpu_s": "time/cpu_s",
    "return_mean": "rollout/ep_rew_mean",
    "length_mean": "rollout/ep_len_mean",
    "entropy_loss": "train/entropy_loss",
    "policy_loss": "train/policy_gradient_loss",
    "value_loss": "train/value_loss",
    "explained_variance": "train/explained_variance",
    "approx_kl": "train/approx_kl",
    "clip_fraction": "train/clip_fraction",
    "kl_reference": "train/kl_reference",
    "learning_rate": "train/learning_rate",
    "decisions_per_cpu_s": "profile/decisions_per_s",
    "score": "eval/score",
}
"""Columns of curve.csv and the logger's name of each."""

NUM_KEPT = 2


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run, but the code."""

    env_id: str
    """Id of the env, kept in the checkpoint."""
    spec: dict[str, Any] = field(default_factory=dict)
    """The env's spec as a dict, kept in the checkpoint."""
    feature_version: int = 1
    """Version of the meaning of the observation's features."""
    seed: int = 0
    """Of weights, environments and minibatches."""
    total_steps: int = 1_000_000
    """Decisions of PPO, over all environments."""
    num_envs: int = 64
    """Environments stepped together."""
    encoder: str = "deepsets"
    """"deepsets" (has a compiled twin) or "attention"."""
    hidden: int = 64
    """Width of the layers."""
    late_context: tuple[int, ...] = ()
    """Columns of the context that the rows do not see (`networks.DeepSetsEncoder`)."""
    late_steps: int = 0
    """States labelled by the teacher once the rows have lost sight of these columns; before, they see all. 0: they
    never see them."""
    n_steps: int = 64
    """Decisions of each environment between two updates."""
    batch_size: int = 2048
    n_epochs: int = 4
    learning_rate: float = 3e-4
    lr_schedule: str = "linear"
    """"linear" (to zero at total_steps) or "constant"."""
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    ent_coef: float = 0.0
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    target_kl: float | None = None
    kl_coef: float = 0.0
    """Weight of KL(policy || cloned policy); needs a teacher."""
    clone_steps: int = 100_000
    """States labelled by the teacher, if one is given."""
    clone_rounds: int = 10
    """Rounds of visiting and fitting."""
    clone_passes: int = 2
    """Passes over the held states in each round."""
    clone_capacity: int = 50_000
    """Labelled states held; one of 64 rows of 24 numbers takes 6 KiB."""
    clone_lr: float = 1e-3
    label_rounds: int = 0
    """Rounds of self-labelling after the imitation; needs a labeller."""
    label_passes: int = 2
    """Passes over the held states in each of them."""
    label_capacity: int = 30_000
    """Labelled states held."""
    label_lr: float = 2e-3
    group_rounds: int = 0
    """Rounds of policy gradient over groups of runs after that; needs a player, and a labeller for what is kept."""
    group_lr: float = 3e-4
    group_kl: float = 1.0
    """Weight of KL(policy before || policy) in the labeller's states."""
    rounds_per_checkpoint: int = 10
    """Of self-labelling and of the policy gradient over groups."""
    checkpoint_every: int = 500_000
    """Decisions between two checkpoints."""
    torch_threads: int = 1
    """Threads of torch; two collapse when the machine is shared."""

    def __post_init__(self) -> None:
        for name in ("num_envs", "hidden", "n_steps", "batch_size", "n_epochs", "checkpoint_every", "torch_threads"):
            if getattr(self, name) < 1:
                raise InputError(f"TrainConfig.{name} is {getattr(self, name)}", remedy="Give a positive integer")
        if self.lr_schedule not in ("linear", "constant"):
            raise InputError(f"unknown lr_schedule {self.lr_schedule!r}", remedy="Choose 'linear' or 'constant'")
        if self.total_steps < 0:
            raise InputError(f"TrainConfig.total_steps is {self.total_steps}", remedy="Give 0 (clone only) or more")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able form."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind."""

    folder: Path
    policy: PointerPolicy
    final: Path
    """The checkpoint folder of the result."""
    decisions: int
    agreement: float | None
    """With the teacher on fresh states, after cloning; None without a teacher."""


def train(
    config: TrainConfig,
    make_env: MakeEnv,
    out: str | PathLike[str],
    *,
    teacher: Teacher | None = None,
    labeller: Labeller | None = None,
    player: Player | None = None,
    keeper: Labeller | None = None,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    card: str = "",
    progress: Callable[[dict[str, float]], None] | None = None,
) -> TrainResult:
    """Train a policy: cloned from `teacher` first, if one is given, then by `labeller`, then on the runs of `player`,
    if these are given, then by PPO.

    A resumed run goes on from the latest checkpoint with its weights, optimizer, generators, counters and schedules;
    what cannot be kept is the state of the environments, which start new episodes (drawn from a new seed).

    Args:
        config: the resolved configuration.
        make_env: builds the pointer VectorEnv, as make_env(num_envs, seed).
        out: the run folder.
        teacher: labels states for the warm start.
        labeller: finds states to imitate with the policy itself (`self_label`).
        player: plays groups of runs that share their noise (`group_gradient`).
        keeper: finds states in which the policy stays as it is while it learns from these.
        evaluate: measures the policy at every checkpoint.
        resume: go on where `out` left off; starts afresh if there is nothing yet.
        card: Markdown for the final checkpoint's card.
        progress: called with the row of the curve after every iteration.

    Raises:
        InputError: `out` holds a run and `resume` is not set, or the run there has another configuration.
    """
    out = Path(out)
    torch.set_num_threads(config.torch_threads)
    if config.kl_coef and teacher is None and labeller is None:
        raise InputError(f"kl_coef is {config.kl_coef} but there is no teacher", remedy="Give a teacher, or kl_coef=0")
    if config.label_rounds and labeller is None:
        raise InputError(f"label_rounds is {config.label_rounds} but there is no labeller", remedy="Give one, or 0")
    if config.group_rounds and (player is None or keeper is None or labeller is None):
        raise InputError(
            f"group_rounds is {config.group_rounds} but player, keeper or labeller is missing", remedy="Give all, or 0"
        )
    latest = _open_run(out, config, resume)
    start = int(latest.name) if latest else 0

    env_seed = config.seed + start  # a resumed run must not see the same episodes again
    vector_env = make_env(config.num_envs, env_seed)
    model = _build_model(config, SB3VecEnv(vector_env), env_seed)
    run = _Run(config, out, model, evaluate, card)
    if latest:
        run.restore(latest)
    elif teacher is not None:
        run.warm_start(make_env, teacher, progress)
    if labeller is not None and run.rounds < config.label_rounds:
        run.self_label(labeller, vector_env.single_observation_space, progress)
    if player is not None and keeper is not None and run.group_rounds < config.group_rounds:
        run.group_gradient(player, keeper, progress)
    if config.kl_coef:
        model.set_reference(load_checkpoint(out / "clone").network, config.kl_coef)

    curve = _Curve(out / "curve.csv", start, progress)
    writers: list[KVWriter] = [curve, TensorBoardOutputFormat(str(out / "tensorboard"))]
    model.set_logger(Logger(str(out), writers))
    remaining = config.total_steps - model.num_timesteps
    if remaining > 0:
        model.profile = Profile()
        model.learn(remaining, callback=_Checkpoints(run), reset_num_timesteps=False, log_interval=None)
        run.save_checkpoint()
        run.dump()
    model.logger.close()
    final = run.save(out / "final", with_onnx=True)
    vector_env.close()
    return TrainResult(out, model.policy, final, model.num_timesteps, run.agreement)


def _open_run(out: Path, config: TrainConfig, resume: bool) -> Path | None:
    """Make the run folder, or check that it is of the same run; the latest checkpoint, if any."""
    path = out / "config.json"
    if not path.exists():
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        record = {"config": config.to_dict(), "versions": versions(), "commit": _commit(), "started": _now()}
        try:
            write_atomically(path, json.dumps(record, indent=2))
        except TypeError as error:
            raise InputError(
                f"the configuration is not JSON-able ({error})", file=path, remedy="Give the spec as a plain dict"
            ) from error
        return None
    if not resume:
        raise InputError("this folder holds a training run", file=out, remedy="Use --resume, or another --out")
    try:
        before = json.loads(path.read_text())["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"not readable ({error!r})", file=path, remedy="Start again in another --out") from error
    now = json.loads(json.dumps(config.to_dict()))  # tuples become lists, as in the file
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        name = changed[0]
        raise InputError(
            f"the run was started with {name}={before.get(name)!r}, now it is {now[name]!r}",
            file=path,
            remedy="Resume with the same configuration, or use another --out",
        )
    for unfinished in (out / "checkpoints").glob(".*"):  # a kill in the middle of a save
        shutil.rmtree(unfinished, ignore_errors=True)
    steps = sorted(int(folder.name) for folder in (out / "checkpoints").iterdir() if folder.name.isdigit())
    return out / "checkpoints" / f"{steps[-1]:012d}" if steps else None


def _build_model(config: TrainConfig, env: SB3VecEnv, seed: int) -> FastMaskablePPO:
    linear = config.lr_schedule == "linear"
    return FastMaskablePPO(
        PointerPolicy,
        env,
        learning_rate=LinearSchedule(config.learning_rate, 0.0, 1.0) if linear else config.learning_rate,
        n_steps=config.n_steps,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip_range,
        ent_coef=config.ent_coef,
        vf_coef=config.vf_coef,
        max_grad_norm=config.max_grad_norm,
        target_kl=config.target_kl,
        policy_kwargs={"encoder": config.encoder, "hidden": config.hidden, "late_context": config.late_context},
        seed=seed,
    )


class _Run:
    """The state of one run: what is saved, where, and how it comes back."""

    def __init__(
        self, config: TrainConfig, out: Path, model: FastMaskablePPO, evaluate: Evaluate | None, card: str
    ) -> None:
        self.config, self.out, self.model, self.evaluate, self.card = config, out, model, evaluate, card
        self.agreement: float | None = None
        self.best_score: float | None = None
        self.cpu_s_before = 0.0
        self.start_s = time.process_time()
        self.saved_at = -1
        self.rounds = 0  # of self-labelling that are done
        self.group_rounds = 0  # of the policy gradient over groups
        self.start = 0  # decisions when this process began

    @property
    def cpu_s(self) -> float:
        """CPU seconds of this run, over all its resumptions."""
        return self.cpu_s_before + time.process_time() - self.start_s

    def warm_start(self, make_env: MakeEnv, teacher: Teacher, progress: Callable | None) -> None:
        """Clone the teacher, and keep the result as `clone/` and as checkpoint 0."""
        config, policy = self.config, self.model.policy
        env = make_env(config.num_envs, config.seed)
        imitate = partial(
            clone,
            policy,
            env,
            teacher,
            rounds=config.clone_rounds,
            passes=config.clone_passes,
            capacity=config.clone_capacity,
            minibatch=min(config.batch_size, 1024),
            gamma=config.gamma,
            progress=progress,
        )
        policy.network.show_late_context(config.late_steps > 0)
        result = imitate(steps=config.clone_steps, lr=config.clone_lr, seed=config.seed)
        if config.late_steps > 0:
            # What the rows made of these columns must come from the summary now: few changes, from where it is.
            policy.network.show_late_context(False)
            result = imitate(steps=config.late_steps, lr=config.clone_lr / 2, seed=config.seed + 1, beta=student_alone)
        env.close()
        self.agreement = result.agreement
        self.save(self.out / "clone", with_onnx=False)
        self.save_checkpoint()

    def self_label(self, labeller: Labeller, space: gym.Space, progress: Callable | None) -> None:
        """Imitate the best of the policy's own samples, and keep the result as `clone/`."""
        config = self.config

        def moved(figures: dict[str, float]) -> None:
            self.rounds = int(figures["label_round"]) + 1
            self._end_round(self.rounds, config.label_rounds, figures, progress)

        self_label(
            self.model.policy,
            labeller,
            LabelledStates(config.label_capacity, space),
            rounds=config.label_rounds,
            first_round=self.rounds,
            passes=config.label_passes,
            lr=config.label_lr,
            minibatch=min(config.batch_size, 512),
            seed=config.seed,
            progress=moved,
        )
        self.save(self.out / "clone", with_onnx=False)

    def group_gradient(self, player: Player, keeper: Labeller, progress: Callable | None) -> None:
        """Learn from the runs of `player`, near `clone/` in the states of `keeper`."""
        config = self.config

        def moved(figures: dict[str, float]) -> None:
            self.group_rounds = int(figures["group_round"]) + 1
            self._end_round(self.group_rounds, config.group_rounds, figures, progress)

        reference = load_checkpoint(self.out / "clone").network
        group_gradient(
            self.model.policy,
            player,
            keeper(reference, config.label_rounds)[0],
            reference,
            rounds=config.group_rounds,
            first_round=self.group_rounds,
            lr=config.group_lr,
            kl_coef=config.group_kl,
            minibatch=config.batch_size,
            seed=config.seed,
            progress=moved,
        )

    def _end_round(self, done: int, rounds: int, figures: dict[str, float], progress: Callable | None) -> None:
        """Keep what a resumed run needs every few rounds, and after the last one."""
        if done % self.config.rounds_per_checkpoint == 0 or done == rounds:
            self.saved_at = -1
            self.save_checkpoint()
        if progress is not None:
            progress(figures)

    def save(self, folder: Path, *, with_onnx: bool, resume: tuple | None = None) -> Path:
        """Write the policy as it is now."""
        config = {
            "env_id": self.config.env_id,
            "spec": self.config.spec,
            "feature_version": self.config.feature_version,
            "training": self.config.to_dict(),
            "decisions": self.model.num_timesteps,
            "cpu_s": round(self.cpu_s, 1),
            "agreement_with_teacher": self.agreement,
            "best_score": self.best_score,
            "commit": _commit(),
        }
        return save_checkpoint(folder, self.model.policy, config, self.card, with_onnx=with_onnx, resume=resume)

    def save_checkpoint(self) -> None:
        """Write what a resumed run needs, measure the policy, and drop the oldest checkpoint."""
        model = self.model
        if self.saved_at == model.num_timesteps:
            return
        if self.evaluate is not None:
            self._evaluate()
        tensors, groups = flatten_optimizer(model.policy.optimizer)
        random, numpy_state = rng_state()
        values = {
            "num_timesteps": model.num_timesteps,
            "n_updates": model._n_updates,
            "param_groups": groups,
            "numpy_state": numpy_state,
            "cpu_s": self.cpu_s,
            "agreement": self.agreement,
            "best_score": self.best_score,
            "rounds": self.rounds,
            "group_rounds": self.group_rounds,
        }
        folder = self.out / "checkpoints" / f"{model.num_timesteps:012d}"
        self.save(folder, with_onnx=False, resume=(tensors | random, values))
        self.saved_at = model.num_timesteps
        folders = sorted(f for f in folder.parent.iterdir() if f.name.isdigit())
        for old in folders[:-NUM_KEPT]:
            shutil.rmtree(old)

    def _evaluate(self) -> None:
        assert self.evaluate is not None
        random, numpy_state = rng_state()
        figures = self.evaluate(self.model.policy)
        restore_rng(random, numpy_state)  # measuring must not change the run
        if hasattr(self.model, "_logger"):
            for name, value in figures.items():
                self.model.logger.record(f"eval/{name}", value)
        score = figures.get("score")
        if score is not None and (self.best_score is None or score > self.best_score):
            self.best_score = float(score)
            self.save(self.out / "best", with_onnx=True)

    def dump(self) -> None:
        """Write the row of the latest iteration."""
        self.model.logger.record("time/cpu_s", round(self.cpu_s, 3))
        self.model.dump_logs()

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        config, model = self.config, self.model
        network = load_checkpoint(folder, env_id=config.env_id, feature_version=config.feature_version).network
        tensors, values = load_resume(folder)
        try:
            model.policy.network.load_state_dict(network.state_dict())
            restore_optimizer(model.policy.optimizer, tensors, values["param_groups"])
            restore_rng(tensors, values["numpy_state"])
            model.num_timesteps = self.saved_at = self.start = values["num_timesteps"]
            model._n_updates = values["n_updates"]
            self.cpu_s_before = values["cpu_s"]
            self.agreement, self.best_score = values["agreement"], values["best_score"]
            self.rounds, self.group_rounds = values["rounds"], values.get("group_rounds", 0)
        except (KeyError, ValueError, RuntimeError) as error:
            raise InputError(
                f"training cannot go on from here ({error!r})",
                file=folder,
                remedy="Delete this folder and resume again",
            ) from error


class _Checkpoints(BaseCallback):
    """Logs and saves between update and rollout, when weights, optimizer and counters belong together."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self.run = run

    def _on_rollout_start(self) -> None:
        run = self.run
        if self.num_timesteps > run.start:  # there was an update before
            if self.num_timesteps - max(run.saved_at, 0) >= run.config.checkpoint_every:
                run.save_checkpoint()
            run.dump()

    def _on_step(self) -> bool:
        return True


class _Curve(KVWriter):
    """Appends one row an iteration to a CSV file with fixed columns; rows after `start` decisions are cut off."""

    def __init__(self, path: Path, start: int, progress: Callable[[dict[str, float]], None] | None) -> None:
        self.progress = progress
        kept = []
        if path.exists():
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            # A kill may leave half a line; iterations after the checkpoint will be run again.
            kept = [r for r in rows if r.get("score") is not None and int(r["decisions"]) <= start]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(CURVE_COLUMNS), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
        write_atomically(path, text.getvalue())
        self.file = path.open("a", newline="")
        self.writer = csv.DictWriter(self.file, list(CURVE_COLUMNS))

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        row = {column: key_values.get(name, "") for column, name in CURVE_COLUMNS.items()} | {"decisions": step}
        self.writer.writerow(row)
        self.file.flush()
        if self.progress is not None:
            self.progress({k: float(v) for k, v in row.items() if v != "" and math.isfinite(float(v))})

    def close(self) -> None:
        self.file.close()


def _commit() -> str | None:
    """Git commit of the installed source, None outside a checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
