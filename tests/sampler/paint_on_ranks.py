"""What test_ranks.py computes in one process and, started by torchrun, on several ranks: pushes, groups, shards."""

import sys

import numpy as np
import torch
import torch.distributed as dist

from repulsion import Repulsion
from sampler import Pipeline, SkipLayerGuidance, ranks

REPEL = sys.modules["repulsion.repel"]
TOKENS = (5, 7, 10)  # samples a group, tokens, features: multiples of neither 2 nor 4
PUSHES = {
    "two groups": (Repulsion(strength=1.0, iterations=3), 2, None),
    "η": (Repulsion(scale=50.0, iterations=2, objective="rke"), 1, None),
    "conditional branch": (Repulsion(strength=0.5, branches="conditional"), 2, None),
    "all of a single stream": (Repulsion(strength=1.0), 2, 3),
    "its context": (Repulsion(strength=1.0, single_stream_tokens="context", branches="conditional"), 2, 3),
    "spread": (Repulsion(strength=0.3, objective="spread", iterations=2), 1, None),
    "no strength": (Repulsion(strength=0.0), 2, None),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPS = {  # checkpoint, repulsion, call
    "SD3, both branches": ("tiny-sd3", Repulsion(strength=2.0), {}),
    "SD3, conditional branch": ("tiny-sd3", Repulsion(strength=4.0, branches="conditional", iterations=4), {
        "steps": 6, "skip_layer_guidance": SkipLayerGuidance((1, 2))}),
    "turbo": ("tiny-turbo", Repulsion(strength=2.0), {}),
    "FLUX.1": ("tiny-flux", Repulsion(scale=5e5), {}),
    "FLUX.1, context": ("tiny-flux", Repulsion(strength=2.0, single_stream_tokens="context"), {}),
    "klein": ("klein", Repulsion(strength=1.0), {"height": 64, "width": 64}),
    "klein base": ("base", Repulsion(strength=1.0, branches="conditional"), {
        "guidance": 3.0, "height": 64, "width": 96}),
}  # fmt: skip


def tokens(dtype, groups, images=TOKENS[0]):
    """The samples of each group share most of what they are, as in a model."""
    generator = torch.Generator().manual_seed(0)
    alike, own = (torch.randn(groups, b, *TOKENS[1:], generator=generator) for b in (1, images))
    return (alike + 0.1 * own).flatten(0, 1).to(dtype)


def pushed(ours):
    """Every push of every dtype, the samples of all ranks in order, on rank 0; and the features that each rank held."""
    found, held, gram_of_all = {}, [], ranks.gram_of_all
    ranks.gram_of_all = lambda c: held.append(c.shape[-1]) or gram_of_all(c)
    for name, (settings, groups, context) in PUSHES.items():
        for dtype in DTYPES:
            split = ours.split(TOKENS[0], settings)
            sizes = ranks.shares(TOKENS[0], ours.size)
            start = sum(sizes[: ours.rank])
            own = tokens(dtype, groups).unflatten(0, (groups, -1))[:, start : start + sizes[ours.rank]]
            push = split["repulsion"].bind(0, 4, groups, num_context=context)
            result = ours.gather([push(own.flatten(0, 1)).unflatten(0, (groups, -1))])
            found[name, dtype] = None if result is None else torch.cat(result, dim=1).flatten(0, 1)
    ranks.gram_of_all = gram_of_all
    return found, held


def painted(ours, folders, names=tuple(GROUPS), images=3):
    """In float64, the pictures and the Gram matrices of the pushes of each group, on rank 0."""
    found = {}
    for name in names:
        checkpoint, settings, call = GROUPS[name]
        pipeline, grams = Pipeline.load(folders.get(checkpoint, checkpoint), dtype=torch.float64), []
        gram_of_all, gram_matrix = ranks.gram_of_all, REPEL.gram_matrix
        ranks.gram_of_all = lambda c, f=gram_of_all, grams=grams: grams.append(f(c)) or grams[-1]
        REPEL.gram_matrix = lambda c, f=gram_matrix, grams=grams: grams.append(f(c)) or grams[-1]
        latents, _ = pipeline("two red circles", images, **{"steps": 2, **call}, **ours.split(images, settings),
                              decode=False)
        ranks.gram_of_all, REPEL.gram_matrix = gram_of_all, gram_matrix
        pictures = ours.gather(pipeline.decode(latents))
        found[name] = grams, None if pictures is None else np.stack([np.asarray(picture) for picture in pictures])
    return found


def ring(ours, folders, **how):
    """Two pictures with tiny-flux, whose blocks are in float8, on rank 0; and the pipeline."""
    pipeline = Pipeline.load("tiny-flux", transformer=folders["float8"], keep_float8=True, **how)
    pictures = ours.gather(pipeline("a ring", 2, steps=2, **ours.split(2, Repulsion(strength=2.0))))
    return pictures and np.stack([np.asarray(picture, dtype=int) for picture in pictures]), pipeline


def sharded(ours, folders):
    """The same with parameters spread over ranks; which share of a network's numbers is here."""
    pictures, pipeline = ring(ours, folders, shard=True)
    networks = [pipeline.transformer, pipeline.text.t5[1].module]
    local, whole = ([sum(size(p) for p in network.parameters()) for network in networks]
                    for size in (lambda p: p.to_local().numel(), lambda p: p.numel()))
    assert pipeline.transformer.dual_blocks[0].attention.image.qkv.weight.to_local().dtype == torch.float8_e4m3fn
    return pictures, [a / b for a, b in zip(local, whole, strict=True)]


if __name__ == "__main__":
    out, *pairs = sys.argv[1:]
    places = dict(pair.split("=") for pair in pairs)
    with ranks.joined() as ours:
        result = {"pushed": pushed(ours)}
        names = list(GROUPS) if ours.size == 2 else ["SD3, both branches"]
        result["painted"] = painted(ours, places, names, 3 if ours.size == 2 else 10)
        result["sharded"] = sharded(ours, places) if ours.size == 2 else None
        everyone = [None] * ours.size
        dist.all_gather_object(everyone, {"held": result["pushed"][1], "sharded": result["sharded"]})
        if not ours.rank:
            torch.save({**result, "everyone": everyone}, out)
        dist.barrier()  # none ends while another still uses the connection
    ranks.leave()
