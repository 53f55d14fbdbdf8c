"""`TextEncoders` against diffusers' encode_prompt around the same encoders, at the public widths: the same bits."""

import json
import shutil
import warnings

import pytest
import torch
import transformers
from diffusers import FluxPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline

import weights
from mmdit import ClipTokenizer, T5Tokenizer
from mmdit.clip import ClipOutput
from sampler.conditioning import TextEncoders
from sampler.parts import Part

PROMPTS = ["a small green star left of a red ring", "", "a red circle! " * 25]  # the last one too long for CLIP alone
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The shipped tokenizers, CLIP-L's, CLIP-G's and T5's, with the public lengths."""
    folders = []
    for name, length in (("tokenizer", 77), ("tokenizer_2", 77), ("tokenizer_3", 512)):
        folder = tmp_path_factory.mktemp("text") / name
        shutil.copytree(weights.BUNDLED["tiny-sd3"] / name, folder)
        config = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": length}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        folders.append(folder)
    return folders


def clip_model(folder, width, kind=transformers.CLIPTextModelWithProjection):
    """Two layers of transformers' CLIP for the folder's vocabulary."""
    tokenizer = ClipTokenizer(folder)
    config = transformers.CLIPTextConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=width, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=width // 64, projection_dim=width, bos_token_id=tokenizer.start_token,
        eos_token_id=tokenizer.end_token, pad_token_id=tokenizer.pad_token,
    )  # fmt: skip
    torch.manual_seed(width)
    return kind(config).eval()


def t5_model(folder):
    config = transformers.T5Config(vocab_size=T5Tokenizer(folder).vocab_size, d_model=4096, d_kv=64, d_ff=64,
                                   num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    torch.manual_seed(0)
    return transformers.T5EncoderModel(config).eval()


class Wrapped(torch.nn.Module):
    """An encoder of transformers with the interface of ours."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        out = self.model(ids, output_hidden_states=True)
        if isinstance(self.model, transformers.T5EncoderModel):
            return out.last_hidden_state
        projected = isinstance(self.model, transformers.CLIPTextModelWithProjection)
        pooled = out.text_embeds if projected else out.pooler_output
        other = torch.full_like(pooled, torch.nan)  # nobody is to use it
        both = (other, pooled) if projected else (pooled, other)
        return ClipOutput(out.last_hidden_state, out.hidden_states[-2], *both)


@pytest.fixture(scope="module")
def models(folders):
    return {
        "l": clip_model(folders[0], 768), "g": clip_model(folders[1], 1280), "t5": t5_model(folders[2]),
        "flux l": clip_model(folders[0], 768, transformers.CLIPTextModel),
    }  # fmt: skip


def same(text, prompt, context, pooled):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the prompt that CLIP does not read whole
        found = text(prompt)
    return torch.equal(found[0], context) and torch.equal(found[1], pooled) and found[0].dtype == context.dtype


def held(network):
    """A part of a pipeline that is in memory already."""
    return Part(lambda: network)


@DTYPES
@pytest.mark.parametrize("with_t5", [True, False], ids=["T5", "no T5"])
@torch.no_grad()
def test_sd3(folders, models, with_t5, dtype):
    clips = [models["l"].to(dtype), models["g"].to(dtype)]
    t5 = models["t5"].to(dtype) if with_t5 else None
    tokenizers = [transformers.CLIPTokenizer.from_pretrained(folder) for folder in folders[:2]]
    transformer = SD3Transformer2DModel(num_layers=1, attention_head_dim=4, num_attention_heads=2,
                                        caption_projection_dim=8, joint_attention_dim=4096, sample_size=8)
    oracle = StableDiffusion3Pipeline(
        transformer, None, None, clips[0], tokenizers[0], clips[1], tokenizers[1], t5,
        transformers.T5Tokenizer.from_pretrained(folders[2]),
    )  # fmt: skip
    text = TextEncoders("sd3", 4096, [(ClipTokenizer(folders[i]), held(Wrapped(clips[i]))) for i in (0, 1)],
                        (T5Tokenizer(folders[2]), held(Wrapped(t5))) if with_t5 else None)
    for prompt in PROMPTS if with_t5 else PROMPTS[:2]:
        context, negative, pooled, negative_pooled = oracle.encode_prompt(prompt, None, None, negative_prompt="a star")
        assert context.shape == (1, 77 + 256, 4096) and context.dtype == dtype
        assert same(text, prompt, context, pooled)
        assert same(text, "a star", negative, negative_pooled)


@DTYPES
@pytest.mark.parametrize("limit", [None, 256], ids=["dev", "schnell"])
@torch.no_grad()
def test_flux(folders, models, limit, dtype):
    clip, t5 = models["flux l"].to(dtype), models["t5"].to(dtype)
    oracle = FluxPipeline(None, None, clip, transformers.CLIPTokenizer.from_pretrained(folders[0]), t5,
                          transformers.T5Tokenizer.from_pretrained(folders[2]), None)
    text = TextEncoders("flux", 4096, [(ClipTokenizer(folders[0]), held(Wrapped(clip)))],
                        (T5Tokenizer(folders[2]), held(Wrapped(t5))), t5_limit=limit)
    for prompt in PROMPTS:
        context, pooled, _ = oracle.encode_prompt(prompt, max_sequence_length=limit or 512)
        assert context.shape == (1, limit or 512, 4096) and context.dtype == dtype
        assert same(text, prompt, context, pooled)


@torch.no_grad()
def test_a_clip_with_projection_gives_flux_what_clip_without_does(folders, tmp_path):
    """The standalone clip_l.safetensors has a text_projection, which SD3 takes and FLUX leaves."""
    projected, bare = clip_model(folders[0], 64), clip_model(folders[0], 64, transformers.CLIPTextModel)
    bare.load_state_dict({name: projected.state_dict()[f"text_model.{name}"] for name in bare.state_dict()})
    projected.save_pretrained(tmp_path)
    tokenizer, ours = ClipTokenizer(folders[0]), weights.load_text_encoder(tmp_path)
    t5 = t5_model(folders[2])
    ids = tokenizer(PROMPTS[:1])
    for family, expected in (("flux", bare(ids).pooler_output), ("sd3", projected(ids).text_embeds)):
        text = TextEncoders(family, 4096, [(tokenizer, held(ours))], (T5Tokenizer(folders[2]), held(Wrapped(t5))))
        _, pooled = text(PROMPTS[0])
        # float32 through two layers, other order of sums
        assert ((pooled - expected).norm() / expected.norm()).item() < 1e-5, family


def test_the_warning_names_who_does_not_read_the_whole_prompt(folders, models):
    tokenizers = [ClipTokenizer(folder) for folder in folders[:2]]
    clips = [(tokenizer, held(Wrapped(models[name]))) for tokenizer, name in zip(tokenizers, "lg", strict=True)]
    text = TextEncoders("sd3", 4096, clips, (T5Tokenizer(folders[2]), held(Wrapped(models["t5"]))))
    counts = [tokenizer.count(PROMPTS[2]) for tokenizer in tokenizers]
    with pytest.warns(UserWarning, match=f"CLIP-L reads only 77 of the prompt's {counts[0]} tokens; T5 reads them all"):
        text.check_length(PROMPTS[2])
    text.t5_limit = 5
    with pytest.warns(UserWarning, match="T5 reads only 5 of the prompt's 10 tokens; CLIP-G reads them all"):
        text.check_length(PROMPTS[0])
    text.t5 = None
    with pytest.raises(ValueError, match=f"the prompt has {max(counts)} tokens and this checkpoint reads 77: shorten"):
        text.check_length(PROMPTS[2])
