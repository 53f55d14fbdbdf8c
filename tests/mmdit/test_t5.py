"""T5Encoder against transformers' T5EncoderModel with the same random weights."""

import pytest
import torch
from transformers import T5Config as OracleConfig
from transformers import T5EncoderModel

from mmdit.t5 import T5Config, T5Encoder, relative_bucket

# Heads times head width (4 · 8) differ from the hidden size on purpose, as T5 allows.
CONFIG = T5Config(vocab_size=60, hidden_size=24, head_dim=8, intermediate_size=40, num_layers=3, num_heads=4)


def oracle() -> T5EncoderModel:
    config = OracleConfig(
        vocab_size=CONFIG.vocab_size,
        d_model=CONFIG.hidden_size,
        d_kv=CONFIG.head_dim,
        d_ff=CONFIG.intermediate_size,
        num_layers=CONFIG.num_layers,
        num_heads=CONFIG.num_heads,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
        dropout_rate=0.0,
    )
    torch.manual_seed(0)
    model = T5EncoderModel(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def ours(model: T5EncoderModel) -> T5Encoder:
    theirs = model.state_dict()
    first = "encoder.block.0.layer.0.SelfAttention"
    state = {
        "token_embedding.weight": theirs["shared.weight"],
        "relative_bias.weight": theirs[f"{first}.relative_attention_bias.weight"],
        "final_norm.weight": theirs["encoder.final_layer_norm.weight"],
    }
    for i in range(CONFIG.num_layers):
        attention, mlp = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        qkv = [theirs[f"{attention}.SelfAttention.{part}.weight"] for part in "qkv"]
        state[f"layers.{i}.norm_1.weight"] = theirs[f"{attention}.layer_norm.weight"]
        state[f"layers.{i}.attention.qkv.weight"] = torch.cat(qkv)
        state[f"layers.{i}.attention.out.weight"] = theirs[f"{attention}.SelfAttention.o.weight"]
        state[f"layers.{i}.norm_2.weight"] = theirs[f"{mlp}.layer_norm.weight"]
        for new, old in {"gate": "wi_0", "value": "wi_1", "out": "wo"}.items():
            state[f"layers.{i}.mlp.{new}.weight"] = theirs[f"{mlp}.DenseReluDense.{old}.weight"]
    encoder = T5Encoder(CONFIG).double()
    encoder.load_state_dict(state)
    return encoder


def prompts(length: int) -> torch.Tensor:
    ids = torch.randint(2, CONFIG.vocab_size, (2, length), generator=torch.Generator().manual_seed(length))
    ids[1, length // 2 :] = 0  # padding, which is attended to like any token
    return ids


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 9, 77, 300])
def test_equals_transformers(length):
    model = oracle()
    ids = prompts(length)
    # transformers takes the norm's mean in float32 even in a float64 model: some 1e-7 a layer, amplified by the next.
    assert relative_error(ours(model)(ids), model(ids).last_hidden_state) < 1e-6


def test_bucket_edges_are_powers_of_root_two():
    """With the public sizes the logarithmic edges lie at 8 · 2^(i/2): bucket 8 + i starts where r² = 64 · 2^i."""
    for distance in range(-400, 401):
        r = abs(distance)
        expected = r if r < 8 else max(8 + i for i in range(8) if r * r >= 64 * 2**i)
        found = relative_bucket(torch.tensor(distance), buckets=32, max_distance=128)
        assert found == expected + 16 * (distance > 0), distance


@torch.no_grad()
def test_bfloat16_stays_near_float64():
    encoder = ours(oracle())
    ids = prompts(40)
    expected = encoder(ids)
    found = encoder.bfloat16()(ids)
    assert found.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits (4e-3 a rounding); a few dozen in sequence, and unscaled attention amplifies them.
    assert relative_error(found.double(), expected) < 0.05


def test_float16_is_refused():
    with pytest.raises(ValueError, match="float16, in which it overflows: use bfloat16 or float32"):
        T5Encoder(CONFIG).half()(prompts(4))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[1, 60]]), r"\[0, 59\], found 60"),
        (torch.tensor([[-3, 1]]), r"\[0, 59\], found -3"),
        (torch.tensor([1, 2]), r"shape \(batch, tokens\), not \(2,\)"),
    ],
)
def test_bad_ids(ids, message):
    with pytest.raises(ValueError, match=message):
        T5Encoder(CONFIG)(ids)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [(dict(relative_buckets=30), "multiple of 4"), (dict(relative_max_distance=8), "must exceed the 8 exact")],
)
def test_bad_config(sizes, message):
    with pytest.raises(ValueError, match=message):
        T5Config(**sizes)
