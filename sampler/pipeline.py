"""`Pipeline`: a checkpoint on disk, then a prompt in and pictures out."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from einops import repeat
from PIL import Image
from torch import Tensor

from mmdit import Autoencoder, MMDiT, MMDiTConfig
from repulsion import Repulsion
from weights import Settings, Stored, inspect_checkpoint, open_part

from .conditioning import ChatEncoder, TextEncoders, find_text_encoders
from .defaults import check_fit, find_schedule, find_settings
from .guidance import GuidedVelocity, SkipLayerGuidance
from .methods import Method
from .parts import Part, compile_blocks, finite, load_sharded, load_streamed, usable_device
from .references import read_references
from .schedule import Schedule, starting_noise

# context and pooled vector (None in FLUX.2) of the prompts; latents of the references
Encoded = tuple[tuple[Tensor, Tensor | None], list[Tensor]]


class Plan(NamedTuple):
    """The arguments of a call, checked, and with what the checkpoint has in place of those left out."""

    guidance: float | None
    weight: float | None  # of classifier-free guidance
    references: list[Tensor]  # pixels (1, 3, H, W)
    height: int
    width: int
    sigmas: Tensor  # (steps + 1,)


class Pipeline:
    """Text encoders, transformer and autoencoder of one checkpoint, with its schedule and its defaults."""

    def __init__(self, transformer: Part, autoencoder: Part, text: TextEncoders | ChatEncoder, config: MMDiTConfig,
                 downscale: int, schedule: Schedule, defaults: Settings, dtype: torch.dtype, device: torch.device,
                 files: dict[str, str]):
        self.parts = {"transformer": transformer, "autoencoder": autoencoder}
        self.text = text
        self.config, self.downscale = config, downscale  # the transformer's; pixels for each latent, along a side
        self.schedule, self.defaults = schedule, defaults
        self.dtype, self.device = dtype, device  # that the transformer computes in
        self.files = files  # what it was taken for, and the file or folder of each part

    @classmethod
    def load(cls, name_or_path: str | Path | None = None, dtype: torch.dtype | None = None,
             device: str | torch.device | None = None, *, transformer: str | Path | None = None,
             autoencoder: str | Path | None = None, text_encoders: Sequence[str | Path] | None = None,
             tokenizers: str | Path | None = None, variant: str | None = None, shift: float | None = None,
             offload: Literal["parts", "blocks"] | None = None, keep_float8: bool = False,
             compile: bool = False, shard: bool = False) -> "Pipeline":
        """The pipeline of a bundled checkpoint (default: "tiny-sd3"), of a folder in the hub's layout or of original
        files, of an original or merged file, or of a name on the hub; single parts from elsewhere where given.

        Files are found and checked now (`weights.inspect_checkpoint`); weights are read when a part is first used.
        `dtype` is that of all networks. The default is bfloat16 on a GPU; on the CPU, the stored dtype of each network,
        whose tensors then stay in the mapped file (bundled checkpoints and autoencoders: float32). T5 and FLUX.2's
        text encoder are never float16. `device` defaults to the GPU where there is one. `variant` is the public
        checkpoint whose settings count, `shift` the schedule's. `offload`: "parts", text encoders, transformer and
        autoencoder are in memory one at a time; "blocks", moreover the blocks of transformer and text encoders stay in
        the CPU's memory, in their stored dtype, and are copied to the GPU one by one. `keep_float8`: keeps float8
        weights in float8 and widens them as they are used. `compile`: the transformer's blocks are compiled when they
        first run, which takes a minute and a C++ compiler. `shard`: the parameters of transformer and text encoders are
        spread over the ranks of `torch.distributed`, which then make all calls together (`sampler.ranks`).
        Raises FileNotFoundError for a part that is not there or was refused, with the reason, and
        `weights.CheckpointError` (a ValueError) for a file of another model, and for parts that do not fit together.
        """
        if offload not in (None, "parts", "blocks"):
            raise ValueError(f'offload must be "parts" or "blocks", got {offload!r}')
        if compile and offload == "blocks":
            raise ValueError("compile needs blocks that stay on the device: leave it out, or offload parts")
        if shard and not dist.is_initialized():
            raise ValueError("shard spreads parameters over several processes: start the program with torchrun")
        if shard and (compile or offload == "blocks"):
            raise ValueError("shard gathers a block's parameters for its call: leave out compile and offload blocks")
        if not isinstance(dtype, torch.dtype | None):
            raise ValueError(f"dtype must be one of torch's, such as torch.bfloat16, got {dtype!r}")
        if name_or_path is None and transformer is None:
            name_or_path = "tiny-sd3"
        device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        found = inspect_checkpoint(name_or_path, transformer=transformer, autoencoder=autoencoder, variant=variant,
                                   text_encoders=text_encoders, tokenizers=tokenizers, download=True)
        found.check()
        stored = {role: open_part(part, family=found.family) for role, part in found.parts.items()}
        check_fit(stored)
        settings, free = find_settings(found), offload is not None
        main, vae = stored.pop("transformer"), stored.pop("autoencoder")
        wide = torch.float32 if device.type == "cpu" else torch.bfloat16
        if dtype is None and (settings.world or device.type != "cpu"):
            dtype = wide
        load = partial(load_sharded if shard else load_streamed if offload == "blocks" else Stored.load, device=device,
                       keep_float8=keep_float8 or dtype is None)
        encoders = {}
        for role, network in stored.items():
            usual = dtype or network.dtype
            narrow = usual == torch.float16 and role in ("t5", "text")
            encoders[role] = Part(partial(load, network, dtype=torch.bfloat16 if narrow else usual), free)
        load_main = partial(load, main, dtype=dtype or main.dtype)
        text = find_text_encoders(found, encoders, main.config.context_dim, settings.prompt_tokens)
        return cls(transformer=Part(lambda: compile_blocks(load_main()) if compile else load_main(), free),
                   autoencoder=Part(partial(vae.load, dtype or wide, device), free), text=text, config=main.config,
                   downscale=vae.config.downscale, schedule=find_schedule(found, settings, shift), defaults=settings,
                   dtype=dtype or main.dtype, device=device,
                   files={"variant": f"{found.variant} ({found.told})" if found.told else found.variant,
                          **{role: str(part.path) for role, part in found.parts.items()}})

    @property
    def transformer(self) -> MMDiT:
        """The transformer, read now if it was not yet."""
        return self.parts["transformer"].module

    @property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder, read now if it was not yet."""
        return self.parts["autoencoder"].module

    @property
    def multiple(self) -> int:
        """The sides of a picture are multiples of this many pixels."""
        return self.downscale * self.config.patch_size

    @torch.no_grad()
    def __call__(self, prompt: str, images: int = 4, *, steps: int | None = None, guidance: float | None = None,
                 height: int | None = None, width: int | None = None, seed: int = 0, noise: Tensor | None = None,
                 negative_prompt: str | None = None, image: Image.Image | Sequence[Image.Image] | None = None,
                 true_guidance: float | None = None, skip_layer_guidance: SkipLayerGuidance | None = None,
                 repulsion: Repulsion | None = None, method: Method | None = None,
                 progress: str | None = None, encoded: Encoded | None = None,
                 decode: bool = True) -> list[Image.Image] | tuple[Tensor, Encoded]:
        """A batch of pictures of one prompt, repelling each other if `repulsion` is given.

        steps, guidance, height and width (pixels) default to the checkpoint's. The noise of picture i depends on
        `seed` and i alone; `noise` (images, c, height / 8, width / 8), in FLUX.2 a sixteenth, replaces it.
        `negative_prompt` is the prompt of the unconditional branch (default: empty). That guidance is `guidance` above
        1 with SD3 and FLUX.2-klein-base; with other FLUX, whose own was distilled into it, `true_guidance` above 1 and
        a negative prompt. `image`: the picture that FLUX.1-Kontext edits, or one or several for FLUX.2, resized as the
        original programs do (see `read_references`); height and width then default to the first one's, resized.
        `skip_layer_guidance` adds a third branch, in which some blocks are skipped (SD3.5-medium). The samples of each
        branch repel each other, those of the third as well. `method` is another way to make them differ, see
        `sampler.methods`, alone or beside repulsion; one that starts with more candidates than pictures takes as much
        `noise`. `progress` names a progress bar. Without `decode` the result is the latents, in the shape of the noise,
        for `Pipeline.decode`, and what prompts and pictures were encoded to, which another call with the same ones may
        be given as `encoded`.
        Raises ValueError naming the argument that is wrong, or the network that returned NaN or a flat picture.
        """
        method = method or Method()  # plain sampling
        guidance, weight, pixels, height, width, sigmas = self.plan(
            prompt, images, steps=steps, guidance=guidance, height=height, width=width, image=image, method=method,
            negative_prompt=negative_prompt, true_guidance=true_guidance, skip_layer_guidance=skip_layer_guidance)
        draw = partial(self._noise, seed=seed, height=height, width=width, noise=noise)
        prompts = [prompt] if weight is None else [negative_prompt or "", prompt]

        texts, references = encoded or (self.text(*prompts), [])
        if pixels and encoded is None:
            with self.parts["autoencoder"].used():  # no name here keeps it in memory afterwards
                dtype = next(self.autoencoder.parameters()).dtype
                references = [finite(self.autoencoder.encode(x.to(self.device, dtype)), "the autoencoder's encoder")
                              for x in pixels]
        noise = method.noise(draw, images)

        def condition(samples: int, sigma: float, step: int) -> tuple[Tensor, Tensor | None]:
            return tuple(None if text is None else repeat(text, "g ... -> (g b) ...", b=samples) for text in texts)

        with self.parts["transformer"].used():
            velocity = GuidedVelocity(
                transformer=self.parts["transformer"], condition=condition,
                steps=len(sigmas) - 1, weight=weight, references=references,
                distilled=guidance if self.config.guidance_embedding else None,
                repulsion=repulsion, skip_layers=skip_layer_guidance, seed=seed,
            )
            latent = method.denoise(method.velocity(velocity, sigmas), noise, sigmas, progress=progress)
        finite(latent, "the transformer", also=", or a lower guidance or strength")
        return self.decode(latent) if decode else (latent, (texts, references))

    def plan(self, prompt: str, images: int = 4, *, steps: int | None = None, guidance: float | None = None,
             height: int | None = None, width: int | None = None, negative_prompt: str | None = None,
             image: Image.Image | Sequence[Image.Image] | None = None, true_guidance: float | None = None,
             skip_layer_guidance: SkipLayerGuidance | None = None, method: Method | None = None) -> Plan:
        """A call's arguments, checked, before anything is computed. Raises ValueError naming the one that is wrong."""
        guidance = self.defaults.guidance if guidance is None else guidance
        pictures = [*image] if isinstance(image, (list, tuple)) else [] if image is None else [image]
        self._check(prompt=prompt, images=images, pictures=pictures, skip=skip_layer_guidance)
        weight = self._classifier_free(guidance=guidance, true_guidance=true_guidance, negative_prompt=negative_prompt,
                                       skip=skip_layer_guidance)
        (method or Method()).check(guided=weight is not None or self.config.guidance_embedding)
        pixels, size = [], (self.defaults.height, self.defaults.width)
        if pictures:
            pixels, size = read_references(pictures, self.text.family == "flux2", size[0] * size[1], self.multiple)
        height, width = self._size(*(usual if side is None else side
                                     for side, usual in zip((height, width), size, strict=True)), images)
        sigmas = self.sigmas(self.defaults.steps if steps is None else steps, height, width)
        return Plan(guidance, weight, pixels, height, width, sigmas)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> list[Image.Image]:
        """The pictures of latents (b, c, H, W). Raises ValueError where the autoencoder returns NaN or one color."""
        pictures = []
        with self.parts["autoencoder"].used() as autoencoder:
            dtype = next(autoencoder.parameters()).dtype
            for x in latent:  # one by one: decoding takes the most memory
                pixels = finite(autoencoder.decode(x[None].to(dtype))[0], "the autoencoder")
                pictures.append(to_picture(pixels.float()))
                if all(low == high for low, high in pictures[-1].getextrema()):
                    raise ValueError("the autoencoder returned a picture of a single color: try another dtype, and "
                                     "check its file with python -m weights FILE --check")
        return pictures

    def sigmas(self, steps: int, height: int, width: int) -> Tensor:
        """The checkpoint's own schedule for pictures of this size in pixels: (steps + 1,)."""
        return self.schedule.sigmas(steps, (height // self.multiple) * (width // self.multiple))

    def _noise(self, images: int, *, seed: int, height: int, width: int, noise: Tensor | None) -> Tensor:
        """The caller's noise or the seed's, on the transformer's device, float32."""
        shape = (self.config.latent_channels, height // self.downscale, width // self.downscale)
        if noise is None:
            noise = starting_noise(seed, images, shape)
        elif tuple(noise.shape) != (images, *shape):
            raise ValueError(f"noise must have the shape {(images, *shape)}, got {tuple(noise.shape)}")
        return noise.to(self.device, torch.float32)

    def _size(self, height: int, width: int, images: int) -> tuple[int, int]:
        """Height and width, checked."""
        table = self.config.position_table_size if self.config.position == "table" else None
        for name, side in (("height", height), ("width", width)):
            if side < 1 or side % self.multiple:
                near = max(1, round(side / self.multiple)) * self.multiple
                raise ValueError(f"{name} {side} is no multiple of {self.multiple}: the nearest that works is {near}")
            if table and side > table * self.multiple:
                raise ValueError(f"{name} {side}: this checkpoint's position table ends at {table} × {table} patches, "
                                 f"{table * self.multiple} pixels a side")
        noise = 4 * self.config.latent_channels // self.downscale**2  # bytes a pixel
        least = height * width * (images * (noise + 3) + 12)  # the noise, the pictures, one of them in float32
        if hasattr(os, "sysconf") and least > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            raise ValueError(f"images {images}, height {height} and width {width}: noise and pictures alone take "
                             f"{least >> 30:,} GiB, more than this machine has: ask for fewer or smaller pictures")
        return height, width

    def _check(self, prompt, images, pictures, skip) -> None:
        if not isinstance(prompt, str):
            raise ValueError(f"the prompt must be one text, got a {type(prompt).__name__}: a batch has one prompt")
        if not prompt.strip():
            raise ValueError("the prompt is empty: say what the pictures should show")
        if images < 1:
            raise ValueError(f"images must be at least 1, got {images}")
        for picture in pictures:
            if not isinstance(picture, Image.Image):
                raise ValueError(f"image must be a PIL image, got a {type(picture).__name__}: open the file with PIL")
        if pictures and not self.defaults.edits:
            raise ValueError("image: this checkpoint edits no pictures: leave it out, or load FLUX.1-Kontext, which is "
                             "recognized by kontext in the name of its file or folder, or by variant, or a FLUX.2 "
                             "(of klein-9B-kv's two attentions only the one without references is there)")
        if len(pictures) > 1 and self.text.family != "flux2":
            raise ValueError(f"image: FLUX.1-Kontext edits one picture, got {len(pictures)}: FLUX.2 takes several")
        if skip is not None and max(skip.layers) >= self.config.num_dual_blocks:
            raise ValueError(f"skip-layer guidance skips layer {max(skip.layers)}, but this model's dual-stream blocks "
                             f"end at {self.config.num_dual_blocks - 1}")

    def _classifier_free(self, guidance, true_guidance, negative_prompt, skip) -> float | None:
        """The weight of classifier-free guidance, or None for a call without it."""
        distilled = self.config.guidance_embedding
        # not so: SD3, FLUX.1 de-distilled, FLUX.2-klein-base
        flux = self.text.family != "sd3" and (distilled or self.defaults.guidance is None)
        for name, value in (("guidance", guidance), ("true_guidance", true_guidance)):
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number, 0 or more, got {value}")
        if distilled and guidance is None:
            raise ValueError("this checkpoint was distilled with guidance: pass a guidance scale, such as 3.5")
        if flux and not distilled and guidance is not None and guidance > 1:
            raise ValueError(f"guidance {guidance} has no meaning for a distilled FLUX without guidance embedding "
                             "(FLUX.1-schnell, FLUX.2-klein): leave it out, or pass true_guidance and a "
                             "negative_prompt")
        if true_guidance is not None and not flux:
            raise ValueError("true_guidance is for distilled FLUX: this checkpoint's guidance is classifier-free, pass "
                             "that")
        weight = true_guidance if flux else guidance
        guided = weight is not None and weight > 1
        if guided and flux and negative_prompt is None:
            raise ValueError('true_guidance needs a negative_prompt: pass one, or "" for nothing')
        for name, value in (("negative_prompt", negative_prompt), ("skip_layer_guidance", skip)):
            if value is not None and not guided:
                raise ValueError(f"{name} needs classifier-free guidance: a guidance above 1, with a "
                                 "distilled FLUX a true_guidance above 1")
        return weight if guided else None


def to_picture(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], clipped → an RGB picture of 8 bits."""
    pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.movedim(0, -1).numpy(force=True))
