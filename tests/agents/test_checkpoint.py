"""Checkpoints: what goes in comes out, and what is wrong is named."""

import json

import numpy as np
import pytest
import torch

from schedlab.agents.checkpoint import load_checkpoint, save_checkpoint
from schedlab.agents.export import OnnxPolicy, agreement, random_observations
from schedlab.agents.networks import ENCODERS, PointerNetwork
from schedlab.envs.core.errors import InputError

CONFIG = {"env_id": "schedlab/Toy-v0", "spec": {"size": 3}, "feature_version": 2}


def network(encoder="deepsets", hidden=16):
    torch.manual_seed(0)
    return PointerNetwork(4, 6, encoder, hidden)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_round_trip(tmp_path, encoder):
    net = network(encoder)
    net.normalizer.fit(torch.randn(50, 4), torch.randn(50, 5, 6), torch.ones(50, 5, dtype=torch.bool))
    folder = save_checkpoint(tmp_path / "deep" / "policy", net, CONFIG, "# Card\n")
    assert sorted(p.name for p in folder.iterdir()) == ["card.md", "config.json", "policy.onnx", "policy.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["policy"]
    loaded = load_checkpoint(folder, env_id=CONFIG["env_id"], feature_version=2, context_size=4, candidate_size=6)
    assert loaded.card == "# Card\n"
    assert loaded.config["spec"] == {"size": 3}
    obs = {key: torch.as_tensor(value) for key, value in random_observations(net, 20, 7).items()}
    for a, b in zip(loaded.network(**_named(obs)), net(**_named(obs)), strict=True):
        torch.testing.assert_close(a, b)
    shares = agreement(loaded.network, OnnxPolicy(loaded.onnx_path), 300, 11)
    assert shares.keys() == ({"onnx", "compiled"} if encoder == "deepsets" else {"onnx"})
    assert min(shares.values()) > 0.99


def _named(obs):
    return {"context": obs["context"], "candidates": obs["candidates"], "mask": obs["action_mask"]}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_small_at_hidden_64(tmp_path, encoder):
    folder = save_checkpoint(tmp_path / "policy", PointerNetwork(24, 24, encoder, 64), CONFIG)
    assert sum(p.stat().st_size for p in folder.iterdir()) < 2**20


def test_onnx_takes_one_table_of_any_size(tmp_path):
    folder = save_checkpoint(tmp_path / "policy", network(), CONFIG)
    model = OnnxPolicy(folder / "policy.onnx")
    assert model.metadata == {"env_id": "schedlab/Toy-v0", "feature_version": "2"}
    assert (model.context_size, model.candidate_size) == (4, 6)
    for num_candidates in (1, 5, 200):
        obs = random_observations(network(), 3, num_candidates)
        rows = model.choose(**obs)
        assert obs["action_mask"][np.arange(3), rows].all()
        assert model(*(obs[key][0] for key in ("context", "candidates", "action_mask"))) == rows[0]


def test_replacing_keeps_the_name(tmp_path):
    save_checkpoint(tmp_path / "policy", network(), CONFIG, "first", with_onnx=False)
    save_checkpoint(tmp_path / "policy", network(), CONFIG, "second", with_onnx=False)
    assert load_checkpoint(tmp_path / "policy").card == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_a_failed_save_leaves_the_old_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "policy", network(), CONFIG, "first", with_onnx=False)
    with pytest.raises(InputError, match="JSON-able"):
        save_checkpoint(tmp_path / "policy", network(), {**CONFIG, "spec": {"x": np.zeros(1)}})
    import schedlab.agents.checkpoint as module

    def full_disk(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path / "policy", network(), CONFIG, "second", with_onnx=False)
    assert load_checkpoint(tmp_path / "policy").card == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


@pytest.fixture
def folder(tmp_path):
    return save_checkpoint(tmp_path / "policy", network(), CONFIG, with_onnx=False)


def refused(folder, *parts, **expected):
    with pytest.raises(InputError) as caught:
        load_checkpoint(folder, **expected)
    message = str(caught.value)
    for part in parts:
        assert str(part) in message, message
    assert "\n" not in message
    assert caught.value.remedy


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_misfits_are_named(folder):
    refused(folder, folder / "config.json", "'schedlab/Toy-v0'", "'schedlab/Other-v0'", env_id="schedlab/Other-v0")
    refused(folder, "feature_version is 2, expected 3", "train again", feature_version=3)
    refused(folder, "context_size of the network is 4, the env has 9", context_size=9)
    refused(folder, "candidate_size of the network is 6, the env has 5", candidate_size=5)
    refused(folder / "nowhere", "no such checkpoint folder")


@pytest.mark.parametrize("name", ["config.json", "policy.safetensors"])
def test_missing_and_corrupt_files_are_named(folder, name):
    path = folder / name
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"\x80\x04garbage", b"[1, 2]"):
        path.write_bytes(broken)
        refused(folder, path)
    path.unlink()
    refused(folder, path, "no such file")


def test_wrong_shapes_and_values_are_named(folder, tmp_path):
    edit(folder, network={**network().config, "hidden": 32})
    refused(folder, folder / "policy.safetensors", "do not fit")
    edit(folder, network={**network().config, "hidden": "wide"})
    refused(folder, folder / "config.json", "does not describe")
    edit(folder, network=None)
    refused(folder, folder / "config.json", "does not describe")
    edit(folder, format=99)
    refused(folder, "format is 99, expected 1")
    net = network()
    with torch.no_grad():
        net.value.bias.fill_(float("nan"))
    refused(save_checkpoint(tmp_path / "nan", net, CONFIG, with_onnx=False), "value.bias", "not finite")


def test_config_must_name_the_env(tmp_path):
    with pytest.raises(InputError, match=r"lacks \['spec', 'feature_version'\]"):
        save_checkpoint(tmp_path / "policy", network(), {"env_id": "x"})


def test_onnx_errors_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        OnnxPolicy(tmp_path / "policy.onnx")
    (tmp_path / "policy.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match="not a policy"):
        OnnxPolicy(tmp_path / "policy.onnx")
