"""ClipTextEncoder against transformers' CLIPTextModel with the same random weights."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mmdit.clip import ClipConfig, ClipTextEncoder

VOCAB, END = 99, 98
SIZES = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=40)
PADS = {"clip_l": END, "clip_g": 0}

# In float64 both do the same arithmetic in another order: some hundred roundings of 1e-16.
TOLERANCE = 1e-13


def oracle(activation: str, projection_dim: int | None) -> torch.nn.Module:
    config = CLIPTextConfig(
        **SIZES,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=16,
        hidden_act=activation,
        projection_dim=projection_dim or 24,
        bos_token_id=VOCAB - 2,
        eos_token_id=END,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = (CLIPTextModelWithProjection if projection_dim else CLIPTextModel)(config).double().eval()
    for parameter in model.parameters():  # the default initialization is too small for the activation to bend
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def ours(model: torch.nn.Module, activation: str, projection_dim: int | None) -> ClipTextEncoder:
    encoder = ClipTextEncoder(
        ClipConfig(
            **SIZES,
            num_layers=3,
            num_heads=4,
            activation=activation,
            projection_dim=projection_dim,
            max_positions=16,
            end_token=END,
        )
    ).double()
    theirs = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    state = {
        "token_embedding.weight": theirs["embeddings.token_embedding.weight"],
        "position_embedding.weight": theirs["embeddings.position_embedding.weight"],
    }
    if projection_dim:
        state["projection.weight"] = theirs["text_projection.weight"]
    for kind in ("weight", "bias"):
        state[f"final_norm.{kind}"] = theirs[f"final_layer_norm.{kind}"]
        for i in range(3):
            old, new = f"encoder.layers.{i}", f"layers.{i}"
            qkv = [theirs[f"{old}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            state[f"{new}.attention.qkv.{kind}"] = torch.cat(qkv)
            state[f"{new}.attention.out.{kind}"] = theirs[f"{old}.self_attn.out_proj.{kind}"]
            state[f"{new}.norm_1.{kind}"] = theirs[f"{old}.layer_norm1.{kind}"]
            state[f"{new}.norm_2.{kind}"] = theirs[f"{old}.layer_norm2.{kind}"]
            state[f"{new}.mlp.in_layer.{kind}"] = theirs[f"{old}.mlp.fc1.{kind}"]
            state[f"{new}.mlp.out_layer.{kind}"] = theirs[f"{old}.mlp.fc2.{kind}"]
    encoder.load_state_dict(state)
    return encoder


def prompts(pad: int) -> torch.Tensor:
    """Four rows of 16: start, text of 0, 3, 9 and 14 tokens, end, padding."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.full((4, 16), pad)
    for row, length in zip(rows, (0, 3, 9, 14), strict=True):
        row[0], row[length + 1] = VOCAB - 2, END
        row[1 : length + 1] = torch.randint(1, VOCAB - 2, (length,), generator=generator)
    return rows


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("pad", PADS.values(), ids=PADS.keys())
@pytest.mark.parametrize("projection_dim", [None, 20])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_equals_transformers(activation, projection_dim, pad):
    model = oracle(activation, projection_dim)
    bare = oracle(activation, None)  # CLIPTextModel, whose pooled state FLUX was trained on: it has no projection
    names = {name: name.removeprefix("text_model.") for name in model.state_dict() if name != "text_projection.weight"}
    bare.load_state_dict({new: model.state_dict()[old] for old, new in names.items()})
    ids = prompts(pad)
    expected = model(ids, output_hidden_states=True)
    found = ours(model, activation, projection_dim)(ids)
    assert relative_error(found.last, expected.last_hidden_state) < TOLERANCE
    assert relative_error(found.penultimate, expected.hidden_states[-2]) < TOLERANCE
    pooled = expected.text_embeds if projection_dim else expected.pooler_output
    assert relative_error(found.pooled, pooled) < TOLERANCE
    assert relative_error(found.unprojected, bare(ids).pooler_output) < TOLERANCE


@torch.no_grad()
def test_nothing_after_the_first_end_token_reaches_the_pooled_state():
    encoder = ours(oracle("gelu", None), "gelu", None)
    ids = prompts(pad=END)[:3]  # the fourth row has no padding
    other = ids.clone()
    for row, length in zip(other, (0, 3, 9), strict=True):
        row[length + 2 :] = 5
    assert torch.equal(encoder(ids).pooled, encoder(other).pooled)
    assert not torch.equal(encoder(ids).last, encoder(other).last)


@torch.no_grad()
def test_bfloat16_stays_near_float64():
    encoder = ours(oracle("quick_gelu", 20), "quick_gelu", 20)
    ids = prompts(pad=END)
    expected = encoder(ids)
    found = encoder.bfloat16()(ids)
    assert found.pooled.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits (4e-3 a rounding); a few dozen in sequence, and weights of this size amplify them.
    assert relative_error(found.last.double(), expected.last) < 0.02


def small() -> ClipTextEncoder:
    return ClipTextEncoder(ClipConfig(**SIZES, num_layers=1, num_heads=4, max_positions=16, end_token=END))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((1, 17), END), "17 tokens a prompt but has 16 positions"),
        (torch.tensor([[1, VOCAB, END]]), r"\[0, 98\], found 99"),
        (torch.tensor([[-1, 1, END]]), r"\[0, 98\], found -1"),
        (torch.tensor([[1, END], [1, 2]]), r"row 1 hold no end token \(98\)"),
        (torch.tensor([1, END]), r"shape \(batch, tokens\), not \(2,\)"),
        (torch.zeros(0, 4, dtype=torch.int64), r"shape \(batch, tokens\), not \(0, 4\)"),
    ],
)
def test_bad_ids(ids, message):
    with pytest.raises(ValueError, match=message):
        small()(ids)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [(dict(activation="relu"), "'relu': use one of"), (dict(num_heads=5), "not a multiple of num_heads 5")],
)
def test_bad_config(sizes, message):
    with pytest.raises(ValueError, match=message):
        ClipConfig(**sizes)
