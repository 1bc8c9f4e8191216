"""A saved pipeline as what its likelihood needs: a function, a chain and a prediction type."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.utils import logging

from ddim_schedulers import MarkovianDDPMScheduler
from ddim_schedulers.class_labels import ClassLabels, class_labels_of
from ddim_schedulers.export import VAE_NAMES
from ddim_schedulers.pipelines.codec import Codec
from ddim_schedulers.pipelines.sampling import state_dtype
from ddim_schedulers.scales import is_one
from ddim_schedulers.training.common.repositories import fetch
from ddim_schedulers.training.networks.autoencoders import load_vae
from ddim_schedulers.training.networks.places import pipeline_folder

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class MeasuredModel:
    """The network of a pipeline and the process it was trained for.

    Attributes:
        unet: in evaluation mode.
        config: the scheduler's config as `from_config` of our classes reads it.
        alpha_bar: float64 (T,), on the CPU.
        prediction_type: see `ddim_schedulers.parameterization`.
        clip: limit of |x0_hat| that the scheduler's config asks for, None for none.
        learned: does the network predict variances in a second set of channels?
        saved: the scheduler's config as it was saved, where it was read from a folder or the Hub.
        commit: NAME@COMMIT of a pipeline from the Hub; '' otherwise.
        labels: int64 (N,), the classes of the images that are measured; None for a network without
            classes.
        codec: of a network of latents, what encodes images; None for one of pixels.
    """

    unet: Any
    config: dict[str, Any]
    alpha_bar: torch.Tensor
    prediction_type: str
    clip: float | None
    learned: bool
    saved: dict[str, Any] | None = None
    commit: str = ""
    labels: torch.Tensor | None = None
    codec: Codec | None = None

    @property
    def channels(self) -> int:
        """Return the number of channels of the images, or latents."""
        return int(self.unet.config.in_channels)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the network."""
        return next(self.unet.parameters()).dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """Return the dtype of samples."""
        return state_dtype(self.dtype)

    @property
    def calibration(self) -> dict[str, Any] | None:
        """Return the statistics of all timesteps in the config, if they were measured.

        A calibration for trajectories alone has none.
        """
        found = self.config.get("calibration")
        return found if found is not None and found.get("gamma") is not None else None

    @property
    def classes(self) -> ClassLabels | None:
        """Return the classes of the network; None if it has none."""
        return class_labels_of(self.unet)

    def labelled(self, labels: torch.Tensor | None) -> "MeasuredModel":
        """Return the model with the classes (N,) of the images that are measured."""
        return replace(self, labels=labels)

    def of(self, start: int, stop: int) -> "MeasuredModel":
        """Return the model for images start .. stop - 1 of those that are measured."""
        return self if self.labels is None else self.labelled(self.labels[start:stop])

    def predict(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return the network's output for CPU tensors x_t (B, C, H, W) and t (B,), on the CPU.

        It has the dtype of x_t.

        Raises:
            ValueError: labels that do not fit the network or the batch.
        """
        device, conditions = next(self.unet.parameters()).device, {}
        if (self.classes is None) != (self.labels is None) or (
            self.labels is not None and self.labels.shape != (len(x_t),)
        ):
            given = None if self.labels is None else tuple(self.labels.shape)
            allowed = "None" if self.classes is None else f"a tensor ({len(x_t)},)"
            raise ValueError(f"`labels` is {given}; it must be {allowed}")
        if self.labels is not None:
            conditions["class_labels"] = self.labels.to(device)
        with torch.no_grad():
            output = self.unet(x_t.to(device, self.dtype), t.to(device), **conditions).sample
        return output.to("cpu", x_t.dtype)

    def predict_mean(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Predict as `predict`, without the variance channels, (B, C, H, W)."""
        return self.predict(x_t, t)[:, : self.channels]

    def fingerprint(self) -> str:
        """Return the SHA-256 of the weights and of what the statistics depend on besides.

        Files of earlier versions hold it, so it is not made of `weights_fingerprint`.
        """
        digest = hashlib.sha256()
        self._hash_weights(digest)
        digest.update(self.alpha_bar.numpy().tobytes())
        digest.update(f"{self.prediction_type}/{self.clip}".encode())
        return digest.hexdigest()

    def parts(self) -> tuple[str, str, str, float | None]:
        """Return what the fingerprint is of: two hashes, the prediction type and the limit."""
        weights = hashlib.sha256()
        self._hash_weights(weights)
        alpha_bar = hashlib.sha256(self.alpha_bar.numpy().tobytes())
        return weights.hexdigest(), alpha_bar.hexdigest(), self.prediction_type, self.clip

    def _hash_weights(self, digest: "hashlib._Hash") -> None:
        for name, value in sorted(self.unet.state_dict().items()):
            digest.update(name.encode())
            # flat first: a 1x1 kernel in channels_last counts as contiguous with any strides
            flat = value.detach().cpu().contiguous().view(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())


def measured_model_of(unet: Any, config: dict[str, Any]) -> MeasuredModel:
    """Return the measured model of a network and a scheduler's config, stock or ours.

    Raises:
        ValueError: for a network with conditions that are no classes, one whose channels fit
            neither a plain nor a learned-variance model, or a config that our schedulers refuse.
    """
    class_labels_of(unet)
    given, made = int(unet.config.in_channels), int(unet.config.out_channels)
    if made not in (given, 2 * given):
        raise ValueError(
            f"`unet` has {given} input and {made} output channels; it must have as many, or twice "
            "as many"
        )
    # the likelihood does not depend on the trajectory and the noise of sampling
    neutral = {"timestep_spacing": "leading", "timesteps": None, "steps_offset": 0}
    scheduler = MarkovianDDPMScheduler.from_config(config, variance_type="fixed_small", **neutral)
    own = dict(scheduler.config)
    if not (is_one(own["eps_scale"]) and own["end_scale"] == 1):
        logger.warning(
            f"`eps_scale` is {own['eps_scale']} and `end_scale` {own['end_scale']} in the "
            "scheduler's config: they correct samples, and the likelihood and statistics of the "
            "network are measured without them."
        )
        own |= {"eps_scale": 1.0, "end_scale": 1.0}
    clip = float(own["clip_sample_range"]) if own["clip_sample"] else None
    return MeasuredModel(
        unet.eval(), own, scheduler.alpha_bar, own["prediction_type"], clip, made == 2 * given
    )


def load_measured_model(
    pipeline: str | Path, device: torch.device | str = "cpu", *, allow_pickle: bool = False
) -> MeasuredModel:
    """Return the measured model of a pipeline's folder, a run's folder, or a name on the Hub.

    Args:
        pipeline: see `places`.
        device: of the network.
        allow_pickle: see `repositories.fetch`.

    Raises:
        ValueError: nothing there, or as `measured_model_of`.
    """
    found = fetch(pipeline_folder(str(pipeline)), allow_pickle=allow_pickle)
    try:
        unet = found.read(UNet2DModel, subfolder="unet")
        config = MarkovianDDPMScheduler.load_config(found.folder, subfolder="scheduler")
    except OSError as error:
        raise ValueError(
            f"`pipeline` is {str(pipeline)!r}; it must be a saved pipeline with the folders unet "
            f"(UNet2DModel) and scheduler: {error}"
        ) from error
    found.finish(unet)
    measured_model = measured_model_of(unet.to(device), dict(config))
    codec = None
    names = [name for name in VAE_NAMES if (found.folder / name / "config.json").is_file()]
    if names:
        vae = load_vae(str(found.folder / names[0]), option=f"{names[0]} of the pipeline")
        codec = Codec(vae.to(device))
        codec.picture_shape((measured_model.channels, 1, 1))
    return replace(measured_model, saved=dict(config), commit=found.commit, codec=codec)


def clip_limit(measured_model: MeasuredModel, choice: str) -> float | None:
    """Return the limit of |x0_hat|: the scheduler's (`config`), its range (`on`), none (`off`)."""
    if choice == "config":
        return measured_model.clip
    return float(measured_model.config["clip_sample_range"]) if choice == "on" else None
