"""Routing of Mixture-of-Experts models: the `Workload` record, its one file format, splits and batches."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InputError

MAX_EXPERTS = 1 << 15
"""Experts a layer that ids of int16 can name."""


@dataclass(frozen=True, eq=False)
class Workload:
    """Which experts every token of every sequence uses, in each of L layers. T tokens, S sequences end to end.

    All of it is the future: engines read it, policies see what `state.State` shows of it, oracles take it explicitly.
    Arrays are read-only.
    """

    name: str
    experts: np.ndarray  # (T, L, k) int16, in 0 .. num_experts - 1, distinct within a token and layer
    sequence_offsets: np.ndarray  # (S + 1,) int64: tokens of sequence i are sequence_offsets[i] : sequence_offsets[i+1]
    num_experts: int
    predicted: np.ndarray  # (T, L, M) int16: experts that a predictor named one layer before; -1: none; M may be 0
    predicted_probability: np.ndarray  # (T, L, M) float32 in [0, 1]
    token_ids: np.ndarray  # (T,) int64, -1: not recorded
    prior: np.ndarray  # (L, E) float32: share of tokens that use an expert, known before the run
    source: str = ""
    """Where the routing is from, as printed beside results."""

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.sequence_offsets) - 1

    @property
    def num_tokens(self) -> int:
        return self.experts.shape[0]

    @property
    def num_layers(self) -> int:
        return self.experts.shape[1]

    @property
    def top_k(self) -> int:
        return self.experts.shape[2]

    @property
    def lengths(self) -> np.ndarray:
        """int64 (S,): tokens of each sequence."""
        return np.diff(self.sequence_offsets)

    @property
    def token_sequence(self) -> np.ndarray:
        """int64 (T,): the sequence of each token."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def token_position(self) -> np.ndarray:
        """int64 (T,): the place of each token in its sequence."""
        return np.arange(self.num_tokens) - np.repeat(self.sequence_offsets[:-1], self.lengths)

    @classmethod
    def from_arrays(
        cls,
        name: str,
        experts: Any,
        lengths: Any,
        *,
        num_experts: int | None = None,
        top_k: int | None = None,
        predicted: Any = None,
        predicted_probability: Any = None,
        token_ids: Any = None,
        prior: Any = None,
        source: str = "",
        file: str | PathLike[str] | None = None,
    ) -> Workload:
        """A validated workload from array-likes (copied).

        Args:
            name: printed beside results.
            experts: (T, L, k) expert ids, tokens of all sequences end to end.
            lengths: (S,) tokens of each sequence.
            num_experts: experts a layer; default: the highest id that occurs, plus one.
            top_k: the k that the model declares; checked if given.
            predicted: (T, L, M) expert ids that a predictor named one layer before, best first, -1 for none.
            predicted_probability: (T, L, M) in [0, 1]; default: 1 for every id that is there.
            token_ids: (T,), default -1.
            prior: (L, E) share of tokens that use an expert; default k / E everywhere.
            source: where the routing is from.
            file: named in errors.

        Raises:
            InputError: for expert ids out of range or twice in one token, a wrong k, ragged lengths, probabilities that
                are no probabilities, and shapes that do not fit each other.
        """
        check = _Checker(name, file)
        routing = check.integers("experts", experts, 3)
        tokens, layers, k = routing.shape
        if tokens == 0 or layers == 0 or k == 0:
            raise check.error(f"experts has shape {routing.shape}", "Give at least one token, layer and expert")
        if top_k is not None and k != top_k:
            raise check.error(
                f"experts gives {k} experts a token, the model declares top {top_k}", "Record all of them"
            )
        sizes = check.integers("seq_len", lengths, 1)
        check.lengths(sizes, tokens)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        total = int(routing.max()) + 1 if num_experts is None else int(num_experts)
        if not k <= total <= MAX_EXPERTS:
            raise check.error(f"num_experts {total} with top {k}", f"Give {k} to {MAX_EXPERTS} experts a layer")
        check.ids("experts", routing, 0, total, offsets)
        check.distinct(routing, offsets)
        names = (
            np.zeros((tokens, layers, 0), np.int16) if predicted is None else check.integers("predicted", predicted, 3)
        )
        if names.shape[:2] != (tokens, layers):
            raise check.error(f"predicted has shape {names.shape}, experts {routing.shape}", "Give one row a layer")
        check.ids("predicted", names, -1, total, offsets)
        odds = (names >= 0).astype(np.float32) if predicted_probability is None else predicted_probability
        probability = check.shares("predicted_probability", odds, names.shape)
        ids = np.full(tokens, -1, np.int64) if token_ids is None else check.integers("token_ids", token_ids, 1)
        if len(ids) != tokens:
            raise check.error(f"token_ids has {len(ids)} entries for {tokens} tokens", "Give one a token")
        uniform = np.full((layers, total), k / total) if prior is None else prior
        return _frozen(
            cls(
                name=name,
                experts=routing.astype(np.int16),
                sequence_offsets=offsets.astype(np.int64),
                num_experts=total,
                predicted=names.astype(np.int16),
                predicted_probability=probability,
                token_ids=ids.astype(np.int64),
                prior=check.shares("prior", uniform, (layers, total)),
                source=source,
            )
        )

    def take(self, tokens: np.ndarray, lengths: np.ndarray, *, name: str | None = None) -> Workload:
        """The workload of these tokens, which form sequences of these lengths."""
        return _frozen(
            replace(
                self,
                name=name or self.name,
                experts=self.experts[tokens],
                sequence_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
                predicted=self.predicted[tokens],
                predicted_probability=self.predicted_probability[tokens],
                token_ids=self.token_ids[tokens],
            )
        )

    def select(self, sequences: Any, *, name: str | None = None) -> Workload:
        """The workload of some sequences only, in the order given."""
        chosen = np.asarray(sequences, np.int64)
        if len(chosen) == 0:
            raise InputError(f"no sequence of workload {self.name!r} chosen", remedy="Choose at least one")
        lengths = self.lengths[chosen]
        begins = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        tokens = np.arange(lengths.sum()) + np.repeat(self.sequence_offsets[chosen] - begins, lengths)
        return self.take(tokens, lengths, name=name)

    def split(self, *shares: float, seed: int = 0) -> list[Workload]:
        """Random parts by whole sequences, never by token, so that part i has about shares[i] of the sequences.

        Shares sum to at most 1; what is left over is in no part. Every part keeps the order of its sequences, and has
        the first part's popularity as its prior: what a run may know is what was there to train on.
        """
        if not shares or min(shares) <= 0 or sum(shares) > 1 + 1e-9:
            raise InputError(f"shares {shares} are no split", remedy="Give positive shares that sum to at most 1")
        order = np.random.default_rng(seed).permutation(len(self))
        ends = np.round(np.cumsum((0.0, *shares)) * len(self)).astype(int)
        if np.diff(ends).min() == 0:
            raise InputError(
                f"workload {self.name!r} has {len(self)} sequences, too few for shares {shares}",
                remedy="Give more sequences or fewer parts",
            )
        parts = [self.select(np.sort(order[a:b]), name=f"{self.name}[{i}]") for i, (a, b) in enumerate(pairwise(ends))]
        return [part.with_prior(parts[0].popularity()) for part in parts]

    def head(self, tokens: int) -> Workload:
        """The first sequences, the last of them cut, with `tokens` tokens in all."""
        if tokens < 1:
            raise InputError(f"head of {tokens} tokens", remedy="Give a positive number of tokens")
        tokens = min(tokens, self.num_tokens)
        last = int(np.searchsorted(self.sequence_offsets, tokens))
        lengths = np.diff(np.append(self.sequence_offsets[:last], tokens))
        return self.take(np.arange(tokens), lengths)

    def popularity(self) -> np.ndarray:
        """float32 (L, E): share of tokens that use each expert."""
        shares = np.empty((self.num_layers, self.num_experts), np.float32)
        for layer in range(self.num_layers):
            shares[layer] = np.bincount(self.experts[:, layer].ravel(), minlength=self.num_experts) / self.num_tokens
        return shares

    def with_prior(self, prior: np.ndarray) -> Workload:
        """The same routing with another prior, float (L, E)."""
        shape = (self.num_layers, self.num_experts)
        return _frozen(replace(self, prior=_Checker(self.name).shares("prior", prior, shape)))

    def with_predictions(self, predicted: np.ndarray, probability: np.ndarray | None = None) -> Workload:
        """The same routing with the predictions of some predictor (see `from_arrays`)."""
        return Workload.from_arrays(
            self.name,
            self.experts,
            self.lengths,
            num_experts=self.num_experts,
            predicted=predicted,
            predicted_probability=probability,
            token_ids=self.token_ids,
            prior=self.prior,
            source=self.source,
        )


def interleave(lengths: np.ndarray, num_sequences: int) -> np.ndarray:
    """int64 (steps, B): the token that each of B interleaved rows serves in each step, -1 where a row is idle.

    Sequences are taken in order; a row whose sequence ended takes the next one that nobody took.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if num_sequences == 1:
        return np.arange(offsets[-1]).reshape(-1, 1)
    free_at = np.zeros(num_sequences, np.int64)  # the step at which each row is free
    begin = np.empty(len(lengths), np.int64)
    row_of = np.empty(len(lengths), np.int64)
    for i, length in enumerate(lengths):
        row = int(np.argmin(free_at))
        begin[i], row_of[i] = free_at[row], row
        free_at[row] += length
    batches = np.full((int(free_at.max()), num_sequences), -1, np.int64)
    for i, length in enumerate(lengths):
        batches[begin[i] : begin[i] + length, row_of[i]] = np.arange(offsets[i], offsets[i] + length)
    return batches


# ---------------------------------------------------------------------------------------------------- files


def save_routing(path: str | PathLike[str], workload: Workload) -> None:
    """Write a workload as a compressed .npz, under a temporary name first.

    Arrays: `experts` (T, L, k), `seq_len` (S,), `num_experts`, `predicted`, `predicted_probability`, `token_ids`,
    `prior`, `source`. Only the first two are needed by `load_routing`.
    """
    path = Path(path)
    small = np.uint8 if workload.num_experts <= 256 else np.int16
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".npz")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(
                file,
                experts=workload.experts.astype(small),
                seq_len=workload.lengths.astype(np.int32),
                num_experts=np.int64(workload.num_experts),
                predicted=workload.predicted,
                predicted_probability=workload.predicted_probability.astype(np.float16),
                token_ids=workload.token_ids.astype(np.int32),
                prior=workload.prior,
                source=np.array(workload.source),
            )
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_routing(path: str | PathLike[str], *, top_k: int | None = None) -> Workload:
    """Read a routing trace: an .npz as `save_routing` writes it, or with `experts` and `seq_len` only.

    Raises InputError naming the file for everything that `Workload.from_arrays` refuses.
    """
    path = Path(path)
    remedy = "Give an .npz with arrays `experts` (tokens, layers, k) and `seq_len` (sequences,)"
    if not path.is_file():
        raise InputError("no such file", remedy="Check the path", file=path)
    try:
        data = np.load(path, allow_pickle=False)
        arrays = {} if isinstance(data, np.ndarray) else {name: data[name] for name in data.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"not a routing trace ({error})", remedy=remedy, file=path) from error
    if isinstance(data, np.ndarray):
        raise InputError("is one array, not an archive of arrays", remedy=remedy, file=path)
    data.close()
    absent = [name for name in ("experts", "seq_len") if name not in arrays]
    if absent:
        raise InputError(f"has no array {absent[0]!r}, only {sorted(arrays)}", remedy=remedy, file=path)
    source = arrays.get("source")
    return Workload.from_arrays(
        path.stem,
        arrays["experts"],
        arrays["seq_len"],
        num_experts=int(arrays["num_experts"]) if "num_experts" in arrays else None,
        top_k=top_k,
        predicted=arrays.get("predicted"),
        predicted_probability=arrays.get("predicted_probability"),
        token_ids=arrays.get("token_ids"),
        prior=arrays.get("prior"),
        source=str(source) if source is not None else f"routing trace {path.name}",
        file=path,
    )


def find_routing(name_or_path: str | PathLike[str], data_dir: str | PathLike[str] | None = None) -> Workload:
    """A routing trace by path, or by name in `data_dir` or $SCHEDLAB_DATA (or the expert_routing/ of either).

    The name "synthetic" generates one (`generate`). Raises InputError.
    """
    if str(name_or_path) == "synthetic":
        return generate()
    if Path(name_or_path).is_file():
        return load_routing(name_or_path)
    folders = [Path(folder) for folder in (data_dir, os.environ.get("SCHEDLAB_DATA")) if folder]
    for folder in folders:
        for file in (folder / f"{name_or_path}.npz", folder / "expert_routing" / f"{name_or_path}.npz"):
            if file.is_file():
                return load_routing(file)
    looked = ", ".join(str(folder) for folder in folders) or "no folder: SCHEDLAB_DATA is not set"
    raise InputError(
        f"no routing trace {str(name_or_path)!r} (looked in {looked})",
        remedy="Name a file, put <name>.npz into a folder and name that in SCHEDLAB_DATA, or use 'synthetic'",
    )


# ------------------------------------------------------------------------------------------------ generation


def generate(
    num_sequences: int = 32,
    *,
    num_layers: int = 4,
    num_experts: int = 32,
    top_k: int = 4,
    mean_length: float = 64.0,
    topics: int = 8,
    stay: float = 0.9,
    skew: float = 1.0,
    prediction_noise: float | None = 0.5,
    seed: int = 0,
) -> Workload:
    """Routing made up with the regularities that caches live from: skew, topics, and layers that follow each other.

    Scores of the experts of a layer are a fixed popularity (standard deviation `skew`), plus the taste of the
    sequence's present topic, plus a token's own noise that is carried from layer to layer by a fixed rotation; the
    top k win. A topic lasts 1 / (1 - stay) tokens on average. The predictor of the next layer sees the scores with
    `prediction_noise` on top (None: no predictions) and names 2k experts.
    """
    for name, value, least in (
        ("num_sequences", num_sequences, 1),
        ("num_layers", num_layers, 1),
        ("top_k", top_k, 1),
        ("num_experts", num_experts, top_k),
        ("mean_length", mean_length, 1),
        ("topics", topics, 1),
    ):
        if value < least:
            raise InputError(f"{name} is {value}", remedy=f"Give at least {least}")
    rng = np.random.default_rng(seed)
    lengths = 1 + rng.poisson(rng.gamma(1.0, mean_length - 1, num_sequences)) if mean_length > 1 else None
    lengths = np.ones(num_sequences, np.int64) if lengths is None else lengths
    tokens = int(lengths.sum())
    is_new = rng.random(tokens) > stay
    is_new[np.concatenate([[0], np.cumsum(lengths)[:-1]])] = True
    topic = rng.integers(topics, size=tokens)[np.maximum.accumulate(np.where(is_new, np.arange(tokens), 0))]
    popularity = skew * rng.standard_normal((num_layers, num_experts))
    taste = 1.5 * rng.standard_normal((topics, num_layers, num_experts))
    noise = rng.standard_normal((tokens, num_experts))
    experts = np.empty((tokens, num_layers, top_k), np.int16)
    width = 0 if prediction_noise is None else min(2 * top_k, num_experts)
    predicted = np.full((tokens, num_layers, width), -1, np.int16)
    probability = np.zeros((tokens, num_layers, width), np.float32)
    for layer in range(num_layers):
        noise = 0.8 * noise[:, rng.permutation(num_experts)] + 0.6 * rng.standard_normal((tokens, num_experts))
        score = popularity[layer] + taste[topic, layer] + noise
        experts[:, layer] = np.argsort(-score, axis=1)[:, :top_k]
        if prediction_noise is not None and layer > 0:
            guess = score + prediction_noise * rng.standard_normal(score.shape)
            best = np.argsort(-guess, axis=1)[:, :width]
            odds = np.take_along_axis(guess, best, axis=1)
            predicted[:, layer] = best
            probability[:, layer] = 1.0 / (1.0 + np.exp(odds[:, top_k - 1 : top_k] - odds))
    return Workload.from_arrays(
        f"synthetic-{num_layers}x{num_experts}",
        experts,
        lengths,
        num_experts=num_experts,
        predicted=predicted,
        predicted_probability=probability,
        token_ids=topic,
        source=f"generated, seed {seed}: {topics} topics of {1 / max(1 - stay, 1e-9):.0f} tokens, skew {skew}",
    )


# ------------------------------------------------------------------------------------------------ validation


class _Checker:
    """Says which array of which workload, or file, is wrong."""

    def __init__(self, name: str, file: str | PathLike[str] | None = None) -> None:
        self.name, self.file = name, file

    def error(self, problem: str, remedy: str) -> InputError:
        where = "" if self.file else f"workload {self.name!r}: "
        return InputError(where + problem, remedy=remedy, file=self.file)

    def integers(self, what: str, values: Any, axes: int) -> np.ndarray:
        try:
            array = np.asarray(values)
        except ValueError as error:  # nested lists of different lengths
            raise self.error(f"{what} is ragged ({error})", "Give every token the same layers and experts") from error
        if array.dtype.kind not in "iu":
            raise self.error(f"{what} has dtype {array.dtype}", "Give integers")
        if array.ndim != axes:
            raise self.error(f"{what} has shape {array.shape}", f"Give an array of {axes} axes")
        return array

    def lengths(self, sizes: np.ndarray, tokens: int) -> None:
        empty = np.flatnonzero(sizes < 1)
        if len(empty):
            raise self.error(f"seq_len[{empty[0]}] is {sizes[empty[0]]}", "Drop sequences without tokens")
        if int(sizes.sum()) != tokens:
            raise self.error(
                f"seq_len sums to {int(sizes.sum())}, experts has {tokens} tokens",
                "Give the tokens of all sequences end to end, and the length of each sequence",
            )

    def ids(self, what: str, ids: np.ndarray, least: int, total: int, offsets: np.ndarray) -> None:
        if ids.size and (int(ids.min()) < least or int(ids.max()) >= total):
            token, layer, place = np.argwhere((ids < least) | (ids >= total))[0]
            raise self.error(
                f"{what}{_place(token, layer, offsets)} is {ids[token, layer, place]}, outside {least}..{total - 1}",
                "Give ids of the model's experts, or the right num_experts",
            )

    def distinct(self, routing: np.ndarray, offsets: np.ndarray) -> None:
        ordered = np.sort(routing, axis=2)
        twice = np.argwhere(ordered[:, :, 1:] == ordered[:, :, :-1])
        if len(twice):
            token, layer, _ = twice[0]
            raise self.error(
                f"experts{_place(token, layer, offsets)} {routing[token, layer].tolist()} names an expert twice",
                "Give k different experts a token and layer",
            )

    def shares(self, what: str, values: Any, shape: Sequence[int]) -> np.ndarray:
        array = np.asarray(values, np.float32)
        if array.shape != tuple(shape):
            raise self.error(f"{what} has shape {array.shape}, expected {tuple(shape)}", "Give one for each expert")
        bad = ~((array >= 0) & (array <= 1))  # true for nan as well
        if bad.any():
            place = tuple(int(i) for i in np.argwhere(bad)[0])
            raise self.error(f"{what}{list(place)} is {array[place]}", "Give probabilities in [0, 1]")
        return array


def _place(token: int, layer: int, offsets: np.ndarray) -> str:
    sequence = int(np.searchsorted(offsets, token, side="right")) - 1
    return f" at token {int(token)} (sequence {sequence}), layer {int(layer)}"


def _frozen(workload: Workload) -> Workload:
    for name in workload.__dataclass_fields__:
        value = getattr(workload, name)
        if isinstance(value, np.ndarray):
            contiguous = np.ascontiguousarray(value)
            contiguous = contiguous.copy() if contiguous is value and value.flags.writeable else contiguous
            contiguous.setflags(write=False)
            object.__setattr__(workload, name, contiguous)
    return workload
