"""Diffusers pipelines built on the schedulers of this package."""
