"""Checkpoints, sharding, logging: what training, evaluation and inference share."""
