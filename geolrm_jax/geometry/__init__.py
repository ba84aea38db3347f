"""Cameras, voxel grids, rotations."""
