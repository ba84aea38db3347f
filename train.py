"""Trains a config: `python train.py --config configs/quickstart.py [--workdir DIR] [overrides]`."""

import sys

from geolrm_jax import cli

if __name__ == "__main__":
    sys.exit(cli.train(sys.argv[1:], program="train.py"))
