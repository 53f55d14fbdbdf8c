"""A module's config: sizes from the shapes of the stored tensors, the rest from the hub's config.json; and back."""

from collections.abc import Mapping
from math import isqrt, prod
from typing import TYPE_CHECKING, Any, NamedTuple

from mmdit import AutoencoderConfig, ClipConfig, DecoderConfig, MMDiTConfig, T5Config

from .layouts import CheckpointError, Sizes

if TYPE_CHECKING:
    from .detect import Part

Config = MMDiTConfig | AutoencoderConfig | ClipConfig | T5Config | DecoderConfig
Json = Mapping[str, Any]
Fields = dict[str, Any]

# Shift and scaling of the latents, which an autoencoder's file does not store.
LATENTS = {"flux": {"shift": 0.1159, "scaling": 0.3611}, "sd3": {"shift": 0.0609, "scaling": 1.5305}}


def sizes_of(config: Config) -> Sizes:
    """The sizes of a module that its name table depends on."""
    if isinstance(config, MMDiTConfig):
        return Sizes(config.hidden_size, config.num_dual_blocks - 1, config.patch_size)
    if isinstance(config, AutoencoderConfig):
        return Sizes(last=len(config.channels) - 1)
    return Sizes(config.num_heads * config.head_dim if isinstance(config, T5Config) else config.hidden_size)


def fields(part: "Part") -> Fields:
    """The values of a network's config that its tensors determine."""
    if part.kind.config is MMDiTConfig:
        return _transformer_fields(part)
    if part.kind.config is AutoencoderConfig:
        levels = part.count("encoder.levels.{}.blocks.0.conv_1.weight")
        found = {"channels": tuple(part[f"encoder.levels.{i}.blocks.0.conv_1.weight"][0] for i in range(levels)),
                 "latent_channels": part["decoder.conv_in.weight"][1],
                 "blocks_per_level": part.count("encoder.levels.0.blocks.{}.conv_1.weight")}
        return found | (_flux2_fields(part, levels, found) if part.family == "flux2" else {})
    if part.kind.config is DecoderConfig:
        return _decoder_fields(part)
    found = dict(zip(("vocab_size", "hidden_size"), part["token_embedding.weight"], strict=False))
    found["num_layers"] = part.count("layers.{}.attention.qkv.weight")
    if part.kind.config is T5Config:
        buckets, heads = part["relative_bias.weight"][:2]
        return found | {"relative_buckets": buckets, "num_heads": heads,
                        "head_dim": part["layers.0.attention.qkv.weight"][0] // heads,
                        "intermediate_size": part["layers.0.mlp.gate.weight"][0]}
    return found | {"max_positions": part["position_embedding.weight"][0],
                    "intermediate_size": part["layers.0.mlp.in_layer.weight"][0],
                    "projection_dim": (part.shape("projection.weight") or (None,))[0]}


def _flux2_fields(part: "Part", levels: int, found: Fields) -> Fields:
    """What FLUX.2's autoencoder has beside: patches, and widths of the decoder's own if those differ."""
    names = (part.layout.find(f"decoder.levels.{i}.blocks.0.conv_1.weight", Sizes(last=levels - 1))[0][0]
             for i in reversed(range(levels)))
    decoder = tuple((part.entries[name].shape or (0,))[0] if name in part.entries else 0 for name in names)
    return {"patch_size": isqrt(part["latent_mean"][0] // found["latent_channels"]), "scaling": 1.0, "shift": 0.0,
            "decoder_channels": None if decoder == found["channels"] or 0 in decoder else decoder}


def _decoder_fields(part: "Part") -> Fields:
    (vocabulary, width), norm = part["token_embedding.weight"][:2], part.shape("layers.0.attention.norm_q.weight")
    heads = _heads(part, part["layers.0.attention.norm_q.weight"][0]) if norm is not None else {}
    return heads | {"vocab_size": vocabulary, "hidden_size": width, "qk_norm": norm is not None,
                    "intermediate_size": part["layers.0.mlp.gate.weight"][0],
                    "layers": (10, 20, 30) if norm is None else (9, 18, 27)}  # FLUX.2-dev's Mistral, klein's Qwen3


def _heads(part: "Part", width: int) -> Fields:
    query, key = (part[f"layers.0.attention.{name}.weight"][0] for name in "qk")
    return {"head_dim": width, "num_heads": query // width, "num_kv_heads": key // width}


def _transformer_fields(part: "Part") -> Fields:
    width, *patch = part["image_in.weight"]  # c * p * p (FLUX, whose p is 2; 1 in FLUX.2) or c, p, p (SD3)
    shared = part.shape("shared_modulation.single.weight") is not None  # FLUX.2
    p = patch[-1] if len(patch) == 3 else 1 if shared else 2
    if (given := prod(patch)) != (returned := part["image_out.weight"][0]):
        raise CheckpointError(f"the transformer reads {given} numbers a patch and returns {returned}, so it is one for "
                              "more inputs (Fill, Canny, Depth): give FLUX.1-dev, -schnell or -Kontext-dev")
    blocks = max(part.count(f"dual_blocks.{{}}.attention.image.{name}.weight") for name in ("qkv", "out"))
    query_norm = "dual_blocks.0.attention.image.norm_q.weight"
    dual = [i for i in range(blocks) if part.shape(f"dual_blocks.{i}.image_attention.qkv.weight")]
    found = {
        "hidden_size": width, "latent_channels": given // p**2, "patch_size": p,
        "context_dim": part["context_in.weight"][1],
        "pooled_dim": None if shared else part["pooled_in.in_layer.weight"][1],
        "num_dual_blocks": blocks, "num_single_blocks": part.count("single_blocks.{}.linear_in.weight"),
        "guidance_embedding": part.shape("guidance_in.in_layer.weight") is not None,
        "qk_norm": part.shape(query_norm) is not None, "dual_attention_blocks": tuple(dual),
        "position": "table" if part.shape("position_table") is not None else "rope",
    }
    if shared:
        found |= {"mlp_ratio": part["dual_blocks.0.image.mlp.out_layer.weight"][1] / width, "reference_step": 10,
                  "bias": False, "gated_mlp": True, "shared_modulation": True}
    found |= {"position_table_size": isqrt(part["position_table"][1])} if found["position"] == "table" else {}
    return found | ({"num_heads": width // part[query_norm][0]} if found["qk_norm"] else {})


def usual(part: "Part", found: Fields) -> Fields:
    """The other values, as in the public checkpoints. Raises CheckpointError where there is no usual value."""
    width = found.get("hidden_size")
    if found.get("qk_norm") and part.kind.config is DecoderConfig or "decoder_channels" in found:
        return {}  # Qwen3; FLUX.2's autoencoder
    if part.kind.config is DecoderConfig:
        return {**_heads(part, 128), "norm_eps": 1e-5, "rope_theta": 1e9}  # Mistral-Small
    if part.kind.config is AutoencoderConfig:
        if part.layout.name.startswith("hub") or found["latent_channels"] != 16:
            raise CheckpointError("the scaling and shift of these latents are not known: give a config or a family")
        return LATENTS["sd3" if part.prefix.endswith("first_stage_model.") else "flux"]
    if part.kind.config is ClipConfig:
        return {"num_heads": max(width // 64, 1), "end_token": found["vocab_size"] - 1,
                "activation": "quick_gelu" if width == 768 else "gelu"}
    heads = max(found.get("num_heads", width // 64), 1)
    if found.get("position") == "rope" and width // heads != 128:
        raise CheckpointError(f"heads are {width // heads} wide, and the file does not say how rotary positions divide "
                              "them (known only for 128: 16, 56, 56, in FLUX.2 four times 32): give "
                              "config=MMDiTConfig(..., rope_axes=...)")
    if found.get("shared_modulation"):
        return {"num_heads": heads, "rope_axes": (32,) * 4, "rope_theta": 2000}
    inside = part.shape("dual_blocks.0.image.mlp.in_layer.weight")
    return {"num_heads": heads, **({"mlp_ratio": inside[0] / width} if inside else {})}


# ---- config.json


# What the tensors do not determine: the type, and what diffusers and transformers take where config.json says nothing.
REST = {"num_heads": (int, None), "rope_axes": (list, [16, 56, 56]), "rope_theta": (int, 2000),
        "norm_groups": (int, 32), "scaling": (float, None), "shift": (float, 0.0), "activation": (str, None),
        "end_token": (int, 2), "relative_max_distance": (int, 128)}


class HubClass(NamedTuple):
    """The config.json of one class of diffusers or transformers."""

    config: type
    entries: dict[str, str]  # our field or property: the entry
    fixed: dict[str, tuple]  # entries with one meaning here: the values that are read, the first of which is written
    written: Json = {}  # other entries that from_pretrained needs
    rest: Json = REST  # what the tensors do not determine


def _pairs(names: str) -> dict[str, str]:
    """ "ours=theirs …", or one name for both."""
    return {pair.split("=")[0]: pair.split("=")[-1] for pair in names.split()}


_TRANSFORMER = _pairs("""num_heads=num_attention_heads head_dim=attention_head_dim num_dual_blocks=num_layers
                  context_dim=joint_attention_dim pooled_dim=pooled_projection_dim""")
_FLUX = _TRANSFORMER | _pairs("""patch_dim=in_channels num_single_blocks=num_single_layers
                              guidance_embedding=guidance_embeds rope_axes=axes_dims_rope""")
_FLUX2 = {name: key for name, key in _FLUX.items() if name != "pooled_dim"} | _pairs("mlp_ratio rope_theta")
_CLIP = HubClass(ClipConfig, _pairs("""vocab_size hidden_size intermediate_size num_layers=num_hidden_layers
                 num_heads=num_attention_heads max_positions=max_position_embeddings activation=hidden_act
                 end_token=eos_token_id"""),
                 {"layer_norm_eps": (1e-5, None)}, {"model_type": "clip_text_model", "pad_token_id": 1})
_T5 = HubClass(T5Config, _pairs("""vocab_size hidden_size=d_model head_dim=d_kv intermediate_size=d_ff num_layers
               num_heads relative_buckets=relative_attention_num_buckets
               relative_max_distance=relative_attention_max_distance"""),
               {"feed_forward_proj": ("gated-gelu",), "layer_norm_epsilon": (1e-6, None)},
               {"model_type": "t5", "is_encoder_decoder": False, "eos_token_id": 1, "pad_token_id": 0})
_DECODER = HubClass(DecoderConfig, _pairs("""vocab_size hidden_size intermediate_size num_layers=num_hidden_layers
                    head_dim num_heads=num_attention_heads num_kv_heads=num_key_value_heads norm_eps=rms_norm_eps
                    rope_theta"""),
                    {"hidden_act": ("silu", None), "attention_bias": (False, None), "rope_scaling": (None,),
                     "rope_type": ("default", None)}, {"tie_word_embeddings": True},
                    {"num_heads": (int, None), "num_kv_heads": (int, None), "head_dim": (int, 128),
                     "norm_eps": (float, 1e-6), "rope_theta": (float, None)})
_VAE = HubClass(AutoencoderConfig, _pairs("""channels=block_out_channels latent_channels norm_groups=norm_num_groups
                blocks_per_level=layers_per_block"""),
                {"in_channels": (3, None), "out_channels": (3, None), "act_fn": ("silu", None),
                 "mid_block_add_attention": (True, None)}, {"sample_size": 1024})
HUB_CLASSES = {
    "FluxTransformer2DModel": HubClass(MMDiTConfig, _FLUX, {"patch_size": (1, None)}),
    "Flux2Transformer2DModel": HubClass(
        MMDiTConfig, _FLUX2, {"patch_size": (1, None), "eps": (1e-6, None), "timestep_guidance_channels": (256, None)},
        rest=REST | {"rope_axes": (list, [32] * 4)}),
    "SD3Transformer2DModel": HubClass(
        MMDiTConfig, _TRANSFORMER | _pairs("""latent_channels=in_channels patch_size hidden_size=caption_projection_dim
        position_table_size=pos_embed_max_size dual_attention_blocks=dual_attention_layers"""),
        {"qk_norm": ("rms_norm", None)}, {"sample_size": 128}),
    "AutoencoderKL": _VAE._replace(
        entries=_VAE.entries | _pairs("scaling=scaling_factor shift=shift_factor"),
        fixed={**_VAE.fixed, "use_quant_conv": (False,), "use_post_quant_conv": (False,)},
        written={**_VAE.written, "force_upcast": True}),
    "AutoencoderKLFlux2": _VAE._replace(
        entries=_VAE.entries | _pairs("decoder_channels=decoder_block_out_channels"),
        fixed={**_VAE.fixed, "use_quant_conv": (True, None), "use_post_quant_conv": (True, None),
               "patch_size": ([2, 2], None), "batch_norm_eps": (1e-4, None)}),
    "CLIPTextModel": _CLIP,
    "CLIPTextModelWithProjection": _CLIP._replace(entries=_CLIP.entries | _pairs("projection_dim")),
    "T5EncoderModel": _T5, "T5ForConditionalGeneration": _T5,
    "Qwen3Model": _DECODER._replace(written={**_DECODER.written, "model_type": "qwen3"}),
    "MistralModel": _DECODER._replace(written={**_DECODER.written, "model_type": "mistral"}),
    "Qwen3ForCausalLM": _DECODER, "MistralForCausalLM": _DECODER, "Mistral3ForConditionalGeneration": _DECODER,
}


def find_config(part: "Part", given: Config | None, family: str | None) -> Config:
    """The given config, else that of a hub layout's config.json, else the usual one for these sizes.

    `family` sets the scaling of latents without a config.json. Raises CheckpointError or ValueError for a config that
    does not fit, makes no sense or is not supported; the caller adds the file's name.
    """
    kind, hub = part.kind, part.config if part.layout in part.kind.layouts[1:] else None
    if not isinstance(given, kind.config | None):
        raise CheckpointError(f"config is a {type(given).__name__}, expected a {kind.config.__name__}")
    if given is not None:
        return given
    found = fields(part)
    if hub is None:
        rest = LATENTS[family] if family in LATENTS and kind.config is AutoencoderConfig else usual(part, found)
        return kind.config(**rest | found)
    name = str(hub.get("_class_name") or next(iter(hub.get("architectures") or ()), None))
    known = HUB_CLASSES.get(name)
    fitting = [name for name, other in HUB_CLASSES.items() if other.config is kind.config
               and ("Flux2T" in name) == found.get("shared_modulation", False)]
    if name not in fitting:
        names = " or ".join(fitting)
        raise CheckpointError(f"config.json describes a {name:.60}, expected {names}: give another folder")
    if kind.config is DecoderConfig:  # nested where the model reads pictures too; transformers 5 nests rope_theta
        hub = {**hub, **(hub.get("text_config") or {})}
        hub = {**hub, **(hub.get("rope_parameters") or {})}
    for key, values in known.fixed.items():  # None: the entry may be missing
        if hub.get(key) not in values:
            raise CheckpointError(f"config.json has {key} {hub.get(key)!r:.60}, expected one of {values}: give another "
                                  "model")
    if "projection_dim" in known.entries and found["projection_dim"] is None:
        raise CheckpointError(f"the tensors hold no projection, which a {name} has: download them again")
    asked = known.rest
    stated = {our: hub.get(key) for our, key in known.entries.items() if our in asked and our not in found}
    rest = {our: asked[our][1] if value is None else value for our, value in stated.items()}
    for our, value in rest.items():
        types = {float: (float, int)}.get(asked[our][0], (asked[our][0],))
        if type(value) not in types or int in types and not (-1e9 if our == "shift" else 1e-9) < value <= 1e9:
            raise CheckpointError(f"config.json has {known.entries[our]} {value!r:.60}: download it again")
    if kind.config is ClipConfig and rest["end_token"] == 2:  # a known error in most public files
        rest["end_token"] = found["vocab_size"] - 1
    return kind.config(**rest | found)


def to_hub(config: Config) -> dict[str, Any]:
    """The config.json with which diffusers' or transformers' `from_pretrained` builds the same module."""
    name = next(name for name, known in HUB_CLASSES.items() if isinstance(config, known.config)
                and ("SD3" in name) == (getattr(config, "position", None) == "table")
                and ("Flux2T" in name) == getattr(config, "shared_modulation", False)
                and ("KLFlux2" in name) == (isinstance(config, AutoencoderConfig) and config.patch_size > 1)
                and ("Mistral" in name) == (isinstance(config, DecoderConfig) and not config.qk_norm)
                and ("Projection" in name) == (getattr(config, "projection_dim", None) is not None))
    known = HUB_CLASSES[name]
    hub = {"_class_name": name} if known.config in (MMDiTConfig, AutoencoderConfig) else {"architectures": [name]}
    values = {key: getattr(config, our) for our, key in known.entries.items()}
    hub |= {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    hub |= {key: values[0] for key, values in known.fixed.items()} | dict(known.written)
    if name == "SD3Transformer2DModel":
        hub |= {"out_channels": config.latent_channels, "qk_norm": "rms_norm" if config.qk_norm else None}
    elif isinstance(config, AutoencoderConfig):
        levels = len(config.channels)
        hub |= {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    elif isinstance(config, ClipConfig):
        hub |= {"bos_token_id": config.end_token - 1, "projection_dim": config.projection_dim or config.hidden_size}
    return hub
