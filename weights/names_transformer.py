"""The transformer's names in the two families' original files and on the hub (grammar: `names`).

Original FLUX.1: one file, names without a prefix; merged files have SD3's prefix. Original SD3: one file that holds
the autoencoder too. The hub splits what the originals fuse (q, k, v), and stores a modulation without a gate as
(scale, shift).
"""

from .names import OUTPUT_PATCH, PATCH_CONV, SWAP_HALVES, Layout

FLUX_ORIGINAL = Layout(
    name="original FLUX.1",
    sign="double_blocks.0.img_attn.qkv.weight",
    prefixes=("model.diffusion_model.",),
    needs={"position": "rope", "patch_size": 2, "context_ends_early": False},
    rows=[
        ("image_in", "img_in"),
        ("context_in", "txt_in"),
        ("time_in.in_layer", "time_in.in_layer"),
        ("time_in.out_layer", "time_in.out_layer"),
        ("pooled_in.in_layer", "vector_in.in_layer"),
        ("pooled_in.out_layer", "vector_in.out_layer"),
        ("guidance_in.in_layer", "guidance_in.in_layer"),
        ("guidance_in.out_layer", "guidance_in.out_layer"),
        ("dual_blocks.{i}.image.modulation", "double_blocks.{i}.img_mod.lin"),
        ("dual_blocks.{i}.image.mlp.in_layer", "double_blocks.{i}.img_mlp.0"),
        ("dual_blocks.{i}.image.mlp.out_layer", "double_blocks.{i}.img_mlp.2"),
        ("dual_blocks.{i}.context.modulation", "double_blocks.{i}.txt_mod.lin"),
        ("dual_blocks.{i}.context.mlp.in_layer", "double_blocks.{i}.txt_mlp.0"),
        ("dual_blocks.{i}.context.mlp.out_layer", "double_blocks.{i}.txt_mlp.2"),
        ("dual_blocks.{i}.attention.image.qkv", "double_blocks.{i}.img_attn.qkv"),
        ("dual_blocks.{i}.attention.image.norm_q.weight", "double_blocks.{i}.img_attn.norm.query_norm.scale"),
        ("dual_blocks.{i}.attention.image.norm_k.weight", "double_blocks.{i}.img_attn.norm.key_norm.scale"),
        ("dual_blocks.{i}.attention.image.out", "double_blocks.{i}.img_attn.proj"),
        ("dual_blocks.{i}.attention.context.qkv", "double_blocks.{i}.txt_attn.qkv"),
        ("dual_blocks.{i}.attention.context.norm_q.weight", "double_blocks.{i}.txt_attn.norm.query_norm.scale"),
        ("dual_blocks.{i}.attention.context.norm_k.weight", "double_blocks.{i}.txt_attn.norm.key_norm.scale"),
        ("dual_blocks.{i}.attention.context.out", "double_blocks.{i}.txt_attn.proj"),
        ("single_blocks.{i}.modulation", "single_blocks.{i}.modulation.lin"),
        ("single_blocks.{i}.linear_in", "single_blocks.{i}.linear1"),
        ("single_blocks.{i}.norm_q.weight", "single_blocks.{i}.norm.query_norm.scale"),
        ("single_blocks.{i}.norm_k.weight", "single_blocks.{i}.norm.key_norm.scale"),
        ("single_blocks.{i}.linear_out", "single_blocks.{i}.linear2"),
        ("final_modulation", "final_layer.adaLN_modulation.1"),
        ("image_out", "final_layer.linear"),
    ],
)

SD3_ORIGINAL = Layout(
    name="original SD3",
    sign="joint_blocks.0.x_block.attn.qkv.weight",
    prefixes=("model.diffusion_model.",),
    prefix="model.diffusion_model.",
    needs={"position": "table"},
    rows=[
        ("image_in.weight", "x_embedder.proj.weight", PATCH_CONV),
        ("image_in.bias", "x_embedder.proj.bias"),
        ("position_table", "pos_embed"),
        ("context_in", "context_embedder"),
        ("time_in.in_layer", "t_embedder.mlp.0"),
        ("time_in.out_layer", "t_embedder.mlp.2"),
        ("pooled_in.in_layer", "y_embedder.mlp.0"),
        ("pooled_in.out_layer", "y_embedder.mlp.2"),
        ("dual_blocks.{i}.image.modulation", "joint_blocks.{i}.x_block.adaLN_modulation.1"),
        ("dual_blocks.{i}.image.mlp.in_layer", "joint_blocks.{i}.x_block.mlp.fc1"),
        ("dual_blocks.{i}.image.mlp.out_layer", "joint_blocks.{i}.x_block.mlp.fc2"),
        ("dual_blocks.{i}.context.modulation", "joint_blocks.{i}.context_block.adaLN_modulation.1"),
        ("dual_blocks.{i}.context.mlp.in_layer", "joint_blocks.{i}.context_block.mlp.fc1"),
        ("dual_blocks.{i}.context.mlp.out_layer", "joint_blocks.{i}.context_block.mlp.fc2"),
        ("dual_blocks.{i}.attention.image.qkv", "joint_blocks.{i}.x_block.attn.qkv"),
        ("dual_blocks.{i}.attention.image.norm_q", "joint_blocks.{i}.x_block.attn.ln_q"),
        ("dual_blocks.{i}.attention.image.norm_k", "joint_blocks.{i}.x_block.attn.ln_k"),
        ("dual_blocks.{i}.attention.image.out", "joint_blocks.{i}.x_block.attn.proj"),
        ("dual_blocks.{i}.attention.context.qkv", "joint_blocks.{i}.context_block.attn.qkv"),
        ("dual_blocks.{i}.attention.context.norm_q", "joint_blocks.{i}.context_block.attn.ln_q"),
        ("dual_blocks.{i}.attention.context.norm_k", "joint_blocks.{i}.context_block.attn.ln_k"),
        ("dual_blocks.{i}.attention.context.out", "joint_blocks.{i}.context_block.attn.proj"),
        ("dual_blocks.{i}.image_attention.qkv", "joint_blocks.{i}.x_block.attn2.qkv"),
        ("dual_blocks.{i}.image_attention.norm_q", "joint_blocks.{i}.x_block.attn2.ln_q"),
        ("dual_blocks.{i}.image_attention.norm_k", "joint_blocks.{i}.x_block.attn2.ln_k"),
        ("dual_blocks.{i}.image_attention.out", "joint_blocks.{i}.x_block.attn2.proj"),
        ("final_modulation", "final_layer.adaLN_modulation.1"),
        ("image_out", "final_layer.linear", OUTPUT_PATCH),
    ],
)

# The rows that both families share on the hub.
_HUB_ROWS = [
    ("context_in", "context_embedder"),
    ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    ("pooled_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    ("pooled_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    ("dual_blocks.{i}.image.modulation", "transformer_blocks.{i}.norm1.linear"),
    ("dual_blocks.{i}.image.mlp.in_layer", "transformer_blocks.{i}.ff.net.0.proj"),
    ("dual_blocks.{i}.image.mlp.out_layer", "transformer_blocks.{i}.ff.net.2"),
    ("dual_blocks.{i}.context.modulation", "transformer_blocks.{i}.norm1_context.linear"),
    ("dual_blocks.{i}.context.mlp.in_layer", "transformer_blocks.{i}.ff_context.net.0.proj"),
    ("dual_blocks.{i}.context.mlp.out_layer", "transformer_blocks.{i}.ff_context.net.2"),
    ("dual_blocks.{i}.attention.image.qkv", (
        "transformer_blocks.{i}.attn.to_q", "transformer_blocks.{i}.attn.to_k", "transformer_blocks.{i}.attn.to_v",
    )),
    ("dual_blocks.{i}.attention.image.norm_q", "transformer_blocks.{i}.attn.norm_q"),
    ("dual_blocks.{i}.attention.image.norm_k", "transformer_blocks.{i}.attn.norm_k"),
    ("dual_blocks.{i}.attention.image.out", "transformer_blocks.{i}.attn.to_out.0"),
    ("dual_blocks.{i}.attention.context.qkv", (
        "transformer_blocks.{i}.attn.add_q_proj", "transformer_blocks.{i}.attn.add_k_proj",
        "transformer_blocks.{i}.attn.add_v_proj",
    )),
    ("dual_blocks.{i}.attention.context.norm_q", "transformer_blocks.{i}.attn.norm_added_q"),
    ("dual_blocks.{i}.attention.context.norm_k", "transformer_blocks.{i}.attn.norm_added_k"),
    ("dual_blocks.{i}.attention.context.out", "transformer_blocks.{i}.attn.to_add_out"),
    ("final_modulation", "norm_out.linear", SWAP_HALVES),
]

FLUX_HUB = Layout(
    name="hub FLUX.1",
    sign="single_transformer_blocks.0.attn.to_q.weight",
    needs={
        "position": "rope", "patch_size": 2, "context_ends_early": False, "qk_norm": True, "mlp_ratio": 4,
        "rope_theta": 10_000,
    },
    rows=[
        ("image_in", "x_embedder"),
        ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
        ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
        *_HUB_ROWS,
        ("single_blocks.{i}.modulation", "single_transformer_blocks.{i}.norm.linear"),
        ("single_blocks.{i}.linear_in", (
            "single_transformer_blocks.{i}.attn.to_q", "single_transformer_blocks.{i}.attn.to_k",
            "single_transformer_blocks.{i}.attn.to_v", "single_transformer_blocks.{i}.proj_mlp",
        )),
        ("single_blocks.{i}.norm_q", "single_transformer_blocks.{i}.attn.norm_q"),
        ("single_blocks.{i}.norm_k", "single_transformer_blocks.{i}.attn.norm_k"),
        ("single_blocks.{i}.linear_out", "single_transformer_blocks.{i}.proj_out"),
        ("image_out", "proj_out"),
    ],
)

SD3_HUB = Layout(
    name="hub SD3",
    sign="pos_embed.pos_embed",
    needs={"position": "table", "mlp_ratio": 4},
    rows=[
        ("image_in.weight", "pos_embed.proj.weight", PATCH_CONV),
        ("image_in.bias", "pos_embed.proj.bias"),
        ("position_table", "pos_embed.pos_embed"),
        ("dual_blocks.{last}.context.modulation", "transformer_blocks.{last}.norm1_context.linear", SWAP_HALVES),
        *_HUB_ROWS,
        ("dual_blocks.{i}.image_attention.qkv", (
            "transformer_blocks.{i}.attn2.to_q", "transformer_blocks.{i}.attn2.to_k",
            "transformer_blocks.{i}.attn2.to_v",
        )),
        ("dual_blocks.{i}.image_attention.norm_q", "transformer_blocks.{i}.attn2.norm_q"),
        ("dual_blocks.{i}.image_attention.norm_k", "transformer_blocks.{i}.attn2.norm_k"),
        ("dual_blocks.{i}.image_attention.out", "transformer_blocks.{i}.attn2.to_out.0"),
        ("image_out", "proj_out", OUTPUT_PATCH),
    ],
)
