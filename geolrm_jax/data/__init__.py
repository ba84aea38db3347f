"""Objects as records: sources, builders, and the pipeline that feeds training."""
