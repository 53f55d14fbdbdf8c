"""Small random FLUX.2 pipelines of diffusers: klein with Qwen3, dev with Mistral, and their tokenizers."""

from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers
import torch
import transformers
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from small_pipelines import randomize

from tests.mmdit.small_tekken import converted, tekken_file

QWEN = Path(__file__).parents[1] / "data" / "flux2-tokenizer"
WIDTH = 16  # of the text encoders, three layers of which are the context
MISTRAL_TEMPLATE = (  # without what it does in a conversation
    "{{ bos_token }}{% for message in messages %}{% set text = message.content[0].text %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]{% else %}[INST]{{ text }}[/INST]"
    "{% endif %}{% endfor %}")


def mistral_tokenizer():
    with TemporaryDirectory() as folder:
        model = converted(tekken_file(Path(folder)))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", pad_token="<pad>",
                                                padding_side="left", chat_template=MISTRAL_TEMPLATE)


def vae(**small_decoder):
    model = randomize(AutoencoderKLFlux2(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(8, 16, 16), layers_per_block=1, latent_channels=8, norm_num_groups=4, sample_size=64,
        **small_decoder))
    with torch.no_grad():
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2.0)
    return model


def transformer(guidance):
    """Heads as wide as the public ones, since an original file does not tell; weights so large that text shows."""
    model = randomize(Flux2Transformer2DModel(
        in_channels=32, num_layers=2, num_single_layers=3, attention_head_dim=128, num_attention_heads=1,
        joint_attention_dim=3 * WIDTH, guidance_embeds=guidance))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


SIZES = {"hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
         "head_dim": 128}


def scheduler():
    """As the hub has it, with FLUX.1's shifts."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0)


def klein(is_distilled=True):
    """klein or, with False, its base."""
    torch.manual_seed(0)
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(QWEN)
    config = transformers.Qwen3Config(**SIZES, vocab_size=len(tokenizer), num_hidden_layers=28,
                                      rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    return diffusers.Flux2KleinPipeline(
        scheduler=scheduler(), vae=vae(), tokenizer=tokenizer, transformer=transformer(guidance=False),
        text_encoder=randomize(transformers.Qwen3ForCausalLM(config)).eval(), is_distilled=is_distilled)


def dev():
    """With the small decoder."""
    torch.manual_seed(0)
    tokenizer = mistral_tokenizer()
    text = transformers.MistralConfig(**SIZES, vocab_size=len(tokenizer), num_hidden_layers=31, rms_norm_eps=1e-5,
                                      rope_parameters={"rope_type": "default", "rope_theta": 1e9})
    sees = transformers.PixtralVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                            num_attention_heads=1, image_size=32, patch_size=16)
    reads = transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=text, vision_config=sees))
    return diffusers.Flux2Pipeline(
        scheduler=scheduler(), vae=vae(decoder_block_out_channels=(4, 8, 8)), tokenizer=tokenizer,
        transformer=transformer(guidance=True), text_encoder=randomize(reads).eval())
