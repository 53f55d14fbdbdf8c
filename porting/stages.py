"""The tensors of a kit in the order of computation, by the tables in formulas.md; and the run that they are of."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from mmdit.trace import PARTS
from repulsion import Repulsion
from sampler import Pipeline
from weights import Stored, inspect_checkpoint, open_part

HERE = Path(__file__).parent
OBJECTIVES = {  # derivatives by the density matrix
    "vendi": "vendi", "dpp": "lambda x: x.inverse()",
    "rke": "lambda x: -2 * x / (x * x).sum((1, 2))[:, None, None]", "cosine": "lambda x: 0 * x - 1 / (len(x[0]) - 1)",
}


def networks(model: str) -> dict[str, Stored]:
    """The networks of a checkpoint by role, none of them read yet."""
    found = inspect_checkpoint(model)
    return {role: open_part(part, family=found.family) for role, part in found.parts.items()}


class Run(SimpleNamespace):
    """Pictures of some prompts, each prompt's a group that repels, and all that they depend on: prompts, the negative
    one of classifier-free guidance first; images of each; branches, 2 with that guidance; batch, of each sample of the
    transformer's batch the row of its prompt, and their number, samples; rows and columns of patches; repels_in, the
    blocks, dual-stream ones first; the networks' configs; of each encoder the prompts' ids, pad token and length."""

    @classmethod
    def of(cls, pipeline: Pipeline, model: str, prompt: str | Sequence[str], images: int = 2, **given: Any) -> "Run":
        """The checkpoint's defaults, and what is given of steps, seed, guidance, height, width, strength, iterations;
        repulsion of strength 1 where there is none. Raises ValueError for a call without it, or without its formula."""
        usual, text, given = pipeline.defaults, pipeline.text, {x: y for x, y in given.items() if y is not None}
        push = {name: given.pop(name) for name in ("strength", "iterations") if name in given}
        push |= {"scale": None} if "strength" in push else {}
        r = replace(usual.repulsion or Repulsion(strength=1.0), **push)
        call = {x: getattr(usual, x) for x in ("steps", "guidance", "height", "width")} | {"seed": 0} | given
        if r.until is not None:
            levels = enumerate(pipeline.sigmas(call["steps"], call["height"], call["width"]).tolist()[:-1])
            r = replace(r, until=None, steps=sum(r.acts_at(step, level) for step, level in levels))
        if images < 2 or call["steps"] <= r.start or r.objective not in OBJECTIVES:
            raise ValueError("a kit of this checkpoint needs at least 2 images, which repel each other, at least "
                             f"{r.start + 1} steps, since repulsion starts after {r.start}, and one of the objectives "
                             f"{', '.join(OBJECTIVES)}: got {images}, {call['steps']} and {r.objective}")
        configs = {role: stored.config for role, stored in networks(model).items()}
        config, sd3 = configs["transformer"], text.family == "sd3"
        guided = not config.guidance_embedding and (call["guidance"] or 0) > 1
        prompts = [""] * guided + ([prompt] if isinstance(prompt, str) else [*prompt])
        tokens, dual = {}, config.num_dual_blocks
        for role, (tokenizer, _) in text.encoders.items():
            n = text.t5_length if role == "t5" else tokenizer.length
            rows = zip(tokenizer(prompts, n).tolist(), map(tokenizer.count, prompts), strict=True)
            left = getattr(tokenizer, "pads_left", False)
            tokens[role] = [row[-count:] if left else row[:count] for row, count in rows], tokenizer.pad_token, n, left
        pictures = images * (len(prompts) - guided)
        batch = [f"[0] * {pictures}"] * guided + [f"[{i}] * {images}" for i in range(guided, len(prompts))]
        last = dual - sd3 if r.single_stream_tokens == "none" or sd3 else None  # SD3 drops the last block's context
        context = tokens["text"][2] if "text" in tokens else text.t5_length + sd3 * tokens["clip_l"][2]
        sizes = {name: call[side] // pipeline.multiple for name, side in (("rows", "height"), ("columns", "width"))}
        return cls(model=model, prompts=tuple(prompts), images=images, **call, **sizes, sd3=sd3, branches=1 + guided,
                   batch=" + ".join(batch), samples=pictures * (1 + guided), repulsion=r, schedule=pipeline.schedule,
                   configs=configs, tokens=tokens, context_tokens=context,
                   repels_in=tuple(i for i in range(config.num_blocks)[:last] if r.acts_in(i, config.num_blocks)))


class Entry(NamedTuple):
    """A tensor of a kit: its formula, as in formulas.md, or in words what it is; inputs, the tensors that the formula's
    variables stand for; and the place of the weights w."""

    name: str
    stage: str
    formula: str
    inputs: dict[str, str]
    place: str
    words: str


TABLES = {name: re.findall(r"^\| (.*?) \| (.*?) \| (.*) \|$", rows, re.MULTILINE) for name, rows in re.findall(
    r"^### (.*)\n((?:\|.*\n)*)", (HERE / "formulas.md").read_text(encoding="utf-8"), re.MULTILINE)}


class Sheet:
    """The entries of a run, table by table; those inside the transformer are of the first step that repels."""

    def __init__(self, run: Run):
        self.run, self.config, self.n = run, run.configs["transformer"], run.context_tokens
        self.sd3, self.dual, self.single = run.sd3, self.config.num_dual_blocks, self.config.num_single_blocks
        self.entries, self.names, self.stage, self.place = [], {}, "", ""
        self.activation = "swiglu" if self.config.gated_mlp else "gelu_tanh"
        self.text()
        for step in range(run.steps):
            if here := step == run.repulsion.start:
                self.transformer()
            self.stage = "steps"
            self.add("step" if here else "other step", step=step, next=step + 1)
        self.image()

    def add(self, table: str, **values: Any) -> None:
        """The rows of a table. A variable of a formula is the tensor that was last added with that name."""
        for row in TABLES[table]:
            variable, name, formula = (x.format_map(vars(self.run) | values) for x in row)
            used = dict.fromkeys(re.findall(r"(?<![\w.])[A-Za-z]\w*", formula))
            used |= {"modulation": None} if used.keys() & {*PARTS} else {}
            inputs, words = {x: self.names[x] for x in used if x in self.names}, formula.strip("“”")
            formula, words = ("", words) if words != formula else (formula, "")
            self.entries.append(Entry(name, self.stage, formula, inputs, self.place, words))
            self.names[variable] = name

    def text(self) -> None:
        run, s, dim = self.run, self.run.schedule, self.config.context_dim
        for role, (ids, pad, n, left) in run.tokens.items():
            config, self.stage, self.place = run.configs[role], role, role
            count, h = config.num_layers, config.num_heads
            values = {"role": role, "ids": ids, "pad": pad, "n": n, "layers": count, "last": count - 1}
            if role == "text":
                more = h, config.num_kv_heads, config.norm_eps, config.rope_theta, [len(row) for row in ids], left
                self.add("decoder text", **values, kept=[*config.layers], padded="padded" + "_left" * left,
                         more=", ".join(map(str, more)))
            elif role == "t5":
                self.add("t5", **values, more=f"{h}, t5_bias(w, {n}, {config.relative_buckets}, "
                         f"{config.relative_max_distance})")
            else:
                values |= {"more": f"{h}, {config.hidden_size // h} ** -0.5, {config.activation}"}
                self.add("clip", **values)
                self.add("clip sd3" if self.sd3 else "clip flux", **values, end=config.end_token)
        clips, self.stage = [role for role in run.tokens if role != "t5"], "start"
        t5 = next((role for role in ("t5", "text") if role in run.tokens), "")
        if self.sd3:
            zeros = dim - sum(run.configs[role].hidden_size for role in clips)
            t5 = t5 or f"zeros({len(run.prompts)}, {self.n - run.tokens[clips[0]][2]}, {dim})"
            context = f"cat([pad(cat([{', '.join(clips)}], -1), (0, {zeros})), {t5}], 1)"
        slope = f"({s.max_shift} - {s.base_shift}) / ({s.max_image_seq_len} - {s.base_image_seq_len})"
        m = run.rows * run.columns
        shift = f"exp({s.base_shift} + {slope} * ({m} - {s.base_image_seq_len}))"
        if s.spacing == "flux2":
            at_200, at_10 = f"(0.00016927 * {m} + 0.45666666)", f"(8.73809524e-05 * {m} + 1.89833333)"
            between = f" + ({at_10} - {at_200}) * (200 - {run.steps}) / 190" * (m <= 4300)
            shift = f"exp({at_200}{between})"
        sd3 = f"cat([shifted(line(1, shifted(0.001, {s.shift}), {run.steps}), {s.shift}), zeros(1)])"
        flux = f"shifted(line(1, 0, {run.steps + 1}), {shift if s.shift is None else s.shift})"
        if self.config.pooled_dim:
            self.add("pooled", pooled=", ".join(f"{role}_pooled" for role in clips))
        self.add("start", context=context if self.sd3 else t5, levels=sd3 if self.sd3 else flux)

    def transformer(self) -> None:
        run, config, self.stage, self.place = self.run, self.config, "embedding", "transformer"
        p, vector = config.patch_size, "mlp(time, w.time_in, silu)"
        vector += f" + mlp(pooled[{run.batch}], w.pooled_in, silu)" if config.pooled_dim else ""
        self.add("embedding", step=run.repulsion.start)
        if config.guidance_embedding:
            self.add("guidance", guidance=float(run.guidance))
            vector += " + mlp(guidance, w.guidance_in, silu)"
        self.add("embedded", vector=vector, p=p)
        self.add("table" if self.sd3 else "rope", n=self.n, axes=config.rope_axes, theta=config.rope_theta)
        for i in range(self.dual):
            self.dual_block(i)
        for i in sorted({0, self.single - 1} if self.single else ()):
            self.single_block(i)
        self.stage, self.place = "velocity", "transformer"
        self.add("modulation", place="final_", layer="final_modulation", parts=2)
        self.add("normed", x="image", tokens=f"tokens[:, {self.n}:]" if self.single else "image", place="image_out.in")
        self.add("velocity")
        half, guided = run.samples // 2, f"unconditional + {run.guidance} * (conditional - unconditional)"
        for branch, part in (("unconditional", f"[:{half}]"), ("conditional", f"[{half}:]"))[-run.branches :]:
            self.add("branch", branch=branch, p=p, part=part * (run.branches > 1))
        self.add("guided", guided=guided if run.branches > 1 else "conditional")

    def between(self, kind: str, i: int, names: Sequence[str]) -> None:
        for x in names if i else ():
            self.add("between", block=f"{kind}.{i}", x=x, names=", ".join([*names, "vector"]))
        self.names |= {x: f"{kind}.{i}.{x}.in" for x in names}

    def modulation(self, name: str, own: str, shared: str, parts: int) -> None:
        """Of a block's own layer, or of the model's for all blocks (FLUX.2)."""
        place = self.place
        if self.config.shared_modulation:
            self.place, own = "transformer", f"shared_modulation.{shared}"
        self.add("modulation", place=name, layer=own, parts=parts)
        self.place = place

    def projected(self, x: str, tokens: str, w: str) -> str:
        split = f"heads(linear({tokens}, {w}.{x}), {self.config.num_heads})"
        return f"rms_norm({split}, 1e-6, {w}.norm_{x})" if x != "v" and self.config.qk_norm else split

    def attention(self, block: str, streams: dict[str, str]) -> None:  # streams: normalized tokens, their weights
        parts = {x: ", ".join(self.projected(x, *stream) for stream in streams.items()) for x in "qkv"}
        parts |= {x: f"cat([{part}], 2)" for x, part in parts.items() if len(streams) > 1}
        parts |= {x: f"rotate({parts[x]}, angles)" for x in ("q", "k") if not self.sd3}
        self.add("attention", block=block, scale=f"{self.config.head_dim} ** -0.5", **parts)

    def dual_block(self, i: int) -> None:
        config, n, block, streams = self.config, self.n, f"dual.{i}", ("context", "image")
        self.stage, self.place = block, f"transformer.dual_blocks.{i}"
        if 0 < i < self.dual - 1:
            if i == self.run.repels_in[0]:
                self.push(block, i, f"“the context that leaves the attention of {block}, of context, image and vector”")
            return
        second, scale = i in config.dual_attention_blocks, f"{config.head_dim} ** -0.5"
        kept = streams[self.sd3 and i == self.dual - 1 :]  # the context output of SD3's last block is unused
        self.between("dual", i, streams)
        for x in streams:
            parts = 2 if x not in kept else 9 if second and x == "image" else 6
            self.modulation(f"{block}.{x}.", f"{x}.modulation", x, parts)
        for x in streams:
            self.names["modulation"] = f"{block}.{x}.modulation"
            self.add("normed", x=x, tokens=x, place=f"{block}.attention.{x}.in")
        self.attention(block, {f"{x}_normed": f"w.attention.{x}" for x in streams})
        for x in kept:
            part = f":{n}" if x == "context" else f"{n}:"
            formula = f"linear(joined(attended[:, :, {part}]), w.attention.{x}.out)"
            if x == "context" and i in self.run.repels_in:
                formula = self.push(block, i, formula)
            self.add("out", block=block, x=x, formula=formula)
        if second:
            qkv = {x: self.projected(x, "second_normed", "w.image_attention") for x in "qkv"}
            self.add("second", block=block, scale=scale, **qkv)
        for x in kept[::-1]:
            self.names["modulation"] = f"{block}.{x}.modulation"
            y = f"{x} + gate * {x}_attended" + " + second_gate * second" * (second and x == "image")
            self.add("mlp", block=block, x=x, y=y, activation=self.activation)
        self.names |= {x: f"{block}.{x}.out" for x in kept}

    def single_block(self, i: int) -> None:
        block, attended, number = f"single.{i}", "joined(attended)", self.dual + i
        self.stage, self.place = block, f"transformer.single_blocks.{i}"
        if i:
            self.between("single", i, ("tokens",))
        else:
            self.add("joined")
        self.modulation(f"{block}.", "modulation", "single", 3)
        self.add("normed", x="tokens", tokens="tokens", place=f"{block}.linear_in.in")
        self.attention(block, {"tokens_normed": "w"})
        if number in self.run.repels_in:
            context = self.run.repulsion.single_stream_tokens == "context"
            attended = self.push(block, number, attended, f"[:, :{self.n}]" * context)
        self.add("single", block=block, attended=attended, activation=self.activation)

    def push(self, block: str, number: int, formula: str, tokens: str = "") -> str:
        """The push of a block, of its tokens at that index; for the first block that repels also what is inside it."""
        run, r, self.stage = self.run, self.run.repulsion, f"{block}.repulsion"
        halved, half = run.branches == 2 and r.branches == "conditional", run.samples // 2
        first, moving = number == run.repels_in[0] < self.dual, "C" + f"[{half}:]" * halved + tokens
        objective, amount = OBJECTIVES[r.objective], r.strength if r.scale is None else r.scale
        length = f"{amount} / {r.iterations}" + " * norm(gram) / norm(moved)" * (r.scale is None)
        gram = f"gram({moving}, {run.samples // (1 + halved) // run.images})"
        settings = f"{objective}, {r.kernel_reg}, {r.iterations}, lambda gram, moved: {length}"
        mixing = f"mixing({'G' if first else gram}, {settings})"
        self.add("repulsion", block=block, formula=formula)
        if first:
            self.add("inside", block=block, gram=gram, eps=r.kernel_reg, objective=objective, moving=moving,
                     mixing=mixing)
        moved = f"{moving} + mixed({'E' if first else mixing}, {moving})"
        moved = f"cat([{moved}, C[:, {self.n}:]], 1)" if tokens else moved
        self.add("pushed", block=block, pushed=f"cat([C[:{half}], {moved}])" if halved else moved)
        self.stage = block
        return "pushed"

    def image(self) -> None:
        config, self.stage, self.place = self.run.configs["autoencoder"], "image", "autoencoder"
        flux2, q = config.patch_size > 1, config.patch_size
        self.add("decoder flux2" if flux2 else "decoder", scaling=config.scaling, shift=config.shift, q=q)
        self.place = "autoencoder.decoder"
        self.add("middle", x="conv(x, w.latent_conv)" if flux2 else "x", groups=config.norm_groups)
        for i in range(len(config.channels)):
            self.add("level", i=i, groups=config.norm_groups, blocks=config.blocks_per_level + 1,
                     up=i < len(config.channels) - 1)
        self.add("picture", groups=config.norm_groups)
