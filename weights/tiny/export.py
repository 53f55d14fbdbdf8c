"""Writes what `train.py` made as a folder in the hub's SD3 layout, which diffusers reads too."""

import json
import shutil
from pathlib import Path

import torch

from mmdit import Autoencoder, ClipTextEncoder, MMDiT, T5Encoder

from ..load import save_autoencoder, save_text_encoder, save_transformer

CLASSES = {  # who reads which folder: the contents of model_index.json
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def export(folder: Path, tokenizers: Path, clips: list[ClipTextEncoder], t5: T5Encoder, transformer: MMDiT,
           autoencoder: Autoencoder, shift: float, sampling: dict) -> None:
    """One pipeline folder in bfloat16. `tokenizers` holds the three tokenizer folders; `shift` is the schedule's;
    `sampling` are the defaults of `sampler.defaults.Defaults`, in a file that diffusers passes over."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(tokenizers / name, folder / name, dirs_exist_ok=True)
    for number, encoder in zip(("", "_2", "_3"), (*clips, t5), strict=True):
        save_text_encoder(encoder.to(torch.bfloat16), folder / f"text_encoder{number}", layout="hub")
    save_transformer(transformer.to(torch.bfloat16), folder / "transformer", layout="hub")
    save_autoencoder(autoencoder.to(torch.bfloat16), folder / "vae", layout="hub")
    side = sampling["height"] // autoencoder.config.downscale
    edit_json(folder / "transformer" / "config.json", sample_size=side)  # diffusers' default picture size
    edit_json(folder / "vae" / "config.json", sample_size=sampling["height"])
    scheduler = {"_class_name": CLASSES["scheduler"][1], "num_train_timesteps": 1000, "shift": shift}
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "sampling.json", sampling)
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusion3Pipeline", **CLASSES})


def edit_json(file: Path, **changes: object) -> None:
    write_json(file, {**json.loads(file.read_text()), **changes})


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
