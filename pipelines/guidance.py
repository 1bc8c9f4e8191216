"""Guided networks: a condition changes what the network predicts, and nothing else of a sampler.

Each is called like an unconditional network, (x_t, t) -> output, and answers in the network's own
prediction type. So every loop and scheduler takes one as it is; a scheduler clips or thresholds
what was guided. With m for the network's output (weights that sum to 1 mean the same in eps, x_0,
v and mu, for each is affine in m):

    classifier-free    m_null + w (m_c - m_null)          arXiv:2207.12598, written as in 2205.11487
    auto guidance      m_guide + w (m - m_guide)          arXiv:2406.02507
    classifier         eps - w sqrt(1 - abar_t) grad log p(c | x_t)        arXiv:2105.05233, Alg. 2

w is `guidance_scale`: 1 is the conditional network itself in the first two, 0 the null class or the
guide; with a classifier 0 is the network itself. The batch has B rows, and so have labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddim_schedulers.class_labels import class_labels_of
from ddim_schedulers.pipelines.interfaces import Network

if TYPE_CHECKING:
    from ddim_schedulers.pipelines.sampling import Levels

Timestep = torch.Tensor | int


@dataclass(frozen=True)
class Interval:
    """Where guidance acts: low <= t / T <= high (arXiv:2404.07724); w = 1 elsewhere.

    Attributes:
        low: share of T.
        high: share of T.
        big_t: T, `num_train_timesteps`.
    """

    low: float
    high: float
    big_t: int

    def holds(self, t: Timestep) -> bool:
        """Tell whether t is inside. A t on a device is read from there."""
        return self.low <= int(t) / self.big_t <= self.high


class BoundNetwork(ABC):
    """A network with its conditions bound: it takes (x_t, t) alone.

    Attributes:
        networks: what it calls; the first tells dtype and config.
        interval: where guidance acts; None is everywhere.
        guides: whether guidance changes a prediction at all; not at a w that says "no guidance".
    """

    def __init__(
        self, *networks: Network, interval: Interval | None = None, guides: bool = False
    ) -> None:
        self.networks, self.interval, self.guides = networks, interval, guides

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the network's weights."""
        return self.networks[0].dtype

    @property
    def config(self) -> Any:  # noqa: ANN401
        """Return the network's config."""
        return self.networks[0].config

    @property
    def changes_predictions(self) -> bool:
        """Tell whether it says something else than the network does of the same sample."""
        first = self.networks[0]
        return self.guides or (isinstance(first, BoundNetwork) and first.changes_predictions)

    def changes_between(self, t: Timestep, s: Timestep) -> bool:
        """Tell whether guidance acts at one of the two timesteps alone.

        Then the predictions at t and at s belong to two different fields.
        """
        if self.interval is None or not self.guides:
            return False
        return self.interval.holds(t) != self.interval.holds(s)

    @abstractmethod
    def predict(self, x: torch.Tensor, t: Timestep) -> torch.Tensor:
        """Return the prediction for x (B, C, H, W), (B, C or 2 C, H, W)."""

    def __call__(self, sample: torch.Tensor, timestep: Timestep) -> UNet2DOutput:
        """Predict for sample (B, C, H, W) at timestep, as a network does."""
        return UNet2DOutput(sample=self.predict(sample, timestep))

    def _acts(self, t: Timestep) -> bool:
        return self.interval is None or self.interval.holds(t)


class LabelledNetwork(BoundNetwork):
    """A class-conditional network with its labels: m_c, or a mixture sum_k u_k m_k of K classes.

    eps of a mixture is that of the product of the classes' densities of x_t to the powers u_k
    (arXiv:2206.01714, with weights that sum to 1), so it goes over from class to class.
    K classes take one call of a batch of K B.

    Args:
        network: takes `class_labels`.
        labels: int64 (B, K), on the device of the samples.
        weights: u, (B, K), each row sums to 1; may be None where K = 1.
    """

    def __init__(
        self, network: Network, labels: torch.Tensor, weights: torch.Tensor | None = None
    ) -> None:
        super().__init__(network)
        self.labels, self.weights = labels, weights

    @property
    def changes_predictions(self) -> bool:
        """Tell whether classes are mixed."""
        return self.weights is not None

    def predict(self, x: torch.Tensor, t: Timestep) -> torch.Tensor:
        """Return the prediction of the labels."""
        return self.mixed(self.each(x, t, self.labels))

    def each(self, x: torch.Tensor, t: Timestep, labels: torch.Tensor) -> list[torch.Tensor]:
        """Return the predictions of x (B, C, H, W) for every column of labels (B, K)."""
        network: Any = self.networks[0]
        count = labels.shape[1]
        together = torch.cat([x] * count) if count > 1 else x
        columns = _filled(labels, len(x)).t().reshape(-1)
        outputs = network(together, t, class_labels=columns).sample
        return list(_wide(outputs).chunk(count))

    def mixed(self, each: list[torch.Tensor]) -> torch.Tensor:
        """Return sum_k u_k m_k as m_0 + sum_k u_k (m_k - m_0)."""
        first, *others = each
        if not others:
            return first
        assert self.weights is not None
        weights = _filled(self.weights, len(first)).to(first).unbind(1)[1:]
        mean = first
        for other, weight in zip(others, weights, strict=True):
            mean = mean + weight.view(-1, 1, 1, 1) * (other - first)
        return mean


class ClassifierFreeNetwork(BoundNetwork):
    """Classifier-free guidance, in one call of a batch of (K + 1) B; of B outside the interval.

    w = 1 and w = 0 take one call of B (K B for w = 1), so that they are the conditional and the
    unconditional sampler to the bit.

    Args:
        conditional: of the class.
        negative: int64 (B,): the null class, or a class to lead away from.
        scale: w.
        rescale: phi of `rescaled`.
        interval: where w counts; it is 1 elsewhere.
    """

    def __init__(
        self,
        conditional: LabelledNetwork,
        negative: torch.Tensor,
        scale: float,
        rescale: float = 0.0,
        interval: Interval | None = None,
    ) -> None:
        super().__init__(conditional, interval=interval, guides=scale != 1)
        self.conditional, self.negative = conditional, negative[:, None]
        self.scale, self.rescale = scale, rescale

    @property
    def is_plain(self) -> bool:
        """Tell whether it is w of one class and the null class alone, as stored samplers know."""
        classes = class_labels_of(self.conditional.networks[0])
        if classes is None or classes.null_class is None:
            return False
        mixes = self.conditional.weights is not None
        return not (self.rescale or mixes) and bool((self.negative == classes.null_class).all())

    def predict(self, x: torch.Tensor, t: Timestep) -> torch.Tensor:
        """Return the guided prediction."""
        if self.scale == 1 or not self._acts(t):
            return self.conditional.predict(x, t)
        if self.scale == 0 and not self.rescale:
            return self.conditional.each(x, t, self.negative)[0]
        labels = torch.cat([self.negative, self.conditional.labels], dim=1)
        negative, *each = self.conditional.each(x, t, labels)
        conditional = self.conditional.mixed(each)
        return guided(conditional, negative, self.scale, self.rescale, x.shape[1])


class AutoGuidedNetwork(BoundNetwork):
    """Guidance of a network by a weaker version of itself; the labels of both are bound before.

    w = 1 calls the network alone, and w = 0 the guide alone.

    Args:
        network: the network.
        guide: an earlier checkpoint, or a smaller network, of the same prediction type.
        scale: w.
        rescale: phi of `rescaled`.
        interval: where w counts; it is 1 elsewhere.
    """

    def __init__(
        self,
        network: Network,
        guide: Network,
        scale: float,
        rescale: float = 0.0,
        interval: Interval | None = None,
    ) -> None:
        super().__init__(network, guide, interval=interval, guides=scale != 1)
        self.scale, self.rescale = scale, rescale

    def predict(self, x: torch.Tensor, t: Timestep) -> torch.Tensor:
        """Return the guided prediction."""
        network, guide = self.networks
        if self.scale == 1 or not self._acts(t):
            return network(x, t).sample
        weak = _wide(guide(x.to(guide.dtype), t).sample)
        # the variance is the network's own: a guide may have none, or one that has no place
        if self.scale == 0 and not self.rescale and weak.shape[1] == self.config.out_channels:
            return weak
        return guided(_wide(network(x, t).sample), weak, self.scale, self.rescale, x.shape[1])


class ClassifierGuidedNetwork(BoundNetwork):
    """Guidance by a classifier of noisy images, for a network with or without labels.

    eps' = eps - w sqrt(1 - abar_t) grad log p(c | x_t) (arXiv:2105.05233, Alg. 2 and Eq. 14). The
    gradient is that of log softmax of the classifier's logits. w = 0 does not call it.

    Args:
        network: the network.
        classifier: any module that takes (x_t, t), (B, C, H, W) and int64 (B,), to logits (B, K);
            in the state (`eval`) in which it is to be called.
        labels: int64 (B,).
        scale: w.
        levels: of the scheduler.
        interval: where w counts; it is 0 elsewhere.
    """

    def __init__(
        self,
        network: Network,
        classifier: torch.nn.Module,
        labels: torch.Tensor,
        scale: float,
        levels: Levels,
        interval: Interval | None = None,
    ) -> None:
        super().__init__(network, interval=interval, guides=scale != 0)
        self.classifier, self.labels, self.scale, self.levels = classifier, labels, scale, levels

    def predict(self, x: torch.Tensor, t: Timestep) -> torch.Tensor:
        """Return the guided prediction.

        Raises:
            ValueError: at alpha_bar_t = 0, where eps has no change that a classifier could tell,
                or for logits that have no such class.
        """
        output = self.networks[0](x, t).sample
        if self.scale == 0 or not self._acts(t):
            return output
        output = _wide(output)
        step = int(t)
        if self.levels.at(step) == 0:
            raise ValueError(
                f"`classifier` cannot guide at t={step}, where alpha_bar is 0 and x_t says nothing "
                "of x_0; set `guidance_interval` to [0, high] with high below "
                f"{step / len(self.levels.alpha_bar):g}."
            )
        change = self.gradient(x, step).to(output) * -(
            self.scale * (1 - self.levels.at(step)) ** 0.5
        )
        mean, rest = output.tensor_split([x.shape[1]], dim=1)
        return torch.cat([mean + self.levels.output_change(change, step), rest], dim=1)

    def gradient(self, x: torch.Tensor, t: int) -> torch.Tensor:
        """Return grad log p(c | x_t) of each sample, (B, C, H, W)."""
        # pipelines run under no_grad, and may be called under inference_mode, whose tensors cannot
        # be differentiated: copies are made outside both
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().to(_dtype_of(self.classifier, x), copy=True).requires_grad_()
            labels = _filled(self.labels, len(x)).clone()
            steps = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
            logits = self.classifier(x, steps)
            _check_logits(logits, len(x), int(labels.max()))
            log_p = logits.log_softmax(dim=1).gather(1, labels[:, None]).sum()
            return torch.autograd.grad(log_p, x)[0]


def guided(
    conditional: torch.Tensor, negative: torch.Tensor, scale: float, rescale: float, channels: int
) -> torch.Tensor:
    """Return m_neg + w (m_c - m_neg) for the mean; a learned variance is the conditional's.

    Args:
        conditional: (B, C or 2 C, H, W).
        negative: (B, C or 2 C, H, W).
        scale: w.
        rescale: phi of `rescaled`.
        channels: C.
    """
    mean, rest = conditional.tensor_split([channels], dim=1)
    negative = negative[:, :channels]
    result = negative + scale * (mean - negative)
    if rescale:
        result = rescaled(result, mean, rescale)
    return torch.cat([result, rest], dim=1) if rest.shape[1] else result


def rescaled(result: torch.Tensor, conditional: torch.Tensor, phi: float) -> torch.Tensor:
    """Return phi r std(m_c) / std(r) + (1 - phi) r (arXiv:2305.08891, Sec. 3.4).

    The deviations are those of each sample. It takes back the growth of the prediction under a
    large w, which oversaturates pictures.

    Args:
        result: r, the guided prediction, (B, C, H, W).
        conditional: m_c, (B, C, H, W).
        phi: 0 .. 1.
    """
    dims = tuple(range(1, result.ndim))
    ratio = conditional.std(dim=dims, keepdim=True) / result.std(dim=dims, keepdim=True)
    return result * (phi * ratio + (1 - phi))


def _wide(output: torch.Tensor) -> torch.Tensor:
    """Return `output` in float32 at least: w times a difference would enlarge its rounding."""
    return output if output.dtype == torch.float64 else output.float()


def _filled(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return `rows` with the first repeated up to `count`, as `sampling.predict` fills a batch."""
    if len(rows) == count:
        return rows
    return torch.cat([rows, rows[:1].expand(count - len(rows), *rows.shape[1:])])


def _dtype_of(module: torch.nn.Module, x: torch.Tensor) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), x.dtype)


def _check_logits(logits: object, count: int, largest: int) -> None:
    is_right = isinstance(logits, torch.Tensor) and logits.ndim == 2 and len(logits) == count
    if not is_right or logits.shape[1] <= largest:  # type: ignore[attr-defined]
        kind = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(
            f"`classifier` returned {kind} for {count} images; it must return logits (B, K), B = "
            f"{count} and K > {largest}, the largest label."
        )
