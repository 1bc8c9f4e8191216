"""The network that a sampler is calibrated to: with its classes, guided or not, and counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ddim_schedulers.parameterization import x0_coefficients
from ddim_schedulers.pipelines.conditions import Conditions
from ddim_schedulers.pipelines.guidance import ClassifierFreeNetwork, Interval, LabelledNetwork
from ddim_schedulers.pipelines.interfaces import Network
from ddim_schedulers.pipelines.sampling import predict
from ddim_schedulers.solver_tables import guidance_of
from ddim_schedulers.training.likelihood.measured_model import MeasuredModel


@dataclass(frozen=True)
class Guiding:
    """The classifier-free guidance that a sampler is calibrated at.

    Attributes:
        scale: w; None and 1 are no guidance.
        interval: shares of t / T where it acts; None for everywhere.
    """

    scale: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def acts(self) -> bool:
        """Tell whether it changes a prediction."""
        return guidance_of(self.scale, self.interval) is not None

    @property
    def calls(self) -> int:
        """Return how many evaluations of the network a prediction takes."""
        return 2 if self.acts else 1

    def check(self, model: MeasuredModel) -> None:
        """Check it against a network and its labels.

        Raises:
            ValueError: naming the option, its value and what is allowed.
        """
        Conditions(guidance_scale=self.scale, guidance_interval=self.interval)
        if self.scale is None:
            return
        if (classes := model.classes) is None:
            raise ValueError(
                f"`guidance_scale` is {self.scale:g}, but the network has no classes; it must be "
                "left out"
            )
        if not self.acts:
            return
        if classes.null_class is None:
            raise ValueError(
                f"`guidance_scale` is {self.scale:g}, but the network was trained without a null "
                "class; it must be 1"
            )
        if model.labels is not None and bool((model.labels == classes.null_class).all()):
            raise ValueError(
                f"`guidance_scale` is {self.scale:g}, but every sample has the null class; it must "
                "be left out with `labels` null"
            )

    def settings(self) -> dict[str, Any]:
        """Return what parts and entries hold of it, as JSON has it; nothing without guidance."""
        if not self.acts:
            return {}
        interval = None if self.interval is None else list(self.interval)
        return {"guidance_scale": self.scale, "guidance_interval": interval}


UNGUIDED = Guiding()


class _Counted:
    """The network as pipelines call it, and how many samples it was asked for."""

    def __init__(self, model: MeasuredModel) -> None:
        self.unet, self.config, self.dtype = model.unet, model.unet.config, model.dtype
        self.device = next(model.unet.parameters()).device
        self.evaluations = 0

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor | int, **given: Any) -> Any:
        self.evaluations += len(sample)
        # a compiled network would compile for integers and for tensors
        t = torch.as_tensor(timestep, device=self.device)
        with torch.no_grad():
            return self.unet(sample, t, **given)


class Predictor:
    """The network as a function of (x, t), and how often it was asked.

    Args:
        model: network and process.
        guiding: how it is guided; a guided sample takes two evaluations, in one call.
    """

    def __init__(self, model: MeasuredModel, guiding: Guiding = UNGUIDED) -> None:
        self.model, self.guiding = model, guiding
        self._counted = _Counted(model)
        self.device = self._counted.device

    @property
    def evaluations(self) -> int:
        """Return how many samples the network was asked for."""
        return self._counted.evaluations

    def network(self, count: int, first: int = 0, period: int | None = None) -> Network:
        """Return the network of (x, t) for `count` samples.

        Args:
            count: B.
            first: the number of the first sample; its class is that of its place in `labels`,
                which are taken in turn.
            period: the samples are so many, several times; None for once.
        """
        if (labels := self.model.labels) is None:
            return self._counted
        places = (first + torch.arange(count) % (period or count)) % len(labels)
        rows = labels[places].to(self.device)
        bound = LabelledNetwork(self._counted, rows[:, None])
        if not self.guiding.acts:
            return bound
        classes, w, ends = self.model.classes, self.guiding.scale, self.guiding.interval
        assert classes is not None and classes.null_class is not None and w is not None
        null = torch.full_like(rows, classes.null_class)
        interval = None if ends is None else Interval(*ends, len(self.model.alpha_bar))
        return ClassifierFreeNetwork(bound, null, w, interval=interval)

    def output(
        self, x: torch.Tensor, t: torch.Tensor | int, first: int = 0, period: int | None = None
    ) -> torch.Tensor:
        """Return what the network says of x (B, C, H, W), without a variance, in its dtype.

        Args:
            x: samples.
            t: of all of them.
            first: as in `network`.
            period: as in `network`.
        """
        network = self.network(len(x), first, period)
        return predict(network, x, t)[:, : self.model.channels]

    def __call__(
        self, x: torch.Tensor, t: int, first: int = 0, period: int | None = None
    ) -> torch.Tensor:
        """Return x0_hat before any clipping; the arguments are those of `output`."""
        now = self.model.alpha_bar[t]
        before = self.model.alpha_bar[t - 1] if t else torch.ones_like(now)
        of_x, of_m = x0_coefficients(self.model.prediction_type, now, before)
        return x * float(of_x) + self.output(x, t, first, period) * float(of_m)


def check_model(model: MeasuredModel, guiding: Guiding) -> None:
    """Check that tables can be stored for a network that is guided so.

    Raises:
        ValueError: as `Guiding.check`, or for a config with thresholding.
    """
    guiding.check(model)
    if model.config.get("thresholding"):
        raise ValueError(
            "`thresholding` is True in the scheduler's config; a stored table goes with clipping "
            "or with none"
        )


def check_calls(calls: Sequence[int], most: int, why: str = "") -> None:
    """Check the numbers of network calls that a calibration is made for.

    Raises:
        ValueError: naming what is out of range.
    """
    if wrong := [each for each in calls if not 1 <= each <= most]:
        raise ValueError(f"`calls` is {wrong[0]}; it must be 1 to {most}{why}")
    if not calls or len(set(calls)) != len(calls):
        raise ValueError(f"`calls` is {list(calls)}; it must be different numbers")
