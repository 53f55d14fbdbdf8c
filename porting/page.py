"""PORTING.md: the guide to a kit, made of a fixed text and of the manifest's rows."""

from itertools import groupby
from typing import Any

from .run import Run

FRAME = """\
# Porting {model}, from “{prompt}” to pictures

This folder holds one run of `{model}`, tensor by tensor. Work through it from top to bottom in your own language or
library, and check each stage before the next.

- `kit.safetensors`: {count} tensors by name. The values are those of a run in float64, rounded to float32 once; a
  tensor that is float64 in the tables is computed in float64 in every run, and should be in yours.
- `manifest.json`: the list below in machine-readable form, in order, and under `run` all sizes and settings.
- The weights are in the checkpoint, under the names of its own files; the tables in `weights/` map them to the modules
  of `mmdit/`, where each formula below stands as code.

## How to proceed

1. Take one stage at a time, and compute it from the tensors in its column *from*, **taken from the kit**, not from
   your own results: then an error in one stage does not reach the next, and each deviation appears where it arises.
2. Save your tensors, any part of them, under the names of the tables as .safetensors or .npz (`numpy.savez`), and run

       python -m porting check {folder} yours.npz

   It compares stage by stage, names the first deviation and, where it recognizes a mistake by its result, the mistake.
3. When every stage passes by itself, connect them, from the token ids and `noise` on, and check once more.

*Tolerance* is the largest relative deviation ‖yours − kit‖ / ‖kit‖ that counts as rounding: {margin} times the
deviation of a float32 run of the program that wrote the kit (for latents the largest of all steps), and at least
{margin} roundings of float32. For whole numbers it is the root mean square of the difference: ids must be equal, one in
a hundred pixel values may differ by 1.

## Conventions

Letters: b batch, g group, n context tokens, m image tokens, d width, h heads, k head width, c latent channels, p patch
side. Tensors are row-major; (h k) is one axis in which k runs fastest. A linear layer is W x + b with W of shape
(out, in). SiLU(x) = x / (1 + e⁻ˣ). GELU's tanh form is x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))). LayerNorm without
weights has mean 0 and variance 1 (divided by d, not d − 1) over the last axis; RMSNorm divides by the root mean square
and multiplies by a weight. In a push, B is the number of samples of a group.

## This run

{settings}

The transformer's batch has {batch} samples, {branches}. The tensors inside it are those of step {step} (from 0), the
first in which samples repel each other; they do so in steps {step} to {last} (blocks: {blocks}).
"""

ABOUT = {
    "tokens": "Each text encoder has a tokenizer of its own, whose files are beside the weights. Code: "
              "`mmdit/tokenizers.py`.",
    "text encoders": "Each text encoder encodes all prompts, padded to its full length. Code: `mmdit/clip.py`, "
                     "`mmdit/t5.py`; sizes: `config.json` of each.",
    "conditioning": "The inputs of the transformer that depend on the prompt: a sequence and a vector. Code: "
                    "`sampler/conditioning.py`.",
    "start": "Noise at σ = 1, and the noise levels down to 0. Code: `sampler/schedule.py`.",
    "embedding": "The inputs of the first block. Each prompt's tensors are repeated for its samples, the latent for "
                 "each prompt. Noise level and pooled vector become one vector that modulates every block. Code: "
                 "`mmdit/model.py`, `mmdit/layers.py`, `mmdit/position.py`.",
    "dual": "A dual-stream block: context and image have layers of their own and share one attention. Code: "
            "`mmdit/blocks.py`, `mmdit/attention.py`.",
    "single": "A single-stream block: context and image are one sequence, attention and MLP run in parallel. Code: "
              "`mmdit/blocks.py`.",
    "repulsion": "The push: inside the attention, the samples of a group repel each other. Code: "
                 "`repulsion/solvers.py`.",
    "velocity": "The output of the transformer: the image tokens become the velocity (noise − picture) of each prompt. "
                "Code: `mmdit/model.py`.",
    "guidance": "One velocity of both prompts' velocities. Code: `sampler/guidance.py`.",
    "steps": "Euler's method along the noise levels. Each later step is a new pass of the transformer. Code: "
             "`sampler/schedule.py`.",
    "image": "From the last latent to pixels. Code: `mmdit/autoencoder.py`, `sampler/pipeline.py`.",
}


def page(run: Run, rows: list[dict[str, Any]], folder: str, margin: int) -> str:
    """The page as Markdown; `rows` as in manifest.json."""
    r, guided = run.repulsion, len(run.prompts) > 1
    branches = f"{run.images} of each prompt, those of the negative prompt first" if guided else "one for each picture"
    parts = [FRAME.format(
        model=run.model, prompt=run.prompts[-1], count=len(rows), folder=folder, margin=margin, branches=branches,
        settings="\n".join(f"- {name}: `{value}`" for name, value in vars(run).items()), step=run.step,
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
    """The row of a tensor in its stage's table."""
    inputs = ", ".join(f"`{name}`" for name in row["inputs"])
    shape = " × ".join(map(str, row["shape"]))
    return f"| `{row['name']}` | {shape} {row['dtype']} | {row['formula']} | {inputs} | {row['tolerance']:.1e} |"


def mistakes(rows: list[dict[str, Any]]) -> list[str]:
    """The usual mistakes in a stage; tensors with the same mistakes share a line."""
    together: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        together.setdefault(tuple(row["causes"]), []).append(f"`{row['name']}`")
    lines = [f"- {' … '.join((names[0], names[-1])) if len(names) > 4 else ', '.join(names)}: {'; '.join(causes)}"
             for causes, names in together.items() if causes]
    return ["Usual mistakes:", "", *lines, ""] if lines else []
