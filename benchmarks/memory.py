"""What a card must hold for each public checkpoint, counted without one: `python -m benchmarks.memory`.

The networks are on the meta device, where tensors have sizes but no numbers, and run as the pipeline runs them: text
encoders on one prompt at a time, one step of the transformer with guidance and repulsion, the decoder on one picture at
a time (FLUX.1-Kontext: the encoder as well). While they run, every storage is counted until it is freed. Pictures are
1024 × 1024. What is not counted: docs/memory.md. Takes a minute or two.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import torch
from einops import repeat
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mmdit import (
    Autoencoder,
    AutoencoderConfig,
    ClipConfig,
    ClipTextEncoder,
    DecoderConfig,
    MMDiT,
    MMDiTConfig,
    T5Config,
    T5Encoder,
    TextDecoder,
)
from mmdit.float8 import keep_in_float8, may_stay_float8
from mmdit.meta import on_meta
from repulsion import Repulsion
from sampler.conditioning import T5_LIMIT
from sampler.guidance import GuidedVelocity
from sampler.parts import Part, stream_blocks
from sampler.schedule import denoise
from weights import PUBLIC, Settings

from .solver import Allocated, show

IMAGES, GIB, MARGIN = (1, 4, 8), 2**30, 1  # MARGIN, GiB: for what is not counted
DTYPE = torch.bfloat16
CLIP_L, T5 = (ClipTextEncoder, ClipConfig()), (T5Encoder, T5Config())
CLIP_G = ClipTextEncoder, ClipConfig(hidden_size=1280, intermediate_size=5120, num_layers=32, num_heads=20,
                                     activation="gelu", projection_dim=1280)
DECODERS = {  # FLUX.2's text encoders, by the width of their context
    7680: DecoderConfig(), 12288: DecoderConfig(hidden_size=4096, intermediate_size=12288),
    15360: DecoderConfig(vocab_size=131072, hidden_size=5120, intermediate_size=32768, layers=(10, 20, 30),
                         qk_norm=False, norm_eps=1e-5, rope_theta=1e9)}
FLUX2_VAE = AutoencoderConfig(latent_channels=32, scaling=1.0, shift=0.0, patch_size=2)
Bytes = tuple[int, int]  # of a network's weights that stay on the card, and the most beside them while it runs


class Kernels(TorchFunctionMode):
    """Lets the meta device allocate what a card's fused kernels do: attention its result and no n × n matrix, RMSNorm
    its result and a contiguous input. The Gram matrices that a push reads are zeros."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        if function is F.rms_norm:
            return torch.empty_like(args[0].contiguous())
        if function is Tensor.numpy and args[0].is_meta:
            return np.zeros(args[0].shape)
        return function(*args, **(kwargs or {}))


def build(network: type[nn.Module], config: object, float8: bool = False, streamed: bool = False) -> nn.Module:
    """A network on the meta device as it would be loaded. Blocks that stay in the CPU's memory have a single number
    for each tensor there, and are copied to the meta device when they run."""
    model = on_meta(network, config).to(DTYPE)
    for name, layer in list(model.named_modules()):
        if float8 and may_stay_float8(name, layer):
            kept = keep_in_float8(layer, torch.float8_e4m3fn, scaled=False)
            kept.bias = layer.bias
            model.set_submodule(name, kept)
    if streamed:
        for name, blocks in model.named_children():
            if isinstance(blocks, nn.ModuleList):
                setattr(model, name, blocks._apply(lambda x: torch.empty(1, dtype=x.dtype).expand(x.shape)))
        stream_blocks(model, torch.device("meta"), DTYPE)
    return model.requires_grad_(False)


def count(model: nn.Module, call: Callable) -> Bytes:
    """The bytes that the call of a model on the meta device needs."""
    with Allocated(*model.state_dict().values(), device="meta") as made, Kernels(), torch.no_grad():
        call()
    return made.held, made.most - made.held


def empty(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@cache
def encode(network: type[nn.Module], config: object, tokens: int, float8: bool, streamed: bool) -> Bytes:
    """A text encoder on one prompt."""
    model = build(network, config, float8 and network is not ClipTextEncoder, streamed)
    model._check = lambda *ids: None  # reads the ids
    return count(model, lambda: model(empty(1, tokens, dtype=torch.int64)))


@cache
def decode(config: AutoencoderConfig, side: int, reference: bool) -> Bytes:
    """The autoencoder: it decodes one picture, and before that, with a reference, encodes one."""
    model, channels = build(Autoencoder, config), config.latent_channels * config.patch_size**2
    latent = (1, channels, side // config.downscale, side // config.downscale)
    needs = [count(model, lambda: model.decode(empty(*latent))[0].float())]
    if reference:
        needs.append(count(model, lambda: model.encode(empty(1, 3, side, side))))
    return max(needs)


def latent_shape(config: MMDiTConfig, settings: Settings) -> tuple[int, int, int]:
    """Of the checkpoint's pictures: c, H, W."""
    downscale = 8 * 2 // config.patch_size  # a token is 16 pixels wide
    return config.latent_channels, settings.height // downscale, settings.width // downscale


def guided(model: MMDiT, settings: Settings, tokens: int, repulsion: Repulsion | None,
           references: Sequence[Tensor] = ()) -> GuidedVelocity:
    """The velocity with the guidance of the checkpoint, of a random prompt of so many context tokens."""
    config, like = model.config, model.image_in.weight
    random = partial(torch.randn, device=like.device, dtype=like.dtype)
    distilled = settings.guidance if config.guidance_embedding else None
    weight = settings.guidance if distilled is None and (settings.guidance or 0) > 1 else None
    branches = 1 if weight is None else 2
    context, pooled = random(branches, tokens, config.context_dim), random(branches, config.pooled_dim or 0)
    return GuidedVelocity(
        transformer=Part(lambda: model), steps=1, weight=weight, distilled=distilled, repulsion=repulsion,
        condition=lambda samples, sigma, step: (
            repeat(context, "g n d -> (g b) n d", b=samples),
            repeat(pooled, "g d -> (g b) d", b=samples) if config.pooled_dim else None), references=references)


def paint(model: MMDiT, name: str, images: int, tokens: int) -> Bytes:
    """A step of the transformer, with the guidance of the checkpoint and a push in one block of each kind."""
    config, settings = model.config, PUBLIC[name].settings
    latent, repulsion = latent_shape(config, settings), Repulsion(strength=1.0, blocks=(0, config.num_blocks - 1))

    def call():
        velocity = guided(model, settings, tokens, repulsion, [empty(1, *latent)] if "kontext" in name else [])
        denoise(velocity, empty(images, *latent, dtype=torch.float32), torch.tensor([1.0, 0.0]))

    return count(model, call)


def text_encoders(config: MMDiTConfig, prompt_tokens: int | None) -> list[tuple[type[nn.Module], object, int]]:
    """The text encoders of a transformer: class, sizes, tokens of a prompt."""
    if config.pooled_dim is None:
        return [(TextDecoder, DECODERS[config.context_dim], 512)]
    if config.position == "rope":
        return [(*CLIP_L, 77), (*T5, prompt_tokens or T5_LIMIT["flux"])]
    return [(*CLIP_L, 77), (*CLIP_G, 77), (*T5, prompt_tokens or T5_LIMIT["sd3"])]


def autoencoder_of(config: MMDiTConfig) -> AutoencoderConfig:
    """The sizes of the autoencoder that belongs to a transformer."""
    return FLUX2_VAE if config.pooled_dim is None else AutoencoderConfig()


def context_tokens(config: MMDiTConfig, encoders: list[tuple]) -> int:
    """Those of the last text encoder; SD3's context has the CLIPs' as well."""
    return encoders[-1][-1] + 77 * (config.position == "table")


def needs(name: str, float8: bool, images: tuple[int, ...] = IMAGES) -> list[float]:
    """GiB for each number of pictures with all networks on the card, then by parts, then by blocks."""
    config, *_, settings = PUBLIC[name]
    encoders, vae = text_encoders(config, settings.prompt_tokens), autoencoder_of(config)
    tokens = context_tokens(config, encoders)
    found = {"all": [], "parts": [], "blocks": []}
    for streamed in (False, True):
        model = build(MMDiT, config, float8, streamed)
        others = [encode(*one, float8, streamed) for one in encoders]
        others.append(decode(vae, settings.height, reference="kontext" in name))
        for number in images:
            stages = [*others, paint(model, name, number, tokens)]
            found["blocks" if streamed else "parts"].append(max(weights + rest for weights, rest in stages) / GIB)
            if not streamed:
                found["all"].append((sum(weights for weights, _ in stages) + max(rest for _, rest in stages)) / GIB)
    return [gib for column in found.values() for gib in column]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=PUBLIC, default=PUBLIC, metavar="NAME")
    args = parser.parse_args()
    rows = [[name, "float8 kept" if float8 else "bfloat16", *(f"{gib:.1f}" for gib in needs(name, float8))]
            for name in args.models for float8 in (False, True)]
    columns = [f"{way}, {number}" for way in ("all", "parts", "blocks") for number in IMAGES]
    show(" | ".join(["checkpoint", "weights", *columns]), rows)
    print(f"GiB. Not counted: CUDA's context, fragments, workspaces of kernels. Leave about {MARGIN} GiB for them.")


if __name__ == "__main__":
    main()
