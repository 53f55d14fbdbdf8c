"""The text encoders' names, the same in the original files and on the hub (grammar: `names`)."""

from dataclasses import replace

from .names import Layout

CLIP_LAYOUT = Layout(
    name="CLIP",
    sign="text_model.encoder.layers.0.self_attn.q_proj.weight",
    prefixes=("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."),
    ignored=("embeddings.position_ids", "logit_scale"),
    rows=[
        ("token_embedding", "text_model.embeddings.token_embedding"),
        ("position_embedding", "text_model.embeddings.position_embedding"),
        ("layers.{i}.norm_1", "text_model.encoder.layers.{i}.layer_norm1"),
        ("layers.{i}.attention.qkv", (
            "text_model.encoder.layers.{i}.self_attn.q_proj", "text_model.encoder.layers.{i}.self_attn.k_proj",
            "text_model.encoder.layers.{i}.self_attn.v_proj",
        )),
        ("layers.{i}.attention.out", "text_model.encoder.layers.{i}.self_attn.out_proj"),
        ("layers.{i}.norm_2", "text_model.encoder.layers.{i}.layer_norm2"),
        ("layers.{i}.mlp.in_layer", "text_model.encoder.layers.{i}.mlp.fc1"),
        ("layers.{i}.mlp.out_layer", "text_model.encoder.layers.{i}.mlp.fc2"),
        ("final_norm", "text_model.final_layer_norm"),
        ("projection", "text_projection"),
    ],
)


def _bare(name: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return name.removeprefix("text_model.") if isinstance(name, str) else tuple(map(_bare, name))


# The names that transformers 5 writes for a CLIP without projection; it reads both.
CLIP_BARE = replace(
    CLIP_LAYOUT,
    name="CLIP of transformers 5",
    sign=_bare(CLIP_LAYOUT.sign),
    prefixes=(),
    rows=[(ours, _bare(theirs)) for ours, theirs in CLIP_LAYOUT.rows],
)

T5_LAYOUT = Layout(
    name="T5",
    sign="encoder.block.0.layer.0.SelfAttention.q.weight",
    prefixes=("text_encoders.t5xxl.transformer.",),
    ignored=("logit_scale",),
    copies={"encoder.embed_tokens.weight": "shared.weight"},
    rows=[
        ("token_embedding", "shared"),
        ("relative_bias", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
        ("layers.{i}.norm_1", "encoder.block.{i}.layer.0.layer_norm"),
        ("layers.{i}.attention.qkv", (
            "encoder.block.{i}.layer.0.SelfAttention.q", "encoder.block.{i}.layer.0.SelfAttention.k",
            "encoder.block.{i}.layer.0.SelfAttention.v",
        )),
        ("layers.{i}.attention.out", "encoder.block.{i}.layer.0.SelfAttention.o"),
        ("layers.{i}.norm_2", "encoder.block.{i}.layer.1.layer_norm"),
        ("layers.{i}.mlp.gate", "encoder.block.{i}.layer.1.DenseReluDense.wi_0"),
        ("layers.{i}.mlp.value", "encoder.block.{i}.layer.1.DenseReluDense.wi_1"),
        ("layers.{i}.mlp.out", "encoder.block.{i}.layer.1.DenseReluDense.wo"),
        ("final_norm", "encoder.final_layer_norm"),
    ],
)
