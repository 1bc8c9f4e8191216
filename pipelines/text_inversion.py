"""`invert`: pictures to the latents from which a text-to-image pipeline makes them.

The network call of DDIM inversion is the pipeline's own: it runs for one timestep with a scheduler
that keeps the model output. So prompts, guidance, ControlNet, adapters and sizes count as they do
when the latents are decoded, and the inverse is that of the pipeline's loop as it is.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput, logging

from ddim_schedulers import GeneralizedDDIMInverseScheduler, GeneralizedDDIMScheduler
from ddim_schedulers.pipelines.images import ImageInput, check_finite, to_model_space
from ddim_schedulers.pipelines.refinement import (
    encode_and_refine,
    network_calls,
    warn_of_residual,
)
from ddim_schedulers.pipelines.sampling import plan

logger = logging.get_logger(__name__)

DEFAULT_REFINEMENTS = 10
DEFAULT_TOLERANCE = 1e-5

# One network call and one `scheduler.step` a timestep, and nothing between them.
PLAIN = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionXLControlNetPipeline",
)
# The same loop, from noise that the pipeline draws: its text-to-image pipeline takes latents.
IMAGE_TO_IMAGE = tuple(name.replace("Pipeline", "Img2ImgPipeline") for name in PLAIN)
# The reason why a pipeline does not fit, by a part of the name of its class.
_REASONS = {
    "Inpaint": "it puts known pixels, or a mask, into every step",
    "Pix2Pix": "it guides by its picture, too",
    "PAG": "it guides by perturbed attention, which depends on the place of a timestep in its list",
    "AnimateDiff": "it makes videos",
    "LEdits": "it has an inversion of its own, `pipe.invert`",
    "Upscale": "it puts its picture into every step",
    "Adapter": "its adapter depends on the place of a timestep in its list",
}
# Arguments of the pipelines that inversion sets itself, or that have no inverse.
_TAKEN = {
    "latents": "pass `latents` of the picture itself",
    "output_type": "latents are returned",
    "return_dict": "an output is returned",
    "generator": "nothing is drawn",
    "eta": "only eta = 0 has an inverse",
    "sigmas": "a scheduler of DDPM's process has none; pass `timesteps`",
    "strength": "the whole trajectory is inverted",
    "callback": "it would be called once for each network call",
    "callback_steps": "it would be called once for each network call",
    "callback_on_step_end": "it would be called once for each network call",
    "callback_on_step_end_tensor_inputs": "it would be called once for each network call",
    "denoising_start": "the whole trajectory is inverted",
    "denoising_end": "the whole trajectory is inverted",
    "num_images_per_prompt": "each picture has one prompt; repeat both instead",
}
# Arguments that treat timesteps by their place in the list, with the value that treats all alike.
_EVERYWHERE = {"control_guidance_start": 0.0, "control_guidance_end": 1.0}
_PROMPTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
# Settings of the scheduler with the values whose steps have an inverse.
_INVERTIBLE: dict[str, tuple[Any, ...]] = {
    "clip_sample": (False,),
    "thresholding": (False,),
    "eta": (None, 0),
    "sigma": (None,),
    "reverse_variance": ("sigma",),
    "eps_scale": (1,),
    "end_scale": (1,),
    "solver_order": (1,),
    "solver_corrector": (False,),
    "solver_calibrated": (False,),
}


@dataclass
class TextInversionOutput(BaseOutput):
    """What `invert` returns; `residual` says how exact it is.

    Attributes:
        latents: x_T (N, C, h, w), on the device and in the dtype of the network: `latents` of the
            pipeline's call.
        timesteps: tau in the order of encoding (increasing), S timesteps.
        network_calls: the most calls of the pipeline's network; guidance doubles the batch of each.
        residual: float64 (S, N) on the CPU: root mean square change of x_t in the last refinement
            of each step; with `mixing` how far x_t decodes from what it should. None without
            refinement.
        converged: bool (N,) on the CPU: whether all residuals of a picture are within the
            tolerance; None without refinement.
        start: the latents of the pictures, x_0 (N, C, h, w), as the VAE encoded them: what decoding
            leads back to.
    """

    latents: torch.Tensor
    timesteps: list[int]
    network_calls: int
    residual: torch.Tensor | None
    converged: torch.Tensor | None
    start: torch.Tensor


@torch.no_grad()
def invert(
    pipe: DiffusionPipeline,
    images: ImageInput | None = None,
    *,
    latents: torch.Tensor | None = None,
    num_inference_steps: int | None = None,
    timesteps: list[int] | None = None,
    guidance_scale: float = 1.0,
    refinements: int = DEFAULT_REFINEMENTS,
    tolerance: float = DEFAULT_TOLERANCE,
    mixing: int = 0,
    height: int | None = None,
    width: int | None = None,
    **call: Any,
) -> TextInversionOutput:
    """Find the latents that a text-to-image pipeline decodes to given pictures (DDIM, Sec. 5.4).

    Decode with the same arguments: `pipe(prompts, latents=found.latents, guidance_scale=...,
    num_inference_steps=...)`, one prompt for each picture. An edit decodes with another prompt.

    Args:
        pipe: a `StableDiffusionPipeline` or `StableDiffusionXLPipeline`, with ControlNet or
            without; it stays as it is. Its scheduler is a `GeneralizedDDIMScheduler` without
            clipping, at eta 0. An image-to-image pipeline serves, too, but begins with noise of its
            own: `AutoPipelineForText2Image.from_pipe(pipe)` decodes.
        images: pictures, see `to_model_space`; the VAE's mean encodes them.
        latents: x_0 (N, C, h, w) instead, as the VAE encodes: scaled as the network takes them.
        num_inference_steps: S; None: the trajectory of the scheduler's config, else 50.
        timesteps: explicit trajectory instead, strictly decreasing, as for decoding.
        guidance_scale: w of the pipeline, with which the latents will be decoded; up to 1 is
            without guidance. The iteration converges the worse, the larger it is.
        refinements: fixed-point iterations of each step, one network call each; 0 is plain DDIM
            inversion, an error of first order.
        tolerance: root mean square change of x_t at which a picture's iteration stops, > 0.
        mixing: of Anderson's method, see `Refinement`; 0 is the plain iteration. 3 to 5 may
            converge where that does not.
        height: of the pictures in pixels; None: the network's own size.
        width: of the pictures in pixels; None: the network's own size.
        **call: further arguments of the pipeline's call: `prompt` (one for all, or a list with one
            for each picture), `negative_prompt`, `prompt_embeds`, `image` of a ControlNet,
            `clip_skip` and so on.

    Returns:
        latents, and the residual of every step and picture. A picture that has not converged is
        warned about, and named.

    Raises:
        TypeError: for an argument that the pipeline does not have.
        ValueError: for a pipeline or scheduler whose loop has no inverse, naming the reason, or
            arguments that do not fit.
    """
    loop = _loop_of(pipe)
    _check_scheduler(pipe.scheduler)
    text: Any = pipe
    if loop in IMAGE_TO_IMAGE:
        # its module imports all of diffusers' pipelines
        from diffusers import AutoPipelineForText2Image

        text = AutoPipelineForText2Image.from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler))
    _check_call(text, call, guidance_scale)
    size = _size_of(text, height, width)
    x_0 = _start(text, images, latents, size)
    _warn_of_pipeline(text)
    call |= {"guidance_scale": guidance_scale, **_prompts(call, len(x_0))}
    if not hasattr(text, "controlnet"):
        call |= {"height": size[0], "width": size[1]}
    inverse = GeneralizedDDIMInverseScheduler.from_config(pipe.scheduler.config)
    tau = plan(inverse, num_inference_steps, timesteps, x_0.device)
    with text.progress_bar(total=len(tau)) as bar:
        found = encode_and_refine(
            PipelineNetwork(text, call),
            x_0,
            inverse,
            refinements,
            tolerance,
            mixing=mixing,
            after_step=bar.update,
        )
    text.maybe_free_model_hooks()
    check_finite(found.latents)
    if found.residual is not None:
        warn_of_residual(found.residual, refinements, tolerance)
    steps = [int(t) for t in tau.tolist()]
    calls = network_calls(len(steps), refinements)
    return TextInversionOutput(
        found.latents, steps, calls, found.residual, found.converged, start=x_0
    )


class PipelineNetwork:
    """The network call of a text-to-image pipeline, guidance and conditions included.

    Args:
        pipe: the pipeline; a shallow copy runs, so that it stays as it is.
        call: arguments of its call.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any]) -> None:  # noqa: ANN401
        self.pipe, self.call = copy.copy(pipe), call
        self.pipe.scheduler = self.scheduler = _OneStep(pipe.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)
        # prompts are encoded once, and offloaded networks stay until the end
        self.pipe.encode_prompt = _once(self.pipe.encode_prompt)
        self.pipe.maybe_free_model_hooks = lambda: None

    def __call__(self, x: torch.Tensor, t: torch.Tensor | int) -> torch.Tensor:
        """Return what the pipeline passes to `scheduler.step` for x (N, C, h, w) at t."""
        self.scheduler.timestep = int(t)
        self.pipe(**self.call, latents=x, num_inference_steps=1, output_type="latent")
        return self.scheduler.model_output


class _OneStep:
    """A scheduler of one timestep, whose step keeps the model output and does nothing."""

    order = 1
    init_noise_sigma = 1.0
    timestep = 0
    model_output: torch.Tensor

    def __init__(self, config: Any) -> None:  # noqa: ANN401
        self.config = config

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:  # noqa: ANN401
        self.timesteps = torch.tensor([self.timestep], device=device)

    def scale_model_input(self, sample: torch.Tensor, timestep: object) -> torch.Tensor:
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: object,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> tuple[torch.Tensor]:
        self.model_output = model_output
        return (sample,)


def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    results: list[Any] = []

    def answer(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if not results:
            results.append(function(*args, **kwargs))
        return results[0]

    return answer


def _loop_of(pipe: object) -> str:
    """Return the name of diffusers' class whose loop `pipe` runs.

    Raises:
        ValueError: for another loop, with the reason.
    """
    cls: Any = type(pipe)
    # a subclass counts as its parent if it leaves the call as it is
    for base in inspect.getmro(cls):
        of_diffusers = base.__module__.startswith("diffusers.")
        if of_diffusers and base.__name__ in PLAIN + IMAGE_TO_IMAGE:
            if cls.__call__ is base.__call__:
                return base.__name__
            break
    reasons = [why for part, why in _REASONS.items() if part in cls.__name__]
    why = reasons[0] if reasons else "its loop is not known to be the plain one of DDIM"
    allowed = ", ".join(PLAIN + IMAGE_TO_IMAGE)
    raise ValueError(
        f"`pipe` is a {cls.__name__}, which has no inverse here: {why}. It must be one of: "
        f"{allowed}."
    )


def _check_scheduler(scheduler: Any) -> None:  # noqa: ANN401
    cls = GeneralizedDDIMScheduler.__name__
    remedy = f"pipe.scheduler = {cls}.from_config(pipe.scheduler.config, "
    if not isinstance(scheduler, GeneralizedDDIMScheduler):
        hint = "where it names the betas of DDPM's process (not flow matching), set "
        raise ValueError(
            f"`pipe.scheduler` is a {type(scheduler).__name__}; it must be a {cls}: {hint}"
            f"{remedy}clip_sample=False)."
        )
    wrong = {
        key: scheduler.config[key]
        for key, allowed in _INVERTIBLE.items()
        if scheduler.config.get(key, allowed[0]) not in allowed
    }
    if wrong:
        had = ", ".join(f"{key}={value!r}" for key, value in wrong.items())
        cure = ", ".join(f"{key}={_INVERTIBLE[key][0]!r}" for key in wrong)
        raise ValueError(
            f"`pipe.scheduler` has {had}, and such a step has no inverse; it must be set to "
            f"{remedy}{cure})."
        )


def _check_call(pipe: Any, call: Mapping[str, Any], guidance_scale: float) -> None:  # noqa: ANN401
    known = inspect.signature(pipe.__call__).parameters
    for name, value in call.items():
        if name in _TAKEN:
            raise ValueError(f"`{name}` must be left out of an inversion: {_TAKEN[name]}.")
        if name not in known:
            kind = type(pipe).__name__
            raise TypeError(f"`{name}` is given; it must be an argument of the call of {kind}.")
        if name in _EVERYWHERE and value != _EVERYWHERE[name]:
            raise ValueError(
                f"`{name}` is {value!r}; it must be {_EVERYWHERE[name]}: a ControlNet that acts in "
                "a part of the steps is not the same network everywhere."
            )
    is_number = isinstance(guidance_scale, int | float) and not isinstance(guidance_scale, bool)
    if not is_number or not 0 <= guidance_scale < float("inf"):
        raise ValueError(
            f"`guidance_scale` is {guidance_scale!r}; it must be a finite number >= 0."
        )
    negative = {name for name in call if name.startswith("negative_prompt")} & {
        name for name, value in call.items() if value is not None
    }
    if guidance_scale <= 1 and negative:
        raise ValueError(
            f"`{min(negative)}` is given, but the pipeline does not use it at `guidance_scale` "
            f"{guidance_scale!r}; it must be left out, or the scale be above 1."
        )
    guides = guidance_scale > 1 and pipe.unet.config.time_cond_proj_dim is None
    if guides and not negative & {"negative_prompt", "negative_prompt_embeds"}:
        raise ValueError(
            f"`negative_prompt` is None at `guidance_scale` {guidance_scale!r}; it must be that of "
            'the decoding, "" for none, or `negative_prompt_embeds`.'
        )


def _size_of(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:  # noqa: ANN401
    """Return the height and width of the pictures in pixels."""
    factor, own = pipe.vae_scale_factor, pipe.unet.config.sample_size
    sizes = (own, own) if isinstance(own, int) else own
    found = []
    for name, given, default in (("height", height, sizes[0]), ("width", width, sizes[1])):
        value = default * factor if given is None else given
        if type(value) is not int or value < 1 or value % factor or value % 8:
            raise ValueError(
                f"`{name}` is {value!r}; it must be a multiple of {max(factor, 8)} pixels."
            )
        found.append(value)
    return found[0], found[1]


def _start(
    pipe: Any,  # noqa: ANN401
    images: ImageInput | None,
    latents: torch.Tensor | None,
    size: tuple[int, int],
) -> torch.Tensor:
    """Return x_0 on the device and in the dtype in which the pipeline keeps it."""
    if (images is None) == (latents is None):
        raise ValueError("`images` or `latents` must be given, and only one of them.")
    device, dtype, config = pipe._execution_device, pipe.unet.dtype, pipe.unet.config
    if images is not None:
        x = to_model_space(images, (pipe.vae.config.in_channels, *size), torch.float32)
        return encode_pictures(pipe.vae, x.to(device)).to(dtype)
    factor = pipe.vae_scale_factor
    shape = (config.in_channels, size[0] // factor, size[1] // factor)
    if (
        not isinstance(latents, torch.Tensor)
        or not latents.is_floating_point()
        or latents.ndim != 4
        or tuple(latents.shape[1:]) != shape
        or not len(latents)
    ):
        kind = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise ValueError(
            f"`latents` is {kind}; it must be a floating-point tensor (N, {shape[0]}, {shape[1]}, "
            f"{shape[2]})."
        )
    if not bool(latents.isfinite().all()):
        raise ValueError("`latents` holds values that are not finite; all must be.")
    return latents.to(device, dtype)


def encode_pictures(vae: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    """Return the latents of pictures x (N, C, H, W) in [-1, 1]: the VAE's mean, scaled.

    A VAE that asks for float32 (`force_upcast`) is run in it.
    """
    dtype, config = vae.dtype, vae.config
    upcast = dtype == torch.float16 and config.get("force_upcast")
    if upcast:
        vae.to(dtype=torch.float32)
    z = vae.encode(x.to(vae.dtype)).latent_dist.mode()
    if upcast:
        vae.to(dtype=dtype)
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return z * config.scaling_factor
    mean, std = (
        torch.tensor(config[key]).view(1, -1, 1, 1).to(z) for key in ("latents_mean", "latents_std")
    )
    return (z - mean) * config.scaling_factor / std


def _prompts(call: Mapping[str, Any], count: int) -> dict[str, list[str]]:
    """Return the prompts of the call as lists, one prompt for each picture."""
    found = {}
    for name, value in call.items():
        if name in _PROMPTS and value is not None:
            found[name] = [value] * count if isinstance(value, str) else value
            value = found[name]
        elif not (name.endswith("prompt_embeds") and value is not None):
            continue
        if len(value) != count:
            raise ValueError(
                f"`{name}` has {len(value)} prompts for {count} pictures; it must have one for "
                "each, or be a single text for all."
            )
    return found


def _warn_of_pipeline(pipe: Any) -> None:  # noqa: ANN401
    if getattr(pipe, "safety_checker", None) is not None:
        logger.warning(
            "`pipe` has a safety checker, which replaces a picture that it refuses by a black one "
            "when the latents are decoded; the latents are not changed by it."
        )
    if pipe.unet.dtype in (torch.float16, torch.bfloat16):
        logger.warning(
            f"`pipe` keeps x_t in {pipe.unet.dtype}, so each decoding step is rounded, and an "
            f"inverse exists to about {torch.finfo(pipe.unet.dtype).eps / 4:.0e} of x_t a step. "
            "Convert it to float32 for a better one, or read `residual`."
        )
