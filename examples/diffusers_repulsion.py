"""Contextual repulsion in a diffusers pipeline that you already have, quantized, with LoRAs, offloaded or compiled.

    pip install -c constraints.txt -e . diffusers transformers accelerate protobuf

    with repelling(pipe, Repulsion(strength=0.5, steps=4)):  # s, τ: about a fifth of the steps; of four steps one
        pictures = pipe("a cat", num_images_per_prompt=8).images

The tokens are those that mmdit/attention.py and mmdit/blocks.py push. In diffusers' blocks they are,

    dual-stream: the context that `block.attn` returns, after its projection `to_add_out`
    single-stream of FLUX.1: what `block.attn` returns, before the projection `block.proj_out`
    single-stream of FLUX.2: the first `inner_dim` columns of the input of `attn.to_out`; the others are the MLP's
"""

from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from repulsion import Repulsion

# Whether classifier-free guidance is one call (the unconditional half of the batch first) or two (conditional first).
ONE_CALL = {"StableDiffusion3Pipeline": True, "FluxPipeline": False, "FluxKontextPipeline": False,
            "Flux2Pipeline": False, "Flux2KleinPipeline": False}


@contextmanager
def repelling(pipe, repulsion: Repulsion):
    """Within it the pictures of each prompt that `pipe` paints repel each other, in each branch of guidance separately.

    Consecutive pictures of a batch with equal context are a group. Compile, quantize or replace the transformer before.
    Raises ValueError for a pipeline or blocks that are not known, and, when the pipeline is called, for a prompt with
    one picture and for attention that is reused, sharded or skipped.
    """
    transformer = getattr(pipe, "transformer", None)
    model = getattr(transformer, "_orig_mod", transformer)  # what torch.compile(pipe.transformer) compiles
    one_call = [ONE_CALL[cls.__name__] for cls in type(pipe).__mro__ if cls.__name__ in ONE_CALL]
    if not one_call or not type(model).__module__.startswith("diffusers."):
        raise ValueError(f"cannot repel in {type(pipe).__name__} with {type(model).__qualname__}: known are "
                         f"{', '.join(ONE_CALL)}, with the transformers of diffusers")
    before = transformer._compiled_call_impl
    # torch calls this attribute first, outside of what torch.compile, accelerate and diffusers put around `forward`.
    call = RepelledCall(pipe, model, before or transformer._call_impl, repulsion, one_call[0])
    transformer._compiled_call_impl = call
    try:
        yield
        if pipe.transformer is not transformer or transformer._compiled_call_impl is not call:
            raise ValueError("the transformer was replaced or compiled within `repelling`: do so before it")
    finally:
        del transformer._compiled_call_impl
        if before is not None:
            transformer._compiled_call_impl = before


class RepelledCall:
    """The call of a transformer, with hooks on the attentions in steps that repel, and at no other time.

    Hooks on modules see what quantized weights, LoRAs and offloading compute. A step that repels is not compiled,
    since a compiled graph ignores hooks that are newer than itself; all other steps are.
    """

    def __init__(self, pipe, model, call, repulsion, one_call):
        self.pipe, self.model, self.call, self.repulsion, self.one_call = pipe, model, call, repulsion, one_call
        self.blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]
        self.last = self.sizes = None  # timesteps and index of the call before; pictures of each prompt
        repulsion.check_blocks(len(self.blocks))

    def __call__(self, *args, **kwargs):
        scheduler, context, model = self.pipe.scheduler, kwargs["encoder_hidden_states"], self.model
        last, self.last = self.last, (scheduler.timesteps, scheduler.step_index)  # each run makes new timesteps
        unconditional = not self.one_call and last is not None and last[0] is self.last[0] and last[1] == self.last[1]
        begin, index = scheduler.begin_index or 0, scheduler.step_index or scheduler.begin_index or 0
        step, only_last = (index - begin) // scheduler.order, self.repulsion.branches == "conditional"
        if not self.repulsion.acts_at(step, scheduler.sigmas[index].item()) or (only_last and unconditional):
            return self.call(*args, **kwargs)

        if getattr(model, "is_cache_enabled", False) or getattr(model, "_parallel_config", None) is not None:
            raise ValueError("cannot repel where attention is reused or sharded: call pipe.transformer.disable_cache() "
                             "before, and leave out enable_parallelism")
        skipped = kwargs.get("skip_layers") or ()  # skip-layer guidance: one more call, of the prompts alone
        branches = 2 if self.one_call and self.pipe.do_classifier_free_guidance and not skipped else 1
        if not unconditional:  # different prompts may have the same negative prompt: the groups are the prompts'
            self.sizes = group_sizes(context[len(context) // branches * (branches - 1) :])
        waiting = set()

        def pushed(tokens, index, push):
            waiting.discard(index)
            groups = tokens.split(branches * self.sizes)
            first = len(groups) - len(self.sizes) if only_last else 0
            return torch.cat([*groups[:first], *map(push, groups[first:])])

        with ExitStack() as hooks, torch.compiler.set_stance("force_eager"):
            for index, block in enumerate(self.blocks):
                single = index >= len(model.transformer_blocks)
                push = self.repulsion.bind(index, len(self.blocks), 1, context.shape[1] if single else None)
                if push and index not in skipped and not getattr(block, "context_pre_only", False):  # SD3's last
                    waiting.add(index)
                    hooks.callback(hook(block.attn, single, partial(pushed, index=index, push=push)).remove)
            result = self.call(*args, **kwargs)
        if waiting:
            raise ValueError(f"blocks {sorted(waiting)} computed no attention in step {step}, which repels: switch off "
                             "what skips them, or leave them out by Repulsion(blocks=…)")
        return result


def group_sizes(context: torch.Tensor) -> list[int]:
    """How many consecutive contexts (b, n, d) are equal, group by group. Raises ValueError for a group of one."""
    starts = [i for i in range(len(context)) if i == 0 or not torch.equal(context[i - 1], context[i])]
    sizes = [end - start for start, end in zip(starts, [*starts[1:], len(context)], strict=True)]
    if 1 in sizes:
        raise ValueError("a prompt has one picture, which nothing repels: pass num_images_per_prompt, 2 or more")
    return sizes


def hook(attn, single: bool, push):  # on the tokens that the head of this file names
    if single and hasattr(attn, "to_qkv_mlp_proj"):
        n = attn.inner_dim
        return attn.to_out.register_forward_pre_hook(lambda _, x: torch.cat([push(x[0][..., :n]), x[0][..., n:]], -1))
    return attn.register_forward_hook(lambda _, x, out: push(out) if single else (out[0], push(out[1]), *out[2:]))
