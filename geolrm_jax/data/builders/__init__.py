"""TFDS builders that write records into ArrayRecord files."""
