"""The evaluation protocol, its runner and its report."""
