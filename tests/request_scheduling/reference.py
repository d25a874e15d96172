"""The serving engine once more, in plain Python: lists, dicts and explicit blocks, written from `state.py`'s docstring.

It shares no code with the simulator. Every physical KV block is an object with an identity, every prefix hit is looked
up from scratch, and iterations run one at a time: slow, and easy to check by eye.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from schedlab.envs.request_scheduling.spec import RequestSchedulingSpec
from schedlab.envs.request_scheduling.workload import Workload

UNLIMITED = 1 << 40


@dataclass
class Plan:
    """A decision. The defaults are the engine's own: first come first served, no limit below the engine's."""

    prefill_tokens: int = UNLIMITED
    chunk_tokens: int = UNLIMITED
    max_running: int = UNLIMITED
    kv_reserve_blocks: int = 0
    whole_prompts: bool = False
    admit_rest: bool = True
    order: list[int] = field(default_factory=list)
    preempt: list[int] = field(default_factory=list)


@dataclass
class Request:
    """One request, with its future."""

    id: int
    arrival_s: float
    prompt: int
    output: int
    predicted: float
    hashes: list[int]
    generated: int = 0
    computed: int = 0
    target: int = 0
    """Tokens to have in KV before the next token."""
    blocks: list[int] = field(default_factory=list)
    """Physical blocks, in order of position."""
    admission: int = -1
    preemptions: int = 0
    token_s: list[float] = field(default_factory=list)

    @property
    def decodes(self) -> bool:
        return self.computed >= self.target

    @property
    def length(self) -> int:
        return self.prompt + self.generated


class ReferenceEngine:
    """One engine serving one workload, an iteration at a time."""

    def __init__(self, spec: RequestSchedulingSpec, workload: Workload) -> None:
        engine = spec.engine
        self.cost = spec.cost.coefficients_s
        self.size, self.total = engine.block_tokens, engine.kv_blocks
        self.max_batch_tokens, self.max_running = engine.max_batch_tokens, engine.max_running
        shares = engine.prefix_cache and workload.hash_block_tokens > 0
        ends = workload.hash_offsets
        self.future = [
            Request(
                i,
                float(workload.arrival_s[i]),
                int(workload.prompt_tokens[i]),
                int(workload.output_tokens[i]),
                float(workload.predicted_output_tokens[i]),
                workload.hash_ids[ends[i] : ends[i + 1]].tolist() if shares else [],
                target=int(workload.prompt_tokens[i]),
            )
            for i in range(len(workload))
        ]
        self.requests = list(self.future)
        self.now_s = 0.0
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.finished: list[Request] = []
        self.refused: list[Request] = []
        self.brought: list[tuple[float, ...]] = []  # of every arrival: prefill tokens, query context, steps, context
        self.admissions = 0
        self.unused = set(range(self.total))
        self.cached: dict[int, int] = {}  # hash -> physical block
        self.holders: dict[int, set[int]] = {}  # physical block of a hash -> requests that reference it
        self.idle: OrderedDict[int, int] = OrderedDict()  # hash -> physical block, least recently used first
        self.iterations: list[tuple[float, float, int, int, int]] = []  # start, end, prefill, decodes, blocks in use
        self.arrive()

    # -- KV blocks

    @property
    def free(self) -> int:
        return len(self.unused) + len(self.idle)

    def take(self, count: int) -> list[int]:
        taken = []
        for _ in range(count):
            if self.unused:
                taken.append(self.unused.pop())
            else:
                block_hash, block = self.idle.popitem(last=False)
                del self.cached[block_hash], self.holders[block]
                taken.append(block)
        return taken

    def hits(self, request: Request) -> int:
        """Full prompt blocks found in the cache now; at least one token is left to compute."""
        hits = 0
        for block_hash in request.hashes[: (request.length - 1) // self.size]:
            if block_hash not in self.cached:
                break
            hits += 1
        return hits

    def reference(self, request: Request, block_hash: int) -> int:
        block = self.cached[block_hash]
        self.idle.pop(block_hash, None)
        self.holders[block].add(request.id)
        return block

    def release(self, request: Request) -> None:
        hash_of = {self.cached[h]: h for h in request.hashes if h in self.cached}
        for block in reversed(request.blocks):
            if request.id in self.holders.get(block, ()):
                self.holders[block].remove(request.id)
                if not self.holders[block]:
                    self.idle[hash_of[block]] = block
            else:
                self.unused.add(block)
        request.blocks = []

    def share(self, request: Request, before: int) -> None:
        """Full prompt blocks completed since `before` tokens become shareable, or give way to the copy that is."""
        for position in range(before // self.size, min(len(request.hashes), request.computed // self.size)):
            block_hash, block = request.hashes[position], request.blocks[position]
            if block_hash in self.cached:
                request.blocks[position] = self.reference(request, block_hash)
                self.unused.add(block)
            else:
                self.cached[block_hash] = block
                self.holders[block] = {request.id}

    # -- one iteration

    def arrive(self) -> None:
        while self.future and self.future[0].arrival_s <= self.now_s:
            request = self.future.pop(0)
            most = request.prompt + request.output - 1
            fits = -(-most // self.size) <= self.total
            (self.waiting if fits else self.refused).append(request)
            new = request.prompt - self.hits(request) * self.size
            prefill = (new, new * (request.prompt - new / 2))
            steps = (request.predicted, request.predicted * (request.prompt + request.predicted / 2))
            self.brought.append((*prefill, *steps) if fits else (0.0, 0.0, 0.0, 0.0))

    def means(self) -> list[float]:
        """Over all arrivals: the gap between two, and what one brings."""
        count = len(self.brought)
        gap_s = (self.requests[count - 1].arrival_s - self.requests[0].arrival_s) / max(count - 1, 1) if count else 0.0
        return [gap_s, *(sum(column) / count for column in zip(*self.brought, strict=True))] if count else [0.0] * 5

    def jump(self) -> bool:
        """Over idle time to the next arrival. False when all is done."""
        while not self.waiting and not self.running:
            if not self.future:
                return False
            self.now_s = max(self.now_s, self.future[0].arrival_s)
            self.arrive()
        return True

    def preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.waiting.insert(0, request)
        self.release(request)
        request.computed, request.target = 0, request.length
        request.preemptions += 1

    def admit(self, request: Request, plan: Plan, left: int, is_first: bool) -> int | None:
        """Prefill tokens of the iteration for this request, None if it does not fit."""
        hits = self.hits(request)
        need = request.length - hits * self.size
        if plan.whole_prompts and need > left and not is_first:
            return None
        new = -(-request.length // self.size) - hits
        reserve = plan.kv_reserve_blocks if self.running else 0
        idle_hits = sum(h in self.idle for h in request.hashes[:hits])
        if self.free - idle_hits - new < reserve:
            return None
        request.blocks = [self.reference(request, h) for h in request.hashes[:hits]] + self.take(new)
        request.computed, request.target = hits * self.size, request.length
        request.admission = self.admissions
        self.admissions += 1
        self.waiting.remove(request)
        self.running.append(request)
        return min(need, left, plan.chunk_tokens)

    def prefill(self, plan: Plan) -> dict[int, int]:
        """Prefill tokens of the iteration, by request."""
        decodes = sum(r.decodes for r in self.running)
        budget = left = max(min(plan.prefill_tokens, self.max_batch_tokens - decodes), 0)
        chunks: dict[int, int] = {}
        for request in self.running:
            if not request.decodes and left > 0:
                chunks[request.id] = min(request.target - request.computed, left, plan.chunk_tokens)
                left -= chunks[request.id]
        by_id = {r.id: r for r in self.waiting}
        picks = [by_id[i] for i in dict.fromkeys(plan.order) if i in by_id]
        others = [r for r in self.waiting if r not in picks] if plan.admit_rest else []
        for request in [*picks, *others]:
            if left <= 0 or len(self.running) >= min(plan.max_running, self.max_running):
                break
            tokens = self.admit(request, plan, left, is_first=left == budget)
            if tokens is None:
                break
            chunks[request.id] = tokens
            left -= tokens
        return chunks

    def iterate(self, plan: Plan) -> None:
        for number in plan.preempt:
            for request in self.running:
                if request.id == number:
                    self.preempt(request)
                    break
        decodes: list[Request] = []
        for request in list(self.running):
            if request not in self.running or not request.decodes:
                continue
            if request.computed == len(request.blocks) * self.size:
                while request in self.running and self.free == 0:
                    self.preempt(self.running[-1])
                if request not in self.running:
                    break
                request.blocks += self.take(1)
            decodes.append(request)
        decodes = [r for r in decodes if r in self.running]
        chunks = self.prefill(plan)
        if not decodes and sum(chunks.values()) == 0:
            chunks = self.prefill(Plan())

        context = sum(r.computed + 1 for r in decodes)
        after = [(chunks[r.id], r.computed + chunks[r.id]) for r in self.running if chunks.get(r.id, 0) > 0]
        prefill = sum(q for q, _ in after)
        features = (
            1,
            prefill,
            len(decodes),
            context,
            sum(q * c for q, c in after),
            (prefill + len(decodes)) * (context + sum(c for _, c in after)),
            prefill > 0,
        )
        start_s = self.now_s
        self.now_s += sum(c * f for c, f in zip(self.cost, features, strict=True))
        self.iterations.append((start_s, self.now_s, prefill, len(decodes), self.total - self.free))

        for request in list(self.running):
            before = request.computed
            if request in decodes:
                request.computed += 1
            else:
                request.computed += chunks.get(request.id, 0)
                self.share(request, before)
                if not request.decodes or request.computed == before:
                    continue
            request.generated += 1
            request.token_s.append(self.now_s)
            if request.generated == request.output:
                self.running.remove(request)
                self.release(request)
                self.finished.append(request)
        self.arrive()

    def check(self) -> None:
        """No block is lost, held twice, or shared without being cached."""
        held = [b for r in self.running for b in r.blocks]
        private = [b for b in held if b not in self.holders]
        assert len(private) == len(set(private))
        assert self.unused.isdisjoint(held) and self.unused.isdisjoint(self.cached.values())
        assert {b for b in held if b in self.holders} == {b for b, who in self.holders.items() if who}
        assert len(self.unused) + len(set(private)) + len(self.cached) == self.total
        for request in self.requests:  # a cached block's predecessors are cached
            cached = [h in self.cached for h in request.hashes]
            assert cached == sorted(cached, reverse=True)
