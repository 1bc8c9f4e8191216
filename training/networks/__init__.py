"""Which network: a preset, a saved pipeline, a run or a checkpoint."""
