"""The released model and training, every difference from the paper and from our default included.

  geolrm weights import --from geolrm.ckpt --to workdir/released
  geolrm infer --workdir workdir/released --views FOLDER --out out

The imported checkpoint gives the released program's numbers with this config (tests/parity). For token attention with
the same weights: --model.proposal.transformer.self-attention tokens, and the same for the reconstruction.

Schedules are counted in optimizer steps: the released reconstruction counts 12,000 and 100,000 in micro-batches, of
which 8 make a step. The released scripts run inference with rope_scale 1; its training has 0.5.
"""

from dataclasses import replace

from geolrm_jax.config import Experiment, load_config
from geolrm_jax.models.geo_transformer import TransformerConfig
from geolrm_jax.models.image_encoder import ImageEncoderConfig
from geolrm_jax.training.optimizer import OptimizerConfig

ACCUMULATION = 8


def transformer(config: TransformerConfig, dropout: float) -> TransformerConfig:
    """The released rules."""
    return replace(
        config,
        self_attention="released_heads",
        cross_attention_residual="normed",
        rope_index="released",
        view_mask="none",
        projection="mirrored",
        dropout=dropout,
    )


def get_config() -> Experiment:
    """`geolrm` with the released choices."""
    base = load_config("geolrm")
    encoder = ImageEncoderConfig(ray_length="depth", ray_intrinsics="centred")
    proposal, reconstruction = base.model.proposal, base.model.reconstruction
    model = replace(
        base.model,
        proposal=replace(proposal, encoder=encoder, transformer=transformer(proposal.transformer, dropout=0.1)),
        reconstruction=replace(
            reconstruction, encoder=encoder, transformer=transformer(reconstruction.transformer, dropout=0.0)
        ),
        padding="origin",
    )
    views = dict(view_rule="released", inputs=(1, 2, 3, 4))
    return replace(
        base,
        name="released",
        data=replace(base.data, occupancy_rounding="released"),
        model=model,
        proposal=replace(
            base.proposal,
            objective=replace(base.proposal.objective, counting="batch", metric_logit=0.5),
            steps=50_000,
            batch=2 * 32,
            accumulation=1,
            optimizer=OptimizerConfig(2e-4, warmup=500, period=50_000, after_period="rise", clip=10.0),
            other_inputs=(0, 1, 2, 3, 4),
            **views,
        ),
        reconstruction=replace(
            base.reconstruction,
            objective=replace(
                base.reconstruction.objective,
                depth_pixels="covered",
                background="batch",
                compositing="twice",
                proposal_mode="training",
            ),
            optimizer=OptimizerConfig(
                1e-4, warmup=12_000 // ACCUMULATION, period=100_000 // ACCUMULATION, after_period="rise"
            ),
            other_inputs=(0, 1, 2, 3),
            **views,
        ),
    )
