"""Images and cameras in, Gaussians out."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from geolrm_jax.geometry.images import resize_views
from geolrm_jax.models.geolrm import GeoLRMConfig
from geolrm_jax.precision import Precision
from geolrm_jax.runtime.checkpoint import Checkpoints
from geolrm_jax.scene import Gaussians, Views, pytree, static_field


@pytree
class Model:
    """A trained model: arrays, and what is needed to run them.

    Attributes:
      variables: `params` and `batch_stats`.
      graphdef: the module's structure.
      input_size: side that images are resized to.
      max_anchors: anchors per object; of more occupied voxels a random subset is used.
      seed: of that subset.
    """

    variables: dict[str, Any]
    graphdef: Any = static_field()
    input_size: int = static_field()
    max_anchors: int = static_field()
    seed: int = static_field()


def abstract_model(config: GeoLRMConfig, precision: Precision) -> tuple[Any, dict[str, Any]]:
    """The structure of a model and the shapes of its `params` and `batch_stats`."""
    module = nnx.eval_shape(lambda: config.make(nnx.Rngs(0), precision))
    graphdef, params, stats = nnx.split(module, nnx.Param, nnx.BatchStat)
    return graphdef, {"params": nnx.to_pure_dict(params), "batch_stats": nnx.to_pure_dict(stats)}


def restore_variables(checkpoints: Checkpoints, step: int, shapes: dict[str, Any]) -> dict[str, Any]:
    """`params` and `batch_stats` of a checkpoint on the first device of this process."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    return checkpoints.restore_model(step, target)


@jax.jit
def reconstruct_batch(model: Model, views: Views) -> tuple[Gaussians, Float[Array, "b g g g"]]:
    """Gaussians of each scene's views (B, V), already at a size the networks take, and the occupancy logits."""
    module = nnx.merge(model.graphdef, model.variables["params"], model.variables["batch_stats"])
    return module(views, max_anchors=model.max_anchors, key=jax.random.key(model.seed))


def reconstruct(model: Model, views: Views) -> Gaussians:
    """Gaussians of one object.

    Args:
      model: from `geolrm_jax.load_model`.
      views: (V,) posed images of any size; they are resized to the model's input size, their cameras with them.

    Returns:
      Gaussians (G, ...) with a mask: those of anchors that were not needed are padding.
    """
    return reconstruct_and_count(model, views)[0]


def reconstruct_and_count(model: Model, views: Views) -> tuple[Gaussians, Int[Array, ""]]:
    """What `reconstruct` gives, and the number of voxels found occupied, of which `max_anchors` are used."""
    views = resize_views(views, model.input_size, model.input_size)
    gaussians, logits = reconstruct_batch(model, jax.tree.map(lambda x: jnp.asarray(x)[None], views))
    return jax.tree.map(lambda x: x[0], gaussians), jnp.sum(logits > 0)
