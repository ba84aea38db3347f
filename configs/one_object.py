"""One object, 30 of its views to train on and 8 unseen: shows that the whole chain can fit.

python train.py --config configs/one_object.py --data.source.root DIR --data.source.train NAME --data.source.test NAME
"""

from dataclasses import replace

from geolrm_jax.config import Experiment, load_config
from geolrm_jax.data.pipeline import DataConfig

OBJECT = "basket"
UNSEEN = (2, 6, 10, 14, 18, 22, 27, 33)  # of the 38 distinct views
TRAINED = tuple(view for view in range(40) if view not in (*UNSEEN, 24, 39))


def get_config() -> Experiment:
    """The quickstart's networks on one object."""
    base = load_config("real_objects")
    source = replace(base.data.source, train=(OBJECT,), test=(OBJECT,), train_views=TRAINED)
    return replace(
        base,
        name="one_object",
        data=DataConfig(source, occupancy_grid=base.data.occupancy_grid),
        evaluation=replace(base.evaluation, targets=UNSEEN, inputs=6),
    )
