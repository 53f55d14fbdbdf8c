"""PORTING.md: the walk through a kit, made of a frame and of the manifest's rows."""

from itertools import groupby
from typing import Any

from .run import Run

FRAME = """\
# Porting {model}, from “{prompt}” to pictures

This folder holds one run of `{model}`, tensor by tensor. Follow it from top to bottom in your own language or library,
and after each stage you know whether you are right.

- `kit.safetensors`: {count} tensors by name. The numbers are those of a run in float64, rounded to float32 once; what
  is float64 in the tables is computed in float64 in any run, or should be.
- `manifest.json`: the same list as below for programs, in order, and under `run` every size and setting.
- The weights are not here but in the checkpoint itself, in its own names; `weights/names_*.py` says, a row each, which
  of them is which module of `mmdit/`, where each formula below stands as code.

## How to go about it

1. Take one stage at a time, and feed it what its column *from* names, **out of the kit**, not what your own code
   made: then an error in one stage cannot reach another, and each deviation is where it shows.
2. Save what you have under the names of the tables, any part of it, as .safetensors or .npz (`numpy.savez`), and

       python -m porting check {folder} yours.npz

   compares stage by stage, names the first deviation and, where it recognizes a mistake by its result, the mistake.
3. When every stage passes alone, chain them, from the prompt and `noise`, and check once more.

*Tolerance* is the relative deviation ‖yours − kit‖ / ‖kit‖ that is still rounding: {margin} times what the program that
wrote the kit deviates by when it computes in float32, and no less than {margin} roundings of float32. For whole
numbers it is the root mean square of the difference: ids must be the same, of the pixels one in a hundred may be off
by a level.

## Conventions

Letters: b samples, g branches, n context tokens, m image tokens, d width, h heads, k head width, c latent channels, p
patch side. Tensors are row-major; (h k) is one axis in which k runs fastest. A linear layer is W x + b with W of shape
(out, in). SiLU(x) = x / (1 + e⁻ˣ). GELU's tanh form is x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))). LayerNorm without
weights of its own has mean 0 and variance 1 (of all d, not d − 1) over the last axis; RMSNorm divides by the root mean
square alone and multiplies with a weight.

## This run

{settings}

The batch of the transformer holds {batch} samples, {branches}. Its inside is that of step {step}, the first in
which samples repel each other; they do so in steps {step} to {last} and blocks {blocks}.
"""

ABOUT = {
    "tokens": "Each text encoder has a tokenizer of its own, whose files are beside the weights. Code: "
              "`mmdit/tokenizers.py`.",
    "text encoders": "All prompts go through each text encoder, padded to its full length. Code: `mmdit/clip.py`, "
                     "`mmdit/t5.py`; sizes: `config.json` of each.",
    "conditioning": "What the transformer reads of the prompts: a sequence and a vector. Code: "
                    "`sampler/conditioning.py`.",
    "start": "Noise at σ = 1, and the noise levels on the way to 0. Code: `sampler/schedule.py`.",
    "embedding": "Into the transformer: each prompt's tensors repeated for each of its samples, the latent for each "
                 "prompt. Noise level and pooled vector become one vector that steers every block. Code: "
                 "`mmdit/model.py`, `mmdit/layers.py`, `mmdit/position.py`.",
    "dual": "A dual-stream block: context and image have layers of their own and meet in one attention. Code: "
            "`mmdit/blocks.py`, `mmdit/attention.py`.",
    "single": "A single-stream block: context and image as one sequence, attention and MLP side by side. Code: "
              "`mmdit/blocks.py`.",
    "repulsion": "Here the samples push each other's tokens apart. Code: `repulsion/solvers.py`.",
    "velocity": "Out of the transformer: the image's tokens become the velocity (noise − picture) of each prompt. "
                "Code: `mmdit/model.py`.",
    "guidance": "The velocities of both prompts become one. Code: `sampler/pipeline.py`.",
    "steps": "Euler's method along the noise levels. Each later step runs the whole transformer again. Code: "
             "`sampler/schedule.py`.",
    "image": "From the last latent to pixels. Code: `mmdit/autoencoder.py`, `sampler/pipeline.py`.",
}


def page(run: Run, rows: list[dict[str, Any]], folder: str, margin: int) -> str:
    """The page as Markdown; `rows` as in manifest.json."""
    r, guided = run.repulsion, len(run.prompts) > 1
    settings = {"prompts": " and ".join(f"“{prompt}”" for prompt in run.prompts), "images": run.images,
                "steps": run.steps, "seed": run.seed, "guidance": run.guidance, "size": f"{run.height} × {run.width}",
                "text encoders": ", ".join(run.encoders), "transformer": f"`{run.transformer}`",
                "autoencoder": f"`{run.autoencoder}`", "repulsion": f"`{r}`"}
    branches = f"{run.images} of each prompt, all of the negative one first" if guided else "one for each picture"
    parts = [FRAME.format(
        model=run.model, prompt=run.prompts[-1], count=len(rows), folder=folder, margin=margin, branches=branches,
        settings="\n".join(f"- {name}: {value}" for name, value in settings.items()), step=run.step,
        last=run.step + r.steps - 1, batch=run.images * len(run.prompts),
        blocks=r.blocks if isinstance(r.blocks, str) else ", ".join(map(str, r.blocks)),
    )]
    seen: set[str] = set()
    for stage, group in groupby(rows, key=lambda row: row["stage"]):
        group = list(group)
        kind = "repulsion" if stage.endswith("repulsion") else stage.partition(".")[0]
        parts.append(f"## {stage}, continued\n" if stage in seen else f"## {stage}\n\n{ABOUT[kind]}\n")
        parts.append("| tensor | shape | formula | from | tolerance |\n|---|---|---|---|---|")
        parts += [line(row) for row in group]
        parts += ["", *mistakes(group)]
        seen.add(stage)
    return "\n".join(parts)


def line(row: dict[str, Any]) -> str:
    """A tensor's line of its stage's table."""
    inputs = ", ".join(f"`{name}`" for name in row["inputs"])
    shape = " × ".join(map(str, row["shape"]))
    return f"| `{row['name']}` | {shape} {row['dtype']} | {row['formula']} | {inputs} | {row['tolerance']:.1e} |"


def mistakes(rows: list[dict[str, Any]]) -> list[str]:
    """What goes wrong in a stage, tensors of the same causes in one line."""
    together: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        together.setdefault(tuple(row["causes"]), []).append(f"`{row['name']}`")
    lines = [f"- {' … '.join((names[0], names[-1])) if len(names) > 4 else ', '.join(names)}: {'; '.join(causes)}"
             for causes, names in together.items() if causes]
    return ["What goes wrong:", "", *lines, ""] if lines else []
