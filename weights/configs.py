"""The hub's config.json <-> our configs."""

from collections.abc import Callable, Mapping
from typing import Any

from mmdit import AutoencoderConfig, ClipConfig, MMDiTConfig, T5Config

from .names import CheckpointError, Sizes

Config = MMDiTConfig | AutoencoderConfig | ClipConfig | T5Config
Json = Mapping[str, Any]


def sizes_of(config: Config) -> Sizes:
    """The sizes of a module that its name table depends on."""
    match config:
        case MMDiTConfig():
            return Sizes(config.hidden_size, config.num_dual_blocks - 1, config.patch_size)
        case AutoencoderConfig():
            return Sizes(config.channels[-1], len(config.channels) - 1)
        case ClipConfig():
            return Sizes(config.hidden_size)
        case T5Config():
            return Sizes(config.num_heads * config.head_dim)


# config.json -> ours. Each raises CheckpointError for unsupported settings; the caller adds the file's name.


def transformer_from_hub(hub: Json) -> MMDiTConfig:
    """Follows diffusers' FluxTransformer2DModel (`in_channels` is a whole patch's) and SD3Transformer2DModel."""
    heads = _get(hub, "num_attention_heads")
    common = {
        "hidden_size": heads * _get(hub, "attention_head_dim"),
        "num_heads": heads,
        "num_dual_blocks": _get(hub, "num_layers"),
        "context_dim": _get(hub, "joint_attention_dim"),
        "pooled_dim": _get(hub, "pooled_projection_dim"),
    }
    channels = _get(hub, "in_channels")
    match _class_of(hub):
        case "FluxTransformer2DModel":
            _expect(hub, patch_size=1, in_channels=4 * (channels // 4), out_channels=(None, channels))
            return MMDiTConfig(
                **common, num_single_blocks=_get(hub, "num_single_layers"), latent_channels=channels // 4,
                guidance_embedding=_get(hub, "guidance_embeds", FLAG, False),
                rope_axes=tuple(_get(hub, "axes_dims_rope", SIZES, (16, 56, 56))),
            )
        case "SD3Transformer2DModel":
            _expect(hub, out_channels=(None, channels), caption_projection_dim=common["hidden_size"],
                    qk_norm=(None, "rms_norm"))
            return MMDiTConfig(
                **common, position="table", position_table_size=_get(hub, "pos_embed_max_size"),
                latent_channels=channels, patch_size=_get(hub, "patch_size"), qk_norm=hub.get("qk_norm") is not None,
                dual_attention_blocks=tuple(_get(hub, "dual_attention_layers", SIZES, ())),
            )
    raise _unknown_class(hub, "FluxTransformer2DModel or SD3Transformer2DModel")


def autoencoder_from_hub(hub: Json) -> AutoencoderConfig:
    """Follows diffusers' AutoencoderKL."""
    if _class_of(hub) != "AutoencoderKL":
        raise _unknown_class(hub, "AutoencoderKL")
    _expect({"use_quant_conv": True, "use_post_quant_conv": True, "norm_num_groups": 32, **hub}, in_channels=3,
            out_channels=3, act_fn=(None, "silu"), use_quant_conv=False, use_post_quant_conv=False,
            mid_block_add_attention=(None, True))
    return AutoencoderConfig(
        channels=tuple(_get(hub, "block_out_channels", SIZES)), latent_channels=_get(hub, "latent_channels"),
        blocks_per_level=_get(hub, "layers_per_block"), norm_groups=_get(hub, "norm_num_groups", SIZE, 32),
        scaling=_get(hub, "scaling_factor", SCALE), shift=_get(hub, "shift_factor", SHIFT, None) or 0.0,
    )


def clip_from_hub(hub: Json) -> ClipConfig:
    """Follows transformers' CLIPTextModel and CLIPTextModelWithProjection.

    `eos_token_id` 2, a known error in most public files, means the highest id.
    """
    if _class_of(hub) not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise _unknown_class(hub, "CLIPTextModel or CLIPTextModelWithProjection")
    _expect(hub, layer_norm_eps=(None, 1e-5))
    vocab_size, end = _get(hub, "vocab_size"), _get(hub, "eos_token_id", SIZE, 2)
    if end >= vocab_size and end != 2:
        raise CheckpointError(f"config.json has eos_token_id {end}, expected one below vocab_size {vocab_size}: "
                              "download it again")
    return ClipConfig(
        vocab_size=vocab_size, hidden_size=_get(hub, "hidden_size"), intermediate_size=_get(hub, "intermediate_size"),
        num_layers=_get(hub, "num_hidden_layers"), num_heads=_get(hub, "num_attention_heads"),
        activation=_get(hub, "hidden_act", TEXT), max_positions=_get(hub, "max_position_embeddings", SIZE, 77),
        projection_dim=_get(hub, "projection_dim") if _class_of(hub) == "CLIPTextModelWithProjection" else None,
        end_token=vocab_size - 1 if end == 2 else end,
    )


def t5_from_hub(hub: Json) -> T5Config:
    """Follows transformers' T5EncoderModel, in version 1.1 (gated MLP)."""
    if _class_of(hub) not in ("T5EncoderModel", "T5ForConditionalGeneration"):
        raise _unknown_class(hub, "T5EncoderModel")
    _expect(hub, feed_forward_proj="gated-gelu", layer_norm_epsilon=(None, 1e-6))
    return T5Config(
        vocab_size=_get(hub, "vocab_size"), hidden_size=_get(hub, "d_model"), head_dim=_get(hub, "d_kv"),
        intermediate_size=_get(hub, "d_ff"), num_layers=_get(hub, "num_layers"), num_heads=_get(hub, "num_heads"),
        relative_buckets=_get(hub, "relative_attention_num_buckets", SIZE, 32),
        relative_max_distance=_get(hub, "relative_attention_max_distance", SIZE, 128),
    )


# Kinds of entries: a description for error messages, and a predicate.
SIZE = ("a whole number from 1 to 2³¹", lambda value: type(value) is int and 1 <= value < 2**31)
SIZES = ("a list of whole numbers",
         lambda value: isinstance(value, list) and all(type(n) is int and 0 <= n < 2**31 for n in value))
SCALE = ("a positive number", lambda value: type(value) in (int, float) and 1e-9 < value < 1e9)
SHIFT = ("a number", lambda value: value is None or type(value) in (int, float) and -1e9 < value < 1e9)
FLAG = ("true or false", lambda value: type(value) is bool)
TEXT = ("a string", lambda value: isinstance(value, str))


def _get(hub: Json, key: str, kind: tuple[str, Callable[[Any], bool]] = SIZE, *default: Any) -> Any:
    """The entry, checked against its kind; the default, if one is given, where the entry is missing."""
    if key not in hub:
        if default:
            return default[0]
        raise CheckpointError(f"config.json has no entry {key}: download it again")
    words, fits = kind
    if not fits(hub[key]):
        raise CheckpointError(f"config.json has {key} {hub[key]!r:.60}, expected {words}: download it again")
    return hub[key]


def _class_of(hub: Json) -> Any:
    architectures = hub.get("architectures")
    return hub.get("_class_name") or (architectures[0] if isinstance(architectures, list) and architectures else None)


def _unknown_class(hub: Json, expected: str) -> CheckpointError:
    return CheckpointError(f"config.json describes a {_class_of(hub)!s:.60}, expected {expected}: give another folder")


def _expect(hub: Json, **wanted: Any) -> None:
    """Check that each entry, if present, has the wanted value, or one of a tuple of values."""
    for key, values in wanted.items():
        values = values if isinstance(values, tuple) else (values,)
        if key in hub and hub[key] not in values:
            raise CheckpointError(
                f"config.json has {key} {hub[key]!r:.60}, expected {' or '.join(map(repr, values))}: "
                "models of this kind are not supported"
            )


def to_hub(config: Config) -> dict[str, Any]:
    """The config.json with which diffusers' or transformers' `from_pretrained` builds the same module."""
    match config:
        case MMDiTConfig(position="rope"):
            return {
                "_class_name": "FluxTransformer2DModel", "patch_size": 1, **_common_to_hub(config),
                "in_channels": config.patch_dim, "num_single_layers": config.num_single_blocks,
                "guidance_embeds": config.guidance_embedding, "axes_dims_rope": list(config.rope_axes),
            }
        case MMDiTConfig():
            return {
                "_class_name": "SD3Transformer2DModel", "patch_size": config.patch_size, **_common_to_hub(config),
                "in_channels": config.latent_channels, "out_channels": config.latent_channels, "sample_size": 128,
                "caption_projection_dim": config.hidden_size, "pos_embed_max_size": config.position_table_size,
                "qk_norm": "rms_norm" if config.qk_norm else None,
                "dual_attention_layers": list(config.dual_attention_blocks),
            }
        case AutoencoderConfig():
            levels = len(config.channels)
            return {
                "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "act_fn": "silu",
                "block_out_channels": list(config.channels), "layers_per_block": config.blocks_per_level,
                "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
                "latent_channels": config.latent_channels, "norm_num_groups": config.norm_groups, "sample_size": 1024,
                "scaling_factor": config.scaling, "shift_factor": config.shift, "use_quant_conv": False,
                "use_post_quant_conv": False, "mid_block_add_attention": True, "force_upcast": True,
            }
        case ClipConfig():
            projected = config.projection_dim is not None
            return {
                "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
                "model_type": "clip_text_model", "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
                "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_layers,
                "num_attention_heads": config.num_heads, "hidden_act": config.activation, "layer_norm_eps": 1e-5,
                "max_position_embeddings": config.max_positions, "eos_token_id": config.end_token,
                "bos_token_id": config.end_token - 1, "pad_token_id": 1,
                "projection_dim": config.projection_dim if projected else config.hidden_size,
            }
        case T5Config():
            return {
                "architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": config.vocab_size,
                "d_model": config.hidden_size, "d_kv": config.head_dim, "d_ff": config.intermediate_size,
                "num_layers": config.num_layers, "num_heads": config.num_heads, "feed_forward_proj": "gated-gelu",
                "relative_attention_num_buckets": config.relative_buckets, "layer_norm_epsilon": 1e-6,
                "relative_attention_max_distance": config.relative_max_distance, "is_encoder_decoder": False,
                "eos_token_id": 1, "pad_token_id": 0,
            }


def _common_to_hub(config: MMDiTConfig) -> dict[str, int]:
    return {
        "num_attention_heads": config.num_heads, "attention_head_dim": config.head_dim,
        "num_layers": config.num_dual_blocks, "joint_attention_dim": config.context_dim,
        "pooled_projection_dim": config.pooled_dim,
    }
