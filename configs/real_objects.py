"""Real textured objects in the GObjaverse layout: 12 to train on, 4 unseen.

  python train.py --config configs/real_objects.py --data.source.root DIR

DIR holds an object a folder; with other objects than these, name the unseen ones by --data.source.test.
2 CPU cores, 10 min 45 s while another job shared them for half of that (14 min 50 s of CPU time). On the 4 unseen
objects, 6 inputs and 4 targets at 128^2: PSNR 18.8 dB, nearest input view 17.2 dB, white picture 12.2 dB.
"""

from dataclasses import replace

from geolrm_jax.config import Experiment, load_config
from geolrm_jax.data.builders.config import DataConfig
from geolrm_jax.data.folder import FolderSource

UNSEEN = ("basket", "milk", "moka_pot", "white_yellow_mug")


def get_config() -> Experiment:
    """The quickstart's networks, 112^2 inputs, 128^2 renders."""
    base = load_config("quickstart")
    source = FolderSource("../shared/renders", test=UNSEEN)
    return replace(
        base,
        name="real_objects",
        data=DataConfig(source, occupancy_grid=base.data.occupancy_grid),
        proposal=replace(base.proposal, steps=220, views=6, inputs=(6,)),
        reconstruction=replace(base.reconstruction, steps=400, views=8, inputs=(6,)),
        evaluation=replace(base.evaluation, inputs=6, render_size=128),
        render_size=128,
    )
