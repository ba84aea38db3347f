"""The terms of the training objectives."""
