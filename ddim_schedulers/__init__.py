"""DDPM and DDIM for Hugging Face Diffusers, exact to the equations.

The scheduler classes are ordinary `SchedulerMixin`s: build one with
`from_config(pipe.scheduler.config)` and put it in a pipeline. Importing this package registers them
with diffusers, so that pipelines holding them can be saved and loaded. The mathematics is in
`betas`, `process`, `parameterization`, `timesteps`, `sigmas` and `transition`; notation is fixed at
the top of `process`.
"""

from pathlib import Path as _Path

from .plugin import register, to_portable
from .scheduling_ddim import CALIBRATED, FEW_STEPS, GeneralizedDDIMScheduler
from .scheduling_ddim_inverse import GeneralizedDDIMInverseScheduler
from .scheduling_ddpm import MarkovianDDPMScheduler

__all__ = [
    "CALIBRATED",
    "FEW_STEPS",
    "GeneralizedDDIMInverseScheduler",
    "GeneralizedDDIMScheduler",
    "MarkovianDDPMScheduler",
    "__version__",
    "to_portable",
]

__version__ = "0.1.0"

register()

# `python -m` and `torchrun -m` at the root of a clone import this folder, not what is installed;
# the folders of its sub-packages lie beside it there. An installed package has no such neighbours.
_root = _Path(__file__).resolve().parent.parent
if all((_root / name).exists() for name in ("pyproject.toml", "pipelines", "training")):
    __path__.append(str(_root))
