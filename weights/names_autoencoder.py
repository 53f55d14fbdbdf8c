"""The autoencoder's names in the original files and on the hub (grammar: `names`).

Both number the encoder's levels from fine to coarse. The hub numbers the decoder's in running order, as we do; the
original numbers them like the encoder's, so its last level runs first. The original's attention is made of 1 x 1
convolutions. An original SD3 file holds the transformer too; FLUX.1's `ae.safetensors` has no prefix, merged
FLUX.1 files have `vae.`.
"""

from .names import CONV_1X1, Layout

AUTOENCODER_ORIGINAL = Layout(
    name="original autoencoder",
    sign="encoder.down.0.block.0.conv1.weight",
    prefixes=("first_stage_model.", "vae."),
    prefix="first_stage_model.",
    rows=[
        ("{half}.conv_in", "{half}.conv_in"),
        ("encoder.levels.{l}.blocks.{j}.norm_{n}", "encoder.down.{l}.block.{j}.norm{n}"),
        ("encoder.levels.{l}.blocks.{j}.conv_{n}", "encoder.down.{l}.block.{j}.conv{n}"),
        ("encoder.levels.{l}.blocks.{j}.shortcut", "encoder.down.{l}.block.{j}.nin_shortcut"),
        ("encoder.levels.{l}.down", "encoder.down.{l}.downsample.conv"),
        ("{half}.middle.block_{j}.norm_{n}", "{half}.mid.block_{j}.norm{n}"),
        ("{half}.middle.block_{j}.conv_{n}", "{half}.mid.block_{j}.conv{n}"),
        ("{half}.middle.attention.norm", "{half}.mid.attn_1.norm"),
        ("{half}.middle.attention.qkv.weight",
         ("{half}.mid.attn_1.q.weight", "{half}.mid.attn_1.k.weight", "{half}.mid.attn_1.v.weight"), CONV_1X1),
        ("{half}.middle.attention.qkv.bias",
         ("{half}.mid.attn_1.q.bias", "{half}.mid.attn_1.k.bias", "{half}.mid.attn_1.v.bias")),
        ("{half}.middle.attention.out.weight", "{half}.mid.attn_1.proj_out.weight", CONV_1X1),
        ("{half}.middle.attention.out.bias", "{half}.mid.attn_1.proj_out.bias"),
        ("decoder.levels.{l}.blocks.{j}.norm_{n}", "decoder.up.{last-l}.block.{j}.norm{n}"),
        ("decoder.levels.{l}.blocks.{j}.conv_{n}", "decoder.up.{last-l}.block.{j}.conv{n}"),
        ("decoder.levels.{l}.blocks.{j}.shortcut", "decoder.up.{last-l}.block.{j}.nin_shortcut"),
        ("decoder.levels.{l}.up", "decoder.up.{last-l}.upsample.conv"),
        ("{half}.norm_out", "{half}.norm_out"),
        ("{half}.conv_out", "{half}.conv_out"),
    ],
)

AUTOENCODER_HUB = Layout(
    name="hub autoencoder",
    sign="encoder.down_blocks.0.resnets.0.conv1.weight",
    rows=[
        ("{half}.conv_in", "{half}.conv_in"),
        ("encoder.levels.{l}.blocks.{j}.norm_{n}", "encoder.down_blocks.{l}.resnets.{j}.norm{n}"),
        ("encoder.levels.{l}.blocks.{j}.conv_{n}", "encoder.down_blocks.{l}.resnets.{j}.conv{n}"),
        ("encoder.levels.{l}.blocks.{j}.shortcut", "encoder.down_blocks.{l}.resnets.{j}.conv_shortcut"),
        ("encoder.levels.{l}.down", "encoder.down_blocks.{l}.downsamplers.0.conv"),
        ("{half}.middle.block_1.norm_{n}", "{half}.mid_block.resnets.0.norm{n}"),
        ("{half}.middle.block_1.conv_{n}", "{half}.mid_block.resnets.0.conv{n}"),
        ("{half}.middle.attention.norm", "{half}.mid_block.attentions.0.group_norm"),
        ("{half}.middle.attention.qkv", (
            "{half}.mid_block.attentions.0.to_q", "{half}.mid_block.attentions.0.to_k",
            "{half}.mid_block.attentions.0.to_v",
        )),
        ("{half}.middle.attention.out", "{half}.mid_block.attentions.0.to_out.0"),
        ("{half}.middle.block_2.norm_{n}", "{half}.mid_block.resnets.1.norm{n}"),
        ("{half}.middle.block_2.conv_{n}", "{half}.mid_block.resnets.1.conv{n}"),
        ("decoder.levels.{l}.blocks.{j}.norm_{n}", "decoder.up_blocks.{l}.resnets.{j}.norm{n}"),
        ("decoder.levels.{l}.blocks.{j}.conv_{n}", "decoder.up_blocks.{l}.resnets.{j}.conv{n}"),
        ("decoder.levels.{l}.blocks.{j}.shortcut", "decoder.up_blocks.{l}.resnets.{j}.conv_shortcut"),
        ("decoder.levels.{l}.up", "decoder.up_blocks.{l}.upsamplers.0.conv"),
        ("{half}.norm_out", "{half}.conv_norm_out"),
        ("{half}.conv_out", "{half}.conv_out"),
    ],
)
