"""Export trained networks as a pipeline folder in the hub's layout, SD3's or FLUX.1's, which diffusers reads too."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from mmdit import Autoencoder, ClipTextEncoder, MMDiT, T5Encoder
from weights import save_autoencoder, save_text_encoder, save_transformer

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
SHARED = {"scheduler": ["diffusers", SCHEDULER], "vae": ["diffusers", "AutoencoderKL"]}
SD3_CLASSES = SHARED | {  # library and class of each folder, for model_index.json
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
}
FLUX_CLASSES = SHARED | {
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
}
DYNAMIC_SHIFT = {  # FLUX.1-dev's: by the number of image tokens
    "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}  # fmt: skip


def export_sd3(folder: Path, tokenizers: Path, clips: list[ClipTextEncoder], t5: T5Encoder, transformer: MMDiT,
               autoencoder: Autoencoder, shift: float, sampling: dict) -> None:
    """An SD3 pipeline in bfloat16. `tokenizers` holds the three tokenizer folders; `shift` is the schedule's;
    `sampling` are the defaults of `weights.Settings`, in a file that diffusers ignores."""
    copy_tokenizers([tokenizers / name for name in ("tokenizer", "tokenizer_2", "tokenizer_3")], folder)
    write(folder, [*clips, t5], transformer, autoencoder, {"shift": shift}, sampling)
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusion3Pipeline", **SD3_CLASSES})


def export_flux(folder: Path, tokenizers: Sequence[Path], clip: ClipTextEncoder, t5: T5Encoder, transformer: MMDiT,
                autoencoder: Autoencoder, sampling: dict) -> None:
    """A FLUX.1 pipeline, likewise; `tokenizers` are CLIP's folder and T5's."""
    copy_tokenizers(tokenizers, folder)
    write(folder, [clip, t5], transformer, autoencoder, DYNAMIC_SHIFT, sampling)
    write_json(folder / "model_index.json", {"_class_name": "FluxPipeline", **FLUX_CLASSES})


def copy_tokenizers(sources: Sequence[Path], folder: Path) -> None:
    for source, name in zip(sources, ("tokenizer", "tokenizer_2", "tokenizer_3"), strict=False):
        shutil.copytree(source, folder / name, dirs_exist_ok=True)


def write(folder: Path, text_encoders: list[nn.Module], transformer: MMDiT, autoencoder: Autoencoder, schedule: dict,
          sampling: dict) -> None:
    """The networks in bfloat16, the schedule and the sampling defaults."""
    for number, encoder in zip(("", "_2", "_3"), text_encoders, strict=False):
        save_text_encoder(encoder.to(torch.bfloat16), folder / f"text_encoder{number}", layout="hub")
    save_transformer(transformer.to(torch.bfloat16), folder / "transformer", layout="hub")
    save_autoencoder(autoencoder.to(torch.bfloat16), folder / "vae", layout="hub")
    side = sampling["height"] // autoencoder.config.downscale
    edit_json(folder / "transformer" / "config.json", sample_size=side)  # diffusers' default picture size
    edit_json(folder / "vae" / "config.json", sample_size=sampling["height"])
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json",
               {"_class_name": SCHEDULER, "num_train_timesteps": 1000, **schedule})
    write_json(folder / "sampling.json", sampling)


def edit_json(file: Path, **changes: object) -> None:
    write_json(file, {**json.loads(file.read_text()), **changes})


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
