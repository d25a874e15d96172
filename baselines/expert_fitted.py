"""Expert caches that need tables: each is fitted to training sequences, and the fit returns a `Rule`.

Tables travel as parameters of the rule, after its knobs. `Rule.shape` names the model that they belong to.
"""

from __future__ import annotations

import numpy as np

from ..envs.core.errors import InputError
from ..envs.core.kernel import njit, njit_borrowed
from ..envs.expert_caching.affinity import Affinity
from ..envs.expert_caching.rule import Rule, evict_lowest, lowest_slot, prefetch
from ..envs.expert_caching.state import ABSENT, AUTO
from ..envs.expert_caching.workload import Workload


def _shape(workload: Workload) -> tuple[int, int, int]:
    return workload.num_layers, workload.num_experts, workload.top_k


# ---------------------------------------------------------------------------------------------- ridge regression

DECAYS = np.array([0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995])
"""d of the decayed frequencies that the regression sees."""
NUM_FEATURES = len(DECAYS) + 5
"""Decayed frequencies; share in this sequence; prior; transitions at 1 and at 10 steps; one."""
LAG = 10
"""Steps of the longer transition."""


@njit(cache=True)
def _ridge_features(decayed, share, prior, near, far, out):
    """Write the regressors of one expert: decayed (9,), then scalars, into out (NUM_FEATURES,)."""
    for d in range(len(decayed)):
        out[d] = decayed[d]
    out[len(decayed)] = share
    out[len(decayed) + 1] = prior
    out[len(decayed) + 2] = near
    out[len(decayed) + 3] = far
    out[len(decayed) + 4] = 1.0


@njit(cache=True)
def _ridge_sums(routing, is_first, decays, prior, near, far, target):
    """X'X (F, F) and X'y (F,) of one layer: routing (T, k), near and far (E, E), target (T, E)."""
    tokens, k = routing.shape
    num_experts, size = len(prior), len(decays) + 5
    gram, moment = np.zeros((size, size)), np.zeros(size)
    decayed, count = np.zeros((num_experts, len(decays))), np.zeros(num_experts)
    x, position = np.zeros(size), 0
    for t in range(tokens):
        if is_first[t]:
            count[:] = 0.0
            position = 0
        position += 1
        for e in range(num_experts):
            for d in range(len(decays)):
                decayed[e, d] *= decays[d]
        for i in range(k):
            count[routing[t, i]] += 1.0
            for d in range(len(decays)):
                decayed[routing[t, i], d] += 1.0 - decays[d]
        for e in range(num_experts):
            one_step, ten_steps = 0.0, 0.0
            for i in range(k):
                one_step += near[routing[t, i], e]
                ten_steps += far[routing[t, i], e]
            _ridge_features(decayed[e], count[e] / position, prior[e], one_step / k, ten_steps / k, x)
            for a in range(size):
                moment[a] += x[a] * target[t, e]
                for b in range(a + 1):
                    gram[a, b] += x[a] * x[b]
    for a in range(size):
        for b in range(a):
            gram[b, a] = gram[a, b]
    return gram, moment


@njit_borrowed
def ridge(state, params, memory, decision):
    """Evict the lowest predicted future use.

    params: DECAYS (9), weights (L, F), near (L, E, E), far (L, E, E). memory: decayed frequencies (L, E, 9), keys.
    """
    engine, experts, num_experts = state.engine[0], state.experts, state.experts.shape[1]
    num_decays, size, layer = len(DECAYS), experts.size, engine.layer
    num_features = num_decays + 5
    decays = params[:num_decays]
    first = num_decays + size // num_experts * num_features
    weights = params[num_decays + layer * num_features : num_decays + (layer + 1) * num_features]
    near = params[first + layer * num_experts * num_experts :]
    far = params[first + (size + layer * num_experts) * num_experts :]
    decayed = memory[layer * num_experts * num_decays : (layer + 1) * num_experts * num_decays]
    keys = memory[size * num_decays : size * num_decays + size]
    for e in range(num_experts):
        used = 1.0 if experts[layer, e].needed else 0.0
        for d in range(num_decays):
            at = e * num_decays + d
            decayed[at] = decays[d] * decayed[at] + (1.0 - decays[d]) * used
    if engine.num_missing == 0:
        return
    tokens = 0
    for b in range(engine.num_sequences):
        tokens += state.sequences[b].position + 1 if state.sequences[b].sequence >= 0 else 0
    for slot in range(state.layers[layer].first_slot, state.layers[layer].end_slot):
        held = state.slots[slot]
        if held.expert < 0 or held.layer != layer:
            continue
        e = held.expert
        one_step, ten_steps = 0.0, 0.0
        for i in range(engine.num_needed):
            one_step += near[state.needed[i] * num_experts + e]
            ten_steps += far[state.needed[i] * num_experts + e]
        x = memory[size * num_decays + size : size * num_decays + size + num_features]
        share = experts[layer, e].count / max(tokens, 1)
        per_needed = 1.0 / engine.num_needed
        mine = decayed[e * num_decays : (e + 1) * num_decays]
        _write_features(mine, share, experts[layer, e].prior, one_step * per_needed, ten_steps * per_needed, x)
        keys[slot] = 0.0
        for a in range(num_features):
            keys[slot] += weights[a] * x[a]
    evict_lowest(state, keys, decision)


_write_features = njit_borrowed(_ridge_features.py_func)


def fit_ridge(workload: Workload, *, discount: float = 0.85, penalty: float = 1e-4, max_tokens: int = 40_000) -> Rule:
    """Ridge regression, layer by layer, of discounted future use on what the past says of an expert.

    Args:
        workload: training sequences; the first `max_tokens` tokens are used for the regression, all for transitions.
        discount: of the target, sum over j of (1 - discount) * discount ** (j - 1) * used(t + j): about .6 / .85 / .95
            for caches of 12.5 / 25 to 50 / 75% of the experts.
        penalty: of the squared weights, as a share of the mean of X'X.
        max_tokens: tokens of the regression.
    """
    if not 0 < discount < 1:
        raise InputError(f"discount is {discount}", remedy="Give a number between 0 and 1")
    layers, num_experts, k = _shape(workload)
    near = Affinity.fit(workload).same_layer
    far = _transitions(workload, LAG)
    prior = workload.popularity()
    sample = workload.head(max_tokens)
    is_first = sample.token_position == 0
    weights = np.zeros((layers, NUM_FEATURES))
    for layer in range(layers):
        routing = np.ascontiguousarray(sample.experts[:, layer])
        target = _future_use(routing, num_experts, discount)
        gram, moment = _ridge_sums(
            routing,
            is_first,
            DECAYS,
            prior[layer].astype(np.float64),
            near[layer].astype(np.float64),
            far[layer].astype(np.float64),
            target,
        )
        gram += penalty * np.trace(gram) / NUM_FEATURES * np.eye(NUM_FEATURES)
        weights[layer] = np.linalg.solve(gram, moment)
    return Rule(
        f"ridge_{discount:g}",
        ridge,
        np.concatenate([DECAYS, weights.ravel(), near.ravel(), far.ravel()]),
        memory_size=NUM_FEATURES,
        memory_per_expert=len(DECAYS) + 1,
        source="discounted future use, regressed on recency, frequency and transitions",
        shape=(layers, num_experts, k),
    )


@njit(cache=True)
def _future_use(routing, num_experts, discount):
    """float32 (T, E): discounted share of the coming tokens that use each expert."""
    tokens, k = routing.shape
    future = np.zeros((tokens, num_experts), np.float32)
    for t in range(tokens - 2, -1, -1):
        for e in range(num_experts):
            future[t, e] = discount * future[t + 1, e]
        for i in range(k):
            future[t, routing[t + 1, i]] += 1.0 - discount
    return future


def _transitions(workload: Workload, lag: int) -> np.ndarray:
    """float32 (L, E, E): P(e' `lag` tokens later | e now), within sequences and layers."""
    layers, num_experts, _ = _shape(workload)
    before = np.flatnonzero(workload.token_position + lag < np.repeat(workload.lengths, workload.lengths))
    tables = np.zeros((layers, num_experts, num_experts), np.float32)
    for layer in range(layers):
        now, then = workload.experts[before, layer], workload.experts[before + lag, layer]
        pairs = now[:, :, None].astype(np.int64) * num_experts + then[:, None, :]
        counts = np.bincount(pairs.ravel(), minlength=num_experts**2).reshape(num_experts, num_experts)
        uses = np.bincount(now.ravel(), minlength=num_experts)
        tables[layer] = counts / np.maximum(uses, 1)[:, None]
    return tables


# --------------------------------------------------------------------------------------------- a learned score

HIDDEN = 16
"""Units of the learned score."""


@njit_borrowed
def learned_score(state, params, memory, decision):
    """Evict the highest predicted reuse distance, from an expert's recency 1 / (1 + age) and lifetime frequency.

    params: a network 2 -> HIDDEN -> 1 with tanh: W1 (HIDDEN, 2), b1, w2, b2. memory: uses so far (L, E), keys.
    """
    engine, experts, num_experts = state.engine[0], state.experts, state.experts.shape[1]
    size, hidden = experts.size, (len(params) - 1) // 4
    uses, keys = memory[:size], memory[size:]
    for i in range(engine.num_needed):
        uses[engine.layer * num_experts + state.needed[i]] += 1.0
    if engine.num_missing == 0:
        return
    for slot in range(state.layers[engine.layer].first_slot, state.layers[engine.layer].end_slot):
        held = state.slots[slot]
        if held.expert < 0:
            continue
        age = (engine.epoch - experts[held.layer, held.expert].last_use) / engine.num_layers
        recency = 1.0 / (1.0 + age)
        frequency = uses[held.layer * num_experts + held.expert] / (engine.step + 1.0)
        distance = params[4 * hidden]
        for h in range(hidden):
            unit = np.tanh(params[2 * h] * recency + params[2 * h + 1] * frequency + params[2 * hidden + h])
            distance += params[3 * hidden + h] * unit
        keys[slot] = -distance
    evict_lowest(state, keys, decision)


def fit_learned_score(workload: Workload, *, samples: int = 200_000, rounds: int = 300, seed: int = 0) -> Rule:
    """FlashMoE's learned replacement: a small network from recency and frequency to Belady's distance.

    Trained by Adam on the squared error of log(1 + steps until the next use), at random (token, layer, expert) of
    experts that were used before; uses that never come count as 1024 steps away.
    """
    rng = np.random.default_rng(seed)
    recency, frequency, distance = _reuse_samples(workload, samples, rng)
    x, y = np.stack([recency, frequency], 1), np.log1p(np.minimum(distance, 1024.0))
    w1, b1 = rng.standard_normal((HIDDEN, 2)), np.zeros(HIDDEN)
    w2, b2 = rng.standard_normal(HIDDEN) / HIDDEN, np.array(y.mean())
    weights = [w1, b1, w2, b2]
    mean = [np.zeros_like(w) for w in weights]
    square = [np.zeros_like(w) for w in weights]
    for i in range(1, rounds + 1):
        batch = rng.integers(len(x), size=4096)
        unit = np.tanh(x[batch] @ weights[0].T + weights[1])
        error = (unit @ weights[2] + weights[3] - y[batch]) / len(batch)
        back = error[:, None] * weights[2] * (1.0 - unit**2)
        for j, gradient in enumerate((back.T @ x[batch], back.sum(0), unit.T @ error, error.sum())):
            mean[j] = 0.9 * mean[j] + 0.1 * gradient
            square[j] = 0.999 * square[j] + 0.001 * gradient**2
            step = mean[j] / (1 - 0.9**i) / (np.sqrt(square[j] / (1 - 0.999**i)) + 1e-8)
            weights[j] = weights[j] - 0.02 * step
    return Rule(
        "learned_score",
        learned_score,
        np.concatenate([np.ravel(w) for w in weights]),
        memory_per_expert=2,
        source="FlashMoE, arXiv 2601.17063: recency and frequency, trained on Belady's distance",
    )


def _reuse_samples(
    workload: Workload, samples: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """1 / (1 + age), lifetime frequency and steps to the next use, of experts used before, at random moments."""
    layers, num_experts, _ = _shape(workload)
    parts = []
    for layer in range(layers):
        routing = workload.experts[:, layer].astype(np.int64)
        steps = np.repeat(np.arange(len(routing)), routing.shape[1])
        order = np.argsort(routing.ravel(), kind="stable")
        uses = routing.ravel()[order] * (len(routing) + 1) + steps[order]  # increasing
        span = len(routing) + 1
        moment = rng.integers(1, len(routing), samples // layers + 1)
        expert = rng.integers(num_experts, size=len(moment))
        after, first = np.searchsorted(uses, expert * span + moment, side="right"), np.searchsorted(uses, expert * span)
        is_known = after > first
        moment, expert, after, first = moment[is_known], expert[is_known], after[is_known], first[is_known]
        age = moment - uses[after - 1] % span
        following = np.append(uses, np.iinfo(np.int64).max)[after]
        distance = np.where(following // span == expert, following - expert * span - moment, np.inf)
        parts.append(np.stack([1.0 / (1.0 + age), (after - first) / (moment + 1.0), distance]))
    recency, frequency, distance = np.concatenate(parts, axis=1)
    return recency, frequency, distance


# ------------------------------------------------------------------------------------------- prefetch by tables


@njit_borrowed
def affinity_prefetch(state, params, memory, decision):
    """LRU; of the next layer, the experts that follow the present ones most often are loaded ahead.

    params: how many, then `Affinity.next_layer` (L, E, E). memory: scores (E).
    """
    engine, num_experts, scores = state.engine[0], state.experts.shape[1], memory
    target = (engine.layer + 1) % engine.num_layers
    if target == engine.layer:
        return
    for e in range(num_experts):
        scores[e] = 0.0
    for i in range(engine.num_needed):
        begin = 1 + (engine.layer * num_experts + state.needed[i]) * num_experts
        for e in range(num_experts):
            scores[e] += params[begin + e]
    for _ in range(int(params[0])):
        best = 0
        for e in range(num_experts):
            best = e if scores[e] > scores[best] else best
        if scores[best] <= 0.0:
            return
        scores[best] = 0.0
        if state.experts[target, best].status == ABSENT:
            prefetch(state, decision, target, best, AUTO)


def fit_affinity_prefetch(workload: Workload, num_prefetch: int | None = None) -> Rule:
    """Prefetch by P(expert at l + 1 | expert at l), as counted on `workload`; top k by default."""
    most = workload.top_k if num_prefetch is None else num_prefetch
    return Rule(
        "affinity_prefetch",
        affinity_prefetch,
        np.concatenate([[most], Affinity.fit(workload).next_layer.ravel()]),
        memory_per_expert=1,
        source="inter-layer expert affinity of ExFlow, arXiv 2401.08383, used for prefetching",
        shape=_shape(workload),
    )


@njit_borrowed
def moe_infinity(state, params, memory, decision):
    """The past sequence that was routed most like the present one tells what comes: load that ahead, keep that.

    params: number of matrices N, then N activation matrices (L * E) of unit length. memory: for each row of the batch
    its sequence + 1 and its products with the N matrices; then the expected shares (L * E), and keys.
    """
    engine, experts, num_experts = state.engine[0], state.experts, state.experts.shape[1]
    size, layer, num_layers = experts.size, engine.layer, engine.num_layers
    num_matrices, window = int(params[0]), state.history.shape[1]
    expected, keys = memory[:size], memory[size : 2 * size]
    rows = memory[2 * size :]
    expected[:] = 0.0
    for b in range(engine.num_sequences):
        row = state.sequences[b]
        products = rows[b * (num_matrices + 1) + 1 : (b + 1) * (num_matrices + 1)]
        if rows[b * (num_matrices + 1)] != row.sequence + 1.0:
            rows[b * (num_matrices + 1)] = row.sequence + 1.0
            products[:] = 0.0
        if row.sequence < 0:
            continue
        best = 0
        for n in range(num_matrices):
            for i in range(engine.top_k):
                expert = state.history[b, (row.served - 1) % window, layer, i]
                products[n] += params[1 + n * size + layer * num_experts + expert]
            best = n if products[n] > products[best] else best
        # only the layers that can be asked about: this one and those within reach
        for ahead in range(min(engine.prefetch_depth, num_layers - 1) + 1):
            begin = (layer + ahead) % num_layers * num_experts
            total = 1e-12
            for e in range(num_experts):
                total += params[1 + best * size + begin + e]
            for e in range(num_experts):
                expected[begin + e] += params[1 + best * size + begin + e] / total
    for slot in range(state.layers[layer].first_slot, state.layers[layer].end_slot):
        held = state.slots[slot]
        if held.expert >= 0:
            distance = (held.layer - layer) % num_layers
            keys[slot] = expected[held.layer * num_experts + held.expert] * (1.0 - distance / num_layers)
            keys[slot] += 1e-9 * (experts[held.layer, held.expert].last_use - engine.epoch)  # ties: LRU
    evict_lowest(state, keys, decision)
    for _ in range(engine.max_prefetch - decision.plan[0].num_prefetch):
        of_layer, best, highest = -1, -1, 0.0
        for ahead in range(1, min(engine.prefetch_depth, num_layers - 1) + 1):
            target = (layer + ahead) % num_layers
            for e in range(num_experts):
                priority = expected[target * num_experts + e] * (1.0 - ahead / num_layers)
                if priority > highest and experts[target, e].status == ABSENT:
                    of_layer, best, highest = target, e, priority
        if best < 0:
            return
        expected[of_layer * num_experts + best] = 0.0
        prefetch(state, decision, of_layer, best, AUTO)


def fit_moe_infinity(
    workload: Workload, *, num_matrices: int = 64, num_sequences: int = 1, rounds: int = 10, seed: int = 0
) -> Rule:
    """MoE-Infinity's activation matrices: the sequences nearest to the centres of k-means over training sequences.

    Args:
        workload: training sequences.
        num_matrices: matrices that are kept.
        num_sequences: rows of the batches that the rule will serve.
        rounds: of k-means, with cosine similarity.
        seed: of its first centres.
    """
    layers, num_experts, k = _shape(workload)
    place = np.arange(layers)[:, None] * num_experts + workload.experts  # (T, L, k)
    matrices = np.zeros((len(workload), layers * num_experts), np.float32)
    np.add.at(matrices, (workload.token_sequence[:, None], place.reshape(len(place), -1)), 1.0)
    matrices /= np.linalg.norm(matrices, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    kept = min(num_matrices, len(workload))
    centres = matrices[rng.choice(len(workload), kept, replace=False)]
    for _ in range(rounds):
        nearest = (matrices @ centres.T).argmax(1)
        sums = np.stack([matrices[nearest == n].sum(0) for n in range(kept)])
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(norms > 0, sums / np.maximum(norms, 1e-12), centres)
    members = np.unique((centres @ matrices.T).argmax(1))
    return Rule(
        "moe_infinity",
        moe_infinity,
        np.concatenate([[len(members)], matrices[members].ravel()]),
        memory_size=num_sequences * (len(members) + 1),
        memory_per_expert=2,
        source="MoE-Infinity, arXiv 2401.14361",
        shape=(layers, num_experts, k),
    )


@njit_borrowed
def expert_flow(state, params, memory, decision):
    """Load what the present tokens' ids say they will need, keep that, and correct by loads on demand.

    params: number of ids V, the ids (increasing), paths (V + 1, L, k): the last one for ids that are not listed.
    memory: rows of the batch that will use an expert in this step, or used it as foreseen (L * E), keys.
    """
    engine, experts, num_experts = state.engine[0], state.experts, state.experts.shape[1]
    size, layer, num_layers, k = experts.size, engine.layer, engine.num_layers, engine.top_k
    foreseen, keys = memory[:size], memory[size:]
    num_ids = int(params[0])
    if layer == 0:
        foreseen[:] = 0.0
        for b in range(engine.num_sequences):
            if state.sequences[b].sequence < 0:
                continue
            low, high = 0, num_ids
            while low < high:
                middle = (low + high) // 2
                if params[1 + middle] < state.sequences[b].token_id:
                    low = middle + 1
                else:
                    high = middle
            path = low if low < num_ids and params[1 + low] == state.sequences[b].token_id else num_ids
            for i in range(num_layers * k):
                foreseen[i // k * num_experts + int(params[1 + num_ids + path * num_layers * k + i])] += 1.0
    for slot in range(engine.num_slots):
        held = state.slots[slot]
        if held.expert >= 0:
            # what no remaining path needs goes first: layers that the step is through with, and experts not foreseen
            is_wanted = held.layer > layer and foreseen[held.layer * num_experts + held.expert] > 0.0
            keys[slot] = experts[held.layer, held.expert].last_use + (1e12 if is_wanted else 0.0)
    evict_lowest(state, keys, decision)
    for ahead in range(1, engine.prefetch_depth + 1):
        target = layer + ahead
        if target >= num_layers:
            return
        for e in range(num_experts):
            if foreseen[target * num_experts + e] > 0.0 and experts[target, e].status == ABSENT:
                slot = lowest_slot(state, keys, decision, target, engine.num_missing, decision.plan[0].num_prefetch)
                if slot != AUTO and keys[slot] < 1e12:
                    prefetch(state, decision, target, e, slot)


def fit_expert_flow(workload: Workload, *, max_ids: int = 4096) -> Rule:
    """ExpertFlow's routing path predictor, as a table: the most frequent experts of each token id in each layer.

    The paper trains a small transformer for it; a table sees the token id alone. Ids beyond the `max_ids` most frequent
    ones get the most popular experts.
    """
    paths, ids = token_paths(workload, max_ids)
    return Rule(
        "expert_flow",
        expert_flow,
        np.concatenate([[len(ids)], ids, paths.ravel()]),
        memory_per_expert=2,
        source="ExpertFlow, arXiv 2410.17954",
        shape=_shape(workload),
    )


def token_paths(workload: Workload, max_ids: int) -> tuple[np.ndarray, np.ndarray]:
    """Paths (V + 1, L, k) and token ids (V,), increasing; the last path is for all other ids. Raises InputError."""
    if (workload.token_ids < 0).any():
        raise InputError(
            f"workload {workload.name!r} has tokens without ids, from which paths are predicted",
            remedy="Record `token_ids` with the routing",
        )
    layers, num_experts, k = _shape(workload)
    found, index, counts = np.unique(workload.token_ids, return_inverse=True, return_counts=True)
    listed = np.sort(np.argsort(-counts, kind="stable")[:max_ids])
    row_of = np.full(len(found), len(listed))
    row_of[listed] = np.arange(len(listed))
    rows = row_of[index]
    paths = np.empty((len(listed) + 1, layers, k))
    for layer in range(layers):
        uses = np.zeros((len(listed) + 1, num_experts))
        np.add.at(uses, (rows[:, None], workload.experts[:, layer]), 1.0)
        popularity = uses.sum(0)
        uses[-1] = popularity
        uses += 1e-6 * popularity / max(popularity.sum(), 1.0)  # ties: the popular ones
        paths[:, layer] = np.sort(np.argsort(-uses, axis=1, kind="stable")[:, :k], axis=1)
    return paths, found[listed].astype(np.float64)


def predicted_paths(workload: Workload, rule: Rule) -> np.ndarray:
    """bool (T, L * E): the experts that a rule of `fit_expert_flow` foresees for each token, for regrouping."""
    layers, num_experts, k = _shape(workload)
    params = rule.param_array
    num_ids = int(params[0])
    ids, paths = params[1 : 1 + num_ids], params[1 + num_ids :].reshape(num_ids + 1, layers, k).astype(np.int64)
    at = np.minimum(np.searchsorted(ids, workload.token_ids), max(num_ids - 1, 0))
    row = np.where(ids[at] == workload.token_ids, at, num_ids)
    mask = np.zeros((workload.num_tokens, layers, num_experts), bool)
    np.put_along_axis(mask, paths[row], True, axis=2)
    return mask.reshape(workload.num_tokens, -1)
