"""MMDiT as a function: what its velocity may and may not depend on, Kontext against diffusers, and bad input."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel, SD3Transformer2DModel

from mmdit import PRESETS, MMDiT, MMDiTConfig
from weights import load_transformer

ROPE = MMDiTConfig(hidden_size=64, num_heads=2, num_dual_blocks=2, num_single_blocks=2, latent_channels=4,
                   context_dim=24, pooled_dim=20, rope_axes=(8, 12, 12))
TABLE = MMDiTConfig(hidden_size=64, num_heads=2, num_dual_blocks=3, latent_channels=4, context_dim=24, pooled_dim=20,
                    position="table", position_table_size=32, dual_attention_blocks=(0, 1))
GUIDED = replace(ROPE, guidance_embedding=True)
TOLERANCE = 1e-12  # float64 throughout (unit round-off 1e-16), and some hundred roundings make 1e-14 of that
both_families = pytest.mark.parametrize("config", [ROPE, TABLE], ids=["rope", "table"])


def difference(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def randomize(model, seed=0):
    """Small random weights, with gates of about a fifth, so that every block matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def model_of(config):
    torch.manual_seed(0)
    return randomize(MMDiT(config)).double()


def inputs_for(config, batch=3, height=6, width=8, dtype=torch.float64):
    inputs = {
        "latent": draw(batch, config.latent_channels, height, width, seed=1, dtype=dtype),
        "sigma": torch.linspace(0.2, 0.9, batch, dtype=dtype),
        "context": draw(batch, 5, config.context_dim, seed=2, dtype=dtype),
        "pooled": draw(batch, config.pooled_dim, seed=3, dtype=dtype),
    }
    return inputs | ({"guidance": torch.linspace(1, 4, batch, dtype=dtype)} if config.guidance_embedding else {})


# ---- invariants


def check_that_inputs_matter(model, inputs):
    velocity = model(**inputs)
    for name in inputs:
        changed = model(**inputs | {name: inputs[name].flip(0)})
        assert all(difference(changed[i], velocity[i]) > 1e-3 for i in (0, 2)), name


@both_families
def test_samples_do_not_depend_on_each_other(config):
    model, inputs = model_of(config), inputs_for(config)
    together = model(**inputs)
    for i in range(3):
        alone = model(**{name: value[i : i + 1] for name, value in inputs.items()})
        assert difference(together[i : i + 1], alone) < TOLERANCE


@both_families
def test_a_batch_in_another_order_gives_its_velocities_in_that_order(config):
    model, inputs, order = model_of(config), inputs_for(config), torch.tensor([2, 0, 1])
    permuted = model(**{name: value[order] for name, value in inputs.items()})
    assert difference(permuted, model(**inputs)[order]) < TOLERANCE


@both_families
def test_text_has_no_position(config):
    model, inputs = model_of(config), inputs_for(config)
    velocity = model(**inputs)
    shuffled = model(**inputs | {"context": inputs["context"][:, [3, 0, 4, 2, 1]]})
    assert difference(shuffled, velocity) < TOLERANCE


@both_families
def test_patches_have_a_position(config):
    model, inputs = model_of(config), inputs_for(config)
    velocity = model(**inputs)
    for side in (2, 3):  # two whole patches to the right or down: not the same picture moved
        moved = model(**inputs | {"latent": inputs["latent"].roll(4, side)})
        assert difference(moved, velocity.roll(4, side)) > 1e-3


@pytest.mark.parametrize("config", [ROPE, TABLE, GUIDED], ids=["rope", "table", "guided"])
def test_every_input_matters(config):
    check_that_inputs_matter(model_of(config), inputs_for(config))


@both_families
def test_bfloat16_stays_close_to_float64(config):
    model, inputs = model_of(config), inputs_for(config, height=64, width=4)
    rounded = copy.deepcopy(model).bfloat16()(**inputs)
    assert rounded.dtype == torch.bfloat16
    # Unit round-off 2^-8, so 0.2 % a rounding in the mean; the weights and about ten results a block, with four blocks,
    # add up as the root of 50 or so: 1.6 %. Noise levels in bfloat16, up to 900 thousandths, cost 15 % and more.
    assert difference(rounded.double(), model(**inputs)) < 0.03


# ---- Kontext and guidance, against diffusers


def diffusers_model(config):
    torch.manual_seed(1)
    return randomize(FluxTransformer2DModel(
        in_channels=config.patch_dim, num_layers=config.num_dual_blocks, num_single_layers=config.num_single_blocks,
        attention_head_dim=config.head_dim, num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_dim, pooled_projection_dim=config.pooled_dim,
        guidance_embeds=config.guidance_embedding, axes_dims_rope=config.rope_axes,
    ))


def diffusers_velocity(model, latent, sigma, context, pooled, guidance=None, reference=None):
    """Packed and numbered by the functions of diffusers' Kontext pipeline."""
    tokens, ids = [], []
    for index, picture in enumerate([latent] if reference is None else [latent, reference]):
        b, c, height, width = picture.shape
        tokens.append(FluxKontextPipeline._pack_latents(picture, b, c, height, width))
        ids.append(FluxKontextPipeline._prepare_latent_image_ids(b, height // 2, width // 2, "cpu", torch.float32))
        ids[-1][:, 0] = index
    height, width = latent.shape[2:]
    out = model(torch.cat(tokens, 1), context, pooled, sigma, torch.cat(ids), torch.zeros(context.shape[1], 3),
                guidance, return_dict=False)[0]
    return FluxKontextPipeline._unpack_latents(out[:, : tokens[0].shape[1]], height, width, 1)


@pytest.mark.parametrize("config", [ROPE, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("size", [None, (6, 8), (10, 4)], ids=["no reference", "same size", "another size"])
def test_kontext_agrees_with_diffusers(tmp_path, config, size):
    theirs = diffusers_model(config)
    theirs.save_pretrained(tmp_path)
    ours = load_transformer(tmp_path)
    inputs = inputs_for(config, dtype=torch.float32)
    if size:
        inputs["reference"] = draw(3, 4, *size, seed=4, dtype=torch.float32)
    velocity = ours(**inputs)
    # float32 on both sides (6e-8), sums of some hundred terms in other orders: 1e-6 to 1e-5.
    assert difference(velocity, diffusers_velocity(theirs, **inputs)) < 1e-4


def test_a_reference_is_read_and_not_painted():
    model, inputs = model_of(ROPE), inputs_for(ROPE)
    without = model(**inputs)
    seen = [model(**inputs, reference=draw(3, 4, *size, seed=4)) for size in ((6, 8), (10, 4), (2, 2))]
    for velocity in seen:
        assert velocity.shape == inputs["latent"].shape
        assert difference(velocity, without) > 1e-3
    assert difference(seen[0], seen[1]) > 1e-3
    # The reference stands at 1 on the first axis: as a second picture it is not the first one seen twice.
    assert difference(model(**inputs, reference=inputs["latent"]), without) > 1e-3


# ---- skipped layers


@pytest.mark.parametrize(("config", "skipped"), [(ROPE, (0,)), (TABLE, (1,)), (TABLE, (2,))])
def test_a_model_that_skips_a_block_is_the_model_without_it(config, skipped):
    model, inputs = model_of(config), inputs_for(config)
    without = copy.deepcopy(model)
    del without.dual_blocks[skipped[0]]
    found = model(**inputs, skip_layers=skipped)
    assert torch.equal(found, without(**inputs))
    assert difference(found, model(**inputs)) > 1e-3


def test_skipped_layers_agree_with_diffusers(tmp_path):
    torch.manual_seed(1)
    theirs = randomize(SD3Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=4, attention_head_dim=32, num_attention_heads=2, sample_size=16,
        joint_attention_dim=24, caption_projection_dim=64, pooled_projection_dim=20, pos_embed_max_size=32,
        qk_norm="rms_norm", dual_attention_layers=(0, 1),
    ))  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours, inputs = load_transformer(tmp_path), inputs_for(TABLE, dtype=torch.float32)
    for skipped in ((1, 2), (0, 3)):
        wanted = theirs(inputs["latent"], inputs["context"], inputs["pooled"], 1000 * inputs["sigma"],
                        skip_layers=list(skipped), return_dict=False)[0]
        assert difference(ours(**inputs, skip_layers=skipped), wanted) < 1e-4  # float32, as above


# ---- sizes of the public checkpoints


BILLIONS = {  # parameters as published; the position tables are no parameters
    "flux1-dev": 11.90, "flux1-schnell": 11.89, "flux1-dev-de-distill": 11.89, "flux1-kontext-dev": 11.90,
    "flux2-dev": 32.22, "flux2-klein-base-9b": 9.08, "flux2-klein-9b": 9.08, "flux2-klein-9b-kv": 9.08,
    "flux2-klein-base-4b": 3.88, "flux2-klein-4b": 3.88,
    "sd3-medium": 2.03, "sd3.5-medium": 2.24, "sd3.5-large": 8.06, "sd3.5-large-turbo": 8.06,
}


def test_presets_have_the_published_number_of_parameters():
    assert BILLIONS.keys() == PRESETS.keys()
    for name, billions in BILLIONS.items():
        with torch.device("meta"):
            model = MMDiT(PRESETS[name])
        assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == billions, name


# ---- bad input


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
    ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
    ({"num_dual_blocks": 0}, "num_dual_blocks must be at least 1, got 0"),
    ({"latent_channels": -4}, "latent_channels must be at least 1, got -4"),
    ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
    ({"num_single_blocks": -1}, "num_single_blocks must not be negative, got -1"),
    ({"num_heads": 3}, "hidden_size 64 is no multiple of 3 heads"),
    ({"position": "learned"}, "position must be .* got 'learned'"),
    ({"rope_axes": (8, 12, 10)}, r"rope_axes .* head width 32, got \(8, 12, 10\)"),
    ({"rope_axes": (16, 16)}, r"rope_axes .* three .* got \(16, 16\)"),
    ({"rope_axes": (9, 11, 12)}, r"rope_axes .* even .* got \(9, 11, 12\)"),
    ({"dual_attention_blocks": (0, 2)}, r"dual_attention_blocks \(0, 2\) must lie in 0 … 1"),
    ({"dual_attention_blocks": (-1,)}, r"dual_attention_blocks \(-1,\) must lie in 0 … 1"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(ROPE, **change)


@pytest.mark.parametrize(("change", "message"), [
    ({"latent": (2, 4, 6)}, r"latent must be \(B, 4, H, W\), got \(2, 4, 6\)"),
    ({"latent": (2, 16, 6, 8)}, r"latent must be \(B, 4, H, W\), got \(2, 16, 6, 8\)"),
    ({"reference": (2, 3, 6, 8)}, r"reference must be \(B, 4, H, W\), got \(2, 3, 6, 8\)"),
    ({"reference": (4, 6, 8)}, r"reference must be \(B, 4, H, W\), got \(4, 6, 8\)"),
    ({"latent": (2, 4, 5, 8)}, r"latent sides \(5, 8\) must be multiples of the patch size 2"),
    ({"reference": (2, 4, 6, 7)}, r"reference sides \(6, 7\) must be multiples of the patch size 2"),
    ({"guidance": None}, r"distilled with guidance: pass guidance \(B,\)"),
    ({"groups": 0}, "batch of 2 cannot be 0 groups"),
    ({"groups": 3}, "batch of 2 cannot be 3 groups"),
])  # fmt: skip
def test_input_that_does_not_fit_is_named(change, message):
    inputs = inputs_for(GUIDED, batch=2)
    inputs |= {name: torch.ones(value) if isinstance(value, tuple) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        model_of(GUIDED)(**inputs)


REFUSED_BY_TORCH = [  # for a batch of 2
    ("latent", (3, 4, 6, 8)), ("latent", (0, 4, 6, 8)), ("latent", (2, 4, 0, 8)),
    ("sigma", ()), ("sigma", (3,)), ("sigma", (2, 1)), ("sigma", (1, 1)),
    ("context", (3, 5, 24)), ("context", (2, 5, 20)), ("context", (2, 1, 5, 24)), ("context", (1, 2, 5, 24)),
    ("pooled", (3, 20)), ("pooled", (2, 24)), ("pooled", (2, 1, 20)),
    ("guidance", ()), ("guidance", (3,)), ("guidance", (2, 1)),
    ("reference", (1, 4, 6, 8)), ("reference", (3, 4, 6, 8)),
]  # fmt: skip


@pytest.mark.parametrize(("config", "name", "shape"), [
    pytest.param(config, name, shape, id=f"{family}-{name}-{'x'.join(map(str, shape))}")
    for family, config, inputs in (("guided", GUIDED, ("guidance", "reference")), ("table", TABLE, ()))
    for name, shape in REFUSED_BY_TORCH if name in ("latent", "sigma", "context", "pooled", *inputs)
])
def test_shapes_that_torch_refuses_never_pass(config, name, shape):
    with pytest.raises((RuntimeError, ValueError, IndexError, ZeroDivisionError)):
        model_of(config)(**inputs_for(config, batch=2) | {name: torch.ones(shape, dtype=torch.float64)})


@pytest.mark.parametrize("config", [GUIDED, TABLE], ids=["guided", "table"])
def test_an_input_of_batch_one_is_every_sample_s(config):
    model, inputs = model_of(config), inputs_for(config, batch=2)
    for name in inputs:
        one = inputs[name][:1]
        expanded = model(**inputs | {name: one.expand(2, *one.shape[1:])})
        assert difference(model(**inputs | {name: one}), expanded) < TOLERANCE, name
    pooled = inputs["pooled"][0]
    expanded = model(**inputs | {"pooled": pooled.expand(2, -1)})
    assert difference(model(**inputs | {"pooled": pooled}), expanded) < TOLERANCE


def test_each_family_refuses_what_only_the_other_understands():
    inputs = inputs_for(ROPE)
    with pytest.raises(ValueError, match="no guidance embedding: leave guidance out"):
        model_of(ROPE)(**inputs, guidance=torch.ones(3))
    with pytest.raises(ValueError, match="rotary positions .*this model has a table"):
        model_of(TABLE)(**inputs, reference=inputs["latent"])
    with pytest.raises(ValueError, match=r"skip_layers \(1, 2\) must lie in 0 … 1"):  # the dual-stream blocks alone
        model_of(ROPE)(**inputs, skip_layers=(1, 2))
    with pytest.raises(ValueError, match="position table ends at 32 × 32"):
        model_of(TABLE)(**inputs_for(TABLE, height=66))
