"""The tensors of a kit in the order of computation: name, stage, formula and inputs of each; and the run they are of."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mmdit.trace import PARTS
from repulsion import Repulsion
from sampler import Pipeline
from sampler.schedule import Schedule
from weights import Stored, inspect_checkpoint, open_part

OBJECTIVES = {  # their derivatives by the density matrix
    "vendi": "vendi", "dpp": "lambda x: x.inverse()",
    "rke": "lambda x: -2 * x / (x * x).sum((1, 2))[:, None, None]", "cosine": "lambda x: -1 / (len(x[0]) - 1) + 0 * x",
}


def networks(model: str) -> dict[str, Stored]:
    """The networks of a checkpoint by role, none of them read yet."""
    found = inspect_checkpoint(model, download=True)
    return {role: open_part(part, family=found.family) for role, part in found.parts.items()}


@dataclass(frozen=True)
class Run:
    """Pictures of one prompt or several, each prompt's a group that repels, and all that they depend on."""

    model: str
    prompts: tuple[str, ...]  # with classifier-free guidance the negative one, which is empty, first
    images: int  # of each prompt
    steps: int
    seed: int
    guidance: float | None
    height: int
    width: int
    branches: int  # 2 with classifier-free guidance
    batch: str  # of each sample of the transformer's batch the row of its prompt: the unconditional branch first
    samples: int  # their number
    rows: int  # of patches in a picture
    columns: int
    context_tokens: int
    repels_in: tuple[int, ...]  # the blocks, dual-stream blocks first
    repulsion: Repulsion
    schedule: Schedule
    configs: dict[str, Any]  # of each network
    tokens: dict[str, tuple[list[list[int]], int, int]]  # of each encoder: the prompts' ids, the pad token, the length

    @classmethod
    def of(cls, pipeline: Pipeline, model: str, prompt: str | Sequence[str], images: int = 2, **given: Any) -> "Run":
        """The call with the checkpoint's defaults where `given` is not; repulsion of strength 1 where there is none.

        given: steps, seed, guidance, height, width, strength, iterations. Raises ValueError for a call without
        repulsion: too few images or steps, or an objective that has no formula here.
        """
        usual, text, given = pipeline.defaults, pipeline.text, {x: y for x, y in given.items() if y is not None}
        push = {name: given.pop(name) for name in ("strength", "iterations") if name in given}
        r = replace(usual.repulsion or Repulsion(strength=1.0), **push, **({"scale": None} if "strength" in push else {}))
        call = {x: getattr(usual, x) for x in ("steps", "guidance", "height", "width")} | {"seed": 0} | given
        if images < 2 or call["steps"] <= r.start or r.objective not in OBJECTIVES:
            raise ValueError(f"a kit of this checkpoint needs at least 2 images, which repel each other, at least "
                             f"{r.start + 1} steps, since repulsion starts after {r.start}, and one of the objectives "
                             f"{', '.join(OBJECTIVES)}: got {images}, {call['steps']} and {r.objective}")
        configs = {role: stored.config for role, stored in networks(model).items()}
        config, guided = configs["transformer"], text.family == "sd3" and (call["guidance"] or 0) > 1
        prompts = [""] * guided + ([prompt] if isinstance(prompt, str) else [*prompt])
        tokenizers = dict(zip(("clip_l", "clip_g"), (one for one, _ in text.clips), strict=False))
        tokenizers |= {} if text.t5 is None else {"t5": text.t5[0]}
        tokens, dual = {}, config.num_dual_blocks
        for role, tokenizer in tokenizers.items():
            n = text.t5_length if role == "t5" else tokenizer.length
            rows = zip(tokenizer(prompts, n).tolist(), map(tokenizer.count, prompts), strict=True)
            tokens[role] = [row[:count] for row, count in rows], tokenizer.pad_token, n
        pictures = images * (len(prompts) - guided)
        batch = [f"[0] * {pictures}"] * guided + [f"[{i}] * {images}" for i in range(guided, len(prompts))]
        last = dual - config.context_ends_early if r.single_stream_tokens == "none" or config.context_ends_early else None
        return cls(model, tuple(prompts), images, **call, branches=1 + guided, batch=" + ".join(batch),
                   samples=pictures * (1 + guided), rows=call["height"] // pipeline.multiple,
                   columns=call["width"] // pipeline.multiple, repulsion=r, schedule=pipeline.schedule, configs=configs,
                   context_tokens=text.t5_length + (tokens["clip_l"][2] if text.family == "sd3" else 0), tokens=tokens,
                   repels_in=tuple(i for i in range(config.num_blocks)[:last] if r.acts_in(i, config.num_blocks)))


class Entry(NamedTuple):
    """One tensor of a kit. Its formula is Python, of the functions in `formulas`; without one, `words` say what it is.

    inputs: the kit's tensors that the variables of the formula stand for; place: of the weights w
    """

    name: str
    stage: str
    formula: str
    inputs: dict[str, str]
    place: str
    words: str


class Sheet:
    """The entries of a run. A tensor that is added gets a variable, by which later formulas refer to it."""

    def __init__(self, run: Run):
        self.run, self.config, self.n = run, run.configs["transformer"], run.context_tokens
        self.sd3, self.dual = self.config.position == "table", self.config.num_dual_blocks
        self.entries, self.names, self.stage, self.place = [], {}, "", ""
        self.text()
        self.start()
        for step in range(run.steps):
            if here := step == run.repulsion.start:
                self.transformer()
            self.stage = "steps"
            self.add("latent", f"latent.{step + 1}",
                     f"latent + (sigmas[{step + 1}] - sigmas[{step}]) * guided" if here else "",
                     "the same with the guided velocity of the latent before, by a new pass of the transformer",
                     "latent sigmas states pooled")
        self.image()

    def add(self, variable: str, name: str, formula: str, words: str = "", inputs: str = "") -> None:
        used = dict.fromkeys(re.findall(r"(?<![\w.])[A-Za-z]\w*", f"{formula} {inputs}"))
        used |= {"modulation": None} if used.keys() & {*PARTS} else {}
        known = {x: self.names[x] for x in used if x in self.names}
        self.entries.append(Entry(name, self.stage, formula, known, self.place, words))
        self.names[variable] = name

    def text(self) -> None:
        for role, (ids, pad, n) in self.run.tokens.items():
            config, self.stage, self.place = self.run.configs[role], role, role
            count, h = config.num_layers, config.num_heads
            self.add("ids", f"{role}.ids", f"padded({ids}, {pad}, {n})")
            if role == "t5":
                more = f"{h}, t5_bias(w, {n}, {config.relative_buckets}, {config.relative_max_distance})"
                self.add("first", "t5.layer_0", f"t5_layers(w.token_embedding.weight[ids], w, [0], {more})")
                layers = f"t5_layers(first, w, range(1, {count}), {more})"
                self.add("t5", "t5.states", f"rms_norm({layers}, 1e-6, w.final_norm)")
                continue
            more = f"{h}, {config.hidden_size // h} ** -0.5, {config.activation}"
            embedded, before = f"w.token_embedding.weight[ids] + w.position_embedding.weight[:{n}]", "first, w, range(1"
            self.add("first", f"{role}.layer_0", f"clip_layers({embedded}, w, [0], {more})")
            if self.sd3:
                self.add(role, f"{role}.penultimate", f"clip_layers({before}, {count - 1}), {more})")
                before = f"{role}, w, range({count - 1}"
            last = f"layer_norm(clip_layers({before}, {count}), {more}), 1e-5, w.final_norm)"
            pooled = f"at_first({last}, ids == {config.end_token})"
            projected = self.sd3 and config.projection_dim is not None
            self.add(f"{role}_pooled", f"{role}.pooled", f"linear({pooled}, w.projection)" if projected else pooled)

    def start(self) -> None:
        run, s, dim, self.stage = self.run, self.run.schedule, self.config.context_dim, "start"
        clips = [role for role in run.tokens if role != "t5"]
        t5 = "t5" if "t5" in run.tokens else f"zeros({len(run.prompts)}, {self.n - run.tokens[clips[0]][2]}, {dim})"
        wide = f"pad(cat([{', '.join(clips)}], -1), (0, {dim - sum(run.configs[role].hidden_size for role in clips)}))"
        self.add("states", "context", f"cat([{wide}, {t5}], 1)" if self.sd3 else t5)
        self.add("pooled", "pooled", f"cat([{', '.join(f'{role}_pooled' for role in clips)}], -1)")
        self.add("latent", "noise", "", "standard normal: take it from the kit, no other library draws it from a seed")
        if self.sd3:
            levels = f"cat([shifted(line(1, shifted(0.001, {s.shift}), {run.steps}), {s.shift}), zeros(1)])"
        else:
            slope = f"({s.max_shift} - {s.base_shift}) / ({s.max_image_seq_len} - {s.base_image_seq_len})"
            shift = f"exp({s.base_shift} + {slope} * ({run.rows * run.columns} - {s.base_image_seq_len}))"
            levels = f"shifted(line(1, 0, {run.steps + 1}), {shift if s.shift is None else s.shift})"
        self.add("sigmas", "sigmas", levels)

    def transformer(self) -> None:
        run, config, p, self.stage, self.place = self.run, self.config, self.config.patch_size, "embedding", "transformer"
        sizes = f"{run.rows}, {run.columns}"
        self.add("time", "time_in.in", f"features(1000 * sigmas[{run.repulsion.start}]).expand({run.samples}, -1)")
        vector = f"mlp(time, w.time_in, silu) + mlp(pooled[{run.batch}], w.pooled_in, silu)"
        if config.guidance_embedding:
            self.add("guidance", "guidance_in.in",
                     f"features(1000 * torch.tensor({float(run.guidance)})).expand({run.samples}, -1)")
            vector += " + mlp(guidance, w.guidance_in, silu)"
        self.add("vector", "dual.0.vector.in", vector)
        self.add("context_in", "context_in.out", f"linear(states[{run.batch}], w.context_in)")
        self.add("patches_in", "image_in.in", f"patches(latent.repeat({run.branches}, 1, 1, 1), {p})")
        self.add("image_in", "image_in.out", "linear(patches_in, w.image_in)")
        if not self.sd3:
            self.add("angles", "dual.0.rope.in", f"rope({self.n}, {sizes}, {config.rope_axes}, {config.rope_theta})")
        self.add("context", "dual.0.context.in", "context_in")
        table = f" + middle_of(w.position_table, {sizes})" * self.sd3
        self.add("image", "dual.0.image.in", f"image_in{table}")
        for i in range(self.dual):
            self.dual_block(i)
        for i in sorted({0, config.num_single_blocks - 1} if config.num_single_blocks else ()):
            self.single_block(i)
        self.stage, self.place = "velocity", "transformer"
        self.add("modulation", "final_modulation", "chunks(linear(silu(vector), w.final_modulation), 2)")
        image = f"tokens[:, {self.n}:]" if config.num_single_blocks else "image"
        self.add("normed", "image_out.in", f"(1 + scale) * layer_norm({image}, 1e-6) + shift")
        self.add("patches_out", "image_out.out", "linear(normed, w.image_out)")
        half, both = run.samples // 2, f"picture(patches_out, {p}, {run.rows})"
        for branch, part in (("unconditional", f":{half}"), ("conditional", f"{half}:"))[-run.branches :]:
            self.add(branch, f"velocity.{branch}", both + f"[{part}]" * (run.branches > 1))
        self.add("guided", "velocity.guided", "conditional" if run.branches == 1 else
                 f"unconditional + {run.guidance} * (conditional - unconditional)")

    def between(self, kind: str, i: int, names: Sequence[str]) -> None:
        """The inputs of a later block."""
        for x in names if i else ():
            self.add(f"next_{x}", f"{kind}.{i}.{x}.in", "", f"what leaves {kind}.{i - 1}, computed as {kind}.0 is, by the "
                     f"blocks from 1 on; repulsion acts in the blocks {self.run.repels_in}", " ".join([*names, "vector"]))
        self.names |= {x: f"{kind}.{i}.{x}.in" for x in names}

    def projected(self, x: str, tokens: str, w: str) -> str:
        """q, k or v of a stream: (b, h, n, k), q and k normalized."""
        split = f"heads(linear({tokens}, {w}.{x}), {self.config.num_heads})"
        return f"rms_norm({split}, 1e-6, {w}.norm_{x})" if x != "v" and self.config.qk_norm else split

    def attention(self, block: str, streams: dict[str, str]) -> None:
        """`streams`: of the normalized tokens' variables the weights of the projections. v, the plain one, first."""
        for x in "vqk":
            parts = [self.projected(x, tokens, w) for tokens, w in streams.items()]
            formula = parts[0] if len(parts) == 1 else f"cat([{', '.join(parts)}], 2)"
            self.add(x, f"{block}.attention.{x}", formula if x == "v" or self.sd3 else f"rotate({formula}, angles)")
        self.add("attended", f"{block}.attention.attended", f"attend(q, k, v, {self.config.head_dim} ** -0.5)")

    def dual_block(self, i: int) -> None:
        config, n, block, streams = self.config, self.n, f"dual.{i}", ("context", "image")
        self.stage, self.place = block, f"transformer.dual_blocks.{i}"
        if 0 < i < self.dual - 1:
            if i == self.run.repels_in[0]:
                self.push(block, i, "", words=f"the context that leaves the attention of {block}")
            return
        second = i in config.dual_attention_blocks
        kept = streams[config.context_ends_early and i == self.dual - 1 :]  # SD3 drops the last block's context
        self.between("dual", i, streams)
        for x in streams:
            parts = 2 if x not in kept else 9 if second and x == "image" else 6
            self.add("", f"{block}.{x}.modulation", f"chunks(linear(silu(vector), w.{x}.modulation), {parts})")
        for x in streams:
            self.names["modulation"] = f"{block}.{x}.modulation"
            self.add(f"{x}_normed", f"{block}.attention.{x}.in", f"(1 + scale) * layer_norm({x}, 1e-6) + shift")
        self.attention(block, {f"{x}_normed": f"w.attention.{x}" for x in streams})
        for x in kept:
            part = f":{n}" if x == "context" else f"{n}:"
            formula = f"linear(joined(attended[:, :, {part}]), w.attention.{x}.out)"
            if x == "context" and i in self.run.repels_in:
                formula = self.push(block, i, formula)
            self.add(f"{x}_attended", f"{block}.attention.{x}.out", formula)
        if second:
            self.add("second_normed", f"{block}.image_attention.in",
                     "(1 + second_scale) * layer_norm(image, 1e-6) + second_shift")
            q, k, v = (self.projected(x, "second_normed", "w.image_attention") for x in "qkv")
            self.add("second", f"{block}.image_attention.out", f"linear(joined(attend({q}, {k}, {v}, "
                     f"{config.head_dim} ** -0.5)), w.image_attention.out)")
        for x in kept[::-1]:
            self.names["modulation"] = f"{block}.{x}.modulation"
            y = f"{x} + gate * {x}_attended" + " + second_gate * second" * (second and x == "image")
            self.add("mlp_in", f"{block}.{x}.mlp.in", f"(1 + mlp_scale) * layer_norm({y}, 1e-6) + mlp_shift")
            self.add("inner", f"{block}.{x}.mlp.in_layer.out", f"linear(mlp_in, w.{x}.mlp.in_layer)")
            self.add("active", f"{block}.{x}.mlp.activation.out", "gelu_tanh(inner)")
            self.add("mlp_out", f"{block}.{x}.mlp.out", f"linear(active, w.{x}.mlp.out_layer)")
            self.add(f"next_{x}", f"{block}.{x}.out", f"{y} + mlp_gate * mlp_out")
        self.names |= {x: f"{block}.{x}.out" for x in kept}

    def single_block(self, i: int) -> None:
        block, attended, number = f"single.{i}", "joined(attended)", self.dual + i
        self.stage, self.place = block, f"transformer.single_blocks.{i}"
        if i:
            self.between("single", i, ("tokens",))
        else:
            self.add("tokens", f"{block}.tokens.in", "cat([context, image], 1)")
        self.add("modulation", f"{block}.modulation", "chunks(linear(silu(vector), w.modulation), 3)")
        self.add("normed", f"{block}.linear_in.in", "(1 + scale) * layer_norm(tokens, 1e-6) + shift")
        self.attention(block, {"normed": "w"})
        if number in self.run.repels_in:
            context = self.run.repulsion.single_stream_tokens == "context"
            attended = self.push(block, number, attended, f"[:, :{self.n}]" * context)
        self.add("inner", f"{block}.activation.in", "linear(normed, w.mlp)")
        self.add("active", f"{block}.activation.out", "gelu_tanh(inner)")
        self.add("both", f"{block}.linear_out.in", f"cat([{attended}, active], -1)")
        self.add("tokens", f"{block}.tokens.out", "tokens + gate * linear(both, w.linear_out)")

    def push(self, block: str, number: int, formula: str, tokens: str = "", words: str = "") -> str:
        """The tokens C before and after the push of a block; for the first that repels also what is in between.
        `tokens` is the index of those that are pushed, where not all are. Returns the variable of the result."""
        run, r, self.stage = self.run, self.run.repulsion, f"{block}.repulsion"
        halved, first = run.branches == 2 and r.branches == "conditional", number == run.repels_in[0] < self.dual
        moving = "C" + f"[{run.samples // 2}:]" * halved + tokens
        amount = f"{r.strength} / {r.iterations} * norm(gram) / norm(moved)" if r.scale is None else f"{r.scale} / {r.iterations}"
        settings = f"{OBJECTIVES[r.objective]}, {r.kernel_reg}"
        gram = f"gram({moving}, {run.samples // (1 + halved) // run.images})"
        mixing = f"mixing({'G' if first else gram}, {settings}, {r.iterations}, lambda gram, moved: {amount})"
        self.add("C", f"{self.stage}.in", formula, words, "attended")
        if first:
            self.add("G", f"{self.stage}.gram", gram)
            self.add("K", f"{self.stage}.kernel", "kernel(G)")
            self.add("", f"{self.stage}.spectrum", f"eigvalsh(density(K, {r.kernel_reg}))")
            self.add("", f"{self.stage}.gradient", f"mixed(gradient_matrix(G, {settings}), {moving})")
            self.add("E", f"{self.stage}.mixing", mixing)
        moved = f"{moving} + mixed({'E' if first else mixing}, {moving})"
        moved = f"cat([{moved}, C[:, {self.n}:]], 1)" if tokens else moved
        self.add("pushed", f"{self.stage}.out", f"cat([C[:{run.samples // 2}], {moved}])" if halved else moved)
        self.stage = block
        return "pushed"

    def image(self) -> None:
        config, self.stage, self.place = self.run.configs["autoencoder"], "image", "autoencoder.decoder"
        groups, levels = config.norm_groups, len(config.channels)
        self.add("x", "decoder.in", f"latent / {config.scaling} + {config.shift}")
        self.add("x", "decoder.middle.out", f"middle(conv(x, w.conv_in), w.middle, {groups})")
        for i in range(levels):
            more = f"{groups}, {config.blocks_per_level + 1}, {i < levels - 1}"
            self.add("x", f"decoder.levels.{i}.out", f"level(x, w.levels[{i}], {more})")
        self.add("image", "image", f"conv(silu(group_norm(x, {groups}, w.norm_out)), w.conv_out)")
        self.add("pixels", "pixels", "((image.clip(-1, 1) + 1) * 127.5).round().movedim(1, -1)")


def entries(run: Run) -> list[Entry]:
    """All tensors of a run's kit. Those inside the transformer are of the first step that repels."""
    return Sheet(run).entries
