"""One object, 30 of its views to train on and 8 unseen: shows that the whole chain can fit.

python train.py --config configs/one_object.py --data.source.root DIR --data.source.train NAME --data.source.test NAME
"""

from dataclasses import replace

from geolrm_jax.config import Experiment, load_config

OBJECT, ANCHORS = "basket", 1536
UNSEEN = (2, 6, 10, 14, 18, 22, 27, 33)  # of the 38 distinct views
TRAINED = tuple(view for view in range(40) if view not in (*UNSEEN, 24, 39))


def get_config() -> Experiment:
    """The quickstart's networks with more anchors, on one object."""
    base = load_config("real_objects")
    source = replace(base.data.source, train=(OBJECT,), test=(OBJECT,), train_views=TRAINED)
    return replace(
        base,
        name="one_object",
        data=replace(base.data, source=source),
        proposal=replace(base.proposal, steps=100, batch=1, views=6, inputs=(6,)),
        reconstruction=replace(
            base.reconstruction,
            objective=replace(base.reconstruction.objective, max_anchors=ANCHORS),
            steps=500,
            batch=1,
            views=8,
            inputs=(6,),
        ),
        evaluation=replace(base.evaluation, targets=UNSEEN, inputs=6, max_anchors=ANCHORS),
    )
