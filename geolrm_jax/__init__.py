"""GeoLRM in JAX and Flax: posed images of an object in, 3D Gaussians out.

`load_model(workdir)` restores a trained model, `reconstruct(model, views)` runs it.
"""

import importlib

__all__ = ["load_model", "reconstruct"]

# Imported when first asked for: `import geolrm_jax.scene` does not pay for the whole program.
_HOMES = {"load_model": "geolrm_jax.starting", "reconstruct": "geolrm_jax.inference"}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
