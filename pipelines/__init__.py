"""Diffusers pipelines that do with a trained unconditional model what the papers do."""

from ddim_schedulers.pipelines.generation import (
    GenerationOutput,
    GenerationPipeline,
    VariationsOutput,
)
from ddim_schedulers.pipelines.records import SamplingPath

__all__ = [
    "GenerationOutput",
    "GenerationPipeline",
    "SamplingPath",
    "VariationsOutput",
]
