"""Accelerate trainer, evaluation and the `ddim-schedulers` command line."""
