"""Evaluates a work directory: `python eval.py --workdir W [--step N|latest|best] [--data ...]`."""

import sys

from geolrm_jax import cli

if __name__ == "__main__":
    sys.exit(cli.evaluate(sys.argv[1:], program="eval.py"))
