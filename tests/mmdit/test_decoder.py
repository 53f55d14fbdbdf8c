"""TextDecoder against transformers' Qwen3Model and MistralModel with the same random weights.

(`tests/weights/test_flux2_encoders.py` compares it with the recorded outputs of the published code.)
"""

from dataclasses import replace

import pytest
import torch
import transformers

from mmdit.decoder import DecoderConfig, TextDecoder, rotate_halves, rotations, visibility

# Heads times head width (4 · 6) differ from the hidden size on purpose, as in both public models.
QWEN = DecoderConfig(vocab_size=60, hidden_size=20, intermediate_size=28, num_heads=4, num_kv_heads=2, head_dim=6,
                     layers=(1, 3))
MISTRAL = replace(QWEN, num_kv_heads=1, layers=(2, 3), qk_norm=False, norm_eps=1e-5, rope_theta=1e9)
CONFIGS = pytest.mark.parametrize("config", [QWEN, MISTRAL], ids=["qwen3", "mistral"])

# transformers takes the norms' means in float32 even in a float64 model: some 1e-7 a layer, amplified by the next.
TOLERANCE = 1e-6


def oracle(config: DecoderConfig) -> torch.nn.Module:
    """One layer more than the context needs, since the last of transformers' states is after the final norm."""
    cls, of = ((transformers.Qwen3Model, transformers.Qwen3Config) if config.qk_norm
               else (transformers.MistralModel, transformers.MistralConfig))
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    theirs = of(vocab_size=config.vocab_size, hidden_size=config.hidden_size, head_dim=config.head_dim,
                intermediate_size=config.intermediate_size, num_hidden_layers=config.num_layers + 1,
                num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
                rms_norm_eps=config.norm_eps, sliding_window=None, attn_implementation="sdpa", pad_token_id=0,
                bos_token_id=1, eos_token_id=2, rope_parameters=rope)
    torch.manual_seed(0)
    model = cls(theirs).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.5 * (parameter.ndim == 1), std=0.3)
    return model


def ours(model: torch.nn.Module, config: DecoderConfig) -> TextDecoder:
    renamed = {"embed_tokens": "token_embedding", "self_attn": "attention", "q_proj": "q", "k_proj": "k", "v_proj": "v",
               "o_proj": "out", "q_norm": "norm_q", "k_norm": "norm_k", "input_layernorm": "norm_1",
               "post_attention_layernorm": "norm_2", "gate_proj": "gate", "up_proj": "value", "down_proj": "out"}
    state = {".".join(renamed.get(word, word) for word in name.split(".")): tensor
             for name, tensor in model.state_dict().items()
             if name != "norm.weight" and not name.startswith(f"layers.{config.num_layers}.")}
    decoder = TextDecoder(config).double()
    decoder.load_state_dict(state)
    return decoder


def ids(length: int) -> torch.Tensor:
    return torch.randint(60, (3, length), generator=torch.Generator().manual_seed(length))


def padding(length: int, side: str) -> torch.Tensor:
    """The mask of three prompts: a whole one, half a one, a single token."""
    lengths = torch.tensor([length, (length + 1) // 2, 1])
    mask = torch.arange(length) < lengths[:, None]
    return mask.flip(1) if side == "left" else mask


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def expected(config: DecoderConfig, length: int, mask: torch.Tensor | None) -> torch.Tensor:
    out = oracle(config)(ids(length), attention_mask=None if mask is None else mask.long(), output_hidden_states=True)
    return torch.cat([out.hidden_states[number] for number in config.layers], dim=-1)


@torch.no_grad()
@CONFIGS
@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("length", [1, 9, 300])
def test_equals_transformers(config, length, side):
    mask = padding(length, side) if side else None
    found = ours(oracle(config), config)(ids(length), mask)
    assert found.shape == (3, length, 2 * config.hidden_size)
    assert relative_error(found, expected(config, length, mask)) < TOLERANCE  # padding's own states too


@torch.no_grad()
@CONFIGS
def test_what_padding_reads(config):
    """Behind a prompt all of it, before a prompt nothing; and no token reads padding."""
    decoder, tokens = ours(oracle(config), config), ids(8)[:1]
    behind = torch.arange(8)[None] < 5
    changed, padded = tokens.clone(), tokens.clone()
    changed[0, 1], padded[0, 6] = (changed[0, 1] + 1) % 60, (padded[0, 6] + 1) % 60
    states, other, same = (decoder(x, behind) for x in (tokens, changed, padded))
    assert (states - other)[0, 5:].abs().amin(dim=0).max() > 1e-3  # their states carry the prompt
    assert torch.equal(states[:, [*range(6), 7]], same[:, [*range(6), 7]])
    assert relative_error(states[:, :5], decoder(tokens[:, :5])) < 1e-12  # float64, sums in another order
    before, changed = behind.flip(1), tokens.clone()
    changed[0, 3:] = (changed[0, 3:] + 1) % 60
    assert torch.equal(decoder(tokens, before)[:, :3], decoder(changed, before)[:, :3])


def test_the_rotation_keeps_lengths_and_turns_by_the_position():
    x = torch.randn(1, 1, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotation = rotations(5, 6, theta=100.0, like=x)
    turned = rotate_halves(x, rotation)
    pairs, angles = torch.complex(x[..., :3], x[..., 3:]), torch.arange(5)[:, None] * 100.0 ** -(torch.arange(3) / 3)
    wanted = pairs * torch.polar(torch.ones_like(angles), angles)
    # The angles are float32: up to 4 radians, half a unit in the last place is 2e-7.
    assert relative_error(turned, torch.cat([wanted.real, wanted.imag], dim=-1)) < 1e-6


def test_visibility_is_causal_and_hides_padding():
    assert visibility(torch.tensor([[0, 1, 1]])).int().tolist() == [[[[0, 0, 0], [0, 1, 0], [0, 1, 1]]]]


@torch.no_grad()
@CONFIGS
def test_bfloat16_stays_near_float64(config):
    decoder, mask = ours(oracle(config), config), padding(40, "left")
    exact = decoder(ids(40), mask)
    found = decoder.bfloat16()(ids(40), mask)
    assert found.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits (4e-3 a rounding); a few dozen in sequence.
    assert relative_error(found.double(), exact) < 0.05


def test_nothing_is_built_behind_the_last_layer_that_is_read():
    names = [name for name, _ in TextDecoder(QWEN).named_parameters()]
    assert {name.split(".")[1] for name in names if name.startswith("layers")} == {"0", "1", "2"}
    assert {name.split(".")[0] for name in names} == {"token_embedding", "layers"}


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (torch.tensor([[1, 60]]), None, r"\[0, 59\], found 60"),
        (torch.tensor([[-3, 1]]), None, r"\[0, 59\], found -3"),
        (torch.tensor([1, 2]), None, r"shape \(batch, tokens\), not \(2,\)"),
        (torch.tensor([[1, 2]]), torch.ones(2), r"\(batch, tokens\), not \(1, 2\) and \(2,\)"),
    ],
)
def test_bad_ids(tokens, mask, message):
    with pytest.raises(ValueError, match=message):
        TextDecoder(QWEN)(tokens, mask)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(layers=()), "ascending numbers, counted from 1"), (dict(layers=(0, 3)), "ascending numbers"),
        (dict(layers=(3, 2)), "ascending numbers"), (dict(num_heads=5), "5 is not a multiple of num_kv_heads 2"),
        (dict(num_kv_heads=0), "4 is not a multiple of num_kv_heads 0"), (dict(head_dim=7), "head_dim 7 is odd"),
    ],
)
def test_bad_config(sizes, message):
    with pytest.raises(ValueError, match=message):
        replace(QWEN, **sizes)
