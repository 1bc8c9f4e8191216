"""What all pipelines share: construction, checks, and being made from another pipeline.

A pipeline of latents has one component more, an autoencoder. It is called `vqvae` in the folder and
among the components, as in diffusers' `LDMPipeline`, whatever its class; `pipe.vae` is the same. A
folder that calls it `vae` loads, too.
"""

import copy
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import SchedulerMixin, UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from typing_extensions import Self

from ddim_schedulers.class_labels import labels_in
from ddim_schedulers.export import with_installed_schedulers
from ddim_schedulers.latent_forms import latent_class
from ddim_schedulers.pipelines.codec import Codec
from ddim_schedulers.pipelines.compatibility import SINGLE_STEP, check_network, check_scheduler
from ddim_schedulers.pipelines.files import write_bytes
from ddim_schedulers.pipelines.images import ImageInput, OutputBuffer, check_finite, to_model_space
from ddim_schedulers.pipelines.interfaces import Network, Scheduler
from ddim_schedulers.pipelines.sampling import speed_up, state_dtype

DEFAULT_BATCH_SIZE = 64
VAE = "vqvae"  # the component of an autoencoder, as `LDMPipeline` calls it
P = TypeVar("P", bound="UnconditionalPipeline")


class UnconditionalPipeline(DiffusionPipeline):
    """Base of the pipelines: a network, with or without classes, and a scheduler that fits it.

    Args:
        unet: a `UNet2DModel`; classes are rows of its embedding (`num_class_embeds`).
        scheduler: one of the classes that the pipeline accepts; kept as it is, never replaced.
        vae: for a network of latents: an `AutoencoderKL`, `AutoencoderTiny` or `VQModel` that makes
            images of them. Its `enable_slicing` and `enable_tiling` bound the memory.
        vqvae: the same by the name that `LDMPipeline` gives it.

    Raises:
        ValueError: for a network, scheduler or autoencoder that does not fit.
    """

    model_cpu_offload_seq = "unet->vqvae"  # type: ignore[assignment]
    _optional_components = [VAE, "vae"]  # noqa: RUF012
    accepted_schedulers: tuple[type, ...] = SINGLE_STEP
    _refuses_vae: str | None = None  # the reason, for a pipeline that works on pixels alone
    _warns_of_clipping = True  # off for a caller that sums up many calls and warns once
    unet: Network
    scheduler: Scheduler

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        vae: Any = None,  # noqa: ANN401
        vqvae: Any = None,  # noqa: ANN401
    ) -> None:
        super().__init__()
        check_network(cast(Network, unet))
        check_scheduler(cast(Scheduler, scheduler), self.accepted_schedulers, type(self).__name__)
        if vae is not None and vqvae is not None:
            raise ValueError("`vae` and `vqvae` are both given; they name one component.")
        self.register_modules(unet=unet, scheduler=scheduler, vqvae=vqvae if vae is None else vae)
        self._check_vae()

    @property
    def vae(self) -> Any:  # noqa: ANN401
        """Return the autoencoder of a pipeline of latents; None for one of pixels."""
        return getattr(self, VAE)

    @property
    def components(self) -> dict[str, Any]:
        """Return the components by name; a pipeline of pixels has no `vqvae` among them."""
        expected, _ = self._get_signature_keys(self)  # diffusers' own asks for `vae` and `vqvae`
        found = {name: getattr(self, name) for name in self.config if name in expected}
        return {name: part for name, part in found.items() if name != VAE or part is not None}

    @property
    def codec(self) -> Codec | None:
        """Return what encodes images and decodes latents; None for a pipeline of pixels."""
        return None if self.vae is None else Codec(self.vae)

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write `model_index.json` for `save_pretrained` and `push_to_hub`.

        It names `DDPMPipeline`, or `LDMPipeline` with a vae, which have the same components and
        which diffusers knows: any of our pipelines loads the folder again, and so does
        `DiffusionPipeline.from_pretrained`. What `LDMPipeline` would sample wrongly, with a shift
        of the latents or with classes, has the name of our class, which diffusers refuses.
        """
        index = {**json.loads(self.to_json_string()), "_class_name": "DDPMPipeline"}
        if self.vae is None:
            del index[VAE]
        else:
            labelled = labels_in(self.unet.config) is not None
            index["_class_name"] = latent_class(self.vae.config, labelled)
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        write_bytes(Path(json_file_path), text.encode())

    @classmethod
    def _dict_from_json_file(
        cls, json_file: str | os.PathLike[str], **of_diffusers: Any
    ) -> dict[str, Any]:
        """Read `model_index.json` for `from_pretrained`, on disk and from the Hub.

        A self-contained scheduler becomes the installed class, so that it fits these pipelines and
        no code of a repository has to be trusted. diffusers 0.40 passes `dduf_entries`.
        """
        return with_installed_schedulers(super()._dict_from_json_file(json_file, **of_diffusers))

    @classmethod
    def from_pipe(  # type: ignore[override]
        cls,
        pipeline: DiffusionPipeline,
        *,
        unet: UNet2DModel | None = None,
        scheduler: SchedulerMixin | None = None,
        vae: Any = None,  # noqa: ANN401
    ) -> Self:
        """Build this pipeline from another one, which stays as it is.

        The network is shared and keeps its dtype and device (diffusers' own `from_pipe` casts it to
        float32, the source's too); the scheduler is copied, so that neither pipeline's timesteps
        touch the other's.

        Args:
            pipeline: any pipeline with a `unet` that fits and a `scheduler`.
            unet: replaces the pipeline's.
            scheduler: replaces the pipeline's; taken as it is, not copied.
            vae: replaces the pipeline's, which is shared, too, where there is one.

        Raises:
            ValueError: for a component that does not fit, or one that is missing.
        """
        parts = pipeline.components
        missing = [
            k for k, v in (("unet", unet), ("scheduler", scheduler)) if v is None and k not in parts
        ]
        if missing:
            raise ValueError(
                f"`pipeline` is a {type(pipeline).__name__} without {missing}; it has "
                f"{sorted(parts)}."
            )
        new = cls(
            unet=parts["unet"] if unet is None else unet,
            scheduler=copy.deepcopy(parts["scheduler"]) if scheduler is None else scheduler,
            vae=(parts.get(VAE) or parts.get("vae")) if vae is None else vae,
        )
        origin = pipeline.config.get("_name_or_path")
        if origin is not None:
            new.register_to_config(_name_or_path=origin)
        return new

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of the network's samples: images, or latents."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (self.unet.config.in_channels, height, width)

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of the images that come out, after the decoder if any."""
        codec = self.codec
        return self.image_shape if codec is None else codec.picture_shape(self.image_shape)

    @property
    def state_dtype(self) -> torch.dtype:
        """Return the dtype of samples: float64 for a float64 network, else float32."""
        return state_dtype(self.unet.dtype)

    def speed_up(
        self,
        *,
        compile: bool | dict[str, Any] = False,
        channels_last: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Make the network faster, in place; none of it is a default, because all of it rounds.

        Args:
            compile: `torch.compile` the network at its first call (a minute), or a dictionary of
                `torch.compile`'s arguments, e.g. `{"mode": "reduce-overhead"}` for CUDA graphs. A
                smaller last batch is filled up, so that it does not compile again.
            channels_last: keep the weights in the memory format that tensor cores and most CPUs
                want.
            dtype: of the network, e.g. `torch.bfloat16`; the sample itself stays in float32.

        Returns:
            the pipeline.
        """
        speed_up(self.unet, compile=compile, channels_last=channels_last, dtype=dtype)
        return self

    def check(self) -> None:
        """Check the components again, for `pipe.scheduler = ...` may have replaced one.

        Raises:
            ValueError: for a network, scheduler or autoencoder that does not fit.
        """
        check_network(self.unet)
        check_scheduler(self.scheduler, self.accepted_schedulers, type(self).__name__)
        self._check_vae()

    def _check_vae(self) -> None:
        if self.vae is None:
            return
        if self._refuses_vae is not None:
            raise ValueError(
                f"`vae` is {type(self.vae).__name__}; it must be left out of "
                f"{type(self).__name__}: {self._refuses_vae}."
            )
        Codec(self.vae).picture_shape(self.image_shape)

    def buffer(
        self, output_type: str, num_images: int, seeds: Sequence[int] | None = None
    ) -> OutputBuffer:
        """Return what gathers this pipeline's samples, and decodes them where they are latents."""
        return OutputBuffer(output_type, num_images, self.picture_shape, seeds, self.codec)

    @torch.no_grad()
    def x0_of(
        self, images: ImageInput, batch_size: int = DEFAULT_BATCH_SIZE, name: str = "images"
    ) -> torch.Tensor:
        """Return images as samples (N, C, H, W) of the network on the CPU.

        Args:
            images: see `to_model_space`; a pipeline of latents encodes them, to the mean where the
                encoder gives a Gaussian.
            batch_size: images that are encoded at a time.
            name: what messages call the argument.

        Raises:
            ValueError: for images that do not fit.
        """
        pixels = to_model_space(images, self.picture_shape, self.state_dtype, name)
        return (
            pixels if self.codec is None else self._by_parts(self.codec.encode, pixels, batch_size)
        )

    def pixels_of(self, x0: torch.Tensor, batch_size: int = DEFAULT_BATCH_SIZE) -> torch.Tensor:
        """Return samples of the network as images in [-1, 1], unclamped, on the CPU."""
        if self.codec is None:
            return x0
        pixels = self._by_parts(self.codec.decode, x0, batch_size)
        check_finite(pixels)
        return pixels

    def _by_parts(
        self, change: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, size: int
    ) -> torch.Tensor:
        device = self._execution_device
        parts = [change(part.to(device)).cpu() for part in x.split(check_batch_size(size))]
        return torch.cat(parts)

    def check_latents(self, latents: torch.Tensor, name: str = "latents") -> torch.Tensor:
        """Return `latents` in the sample's dtype if they are a batch of the network's shape.

        Raises:
            ValueError: for another type, dtype or shape, or values that are not finite.
        """
        if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
            kind = latents.dtype if isinstance(latents, torch.Tensor) else type(latents).__name__
            raise ValueError(
                f"`{name}` is {kind}; it must be a floating-point tensor (N, C, H, W)."
            )
        if latents.ndim != 4 or tuple(latents.shape[1:]) != self.image_shape or len(latents) == 0:
            raise ValueError(
                f"`{name}` has shape {tuple(latents.shape)}; it must be (N, "
                f"{', '.join(map(str, self.image_shape))})."
            )
        if not bool(latents.isfinite().all()):
            raise ValueError(f"`{name}` holds values that are not finite; all must be.")
        return latents.to(self.state_dtype)

    def sibling(self, cls: type[P], **components: object) -> P:
        """Return a `cls` on the same components, with this one's progress bar and warnings."""
        other = cls(**{**self.components, **components})
        other._warns_of_clipping = self._warns_of_clipping
        other.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return other


def check_batch_size(batch_size: int) -> int:
    """Return `batch_size` if it is an integer >= 1.

    Raises:
        ValueError: otherwise.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size!r}; it must be an integer >= 1.")
    return batch_size


def check_callback(callback: object, name: str = "callback_on_step_end") -> None:
    """Check that a callback can be called, before the first network call.

    Raises:
        ValueError: otherwise.
    """
    if callback is not None and not callable(callback):
        raise ValueError(f"`{name}` is {callback!r}; it must be None or a function.")


def chunks(num_images: int, batch_size: int) -> list[tuple[int, int]]:
    """Return [(start, stop), ...]: consecutive chunks, the last one shorter if need be."""
    return [(i, min(i + batch_size, num_images)) for i in range(0, num_images, batch_size)]
