"""`record`: a run of a pipeline, and by name every tensor of it that a port is compared with."""

from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from mmdit import trace
from mmdit.trace import PARTS
from repulsion import Repulsion, solvers
from repulsion.kernel import cosine_kernel
from repulsion.objectives import density_matrix
from repulsion.repel import gram_matrix
from sampler import Pipeline
from sampler.methods import Method
from sampler.schedule import Velocity, denoise

from .run import Run
from .stages import entries


@dataclass(frozen=True)
class Watch(Method):
    """Plain sampling that records the noise levels, the latent at each of them, and the velocity of each step."""

    latents: list[Tensor] = field(default_factory=list)
    velocities: list[Tensor] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)

    def denoise(self, velocity: Velocity, noise: Tensor, sigmas: Tensor, progress: str | None = None) -> Tensor:
        def watched(x: Tensor, sigma: float, step: int) -> Tensor:
            self.latents.append(x)
            self.velocities.append(velocity(x, sigma, step))
            return self.velocities[-1]

        self.sigmas.extend(sigmas.tolist())
        self.latents.append(denoise(watched, noise, sigmas, progress))
        return self.latents[-1]


@torch.no_grad()
def record(pipeline: Pipeline, run: Run) -> dict[str, Tensor]:
    """Generate the pictures of a run, and return the tensors that `stages.entries` lists, in its order.

    Raises ValueError where the repulsion acts in no block whose tensors the kit holds.
    """
    watch, text = Watch(), pipeline.text
    parts = [part for _, part in text.clips] + ([] if text.t5 is None else [text.t5[1]])
    wanted = {entry.name for entry in entries(run)} | {"context.in", "pooled.in", "velocity.out"}

    def only(name: str) -> bool:
        return len(passes) == run.step + 1 and (name in wanted or "modulation." in name)

    with ExitStack() as stack:
        ends = {"in", "out", "penultimate.out", "unprojected.out", "pooled.out"}.__contains__
        encoded = {role: stack.enter_context(trace(part.module, ends))
                   for role, part in zip(run.encoders, parts, strict=True)}
        passes = stack.enter_context(trace(pipeline.transformer, only))
        decoded = stack.enter_context(trace(pipeline.autoencoder, ("decoder.in", "decoder.out")))
        pictures = pipeline(run.prompts[-1], run.images, steps=run.steps, seed=run.seed, repulsion=run.repulsion,
                            method=watch)

    found = dict(passes[run.step])
    for role, of_prompts in encoded.items():
        for ours, theirs in (("ids", "in"), ("penultimate", "penultimate.out"), ("states", "out"),
                             ("pooled", "unprojected.out" if text.family == "flux" else "pooled.out")):
            if theirs in of_prompts[0]:
                found[f"{role}.{ours}"] = torch.cat([one[theirs] for one in of_prompts])
    found |= {name: found[f"{name}.in"][:: run.images] for name in ("context", "pooled")}
    found |= {"noise": watch.latents[0], "sigmas": torch.tensor(watch.sigmas)}
    for place in [name.removesuffix(".shift.out") for name in found if name.endswith("modulation.shift.out")]:
        vectors = [found.get(f"{place}.{part}.out") for part in PARTS]
        found[place] = torch.cat([vector for vector in vectors if vector is not None], dim=1)
    if run.pushed_block is not None:
        block = f"dual.{run.pushed_block}.repulsion"
        inside = inside_push(found[f"{block}.in"], run.repulsion, len(run.prompts))
        found |= {f"{block}.{name}": tensor for name, tensor in inside.items()}
    branches = found["velocity.out"].chunk(len(run.prompts))
    found |= {"velocity.unconditional": branches[0], "velocity.conditional": branches[-1],
              "velocity.guided": watch.velocities[run.step]}
    found |= {f"latent.{step}": latent for step, latent in enumerate(watch.latents)}
    # each picture is decoded in a pass of its own
    found |= {"decoder.in": torch.cat([one["decoder.in"] for one in decoded]),
              "image": torch.cat([one["decoder.out"] for one in decoded])}
    found["pixels"] = torch.from_numpy(np.stack(pictures))
    if absent := [entry.name for entry in entries(run) if entry.name not in found]:
        raise ValueError(f"the run has no {absent[0]}: the repulsion of a kit must push the context's tokens")
    return {entry.name: found[entry.name] for entry in entries(run)}


def inside_push(tokens: Tensor, r: Repulsion, groups: int) -> dict[str, Tensor]:
    """The intermediate tensors of the push of tokens (groups · B, n, d), all in float64: for each group that is pushed
    the Gram matrix, kernel, spectrum of K̃ and mixing matrix; for each sample the gradient before the first step."""
    if r.branches == "conditional":
        tokens, groups = tokens[-(len(tokens) // groups) :], 1
    c = rearrange(tokens, "(g b) n d -> g b n d", g=groups)
    vectors, gram = c.flatten(2).double(), gram_matrix(c)
    kernel = cosine_kernel(vectors)
    density = density_matrix(kernel, torch.eye(kernel.shape[-1], dtype=torch.float64), r.kernel_reg)
    gradient = torch.tensor(solvers.gradient_matrix(gram, r.objective, r.kernel_reg)) @ vectors
    mixing, _ = solvers.mixing_matrix(gram, r.strength, r.scale, r.iterations, r.objective, r.kernel_reg)
    return {"gram": torch.from_numpy(gram), "kernel": kernel, "spectrum": torch.linalg.eigvalsh(density),
            "gradient": gradient.view_as(c).flatten(0, 1), "mixing": torch.from_numpy(mixing)}
