"""Repulsion in diffusers' pipelines that were quantized, adapted, offloaded or compiled before."""

import shutil

import accelerate
import diffusers
import optimum.quanto
import peft
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from einops import rearrange
from small_pipelines import assert_other_pictures, assert_same_pictures, pixels

import weights
from examples.diffusers_repulsion import repelling
from repulsion import Repulsion
from sampler import Pipeline, starting_noise

FLUX, SD3 = weights.BUNDLED["tiny-flux"], weights.BUNDLED["tiny-turbo"]
NOISE = starting_noise(3, 3, (16, 16, 16))
STRONG = Repulsion(strength=1.0, steps=2)
GUIDANCE = 5.0  # tiny-flux's input


def load(folder):
    kind = diffusers.FluxPipeline if folder == FLUX else diffusers.StableDiffusion3Pipeline
    pipe = kind.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe, repulsion=None):
    flux = isinstance(pipe, diffusers.FluxPipeline)
    call = {"num_images_per_prompt": 3, "num_inference_steps": 4, "height": 128, "width": 128,
            "max_sequence_length": 24,
            "latents": rearrange(NOISE, "b c (y p) (x q) -> b (y x) (c p q)", p=2, q=2) if flux else NOISE,
            "guidance_scale": GUIDANCE if flux else 0.0}
    if repulsion is None:
        return pipe("a circle", **call).images
    with repelling(pipe, repulsion):
        return pipe("a circle", **call).images


def ours(folder, transformer, tmp_path, push):
    """Our pictures with the weights of diffusers' transformer, typical and repelled."""
    copy = shutil.copytree(folder, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("transformer"))
    transformer.save_pretrained(copy / "transformer")
    pipeline = Pipeline.load(copy)
    call = {"noise": NOISE, "steps": 4, "guidance": GUIDANCE if folder == FLUX else None}
    return [pipeline("a circle", 3, **call, repulsion=repulsion) for repulsion in (None, push)]


def check(pipe, folder, transformer, tmp_path, same=assert_same_pictures, push=STRONG):
    typical, repelled = ours(folder, transformer, tmp_path, push)
    same(paint(pipe), typical)
    same(paint(pipe, push), repelled)
    assert_other_pictures(repelled, typical)
    same(paint(pipe), typical)


# ---- weights


def quantized(folder):
    pipe = load(folder)
    optimum.quanto.quantize(pipe.transformer, weights=optimum.quanto.qint8)
    optimum.quanto.freeze(pipe.transformer)
    return pipe


def same_but_for_edges(found, expected):
    """quanto's product is 0.5 % off float32's with the same numbers, which moves an edge here and there."""
    assert abs(pixels(found) - pixels(expected)).mean() < 0.5


@pytest.mark.parametrize("folder", [FLUX, SD3], ids=["tiny-flux", "tiny-turbo"])
def test_int8_weights_repel_as_the_numbers_that_they_stand_for(folder, tmp_path):
    pipe = quantized(folder)
    plain = load(folder).transformer
    rounded = 0
    for name, module in pipe.transformer.named_modules():
        if isinstance(module, optimum.quanto.QLinear):
            weight = plain.get_submodule(name).weight
            wide = module.weight.dequantize()
            rounded += not torch.equal(weight, wide)
            weight.data.copy_(wide)
    assert rounded > 50
    # A strong push in two of four steps makes of half a percent another picture.
    check(pipe, folder, plain, tmp_path, same_but_for_edges, Repulsion(strength=0.5))


def adapted(folder):
    """With a random LoRA of rank 2 at the projections around every push."""
    pipe = load(folder)
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_add_out", "proj_out", "to_q", "add_v_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return pipe


@pytest.mark.parametrize("folder", [FLUX, SD3], ids=["tiny-flux", "tiny-turbo"])
def test_loras_repel_as_weights_that_they_are_merged_into(folder, tmp_path):
    merged = adapted(folder).transformer
    merged.fuse_lora()
    merged.unload_lora()
    check(adapted(folder), folder, merged, tmp_path)


# ---- offloading, here from the CPU to the CPU


def by_model(transformer):  # what enable_model_cpu_offload does with each network
    accelerate.cpu_offload_with_hook(transformer, execution_device="cpu")


def by_layer(transformer):  # enable_sequential_cpu_offload
    accelerate.cpu_offload(transformer, execution_device="cpu")


def by_group(transformer):
    apply_group_offloading(transformer, torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


@pytest.mark.parametrize("offload", [by_model, by_layer, by_group])
def test_offloaded_transformers_repel_all_the_same(offload):
    pipe = load(FLUX)
    wanted = paint(pipe), paint(pipe, STRONG)
    offload(pipe.transformer)
    for repulsion, pictures in zip((None, STRONG, None), (*wanted, wanted[0]), strict=True):
        assert (pixels(paint(pipe, repulsion)) == pixels(pictures)).all()
    assert_other_pictures(*wanted)


# ---- torch.compile


def compile_call(pipe, **options):
    pipe.transformer.compile(**options)


def compile_copy(pipe, **options):
    pipe.transformer = torch.compile(pipe.transformer, **options)


def compile_blocks(pipe, **options):
    pipe.transformer.compile_repeated_blocks(**options)


@pytest.mark.parametrize("way", [compile_call, compile_copy, compile_blocks])
def test_compiled_transformers_repel_and_run_compiled_in_all_other_steps(way):
    pipe, calls = load(FLUX), []
    for blocks in (pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks):
        del blocks[2:]  # quick to compile
    wanted = {None: paint(pipe), STRONG: paint(pipe, STRONG)}

    def backend(graph, inputs):
        return lambda *given: calls.append(graph) or graph(*given)

    torch._dynamo.reset()
    way(pipe, backend=backend, fullgraph=True)
    compiled = []
    for repulsion in (STRONG, None, STRONG):  # the first graph is made within `repelling`
        calls.clear()
        assert_same_pictures(paint(pipe, repulsion), wanted[repulsion])
        compiled.append(len(calls))
    assert compiled == [compiled[0], 2 * compiled[0], compiled[0]] and compiled[0] > 0  # 2, 4 and 2 of 4 steps
