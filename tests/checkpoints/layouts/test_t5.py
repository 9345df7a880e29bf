"""T5's encoder against transformers' T5EncoderModel: outputs, files both ways, settings that do not fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.nets.t5 import T5Config, T5Encoder

transformers = pytest.importorskip("transformers")

TINY = {"vocab_size": 40, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
SHAPES = {
    "v1.1": {"feed_forward_proj": "gated-gelu"},
    "first": {"feed_forward_proj": "relu"},
    "wide heads": {"feed_forward_proj": "gated-gelu", "d_kv": 16, "num_heads": 2, "num_layers": 3},
    "few buckets": {
        "feed_forward_proj": "relu",
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
        "layer_norm_epsilon": 1e-3,
    },
    "exact gelu": {"feed_forward_proj": "gelu"},
    "silu": {"feed_forward_proj": "gated-silu"},
}


def theirs(**options):
    model = transformers.T5EncoderModel(transformers.T5Config(**{**TINY, **options})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=0.02, std=0.2)
    return model


def asked(length: int):
    ids = torch.randint(0, 40, (3, length))
    mask = torch.arange(length)[None] < torch.tensor([length, length // 2, 1])[:, None]
    return ids, mask


@pytest.mark.parametrize("name", SHAPES)
def test_outputs_are_those_of_transformers(name, tmp_path):
    model = theirs(**SHAPES[name])
    model.save_pretrained(tmp_path / "t5")
    net = sfumato.load_nets(tmp_path / "t5")["text_encoder"]
    for length in (5, 40):  # beyond the distances that have a bucket of their own
        ids, mask = asked(length)
        with torch.no_grad():
            wanted = model(ids, attention_mask=mask.long()).last_hidden_state
            tokens, pooled = net(ids, mask)
        assert wanted.abs().mean() > 0.1
        torch.testing.assert_close(tokens, wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(pooled[1], tokens[1, : length // 2].mean(0))
        with torch.no_grad():
            all_real = model(ids).last_hidden_state
            torch.testing.assert_close(net(ids)[0], all_real, rtol=0, atol=1e-5)
    sfumato.save_nets({"text_encoder": net}, tmp_path / "again", layout="t5")
    again = transformers.T5EncoderModel.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).last_hidden_state, all_real, rtol=0, atol=1e-6)


def test_shards_and_the_rest_of_a_whole_t5(tmp_path):
    whole = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**TINY, num_decoder_layers=1, feed_forward_proj="gated-gelu")
    ).eval()
    whole.save_pretrained(tmp_path / "t5", max_shard_size="8KB")
    assert (tmp_path / "t5" / "model.safetensors.index.json").is_file()
    net = sfumato.load_nets(tmp_path / "t5", layout="t5")["text_encoder"]
    ids, mask = asked(6)
    with torch.no_grad():
        wanted = whole.encoder(ids, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(net(ids, mask)[0], wanted, rtol=0, atol=1e-5)


def test_the_embedding_may_have_its_second_name(tmp_path):
    model = theirs(feed_forward_proj="relu")
    model.save_pretrained(tmp_path / "t5")
    file = tmp_path / "t5" / "model.safetensors"
    state = load_file(file)
    state["encoder.embed_tokens.weight"] = state.pop("shared.weight")
    save_file(state, file)
    net = sfumato.load_nets(tmp_path / "t5")["text_encoder"]
    assert torch.equal(net.tokens.weight, model.shared.weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj relu, the tensors are gated: True"),
        ({"feed_forward_proj": "gated-tanh"}, "unknown feed_forward_proj 'gated-tanh'"),
        ({"num_heads": 5}, "the config says num_heads 5, the tensors say 3"),
    ],
    ids=["not gated", "unknown", "heads"],
)
def test_settings_that_do_not_fit(change, said, tmp_path):
    theirs(feed_forward_proj="gated-gelu").save_pretrained(tmp_path / "t5")
    file = tmp_path / "t5" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=said):
        sfumato.load_nets(tmp_path / "t5")


def test_half_precision_does_not_overflow():
    """The residual sum exceeds 65504; it is clamped, so that the norms after it are finite."""
    net = T5Encoder(T5Config(vocab_size=8, width=8, depth=2, heads=1, head_dim=8, hidden=16)).half()
    torch.nn.init.constant_(net.tokens.weight, 6e4)
    torch.nn.init.constant_(net.blocks[0].down.weight, 3e4)
    torch.nn.init.constant_(net.blocks[0].up.weight, 1.0)
    torch.nn.init.constant_(net.blocks[0].gate.weight, 1.0)
    with torch.no_grad():
        assert net(torch.zeros(1, 3, dtype=torch.long))[0].isfinite().all()


def test_published_size():
    with torch.device("meta"):
        net = T5Encoder(T5Config())
    assert sum(p.numel() for p in net.parameters()) == 4_762_310_656
