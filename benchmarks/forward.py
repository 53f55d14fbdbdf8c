"""One forward pass against diffusers' with the same weights: `python -m benchmarks.forward [--compile]`.

Random transformers of the shapes of FLUX.1, SD3 and FLUX.2, at a quarter of their width and fewer blocks, 256 context
and 1024 image tokens, in float32 and bfloat16. Ours, ours with compiled blocks, and diffusers alternate on one thread
of one process; medians of the CPU time and their ratios are printed. Whole runs of the bundled checkpoints against
diffusers' pipelines on the same folders come last. Needs `pip install -c constraints.txt -e ".[test]"`.

`--device cuda` times passes in bfloat16 of four times that width and as many image tokens, as FLUX.1-dev has them at
1024 × 1024 pixels, by the clock on the wall, and leaves the bundled checkpoints out.

`--official FOLDER …` adds the official code, where the folders have it: `src` of black-forest-labs/flux and of
black-forest-labs/flux2, and Stability-AI/sd3.5. All calls get the same inputs, and their velocities must agree.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmdit import MMDiT
from mmdit.model import patchify
from sampler import Pipeline
from sampler.parts import compile_blocks
from weights import BUNDLED, load_transformer, save_transformer

from .solver import finished, milliseconds, show

HEADS = {"num_attention_heads": 6, "attention_head_dim": 128}
FLUX1 = diffusers.FluxTransformer2DModel, {**HEADS, "num_layers": 2, "num_single_layers": 4, "in_channels": 64,
                                           "joint_attention_dim": 512, "pooled_projection_dim": 256}
SD3 = diffusers.SD3Transformer2DModel, {
    "num_attention_heads": 12, "attention_head_dim": 64, "num_layers": 6, "in_channels": 16, "out_channels": 16,
    "sample_size": 64, "joint_attention_dim": 512, "caption_projection_dim": 768, "pooled_projection_dim": 256,
    "pos_embed_max_size": 96, "qk_norm": "rms_norm"}
FLUX2 = diffusers.Flux2Transformer2DModel, {**HEADS, "num_layers": 2, "num_single_layers": 4, "in_channels": 128,
                                            "joint_attention_dim": 512, "guidance_embeds": False}
MODELS = {"FLUX.1": FLUX1, "SD3": SD3, "FLUX.2": FLUX2}
OFFICIAL = {"FLUX.1": "flux.model", "SD3": "mmditx", "FLUX.2": "flux2.model"}  # modules
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative; found: 3e-7, 2e-3
SIDE, CONTEXT = 32, 256  # patches, tokens
WIDER = 4  # on a GPU, of the widths and the number of patches
WIDTHS = "num_attention_heads", "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim"


def inputs(config, dtype: torch.dtype, side: int) -> tuple[Tensor, ...]:
    """Latent, σ, context, pooled vector of one picture of side × side patches, for ours."""
    side = side * config.patch_size
    pooled = None if config.pooled_dim is None else torch.randn(1, config.pooled_dim, dtype=dtype)
    return (torch.randn(1, config.latent_channels, side, side, dtype=dtype), torch.full((1,), 0.5, dtype=dtype),
            torch.randn(1, CONTEXT, config.context_dim, dtype=dtype), pooled)


def sequence(latent: Tensor, patch: int, axes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Patches, their positions and the context's: (1, c, H, W) → (1, m, c · p · p), (m, axes), (n, axes)."""
    side = latent.shape[-1] // patch
    picture, text = torch.zeros(side, side, axes), torch.zeros(CONTEXT, axes)
    picture[..., 1], picture[..., 2] = torch.arange(side)[:, None], torch.arange(side)
    text[:, 3:] = torch.arange(CONTEXT)[:, None]
    return patchify(latent, patch), picture.flatten(0, 1), text


def theirs(model: nn.Module, patch: int, latent: Tensor, sigma: Tensor, context: Tensor,
           pooled: Tensor | None) -> Callable:
    """The same call of diffusers' transformer: a sequence of patches and their positions, or SD3's latent."""
    if isinstance(model, diffusers.SD3Transformer2DModel):
        return lambda: model(latent, context, pooled, 1000 * sigma)[0]
    flux2 = isinstance(model, diffusers.Flux2Transformer2DModel)
    tokens, picture, text = sequence(latent, patch, 4 if flux2 else 3)
    more = {} if flux2 else {"pooled_projections": pooled}
    return lambda: model(hidden_states=tokens, encoder_hidden_states=context, timestep=sigma, txt_ids=text,
                         img_ids=picture, **more)[0]


def official(name: str, ours: MMDiT, latent: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor | None) -> Callable:
    """The same call of the official code with our weights."""
    code, config = import_module(OFFICIAL[name]), ours.config
    if name == "SD3":
        linear = {"in_features": config.context_dim, "out_features": config.hidden_size}
        model = code.MMDiTX(None, in_channels=config.latent_channels, depth=config.num_heads, qk_norm="rms",
                            adm_in_channels=config.pooled_dim, pos_embed_max_size=config.position_table_size,
                            num_patches=config.position_table_size**2,
                            context_embedder_config={"target": "torch.nn.Linear", "params": linear})
        model.joint_blocks = model.joint_blocks[-config.num_dual_blocks :]  # MMDiTX made one per head
        given = latent, 1000 * sigma, pooled, context
    else:
        tokens, picture, text = sequence(latent, config.patch_size, len(config.rope_axes))
        sizes = {"in_channels": config.patch_dim, "context_in_dim": config.context_dim, "theta": config.rope_theta,
                 "hidden_size": config.hidden_size, "mlp_ratio": config.mlp_ratio, "num_heads": config.num_heads,
                 "depth": config.num_dual_blocks, "depth_single_blocks": config.num_single_blocks,
                 "axes_dim": config.rope_axes}
        if name == "FLUX.1":
            model = code.Flux(code.FluxParams(**sizes, out_channels=config.patch_dim, vec_in_dim=config.pooled_dim,
                                              qkv_bias=True, guidance_embed=False))
            given = tokens, picture[None], context, text[None], sigma, pooled
        else:
            model = code.Flux2(code.Flux2Params(**sizes, use_guidance_embed=False))
            given = tokens, picture[None], sigma, context, text[None], None
    with tempfile.TemporaryDirectory() as folder:
        save_transformer(ours, file := f"{folder}/x.safetensors")
        state = {key.removeprefix("model.diffusion_model."): tensor for key, tensor in load_file(file).items()}
    model.to(latent).load_state_dict(state)
    return lambda: model(*given)


def compare(name: str, dtype: torch.dtype, runs: int, compiled: bool, with_official: bool) -> list[str]:
    """A row: milliseconds of diffusers' forward pass; relative to it ours, eager and compiled, and the official one."""
    kind, sizes = MODELS[name]
    device = torch.get_default_device()
    side, clock = SIDE, time.process_time
    if device.type == "cuda":
        sizes = sizes | {name: WIDER * sizes[name] for name in WIDTHS if name in sizes}
        side, clock = SIDE * math.isqrt(WIDER), partial(finished, device)
    with tempfile.TemporaryDirectory() as folder:
        model = kind(**sizes).to(dtype).eval()
        model.save_pretrained(folder)
        ours = [load_transformer(folder, device=device) for _ in range(1 + compiled)]
        given = inputs(ours[0].config, dtype, side)
        if compiled:
            compile_blocks(ours[1])
        patch = ours[0].config.patch_size
        calls = [theirs(model, patch, *given), *(lambda ours=ours: ours(*given) for ours in ours)]
        if with_official and find_spec(OFFICIAL[name].partition(".")[0]):
            calls.append(official(name, ours[0], *given))
        with torch.no_grad():
            first, *rest = (x if x.ndim == 3 else patchify(x, patch) for x in (call() for call in calls))
            errors = [((x - first).norm() / first.norm()).item() for x in rest]
            assert max(errors) < TOLERANCE[dtype], f"{name}: the velocities differ by {errors}"
            base, *found = milliseconds(runs, *calls, clock=clock)
    return [name, str(dtype).removeprefix("torch."), f"{base:.0f}", *(f"{time / base:.2f}" for time in found)]


def whole_run(name: str, runs: int, compiled: bool) -> list[str]:
    """A row: a run of 8 pictures of a bundled checkpoint by diffusers, and ours relative to it."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(BUNDLED[name], dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    ours = [Pipeline.load(name, compile=compile) for compile in (False, True)[: 1 + compiled]]
    defaults = ours[0].defaults
    call = {"prompt": "a circle", "num_images_per_prompt": 8, "num_inference_steps": defaults.steps,
            "height": defaults.height, "width": defaults.width, "max_sequence_length": 24}
    call |= {} if defaults.guidance is None else {"guidance_scale": defaults.guidance}
    base, *found = milliseconds(runs, lambda: pipe(**call), *(lambda ours=ours: ours("a circle", 8) for ours in ours),
                                clock=time.process_time)
    return [name, "float32", f"{base:.0f}", *(f"{time / base:.2f}" for time in found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="ours compiled as well; needs a C++ compiler")
    parser.add_argument("--official", nargs="+", metavar="FOLDER", help="where the official code is to be found")
    parser.add_argument("--rows", nargs="+", choices=[*MODELS, *BUNDLED], default=[*MODELS, *BUNDLED])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    if missing := [folder for folder in args.official or [] if not Path(folder).is_dir()]:
        parser.error(f"--official {missing[0]}: no such folder")
    sys.path += args.official or []
    torch.set_default_device(args.device)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = [compare(name, dtype, args.runs, args.compile, bool(args.official)) for name in args.rows if name in MODELS
            for dtype in ([] if on_gpu else [torch.float32]) + [torch.bfloat16]]
    rows += [whole_run(name, args.runs, args.compile) for name in args.rows if name in BUNDLED and not on_gpu]
    columns = {"diffusers, ms": True, "ours": True, "ours, compiled": args.compile, "official": args.official}
    head = ["", "dtype", *(column for column, shown in columns.items() if shown)]
    show(" | ".join(head), [row + ["–"] * (len(head) - len(row)) for row in rows])


if __name__ == "__main__":
    main()
