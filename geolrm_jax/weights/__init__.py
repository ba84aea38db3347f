"""Imports of published weights."""
