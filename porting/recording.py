"""`record`: a run of a pipeline, and by name every tensor of it that a port is compared with."""

from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from mmdit import trace
from mmdit.trace import PARTS
from repulsion import Repulsion, solvers
from repulsion.kernel import cosine_kernel
from repulsion.objectives import OBJECTIVES, density_matrix
from sampler import Pipeline
from sampler.methods import Method

from .run import Run
from .stages import entries


@dataclass(frozen=True)
class Watch(Method):
    """Plain sampling that remembers its latents, its noise levels and the velocities that it follows."""

    latents: list[Tensor] = field(default_factory=list)
    velocities: list[Tensor] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)

    def steer(self, x: Tensor, velocity: Tensor, sigma: float, next_sigma: float, step: int) -> Tensor:
        self.latents.append(x)
        self.velocities.append(velocity)
        self.sigmas[step:] = [sigma, next_sigma]
        return velocity

    def choose(self, predicted: Tensor, images: int, steps_left: int) -> None:
        if steps_left == 0:
            self.latents.append(predicted)  # x − σ v: the last step leads to σ = 0


@torch.no_grad()
def record(pipeline: Pipeline, run: Run) -> dict[str, Tensor]:
    """Paint the pictures of a run, and return the tensors that `stages.entries` lists, in its order."""
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
    for place in {name.rpartition(".modulation.")[0] + ".modulation" for name in found if ".modulation." in name}:
        found[place] = joined(found, place)
    found["final_modulation"] = joined(found, "final_modulation")
    if run.pushed_block is not None:
        block = f"dual.{run.pushed_block}.repulsion"
        inside = inside_push(found[f"{block}.in"], run.repulsion, len(run.prompts))
        found |= {f"{block}.{name}": tensor for name, tensor in inside.items()}
    branches = found["velocity.out"].chunk(len(run.prompts))
    found |= {"velocity.unconditional": branches[0], "velocity.conditional": branches[-1],
              "velocity.guided": watch.velocities[run.step]}
    found |= {f"latent.{step}": latent for step, latent in enumerate(watch.latents)}
    found |= {"decoder.in": decoded[0]["decoder.in"], "image": decoded[0]["decoder.out"]}
    found["pixels"] = torch.stack([torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
                                   .view(picture.height, picture.width, 3) for picture in pictures])
    if absent := [entry.name for entry in entries(run) if entry.name not in found]:
        raise ValueError(f"the run has no {absent[0]}: the repulsion of a kit must push the context's tokens")
    return {entry.name: found[entry.name] for entry in entries(run)}


def joined(found: dict[str, Tensor], place: str) -> Tensor:
    """A modulation's parts as one tensor (b, parts, d)."""
    return torch.cat([found[f"{place}.{part}.out"] for part in PARTS if f"{place}.{part}.out" in found], dim=1)


def inside_push(tokens: Tensor, repulsion: Repulsion, groups: int) -> dict[str, Tensor]:
    """What one push computes of its tokens (groups · B, n, d), all in float64: for each group that is pushed the Gram
    matrix, kernel, spectrum of K̃ and mixing matrix; for each sample the gradient of the entropy where it starts."""
    if repulsion.branches == "conditional":
        tokens, groups = tokens[-(len(tokens) // groups) :], 1
    objective, reg = OBJECTIVES[repulsion.objective], repulsion.kernel_reg
    vectors = rearrange(tokens.double(), "(g b) n d -> g b (n d)", g=groups)
    gram = solvers.gram_matrix(vectors)
    with torch.enable_grad():
        vectors.requires_grad_()
        kernel = cosine_kernel(vectors)
        (gradient,) = torch.autograd.grad(objective(density_matrix(kernel, reg)).sum(), vectors)
    kernel = kernel.detach()
    return {
        "gram": gram, "kernel": kernel, "spectrum": torch.linalg.eigvalsh(density_matrix(kernel, reg)),
        "gradient": rearrange(gradient, "g b (n d) -> (g b) n d", n=tokens.shape[1]),
        "mixing": solvers.mixing_matrix(gram, repulsion.scale, repulsion.iterations, objective, reg,
                                        repulsion.diversity),
    }
