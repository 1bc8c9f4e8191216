"""Diffusers pipelines for what the papers do with a trained model, with or without classes."""

from ddim_schedulers.pipelines.conditions import Conditions
from ddim_schedulers.pipelines.generation import (
    GenerationOutput,
    GenerationPipeline,
    VariationsOutput,
)
from ddim_schedulers.pipelines.interpolation import InterpolationOutput, InterpolationPipeline
from ddim_schedulers.pipelines.inversion import (
    InversionOutput,
    InversionPipeline,
    ReconstructionOutput,
    TranslationOutput,
)
from ddim_schedulers.pipelines.labels import ClassMixture
from ddim_schedulers.pipelines.langevin import (
    AnnealedLangevinPipeline,
    LangevinOutput,
    geometric_timesteps,
)
from ddim_schedulers.pipelines.observers import SamplingPath
from ddim_schedulers.pipelines.pictures import make_grid, path_grid
from ddim_schedulers.pipelines.refinement import Encoding, encode_and_refine
from ddim_schedulers.pipelines.restoration.pipeline import (
    RestorationOutput,
    RestorationPipeline,
)
from ddim_schedulers.pipelines.slerp import slerp
from ddim_schedulers.pipelines.text_inversion import TextInversionOutput, invert

__all__ = [
    "AnnealedLangevinPipeline",
    "ClassMixture",
    "Conditions",
    "Encoding",
    "GenerationOutput",
    "GenerationPipeline",
    "InterpolationOutput",
    "InterpolationPipeline",
    "InversionOutput",
    "InversionPipeline",
    "LangevinOutput",
    "ReconstructionOutput",
    "RestorationOutput",
    "RestorationPipeline",
    "SamplingPath",
    "TextInversionOutput",
    "TranslationOutput",
    "VariationsOutput",
    "encode_and_refine",
    "geometric_timesteps",
    "invert",
    "make_grid",
    "path_grid",
    "slerp",
]
