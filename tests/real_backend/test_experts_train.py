"""`schedlab train-moe` in small, and the routing that it recorded when it was run in full."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
import torch

import schedlab
from schedlab.envs.core.errors import InputError
from schedlab.envs.expert_caching.workload import load_routing
from schedlab.experiments import train_moe
from schedlab.experiments.train_moe import balance_loss, find_documents
from schedlab.real_backend import experts_model

SHIPPED = Path(schedlab.__file__).parent / "real_backend" / "data" / "moe.npz"


def write_text(folder, seed=0):
    rng = np.random.default_rng(seed)
    for i in range(64):
        letters = rng.choice(list("abcdefghijklmnop  "), 1500)
        (folder / f"{i}.txt").write_text("".join(letters) + "\n")


def test_documents_are_ordered_by_content_without_copies(tmp_path):
    write_text(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "README").write_bytes((tmp_path / "0.txt").read_bytes())
    (tmp_path / "image.png").write_bytes(bytes(2000))
    first = list(find_documents([tmp_path], 5e4))
    for path in list(tmp_path.glob("*.txt")):
        path.rename(tmp_path / f"renamed-{path.name}")
    assert list(find_documents([tmp_path], 5e4)) == first
    texts = [text for _, text in first]
    assert len(set(texts)) == len(texts) and 5e4 <= sum(map(len, texts)) < 5e4 + 3000
    assert [i for i, (is_held_out, _) in enumerate(first) if is_held_out] == [0, 16, 32]
    with pytest.raises(InputError, match=r"only 0\.1 MB of text in .*; 1\.0 MB are needed.*--text-dirs"):
        list(find_documents([tmp_path], 1e6))


def test_balance_loss_is_one_for_even_use_and_e_over_k_for_the_same_experts():
    even = torch.eye(8).repeat(4, 1) * 9
    assert balance_loss([even], 1).item() == pytest.approx(1.0)
    one = torch.zeros(32, 8)
    one[:, :2] = 50.0
    assert balance_loss([one], 2).item() == pytest.approx(4.0)
    assert balance_loss([even, one[:, [0, 2, 3, 1, 4, 5, 6, 7]]], 2).item() > 1.5  # a layer at a time


def test_a_small_run_leaves_a_model_and_its_routing(tmp_path, monkeypatch, capsys):
    """Two steps of a small model on made-up text: the folder holds what the help says, and routes as it says."""
    text, out = tmp_path / "text", tmp_path / "out"
    text.mkdir()
    write_text(text)
    build = experts_model.build_olmoe
    monkeypatch.setattr(
        experts_model, "build_olmoe", lambda seed: build(hidden=32, intermediate=32, layers=2, vocab=300, seed=seed)
    )
    options = ["--tokens", "512", "--sequence-tokens", "32", "--recorded-sequences", "3", "--text-dirs", str(text)]
    assert train_moe.main(["--out", str(out), *options]) == 0
    work = load_routing(out / "routing.npz", top_k=4)
    assert work.experts.shape == (96, 2, 4) and work.num_experts == 32 and work.predicted.shape == (96, 2, 8)
    assert (work.token_ids >= 0).all() and (work.lengths == 32).all()
    np.testing.assert_array_equal(work.predicted_probability * 64 % 1, 0)
    assert len((out / "training.csv").read_text().splitlines()) == 1 + 2
    with torch.inference_mode():
        model = experts_model.load_olmoe(out)
        output = model.model(torch.tensor(work.token_ids[None, :32]), output_router_logits=True)
    chosen = output.router_logits[0].topk(4, dim=-1).indices.sort(dim=-1).values.numpy()
    agree = (chosen == np.sort(work.experts[:32, 0], axis=1)).all(axis=1)
    assert agree.mean() > 0.95  # a whole sequence at once rounds differently from a token at a time
    assert train_moe.main(["--out", str(out), *options, "--tokens", "10000000"]) == 2
    assert "MB are needed" in capsys.readouterr().err


def test_the_shipped_routing_is_neither_degenerate_nor_uniform():
    work = load_routing(SHIPPED)
    assert work.experts.shape == (24576, 6, 4) and work.num_experts == 32 and len(work) == 48
    assert SHIPPED.stat().st_size < 2e6
    popularity = work.popularity()
    assert popularity.max() < 0.5 and popularity.min() > 0.0
    entropy_bits = -(popularity / 4 * np.log2(popularity / 4)).sum(axis=1)
    assert (entropy_bits > 4.5).all() and (entropy_bits < 4.95).all()  # 5 bits are uniform
    again = np.mean([np.isin(work.experts[1:, 3][i], work.experts[:-1, 3][i]).mean() for i in range(0, 24000, 8)])
    assert again > 2 * 4 / 32  # a token uses its predecessor's experts far more often than chance
