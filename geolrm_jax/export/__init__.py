"""Gaussians and pictures as files that other programs open."""
