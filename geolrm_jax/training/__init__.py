"""Objectives, the train step, the loop."""
