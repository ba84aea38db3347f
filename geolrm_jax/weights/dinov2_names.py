"""DINOv2's parameters by the names of Hugging Face's `Dinov2Model` and `Dinov2Backbone`, and ours."""

from geolrm_jax.weights.names import CONV, LINEAR, NORM, ONE_LEADING, SAME, TWO_LEADING, Row

VIT: tuple[Row, ...] = (
    ("embeddings.cls_token", "class_token", TWO_LEADING),
    ("embeddings.mask_token", "mask_token", ONE_LEADING),
    ("embeddings.position_embeddings", "positions", ONE_LEADING),
    ("embeddings.register_tokens", "registers", ONE_LEADING),
    ("embeddings.patch_embeddings.projection", "patches", CONV),
    ("encoder.layer.{n}.norm1", "blocks.norm1", NORM),
    ("encoder.layer.{n}.attention.attention.query", "blocks.query", LINEAR),
    ("encoder.layer.{n}.attention.attention.key", "blocks.key", LINEAR),
    ("encoder.layer.{n}.attention.attention.value", "blocks.value", LINEAR),
    ("encoder.layer.{n}.attention.output.dense", "blocks.out", LINEAR),
    ("encoder.layer.{n}.layer_scale1.lambda1", "blocks.scale1", SAME),
    ("encoder.layer.{n}.norm2", "blocks.norm2", NORM),
    ("encoder.layer.{n}.mlp.fc1", "blocks.fc1", LINEAR),
    ("encoder.layer.{n}.mlp.fc2", "blocks.fc2", LINEAR),
    ("encoder.layer.{n}.layer_scale2.lambda1", "blocks.scale2", SAME),
    ("layernorm", "norm", NORM),
)

# Names of transformers from version 5 on, and those before, which the table and the released checkpoint have.
OLD_BY_NEW = {
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
}
