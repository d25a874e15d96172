"""Train a small Mixture-of-Experts language model on text of this machine, and record how it routes held-out text.

The model is an OLMoE (arXiv 2409.02060) of 6 layers with 32 experts each, 4 a token, 15 million weights. It reads the
sources of Python's standard library and the documents below --text-dirs, as tokens of a byte-pair encoding that is
learned first. A load-balancing loss a layer (Switch, arXiv 2101.03961) keeps its routing from collapsing. On one CPU
thread this takes about 20 minutes.

The folder OUT holds the model (for `schedlab evaluate expert_caching --backend experts`), `tokenizer.json`,
`training.csv`, and `routing.npz`: the experts of every layer for every token of sequences that were held out.

Examples:

  schedlab train-moe --out runs/moe
  python -m schedlab.experiments.train_moe --out runs/moe --tokens 5000000
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..envs.core.errors import InputError
from . import command

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SUFFIXES = (".md", ".rst", ".txt", ".py")
NAMES = ("copyright", "README", "NEWS")
MAX_FILE_BYTES = 200_000
"""Larger files are cut here: a few change logs would otherwise be most of the text."""
HELD_OUT = 16
"""One document in so many is held out of training."""
BYTES_PER_TOKEN = 3.2
"""Text to look for: a token of 2048 is 2.7 bytes long, and the last piece of a document is too short for a sequence."""


@dataclass
class Args:
    """Arguments of `schedlab train-moe`."""

    out: Path = Path("runs/moe")
    """Folder for model, tokenizer, training curve and routing."""
    tokens: int = 3_000_000
    """Tokens to train on; fewer than the text has, so that none is seen twice."""
    text_dirs: tuple[Path, ...] = (Path(sysconfig.get_paths()["stdlib"]), Path("/usr/share/doc"))
    """Folders with documents and sources: the standard library of this Python, and the system's documents. Missing ones
    are skipped."""
    batch_sequences: int = 8
    """Sequences in a batch."""
    sequence_tokens: int = 512
    """Tokens of a sequence, in training and in the recorded routing."""
    learning_rate: float = 3e-3
    """At its highest, after the warm-up; a cosine takes it to a tenth."""
    balance: float = 0.02
    """Weight of the load-balancing loss."""
    recorded_sequences: int = 48
    """Held-out sequences of the recorded routing."""
    predicted_experts: int = 8
    """Experts of the next layer whose guessed probability is recorded."""
    seed: int = 0
    """Of the weights and of the order of the text."""


def find_documents(folders: Sequence[Path], num_bytes: float) -> Iterator[tuple[bool, str]]:
    """(held out, text) of documents below `folders`, in turn and each in an order that only contents decide.

    Ordered by a hash of the content, which also drops copies: the same files give the same text, wherever they lie.
    Raises InputError if there are not `num_bytes` of them.
    """
    by_folder = []
    for folder in folders:
        documents = {}
        for path in folder.rglob("*"):
            is_text = path.suffix in SUFFIXES or path.name in NAMES
            if is_text and not {"site-packages", "test", "tests"} & set(path.parts) and path.is_file():
                content = path.read_bytes()[:MAX_FILE_BYTES]
                if len(content) > 500:
                    documents[hashlib.sha256(content).digest()] = content
        by_folder.append([documents[key] for key in sorted(documents)])
    found = 0
    longest = max(map(len, by_folder), default=0)
    for i in range(longest):
        for documents_of_folder in by_folder:
            if i < len(documents_of_folder) and found < num_bytes:
                text = documents_of_folder[i].decode(errors="replace")
                found += len(text)
                yield i % HELD_OUT == 0, text
    if found < num_bytes:
        raise InputError(
            f"only {found / 1e6:.1f} MB of text in {', '.join(map(str, folders))}; {num_bytes / 1e6:.1f} MB are needed",
            remedy="Name folders with more text by --text-dirs, or train on fewer --tokens",
        )


def learn_tokenizer(texts: Sequence[str], vocab: int) -> Tokenizer:
    """A byte-level BPE (Sennrich 2016) of `vocab` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def cut(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> np.ndarray:
    """(N, length) int64: the tokens of each document in pieces of `length`; remainders are dropped."""
    rows = [np.array(encoding.ids, np.int64) for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate([row[: len(row) // length * length].reshape(-1, length) for row in rows])


def balance_loss(router_logits: Sequence[Any], top_k: int) -> Any:
    """Mean over layers of E * sum_e (share of tokens sent to e) * (mean probability of e): 1 if all are used alike.

    A layer at a time: over all layers together, as transformers sums it, one layer's favourites excuse another's.
    """
    import torch

    losses = []
    for logits in router_logits:  # (tokens, E)
        probability = torch.softmax(logits, dim=-1)
        chosen = torch.zeros_like(probability).scatter_(1, probability.topk(top_k, dim=-1).indices, 1.0)
        losses.append(logits.shape[1] * (chosen.mean(0) / top_k * probability.mean(0)).sum())
    return torch.stack(losses).mean()


def train(model: Any, sequences: np.ndarray, args: Args) -> None:
    """AdamW over `sequences` (N, T), once, with a cosine schedule; one line a step into `training.csv`."""
    import torch

    steps = len(sequences) // args.batch_sequences
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    warm_up = max(1, min(50, steps // 10))
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm_up, 0.55 + 0.45 * float(np.cos(np.pi * min(i / steps, 1))))
    )
    top_k = model.config.num_experts_per_tok
    with command.progress("training", steps) as bar, open(args.out / "training.csv", "w") as curve:
        curve.write("tokens,loss_nats,balance\n")
        for i in range(steps):
            batch = torch.from_numpy(sequences[i * args.batch_sequences : (i + 1) * args.batch_sequences])
            output = model.model(batch[:, :-1], output_router_logits=True, use_cache=False)
            logits = model.lm_head(output.last_hidden_state)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            balance = balance_loss(output.router_logits, top_k)
            (loss + args.balance * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            cosine.step()
            optimizer.zero_grad()
            curve.write(f"{(i + 1) * batch.numel()},{loss.item():.4f},{balance.item():.4f}\n")
            curve.flush()
            bar(i + 1, f"training, loss {loss.item():.3f}")


def train_moe(args: Args) -> int:
    """Run `schedlab train-moe`."""
    import torch

    from ..real_backend.experts_model import build_olmoe

    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    model = build_olmoe(seed=args.seed)
    needed_bytes = args.tokens * BYTES_PER_TOKEN * HELD_OUT / (HELD_OUT - 1)
    documents = list(find_documents(args.text_dirs, needed_bytes))
    command.say(f"read {len(documents)} documents; learning their tokens")
    texts = [text for is_held_out, text in documents if not is_held_out]
    tokenizer = learn_tokenizer(texts, model.config.vocab_size)
    tokenizer.save(str(args.out / "tokenizer.json"))
    length = args.sequence_tokens
    sequences = np.random.default_rng(args.seed).permutation(cut(tokenizer, texts, length))
    held_out = cut(tokenizer, [text for is_held_out, text in documents if is_held_out], length)
    if len(sequences) * length < args.tokens or len(held_out) < args.recorded_sequences:
        raise InputError(
            f"the text gives {len(sequences) * length} tokens to train on and {len(held_out)} sequences to record",
            remedy="Name folders with more text by --text-dirs, or lower --tokens or --recorded-sequences",
        )
    train(model, sequences[: args.tokens // length], args)
    model.set_experts_implementation("eager")
    model.half().save_pretrained(args.out)  # half the size; what is recorded below is the model as it was saved
    return record(args, held_out)


def record(args: Args, held_out: np.ndarray) -> int:
    """Write the routing of held-out sequences by the saved model, with its guesses of the next layer's experts."""
    from ..envs.expert_caching.workload import save_routing
    from ..real_backend.experts import OffloadedModel, record_routing
    from ..real_backend.experts_model import load_olmoe

    model = OffloadedModel(load_olmoe(args.out), folder=args.out)
    chosen = np.random.default_rng(args.seed).permutation(len(held_out))[: args.recorded_sequences]
    with command.progress("recording", len(chosen)) as bar:
        workload = record_routing(
            model,
            held_out[np.sort(chosen)].tolist(),
            name="moe",
            num_predicted=args.predicted_experts,
            source=f"OLMoE of {args.tokens} tokens (schedlab train-moe, seed {args.seed}), held-out text",
            progress=bar,
        )
    model.close()
    # in steps of 1/64 the probabilities take a third of the space, and say all that a cache can use
    odds = np.round(workload.predicted_probability * 64) / 64
    save_routing(args.out / "routing.npz", workload.with_predictions(workload.predicted, odds))
    command.say(f"wrote {args.out}: the model, and the routing of {workload.num_tokens} held-out tokens in routing.npz")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return command.run(Args, train_moe, argv, "train-moe", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
