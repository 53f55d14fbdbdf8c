"""The names of every layout: one table each (grammar: `layouts`).

Original FLUX.1: one file, names without a prefix. Original SD3: one file that holds the autoencoder too, and a prefix
before each of the two; merged files hold the text encoders as well, each under a prefix. The hub splits what the
originals fuse (q, k, v), and stores a modulation without a gate as (scale, shift).
"""

from dataclasses import replace

from .layouts import CONV_1X1, OUTPUT_PATCH, PATCH_CONV, SWAP_HALVES, Layout

FLUX_ORIGINAL = Layout(
    "original FLUX.1", "double_blocks.0.img_mod.lin.weight", alias=(r"_norm\.weight$", "_norm.scale"), rows=[
        ("{image,context}_in", "{img,txt}_in"),
        ("{time,pooled,guidance}_in.{n}_layer", "{time,vector,guidance}_in.{n}_layer"),
        ("dual_blocks.{i}.{image,context}.modulation", "double_blocks.{i}.{img,txt}_mod.lin"),
        ("dual_blocks.{i}.{image,context}.mlp.{in,out}_layer", "double_blocks.{i}.{img,txt}_mlp.{0,2}"),
        ("dual_blocks.{i}.attention.{image,context}.qkv", "double_blocks.{i}.{img,txt}_attn.qkv"),
        ("dual_blocks.{i}.attention.{image,context}.norm_{q,k}.weight",
         "double_blocks.{i}.{img,txt}_attn.norm.{query,key}_norm.scale"),
        ("dual_blocks.{i}.attention.{image,context}.out", "double_blocks.{i}.{img,txt}_attn.proj"),
        ("single_blocks.{i}.modulation", "single_blocks.{i}.modulation.lin"),
        ("single_blocks.{i}.linear_{in,out}", "single_blocks.{i}.linear{1,2}"),
        ("single_blocks.{i}.norm_{q,k}.weight", "single_blocks.{i}.norm.{query,key}_norm.scale"),
        ("{final_modulation,image_out}", "final_layer.{adaLN_modulation.1,linear}"),
])

FLUX2_ORIGINAL = replace(
    FLUX_ORIGINAL, name="original FLUX.2", sign="double_stream_modulation_img.lin.weight", rows=[
        ("shared_modulation.{context,image,single}",
         "{double_stream_modulation_txt,double_stream_modulation_img,single_stream_modulation}.lin"),
        *FLUX_ORIGINAL.rows,
])

SD3_ORIGINAL = Layout(
    "original SD3", "joint_blocks.0.x_block.attn.qkv.weight", prefix="model.diffusion_model.", rows=[
        ("image_in.weight", "x_embedder.proj.weight", PATCH_CONV),
        ("{image_in.bias,position_table,context_in}", "{x_embedder.proj.bias,pos_embed,context_embedder}"),
        ("{time,pooled}_in.{in,out}_layer", "{t,y}_embedder.mlp.{0,2}"),
        ("dual_blocks.{i}.{image,context}.modulation", "joint_blocks.{i}.{x,context}_block.adaLN_modulation.1"),
        ("dual_blocks.{i}.{image,context}.mlp.{in,out}_layer", "joint_blocks.{i}.{x,context}_block.mlp.{fc1,fc2}"),
        ("dual_blocks.{i}.attention.{image,context}.{qkv,norm_q,norm_k,out}",
         "joint_blocks.{i}.{x,context}_block.attn.{qkv,ln_q,ln_k,proj}"),
        ("dual_blocks.{i}.image_attention.{qkv,norm_q,norm_k,out}",
         "joint_blocks.{i}.x_block.attn2.{qkv,ln_q,ln_k,proj}"),
        ("final_modulation", "final_layer.adaLN_modulation.1"),
        ("image_out", "final_layer.linear", OUTPUT_PATCH),
])

# The rows that the families share on the hub.
_HUB_ROWS = [
    ("context_in", "context_embedder"),
    ("{time,pooled}_in.{in,out}_layer", "time_text_embed.{timestep,text}_embedder.linear_{1,2}"),
    ("dual_blocks.{i}.{image,context}.modulation", "transformer_blocks.{i}.{norm1,norm1_context}.linear"),
    ("dual_blocks.{i}.{image,context}.mlp.{in,out}_layer", "transformer_blocks.{i}.{ff,ff_context}.net.{0.proj,2}"),
    ("dual_blocks.{i}.attention.image.qkv", "transformer_blocks.{i}.attn.to_{q,k,v}"),
    ("dual_blocks.{i}.attention.context.qkv", "transformer_blocks.{i}.attn.add_{q,k,v}_proj"),
    ("dual_blocks.{i}.attention.{image,context}.norm_{n}", "transformer_blocks.{i}.attn.{norm,norm_added}_{n}"),
    ("dual_blocks.{i}.attention.{image,context}.out", "transformer_blocks.{i}.attn.{to_out.0,to_add_out}"),
    ("final_modulation", "norm_out.linear", SWAP_HALVES),
]

FLUX_HUB = Layout(
    "hub FLUX.1", "single_transformer_blocks.0.attn.to_q.weight", rows=[
        ("{image_in,image_out}", "{x_embedder,proj_out}"),
        ("guidance_in.{in,out}_layer", "time_text_embed.guidance_embedder.linear_{1,2}"),
        *_HUB_ROWS,
        ("single_blocks.{i}.{modulation,linear_out}", "single_transformer_blocks.{i}.{norm.linear,proj_out}"),
        ("single_blocks.{i}.linear_in", "single_transformer_blocks.{i}.{attn.to_q,attn.to_k,attn.to_v,proj_mlp}"),
        ("single_blocks.{i}.norm_{n}", "single_transformer_blocks.{i}.attn.norm_{n}"),
])

FLUX2_HUB = Layout(
    "hub FLUX.2", "double_stream_modulation_img.linear.weight", rows=[
        ("{image_in,image_out}", "{x_embedder,proj_out}"),
        ("{time,guidance}_in.{in,out}_layer", "time_guidance_embed.{timestep,guidance}_embedder.linear_{1,2}"),
        ("shared_modulation.{context,image,single}",
         "{double_stream_modulation_txt,double_stream_modulation_img,single_stream_modulation}.linear"),
        ("dual_blocks.{i}.{image,context}.mlp.{n}_layer", "transformer_blocks.{i}.{ff,ff_context}.linear_{n}"),
        *_HUB_ROWS,
        ("single_blocks.{i}.linear_{in,out}", "single_transformer_blocks.{i}.attn.{to_qkv_mlp_proj,to_out}"),
        ("single_blocks.{i}.norm_{n}", "single_transformer_blocks.{i}.attn.norm_{n}"),
])

SD3_HUB = Layout(
    "hub SD3", "pos_embed.pos_embed", rows=[
        ("image_in.weight", "pos_embed.proj.weight", PATCH_CONV),
        ("{image_in.bias,position_table}", "pos_embed.{proj.bias,pos_embed}"),
        ("dual_blocks.{last}.context.modulation", "transformer_blocks.{last}.norm1_context.linear", SWAP_HALVES),
        *_HUB_ROWS,
        ("dual_blocks.{i}.image_attention.qkv", "transformer_blocks.{i}.attn2.to_{q,k,v}"),
        ("dual_blocks.{i}.image_attention.norm_{n}", "transformer_blocks.{i}.attn2.norm_{n}"),
        ("dual_blocks.{i}.image_attention.out", "transformer_blocks.{i}.attn2.to_out.0"),
        ("image_out", "proj_out", OUTPUT_PATCH),
])

# Both number the encoder's levels from fine to coarse. The hub numbers the decoder's in running order, as we do; the
# original numbers them like the encoder's, so its last level runs first. The original's attention is made of 1 x 1
# convolutions.

AUTOENCODER_ORIGINAL = Layout(  # the prefix is SD3's; FLUX.1's own file has none
    "original autoencoder", "encoder.down.0.block.0.conv1.weight", prefix="first_stage_model.", rows=[
        ("{half}.{conv_in,conv_out,norm_out}", "{half}.{conv_in,conv_out,norm_out}"),
        ("{encoder,decoder}.latent_conv", "{encoder.quant_conv,decoder.post_quant_conv}"),
        ("latent_{mean,variance}", "bn.running_{mean,var}"),
        ("encoder.levels.{l}.blocks.{j}.{a}_{n}", "encoder.down.{l}.block.{j}.{a}{n}"),
        ("encoder.levels.{l}.blocks.{j}.shortcut", "encoder.down.{l}.block.{j}.nin_shortcut"),
        ("encoder.levels.{l}.resample", "encoder.down.{l}.downsample.conv"),
        ("{half}.middle.block_{j}.{a}_{n}", "{half}.mid.block_{j}.{a}{n}"),
        ("{half}.middle.attention.norm", "{half}.mid.attn_1.norm"),
        ("{half}.middle.attention.qkv.weight", "{half}.mid.attn_1.{q,k,v}.weight", CONV_1X1),
        ("{half}.middle.attention.out.weight", "{half}.mid.attn_1.proj_out.weight", CONV_1X1),
        ("{half}.middle.attention.qkv.bias", "{half}.mid.attn_1.{q,k,v}.bias"),
        ("{half}.middle.attention.out.bias", "{half}.mid.attn_1.proj_out.bias"),
        ("decoder.levels.{l}.blocks.{j}.{a}_{n}", "decoder.up.{last-l}.block.{j}.{a}{n}"),
        ("decoder.levels.{l}.blocks.{j}.shortcut", "decoder.up.{last-l}.block.{j}.nin_shortcut"),
        ("decoder.levels.{l}.resample", "decoder.up.{last-l}.upsample.conv"),
])

AUTOENCODER_HUB = Layout(
    "hub autoencoder", "encoder.down_blocks.0.resnets.0.conv1.weight", rows=[
        ("{half}.{conv_in,conv_out,norm_out}", "{half}.{conv_in,conv_out,conv_norm_out}"),
        ("{encoder,decoder}.latent_conv", "{quant_conv,post_quant_conv}"),
        ("latent_{mean,variance}", "bn.running_{mean,var}"),
        ("{encoder,decoder}.levels.{l}.blocks.{j}.{a}_{n}", "{encoder.down,decoder.up}_blocks.{l}.resnets.{j}.{a}{n}"),
        ("{encoder,decoder}.levels.{l}.blocks.{j}.shortcut",
         "{encoder.down,decoder.up}_blocks.{l}.resnets.{j}.conv_shortcut"),
        ("encoder.levels.{l}.resample", "encoder.down_blocks.{l}.downsamplers.0.conv"),
        ("decoder.levels.{l}.resample", "decoder.up_blocks.{l}.upsamplers.0.conv"),
        ("{half}.middle.block_{1,2}.{a}_{n}", "{half}.mid_block.resnets.{0,1}.{a}{n}"),
        ("{half}.middle.attention.norm", "{half}.mid_block.attentions.0.group_norm"),
        ("{half}.middle.attention.qkv", "{half}.mid_block.attentions.0.to_{q,k,v}"),
        ("{half}.middle.attention.out", "{half}.mid_block.attentions.0.to_out.0"),
    ])

# The text encoders are named alike in the original files and on the hub.

CLIP = Layout(
    "CLIP", "text_model.encoder.layers.0.self_attn.q_proj.weight", rows=[
        ("{token,position}_embedding", "text_model.embeddings.{token,position}_embedding"),
        ("layers.{i}.norm_{n}", "text_model.encoder.layers.{i}.layer_norm{n}"),
        ("layers.{i}.attention.qkv", "text_model.encoder.layers.{i}.self_attn.{q,k,v}_proj"),
        ("layers.{i}.attention.out", "text_model.encoder.layers.{i}.self_attn.out_proj"),
        ("layers.{i}.mlp.{in,out}_layer", "text_model.encoder.layers.{i}.mlp.{fc1,fc2}"),
        ("final_norm", "text_model.final_layer_norm"),
        ("projection", "text_projection"),
])

# The names that transformers 5 writes for a CLIP without projection; it reads both.
CLIP_BARE = replace(CLIP, name="CLIP of transformers 5", sign=CLIP.sign.removeprefix("text_model."),
                    rows=[(ours, theirs.removeprefix("text_model.")) for ours, theirs in CLIP.rows])

T5 = Layout(
    "T5", "encoder.block.0.layer.0.SelfAttention.q.weight", alias=("encoder.embed_tokens", "shared"), rows=[
        ("{token_embedding,final_norm}", "{shared,encoder.final_layer_norm}"),
        ("relative_bias", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
        ("layers.{i}.norm_{1,2}", "encoder.block.{i}.layer.{0,1}.layer_norm"),
        ("layers.{i}.attention.qkv", "encoder.block.{i}.layer.0.SelfAttention.{q,k,v}"),
        ("layers.{i}.attention.out", "encoder.block.{i}.layer.0.SelfAttention.o"),
        ("layers.{i}.mlp.{gate,value,out}", "encoder.block.{i}.layer.1.DenseReluDense.{wi_0,wi_1,wo}"),
])

# Qwen3 and Mistral; a model that reads pictures too has another prefix. The layers that the context does not need
# follow in the same file, with the final norm and the head.
DECODER = Layout(
    "text decoder", "layers.0.post_attention_layernorm.weight", prefix="model.", rows=[
        ("token_embedding", "embed_tokens"),
        ("layers.{i}.norm_{1,2}", "layers.{i}.{input,post_attention}_layernorm"),
        ("layers.{i}.attention.{q,k,v,out}", "layers.{i}.self_attn.{q,k,v,o}_proj"),
        ("layers.{i}.attention.norm_{n}", "layers.{i}.self_attn.{n}_norm"),
        ("layers.{i}.mlp.{gate,value,out}", "layers.{i}.mlp.{gate,up,down}_proj"),
])
