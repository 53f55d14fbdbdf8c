"""The tensors of a kit in the order of computation: name, formula, inputs and usual mistakes of each."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import mistakes as m
from .blocks import blocks, modulated, modulation
from .entry import Cause, Entry, Tensors
from .run import Run

BATCH = Cause("samples in another order: all of the first prompt, then all of the second")


def entries(run: Run) -> list[Entry]:
    """All tensors of a run's kit. Those inside the transformer are of the step `run.step`."""
    steps = [*euler_steps(run)]
    return [*text(run), *start(run), *steps[: run.step], *embedding(run), *blocks(run), *velocity(run),
            *steps[run.step :], *image(run)]


def latent_at(step: int) -> str:
    """The name of the latent at the start of a step."""
    return f"latent.{step}" if step else "noise"


def text(run: Run) -> Iterator[Entry]:
    sd3 = run.transformer.position == "table"
    for role in run.encoders:
        pad, formula = "that of tokenizer_config.json, or the end token", "start token, lower-cased words, end token"
        if role == "t5":
            pad, formula = "<pad>", "pieces, end token"
        yield Entry(f"{role}.ids", "tokens", f"{formula}, padding; a row for each prompt", (), (
            Cause(f"another pad token: it is {pad}", lambda k, own: m.other_pad(own, k["theirs"])),
            Cause("start or end token: T5 has no start token, CLIP has both"),
        ))
    for role in run.encoders:
        if role == "t5":
            yield Entry("t5.states", "text encoders", "the last layer's states after the final norm", ("t5.ids",), (
                Cause("scores divided by √k: T5 does not divide"), Cause("padding masked: T5 attends to it here"),
                Cause("LayerNorm in place of RMSNorm, or its eps (1e-6)"), Cause("exact GELU: it is the tanh form"),
                Cause("the buckets of key − query: half of them for keys after the query, one table for all layers"),
            ))
            continue
        layers = (Cause("the activation, see config.json: quick_gelu is x · sigmoid(1.702 x), gelu is the exact GELU"),
                  Cause("no causal mask: a token attends to itself and earlier ones"), Cause("LayerNorm's eps (1e-5)"))
        if sd3:
            yield Entry(f"{role}.penultimate", "text encoders", "the states that enter the last layer, not normalized",
                        (f"{role}.ids",), (*layers, Cause("the last layer's states, or the final norm applied")))
        yield Entry(f"{role}.pooled", "text encoders", "the last layer's state at the first end token, after the final "
                    "norm" + ", projected (no bias)" * sd3, (f"{role}.ids",), (
            Cause("taken at another token: it is the first end token"),
            Cause("projected, or not: SD3's are, FLUX.1's is not"), *layers,
        ))


def start(run: Run) -> Iterator[Entry]:
    clips = [role for role in run.encoders if role != "t5"]
    if run.transformer.position == "table":
        states = (*(f"{role}.penultimate" for role in clips), *(("t5.states",) if "t5" in run.encoders else ()))
        formula = "the CLIPs' states concatenated along the width, zeros up to T5's width; then T5's tokens" + (
            "" if "t5" in run.encoders else ", which are zeros")
        yield Entry("context", "conditioning", formula, states, (
            Cause("T5's tokens before CLIP's", lambda k, own: own.roll(-k[states[0]].shape[1], 1)),
            Cause("the CLIPs in the other order, or the zeros not at the end"),
        ))
    else:
        yield Entry("context", "conditioning", "T5's states", ("t5.states",))
    pooled = tuple(f"{role}.pooled" for role in clips)
    yield Entry("pooled", "conditioning", "the pooled vectors of the CLIPs, concatenated", pooled, (
        Cause("the CLIPs in the other order", lambda k, own: torch.cat([k[name] for name in pooled[::-1]], -1)),
    ))
    yield Entry("noise", "start", "standard normal: take it from the kit", (), (
        Cause("other noise: no other library draws the same from a seed, so take the kit's"),
    ))
    times = torch.linspace(1, 0, run.steps + 1, dtype=torch.float64)
    if run.transformer.position == "table":
        formula = (f"s(t) = {run.shift:g} t / (1 + {run.shift - 1:g} t): s of {run.steps} evenly spaced times from 1 "
                   "to s(1/1000), then 0")
    else:
        formula = f"s t / (1 + (s − 1) t) of {run.steps + 1} evenly spaced times t from 1 to 0, " + (
            f"s = {run.shift:g}" if run.shift else "log s on a line from 0.5 at 256 image tokens to 1.15 at 4096")
    unshifted = torch.cat([torch.linspace(1, 1e-3, run.steps, dtype=torch.float64), times[-1:]])
    yield Entry("sigmas", "start", formula, (), (
        Cause("σ not shifted", lambda k, own: times),
        Cause("σ not shifted, its last but one 1/1000", lambda k, own: unshifted),
        Cause("times that end at 0: SD3's end at the shifted 1/1000, are shifted again, and then comes 0",
              lambda k, own: (run.shift or 1) * times / (1 + ((run.shift or 1) - 1) * times)),
        Cause("σ in thousandths: it runs from 1 to 0", lambda k, own: 1000 * own),
        Cause("σ rising: it falls", lambda k, own: own.flip(0)),
    ))


def time_causes(level: Callable[[Tensors], Tensor]) -> tuple[Cause, ...]:
    """Mistakes in the features of a level, which is σ or the guidance."""
    return (
        Cause("sines before cosines", lambda k, own: own.roll(128, -1)),
        Cause("σ for 1000 σ", lambda k, own: m.features(level(k), per_unit=1).expand_as(own)),
        Cause("1000 σ times 1000", lambda k, own: m.features(level(k), per_unit=1e6).expand_as(own)),
        Cause("1 − σ for σ", lambda k, own: m.features(1 - level(k)).expand_as(own)),
        Cause("frequencies 10000^(−j/127): it is −j/128", lambda k, own: m.features(level(k), last=1).expand_as(own)),
    )


def embedding(run: Run) -> Iterator[Entry]:
    config, latent = run.transformer, latent_at(run.step)
    p, table, guided = config.patch_size, config.position == "table", config.guidance_embedding
    yield Entry("time_in.in", "embedding", f"cos, then sin of 1000 σ · 10000^(−j/128), j = 0 … 127; σ = "
                f"sigmas[{run.step}]", ("sigmas",), time_causes(lambda k: k["sigmas"][run.step, None]))
    if guided:
        yield Entry("guidance_in.in", "embedding", f"the same of 1000 · {run.guidance:g}, the guidance", (),
                    time_causes(lambda k: torch.tensor([run.guidance])))
    more = ("guidance_in.in",) if guided else ()
    yield Entry("dual.0.vector.in", "embedding", "time_in(features) + pooled_in(pooled)" + " + guidance_in(features)"
                * guided + ", each W SiLU(W x + b) + b", ("time_in.in", *more, "pooled"), (
        Cause("another activation between the two layers, or none: it is SiLU"), BATCH,
    ))
    yield Entry("context_in.out", "embedding", "W context + b", ("context",), (BATCH,))
    yield Entry("image_in.in", "embedding", "patches of the latent, row by row, each as (c p q)", (latent,), (
        *(Cause(f"a patch's values as ({order}): they are (c p q)", lambda k, own, order=order:
                m.patches(k[latent], order, p).repeat(len(run.prompts), 1, 1)) for order in ("p q c", "c q p")),
        Cause("patches column by column: they go row by row"), BATCH,
    ))
    yield Entry("image_in.out", "embedding", "W patch + b", ("image_in.in",), (
        Cause("the convolution's weight (d, c, p, p) flattened in another order than the patch: (c p q)"),
    ))
    if not table:
        yield Entry("dual.0.rope.in", "embedding", "cos, then sin of the angles position · θ^(−2j/w), side by side for "
                    f"the axes (picture, row, column) with w = {', '.join(map(str, config.rope_axes))}; j < w/2, "
                    f"θ = {config.rope_theta}; the position of context tokens is 0, 0, 0", (), (
            Cause("sin before cos", lambda k, own: own.flip(0)), Cause("rows and columns swapped"),
            Cause("context tokens numbered: all are at position 0"), Cause("θ, or the axes"),
        ))
    yield Entry("dual.0.context.in", "embedding", "context_in.out", ("context_in.out",))
    yield Entry("dual.0.image.in", "embedding", "image_in.out" + " + the middle rows × columns of the position table"
                * table, ("image_in.out",), (
        Cause("the position table cropped from its corner: it is cropped from its middle"),
        Cause("rows and columns of the table swapped"), Cause("no position added", lambda k, own: k["image_in.out"]),
    ) if table else ())


def velocity(run: Run) -> Iterator[Entry]:
    config, p = run.transformer, run.transformer.patch_size
    single = config.num_single_blocks
    last = f"single.{single - 1}.tokens.out" if single else f"dual.{config.num_dual_blocks - 1}.image.out"
    yield modulation("velocity", "final_modulation", 2)
    yield modulated("velocity", "image_out.in", "final_modulation", "the image's tokens", (last,),
                    lambda k: k[last][:, -k["image_in.in"].shape[1] :])
    yield Entry("image_out.out", "velocity", "W x + b, the values of each patch as (c p q)", ("image_out.in",), (
        Cause("rows as (p q c), as SD3's files store them: reorder them to (c p q)", lambda k, own: m.patches(
            m.picture(own, k["noise"], "c p q", p), "p q c", p)),
    ))
    branches = ("unconditional", "conditional")[-len(run.prompts) :]
    for i, branch in enumerate(branches):
        def put(k: Tensors, order: str, i: int = i) -> Tensor:
            return m.picture(k["image_out.out"].chunk(len(branches))[i], k["noise"], order, p)

        other = f"velocity.{branches[len(branches) - 1 - i]}"
        yield Entry(f"velocity.{branch}", "velocity", f"the patches put together; the samples of prompt {i + 1}",
                    ("image_out.out",), (
            *(Cause(f"a patch's values taken as ({order}): they are (c p q)",
                    lambda k, own, order=order, put=put: put(k, order)) for order in ("p q c", "c q p")),
            Cause("the branches swapped: the first prompt comes first", lambda k, own, other=other: k[other]),
            Cause("the other sign: velocity is noise − picture", lambda k, own: -own),
        ))
    if len(branches) == 1:
        yield Entry("velocity.guided", "guidance", "the same: no classifier-free guidance", ("velocity.conditional",))
        return
    u, c = "velocity.unconditional", "velocity.conditional"
    formula = f"unconditional + {run.guidance:g} (conditional − unconditional)"
    yield Entry("velocity.guided", "guidance", formula, (u, c), (
        Cause("the branches swapped in the guidance", lambda k, own: k[c] + run.guidance * (k[u] - k[c])),
        Cause("added to the conditional velocity, not to the unconditional",
              lambda k, own: k[c] + run.guidance * (k[c] - k[u])),
        Cause("no guidance", lambda k, own: k[c]),
    ))


def euler_steps(run: Run) -> Iterator[Entry]:
    repels = f"{run.step} … {run.step + run.repulsion.steps - 1}"
    for step in range(run.steps):
        x, name, here = latent_at(step), f"latent.{step + 1}", step == run.step
        formula = f"{x} + (sigmas[{step + 1}] − sigmas[{step}]) · " + (
            "velocity.guided" if here else f"the guided velocity of {x}")
        yield Entry(name, "steps", formula, (x, "sigmas", *(("velocity.guided",) if here else ("context", "pooled"))), (
            Cause("a step the wrong way: σ falls, the difference is negative", lambda k, own, x=x: 2 * k[x] - own),
            Cause("a step of σ, not of the difference to the next σ"),
        ) if here else (
            Cause(f"repulsion in other steps: it acts in {repels}"), Cause("another step's σ in the features"),
        ))


def image(run: Run) -> Iterator[Entry]:
    scaling, shift, last = run.autoencoder.scaling, run.autoencoder.shift, f"latent.{run.steps}"
    yield Entry("decoder.in", "image", f"latent / {scaling:g} + {shift:g}", (last,), (
        Cause("the shift added before the division", lambda k, own: (k[last] + shift) / scaling),
        Cause("multiplied with the scaling, as in encoding", lambda k, own: k[last] * scaling + shift),
        Cause("the shift subtracted, as in encoding", lambda k, own: k[last] / scaling - shift),
        Cause("neither scaling nor shift", lambda k, own: k[last]),
    ))
    yield Entry("image", "image", "the decoder's output, about −1 … 1", ("decoder.in",), (
        Cause("rows and columns swapped", lambda k, own: own.mT),
        Cause("channels as blue, green, red", lambda k, own: own.flip(1)),
        Cause("GroupNorm: a group is consecutive channels, eps is 1e-6"),
        Cause("upsampling: values are repeated, then convolved"),
        Cause("the attention: it has one head, its scores are divided by √channels"),
    ))
    yield Entry("pixels", "image", "round((clip(image, −1, 1) + 1) · 127.5) as (rows, columns, channels)", ("image",), (
        Cause("truncated: it is rounded",
              lambda k, own: ((k["image"].clamp(-1, 1) + 1) * 127.5).floor().movedim(1, -1)),
        Cause("not clipped before the conversion to 8 bits"),
    ))
