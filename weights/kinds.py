"""The kinds of networks that files hold, with their classes and layouts; and by which names other models are told."""

from typing import NamedTuple

from torch import nn

import mmdit

from . import tables
from .layouts import Layout


class Kind(NamedTuple):
    """A kind of network: its part in a pipeline, its classes, and its layouts."""

    role: str
    module: type[nn.Module]
    config: type
    layouts: tuple[Layout, ...]  # the original, the hub's, others that are read only


KINDS = FLUX, FLUX2, SD3, AUTOENCODER, CLIP, T5, DECODER = (
    Kind("transformer", mmdit.MMDiT, mmdit.MMDiTConfig, (tables.FLUX_ORIGINAL, tables.FLUX_HUB)),
    Kind("transformer", mmdit.MMDiT, mmdit.MMDiTConfig, (tables.FLUX2_ORIGINAL, tables.FLUX2_HUB)),
    Kind("transformer", mmdit.MMDiT, mmdit.MMDiTConfig, (tables.SD3_ORIGINAL, tables.SD3_HUB)),
    Kind("autoencoder", mmdit.Autoencoder, mmdit.AutoencoderConfig,
         (tables.AUTOENCODER_ORIGINAL, tables.AUTOENCODER_HUB)),
    Kind("clip", mmdit.ClipTextEncoder, mmdit.ClipConfig, (tables.CLIP, tables.CLIP, tables.CLIP_BARE)),
    Kind("t5", mmdit.T5Encoder, mmdit.T5Config, (tables.T5, tables.T5)),
    Kind("text", mmdit.TextDecoder, mmdit.DecoderConfig, (tables.DECODER, tables.DECODER)),
)
ENCODERS = ("text", "clip_l", "clip_g", "clip", "t5")

# Patterns of names that only unsupported models have, and what such a file is. The first match counts.
FOREIGN = {
    r"lora|dora_|hada_w|lokr_w": "a LoRA, a small change to a model",
    r"(^|\.)controlnet_|(^|\.)input_hint_block|^control_model\.": "a ControlNet, not the model that it controls",
    r"\.weight_scale_2$": "quantized to 4 bits (nvfp4), where float8 or wider is supported",
    r"\.(absmax|quant_map|qweight|SCB)$|\.bitsandbytes__": "quantized to 4 or 8 bits (such as bitsandbytes' NF4)",
    r"^redux_(up|down)\.": "FLUX.1-Redux, an adapter for image prompts",
    r"distilled_guidance_layer": "Chroma, a FLUX.1 without modulation layers",
    r"(^|\.)label_emb\.|^add_embedding\.|^conditioner\.": "SDXL, which is no MMDiT",
    r"(^|\.)input_blocks\.0\.0\.weight|^down_blocks\.0\.resnets\.0\.": "Stable Diffusion 1 or 2, which is no MMDiT",
    r"\A(?![\s\S]*\bbn\.running_mean$)[\s\S]*\b(post_)?quant_conv\.": "an autoencoder of Stable Diffusion 1, 2 or XL",
    r"\A(vision_model\..*\n?)+\Z": "the image encoder of a CLIP, not its text encoder",
}

# Names of no part of a network: markers; what training leaves; the other half of a model whose text encoder is read.
MARKER = r"(.*\.)?(logit_scale|position_ids|scaled_fp8|tekken_model|num_batches_tracked)"
UNUSED = (r"(optimizer|lr_scheduler|(model_)?ema|loss|discriminator|global_step|epoch)([._].*)?|"
          r"(vision_model|visual_projection|lm_head|decoder\.(block|final_layer_norm|embed_tokens))\..*")
BESIDE_DECODER = r"(.*\.)?(lm_head|vision_tower|multi_modal_projector)\..*"  # in every public file, so worth no warning
