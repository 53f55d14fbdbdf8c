"""`Pipeline`: a checkpoint on disk, then a prompt in and pictures out."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

import weights
from mmdit import PRESETS, Autoencoder, ClipTextEncoder, ClipTokenizer, MMDiT, T5Tokenizer
from repulsion import Repulsion

from .conditioning import TextEncoders
from .schedule import euler, sigmas, starting_noise


@dataclass(frozen=True)
class Defaults:
    """What a checkpoint wants where the caller says nothing. Sizes in pixels."""

    steps: int
    guidance: float | None = None  # of classifier-free guidance, or of the guidance embedding; None: neither
    height: int = 1024
    width: int = 1024
    repulsion: Repulsion | None = None
    world: str | None = None  # "tiny": pictures that `weights.tiny.reader` can read


PUBLIC = {  # by the transformer's sizes; dev and Kontext share them, large and turbo too (told apart by name)
    "flux1-dev": Defaults(28, 3.5, repulsion=Repulsion.preset("flux1-dev")),
    "flux1-schnell": Defaults(4),
    "sd3-medium": Defaults(28, 7.0),
    "sd3.5-medium": Defaults(40, 4.5),
    "sd3.5-large": Defaults(28, 4.5, repulsion=Repulsion.preset("sd3.5-large")),
    "sd3.5-large-turbo": Defaults(4, repulsion=Repulsion.preset("sd3.5-large-turbo")),
}


class Pipeline:
    """Text encoders, transformer and autoencoder of one checkpoint, with its schedule and its defaults."""

    def __init__(self, transformer: MMDiT, autoencoder: Autoencoder, text: TextEncoders, shift: float | None,
                 defaults: Defaults):
        self.transformer, self.autoencoder, self.text = transformer, autoencoder, text
        self.shift = shift  # of the schedule; None: by picture size (FLUX.1-dev)
        self.defaults = defaults

    @classmethod
    def load(cls, name_or_path: str | Path = "tiny-sd3", dtype: torch.dtype | None = None,
             device: str | torch.device | None = None) -> "Pipeline":
        """The pipeline of an embedded checkpoint ("tiny-sd3") or of a folder in the hub's layout.

        `dtype` is that of all networks (default: float32 on the CPU, bfloat16 on a GPU); `device` defaults to the
        GPU where there is one. Raises FileNotFoundError for a name or file that is not there, and
        `weights.CheckpointError` (a ValueError) for one that cannot be right.
        """
        folder = weights.EMBEDDED.get(str(name_or_path), Path(name_or_path))
        if not (folder / "model_index.json").is_file():
            known = ", ".join(weights.EMBEDDED)
            raise FileNotFoundError(f"no model {str(name_or_path)!r}: it is neither one of {known} nor a folder with a "
                                    "model_index.json")
        device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        where = {"dtype": dtype, "device": device}
        text_dtype = torch.bfloat16 if dtype == torch.float16 else dtype  # T5 overflows in float16
        transformer = weights.load_transformer(folder, **where).eval().requires_grad_(False)
        autoencoder = weights.load_autoencoder(folder / "vae", **where).eval().requires_grad_(False)
        family = "flux" if transformer.config.position == "rope" else "sd3"
        text = TextEncoders(family, transformer.config.context_dim, clips=[])
        for number in ("", "_2", "_3"):
            if not (folder / f"text_encoder{number}").is_dir():
                continue
            encoder = weights.load_text_encoder(folder / f"text_encoder{number}", dtype=text_dtype, device=device)
            encoder.eval().requires_grad_(False)
            if isinstance(encoder, ClipTextEncoder):
                text.clips.append((ClipTokenizer(folder / f"tokenizer{number}"), encoder))
            else:
                text.t5 = T5Tokenizer(folder / f"tokenizer{number}"), encoder
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        shift = None if scheduler.get("use_dynamic_shifting") else scheduler.get("shift", 1.0)
        return cls(transformer, autoencoder, text, shift, find_defaults(folder, transformer))

    @property
    def multiple(self) -> int:
        """The sides of a picture are multiples of this many pixels."""
        return self.autoencoder.downscale * self.transformer.config.patch_size

    @torch.no_grad()
    def __call__(self, prompt: str, images: int = 4, *, steps: int | None = None, guidance: float | None = None,
                 height: int | None = None, width: int | None = None, seed: int = 0, noise: Tensor | None = None,
                 negative_prompt: str | None = None, image: Image.Image | None = None,
                 repulsion: Repulsion | None = None, progress: str | None = None) -> list[Image.Image]:
        """A batch of pictures of one prompt, repelling each other if `repulsion` is given.

        steps, guidance, height and width (pixels) default to the checkpoint's. The noise of picture i depends on
        `seed` and i alone; `noise` (images, c, height / 8, width / 8) replaces it. `negative_prompt` is what
        classifier-free guidance leads away from (default: nothing). `image`: the picture that FLUX.1-Kontext edits.
        `progress` names a progress bar. Raises ValueError, naming the argument, for a call that cannot be right.
        """
        steps = self.defaults.steps if steps is None else steps
        guidance = self.defaults.guidance if guidance is None else guidance
        height, width = height or self.defaults.height, width or self.defaults.width
        self._check(prompt, images, guidance, height, width, negative_prompt)
        config, weight = self.transformer.config, self.transformer.image_in.weight
        latent_shape = (config.latent_channels, height // self.autoencoder.downscale,
                        width // self.autoencoder.downscale)
        if noise is None:
            noise = starting_noise(seed, images, latent_shape)
        elif tuple(noise.shape) != (images, *latent_shape):
            raise ValueError(f"noise must have the shape {(images, *latent_shape)}, got {tuple(noise.shape)}")
        noise = noise.to(weight.device, torch.float32)

        prompts, distilled = [prompt], None
        if config.guidance_embedding:
            distilled = torch.full((images,), guidance, device=weight.device)
        elif guidance is not None and guidance > 1:
            prompts = [negative_prompt or "", prompt]  # both branches in one batch, the unconditional one first
        encoded = [self.text(p) for p in prompts]
        context, pooled = (repeat(torch.cat(parts), "g ... -> (g images) ...", images=images)
                           for parts in zip(*encoded, strict=True))
        reference = None if image is None else self._encode(image, len(prompts) * images)

        def velocity(x: Tensor, sigma: float, step: int) -> Tensor:
            groups = len(prompts)
            v = self.transformer(
                repeat(x, "b ... -> (g b) ...", g=groups), torch.full((groups * images,), sigma, device=x.device),
                context, pooled, distilled, reference,
                repulsion if repulsion is not None and step < repulsion.steps else None, groups,
            ).float()
            if groups == 1:
                return v
            unconditional, conditional = v.chunk(2)
            return unconditional + guidance * (conditional - unconditional)

        latent = euler(velocity, noise, self.sigmas(steps, height, width), progress)
        return [to_picture(x) for x in self.autoencoder.decode(latent.to(weight.dtype)).float()]

    def sigmas(self, steps: int, height: int, width: int) -> Tensor:
        """The checkpoint's own schedule for pictures of this size in pixels: (steps + 1,)."""
        if self.text.family == "sd3":
            return sigmas(steps, shift=self.shift, spacing="sd3")
        tokens = (height // self.multiple) * (width // self.multiple)
        return sigmas(steps, image_tokens=tokens) if self.shift is None else sigmas(steps, shift=self.shift)

    def _encode(self, picture: Image.Image, batch: int) -> Tensor:
        """Kontext's reference picture as a latent, sides cut down to legal multiples: (batch, c, H', W')."""
        sides = [side // self.multiple * self.multiple for side in picture.size]
        pixels = torch.frombuffer(bytearray(picture.convert("RGB").resize(sides).tobytes()), dtype=torch.uint8)
        weight = self.transformer.image_in.weight
        pixels = rearrange(pixels, "(y x c) -> 1 c y x", y=sides[1], c=3).to(weight) / 127.5 - 1
        return repeat(self.autoencoder.encode(pixels), "1 ... -> b ...", b=batch)

    def _check(self, prompt, images, guidance, height, width, negative_prompt) -> None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError("the prompt is empty: say what the pictures should show")
        if images < 1:
            raise ValueError(f"images must be at least 1, got {images}")
        for name, side in (("height", height), ("width", width)):
            if side < 1 or side % self.multiple:
                near = max(1, round(side / self.multiple)) * self.multiple
                raise ValueError(f"{name} {side} is no multiple of {self.multiple}: the nearest that works is {near}")
        if self.transformer.config.guidance_embedding and guidance is None:
            raise ValueError("this checkpoint was distilled with guidance: pass a guidance scale, such as 3.5")
        if guidance is not None and not 0 <= guidance < float("inf"):
            raise ValueError(f"guidance must be a finite number, 0 or more, got {guidance}")
        without = self.transformer.config.guidance_embedding or guidance is None or guidance <= 1
        if negative_prompt is not None and without:
            raise ValueError("negative_prompt needs classifier-free guidance: a guidance above 1, and a checkpoint "
                             "without a guidance embedding")


def usable_device(name: str | torch.device) -> torch.device:
    """The device of this name. Raises ValueError where this machine or this build of torch has none such."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(name)!r} cannot be used here: {str(error).splitlines()[0]}") from error


def find_defaults(folder: Path, transformer: MMDiT) -> Defaults:
    """From the folder's `sampling.json` (embedded checkpoints), else by the sizes and name of a public one."""
    if (folder / "sampling.json").is_file():
        found = read_json(folder / "sampling.json")
        if found.get("repulsion"):
            found["repulsion"] = Repulsion(**found["repulsion"])
        return Defaults(**found)
    for name, defaults in PUBLIC.items():
        if PRESETS[name] == transformer.config:
            turbo = name == "sd3.5-large" and "turbo" in folder.resolve().name.lower()
            return PUBLIC["sd3.5-large-turbo"] if turbo else defaults
    if transformer.config.position == "rope":
        return PUBLIC["flux1-dev" if transformer.config.guidance_embedding else "flux1-schnell"]
    return PUBLIC["sd3-medium"]


def read_json(file: Path) -> dict:
    """A JSON file's contents. Raises FileNotFoundError or ValueError naming the file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: download the checkpoint's folder again")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no valid JSON: {error}") from error


def to_picture(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], clipped → an RGB picture of 8 bits."""
    pixels = rearrange(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().cpu(), "c y x -> y x c").contiguous()
    return Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), bytes(pixels.untyped_storage()))
