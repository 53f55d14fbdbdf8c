"""A checkpoint's folder: each network's weights and config, and the sampling settings in the JSON files."""

import json
from pathlib import Path

import numpy as np

from .autoencoder import Decoder
from .layers import Network
from .mmdit import Transformer
from .repulsion import Repulsion
from .safetensors import read
from .text import T5, Clip

CLIP = {"architectures": [["CLIPTextModelWithProjection"]], "hidden_act": ["gelu", "quick_gelu"]}
PARTS = {  # folder and file, network, and the values in the folder's config.json that this port supports
    "transformer": ("transformer/diffusion_pytorch_model", Transformer, {
        "_class_name": ["SD3Transformer2DModel"], "qk_norm": ["rms_norm"], "dual_attention_layers": [None, []]}),
    "clip_l": ("text_encoder/model", Clip, CLIP),
    "clip_g": ("text_encoder_2/model", Clip, CLIP),
    "t5": ("text_encoder_3/model", T5, {"feed_forward_proj": ["gated-gelu"]}),
    "autoencoder": ("vae/diffusion_pytorch_model", Decoder, {"use_post_quant_conv": [False]}),
}


def load(folder: Path, dtype: type = np.float32) -> tuple[dict[str, Network], dict]:
    """The networks, computing in dtype, and the settings of `sampler.paint`: steps, guidance, shift, repulsion.

    Raises FileNotFoundError for a missing file, ValueError for what is not supported, such as rotary positions.
    """
    parts = {}
    for name, (place, network, known) in PARTS.items():
        file = folder / f"{place}.safetensors"
        config = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
        for key, values in known.items():
            if config.get(key) not in values:
                raise ValueError(f"{file.parent}/config.json has {key} {config.get(key)!r}, but this port supports "
                                 f"only {' or '.join(map(repr, values))}: use the project itself")
        parts[name] = network({key: tensor.astype(dtype) for key, tensor in read(file).items()}, config)
    shift = json.loads((folder / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))["shift"]
    sampling = json.loads((folder / "sampling.json").read_text(encoding="utf-8"))
    repulsion = Repulsion(**sampling["repulsion"]) if sampling.get("repulsion") else None
    return parts, {"steps": sampling["steps"], "guidance": sampling["guidance"], "shift": shift, "repulsion": repulsion}
