"""`write` and `Kit`: the folder of reference tensors that a port is compared with; `record`: the run they are of."""

import json
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import mmdit.model
from mmdit import trace
from sampler import Pipeline, starting_noise
from sampler.folders import whole_folder

from . import files
from .evaluate import SCOPE, TRAPS, Weights, evaluate
from .page import page
from .stages import Entry, Run, Sheet, networks

MARGIN = 10  # the tolerance, relative to the deviation of our own run
ROUNDING = {"float32": 2.0**-24, "tf32": 2.0**-24, "bfloat16": 2.0**-9}  # the least deviation assumed of a run
FILES = r"kit\.safetensors|manifest\.json|PORTING\.md"
PROMPTS = "a circle", "a small green star"  # the default: two, so that their order is tested
TRACED = {"in": "ids", "layers.0.out": "layer_0", "penultimate.out": "penultimate", "out": "states",
          "pooled.out": "pooled", "unprojected.out": "unprojected"}  # of a text encoder


@dataclass(frozen=True)
class Kit:
    """A kit as read from its folder: the run, the manifest's row of each tensor (see `write`), and the tensors."""

    run: dict[str, Any]
    rows: list[dict[str, Any]]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> "Kit":
        """Raises FileNotFoundError or ValueError where `folder` holds no complete kit."""
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            kit = cls(manifest["run"], manifest["tensors"], files.read(folder / "kit.safetensors"))
            if {kit.entry(row).name for row in kit.rows} != {*kit.tensors}:
                raise ValueError("manifest.json and kit.safetensors do not list the same tensors")
        except FileNotFoundError as error:
            name = Path(error.filename or "kit.safetensors").name
            raise FileNotFoundError(f"{folder} is no kit, {name} is missing: write one with python -m porting write"
                                    ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder} is no kit that can be read ({error}): write it again") from error
        return kit

    @staticmethod
    def entry(row: dict[str, Any]) -> Entry:
        """What a row says of its tensor."""
        return Entry(*(row[name] for name in Entry._fields))


class Tf32(TorchFunctionMode):
    """Products of float32 as a GPU computes them in TF32: of operands with 11 significant bits."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.linear, F.conv2d, F.scaled_dot_product_attention, Tensor.matmul, Tensor.__matmul__):
            args = [(x.contiguous().view(torch.int32) + 4096 & -8192).view(torch.float32)
                    if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in args]
        return func(*args, **(kwargs or {}))


def write(folder: Path, model: str = "tiny-sd3", prompt: str | Sequence[str] = PROMPTS, images: int = 2,
          steps: int | None = None, overwrite: bool = False, **given: Any) -> list[dict[str, Any]]:
    """Write a kit: kit.safetensors, manifest.json and PORTING.md, all of them or none; returns the manifest's rows.

    The tensors are those of a run in float64, rounded to float32 once (what the program itself computes in float64,
    such as the kernel, stays float64); `images` of each prompt; `given` as in `Run.of`. `measured` are deviations of
    this program in float32, bfloat16 and TF32: of a whole run, and of each formula from the kit's inputs (fed). The
    `tolerance` is MARGIN times that, and at least MARGIN roundings: other orders of the same sums gave at most 2 times
    the measured deviation, ports to numpy and JAX 4. For latents it is the largest of all steps: in which step and
    sample earlier errors are amplified differs between runs of the same accuracy (16 samples, strength 4: 11 times).
    Raises FileExistsError where the folder exists, ValueError for a call that the pipeline refuses.
    """
    with whole_folder(folder, overwrite, ours=FILES) as claim:  # before anything is computed
        tensors, rows = {}, []
        for name in ("float64", *ROUNDING):
            dtype = getattr(torch, name, torch.float32)
            with Tf32() if name == "tf32" else nullcontext():
                pipeline = Pipeline.load(model, dtype=dtype, device="cpu", offload="blocks")
                weights = Weights(networks(model), dtype)
                run = Run.of(pipeline, model, prompt, images, steps=steps, **given)
                ours = record(pipeline, run, weights)
                if name == "float64":
                    exact = ours
                    rows = [entry._asdict() | {"measured": {}, "tolerance": {}} for entry in Sheet(run).entries]
                    continue
                tensors = tensors or {one: tensor.to(ours[one].dtype) for one, tensor in exact.items()}
                of_latents = max(deviation(x, tensors[one]) for one, x in ours.items() if one.startswith("latent"))
                for row in rows:
                    entry, weights.used, wanted = Kit.entry(row), [], tensors[row["name"]]
                    whole = of_latents if entry.stage == "steps" else deviation(ours[entry.name], wanted)
                    fed = deviation(evaluate(entry, tensors, weights), wanted) if entry.formula else whole
                    least = ROUNDING[name] if wanted.is_floating_point() else 0.01 * (entry.name == "pixels")
                    row["measured"][name] = {"whole": whole, "fed": fed}
                    row["tolerance"][name] = {"whole": MARGIN * max(whole, least), "fed": MARGIN * max(fed, least)}
                    row |= {"shape": list(wanted.shape), "dtype": str(wanted.dtype).removeprefix("torch.")}
                    row["weights"] = [f"`{theirs}`{f' ({TRAPS[how]})' if how in TRAPS else ''}" for theirs, how in
                                      dict.fromkeys(map(weights.named, weights.used))]
        manifest = json.dumps({"run": vars(run), "tensors": rows}, indent=1, ensure_ascii=False, default=vars)
        save_file({name: x.contiguous().clone() for name, x in tensors.items()}, claim.work / "kit.safetensors")
        (claim.work / "manifest.json").write_text(manifest + "\n", encoding="utf-8")
        (claim.work / "PORTING.md").write_text(page(run, rows, folder.name, MARGIN), encoding="utf-8")
    return rows


@torch.no_grad()
def record(pipeline: Pipeline, run: Run, weights: Weights | None = None) -> dict[str, Tensor]:
    """Paint a run's pictures, and return the tensors that its `Sheet` lists: of modules by `trace`, those between the
    modules by their formulas. The model computes timestep features in float32 whatever its dtype; with float64 that
    would be the largest error of all (3e-5 in cosines of angles up to 1000), so they are then computed in float64."""
    weights = weights or Weights(networks(run.model), pipeline.dtype)
    listed, own = {entry.name: entry for entry in Sheet(run).entries}, mmdit.model.timestep_features
    images, per = run.images, run.branches
    shape = pipeline.config.latent_channels, run.height // pipeline.downscale, run.width // pipeline.downscale
    noise = starting_noise(run.seed, run.samples // per, shape)
    encoders = pipeline.text.encoders

    def only(name: str) -> bool:
        return name == "latent.in" or name in listed and (len(passes) - 1) % run.steps == run.repulsion.start

    with ExitStack() as stack:
        if weights.dtype == torch.float64:
            stack.callback(setattr, mmdit.model, "timestep_features", own)
            mmdit.model.timestep_features = lambda t: torch.stack([SCOPE["features"](1000 * x) for x in t.double()])
        for part in (*pipeline.parts.values(), *(part for _, part in encoders.values())):
            stack.enter_context(part.used())  # or a later call would read it anew, without the hooks
        encoded = {role: stack.enter_context(trace(encoders[role][1].module, TRACED.__contains__))
                   for role in run.tokens}
        passes = stack.enter_context(trace(pipeline.transformer, only))
        decoded = stack.enter_context(trace(pipeline.autoencoder, lambda name: name in {*listed, "decoder.out"}))
        latents = [pipeline(prompt, images, steps=run.steps, guidance=run.guidance, height=run.height, width=run.width,
                            noise=part, repulsion=run.repulsion, decode=False)[0]
                   for prompt, part in zip(run.prompts[per - 1 :], noise.split(images), strict=True)]
        pictures = [picture for latent in latents for picture in pipeline.decode(latent)]
    found = {"sigmas": pipeline.sigmas(run.steps, run.height, run.width)}
    for role, of_prompts in encoded.items():  # a prompt in a pass; the negative one again in each call
        once = of_prompts[:per] + of_prompts[2 * per - 1 :: per]
        found |= {f"{role}.{TRACED[name]}": torch.cat([one[name] for one in once]) for name in once[0]}
    found |= {"clip_l.pooled": found["clip_l.unprojected"]} if not run.sd3 and "clip_l" in run.tokens else {}
    calls = [passes[i : i + run.steps] for i in range(0, len(passes), run.steps)]
    for step in range(run.steps):
        found[f"latent.{step}" if step else "noise"] = torch.cat([one[step]["latent.in"][:images] for one in calls])
    found[f"latent.{run.steps}"] = torch.cat(latents)
    inside = [one[run.repulsion.start] for one in calls]
    for name in inside[0]:  # the unconditional branch of all prompts first
        branches = zip(*(one[name].chunk(per) for one in inside), strict=True)
        found[name] = inside[0][name] if "rope" in name else torch.cat([x for branch in branches for x in branch])
    found |= {name: torch.cat([one[name] for one in decoded]) for name in decoded[0]}
    found |= {"image": found["decoder.out"], "pixels": torch.from_numpy(np.stack(pictures))}
    for name in [name for name in listed if name not in found]:
        found[name] = evaluate(listed[name], found, weights)
    return {name: found[name] for name in listed}


def deviation(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖; for whole numbers the root mean square of the difference."""
    scale = wanted.double().norm() if wanted.is_floating_point() else wanted.numel() ** 0.5
    return ((found.double() - wanted.double()).norm() / max(scale, 1e-300)).item()
