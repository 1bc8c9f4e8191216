"""From what a caller asks for (labels, scale, guide, classifier) to the network of a loop."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from ddim_schedulers.class_labels import ClassLabels, class_labels_of
from ddim_schedulers.pipelines.classifier_checks import check_classifier
from ddim_schedulers.pipelines.compatibility import check_network
from ddim_schedulers.pipelines.guidance import (
    AutoGuidedNetwork,
    ClassifierFreeNetwork,
    ClassifierGuidedNetwork,
    Interval,
    LabelledNetwork,
)
from ddim_schedulers.pipelines.interfaces import Network, Scheduler
from ddim_schedulers.pipelines.labels import (
    ClassLabelInput,
    ClassMixture,
    Label,
    count_of,
    read_labels,
)
from ddim_schedulers.pipelines.sampling import Levels, alpha_bar_table


@dataclass(frozen=True)
class Conditions:
    """What the images of a call are to be, and how much the network is pushed there.

    Attributes:
        class_labels: classes of a conditional network (or of the classifier), names or numbers: one
            for all images, or a list, array or tensor with one for each; or a `ClassMixture`. Not
            needed at `guidance_scale` 0.
        guidance_scale: w; see `guidance`. None is 1, without guidance.
        guidance_interval: [low, high], shares of t / T within 0 .. 1 where guidance acts
            (arXiv:2404.07724); outside the sample follows the conditional network, w = 1 (with a
            classifier the network, w = 0). None: everywhere.
        guidance_rescale: phi in 0 .. 1, arXiv:2305.08891, Sec. 3.4; takes back the growth of the
            prediction, in the network's prediction type.
        negative_label: a class in the place of the null class: the samples are led away from it.
        guide: a weaker network (arXiv:2406.02507): an earlier checkpoint, or a smaller one, of the
            same images, process and prediction type, on the device of the pipeline. It takes the
            place of the null class. A guide without classes is called without labels.
        classifier: a module (x_t, t) -> logits (B, K) that knows noisy images (arXiv:2105.05233),
            on the device of the pipeline and in `eval`. The gradient's scale is w.
    """

    class_labels: ClassLabelInput | None = None
    guidance_scale: float | None = None
    guidance_interval: Sequence[float] | None = None
    guidance_rescale: float = 0.0
    negative_label: Label | None = None
    guide: Any = None
    classifier: torch.nn.Module | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a network.

        Raises:
            ValueError: naming the argument that is out of range or contradicts another.
        """
        scale = self.guidance_scale
        if scale is not None and not _is_number(scale):
            raise ValueError(f"`guidance_scale` is {scale!r}; it must be a finite number.")
        if not _is_number(self.guidance_rescale) or not 0 <= self.guidance_rescale <= 1:
            raise ValueError(
                f"`guidance_rescale` is {self.guidance_rescale!r}; it must be a number in 0 .. 1."
            )
        check_interval(self.guidance_interval, "guidance_interval")
        given = self.given()
        if scale is None and (rest := given - {"class_labels"}):
            raise ValueError(
                f"`guidance_scale` is None, and {_quoted(rest)} would do nothing; it must be a "
                "finite number."
            )
        for one, others in (
            ("guide", {"classifier", "negative_label"}),
            ("classifier", {"negative_label", "guidance_rescale"}),
        ):
            if one in given and (both := given & others):
                raise ValueError(
                    f"`{one}` and {_quoted(both)} are both given; pass one of the two."
                )

    @classmethod
    def of_call(cls, keywords: dict[str, Any]) -> "Conditions":
        """Return the conditions among a pipeline's arguments, which are what it has left over.

        Raises:
            TypeError: for a name that no condition has.
            ValueError: as the class.
        """
        names = [f.name for f in fields(cls)]
        for name in keywords:
            if name not in names:
                raise TypeError(
                    f"`{name}` is no argument of this pipeline; as conditions it takes "
                    f"{', '.join(f'`{one}`' for one in names)}."
                )
        return cls(**keywords)

    def given(self) -> set[str]:
        """Return the names of the attributes that are set."""
        return {f.name for f in fields(self) if not _is_default(getattr(self, f.name), f.default)}

    @property
    def scale(self) -> float:
        """Return w."""
        return 1.0 if self.guidance_scale is None else float(self.guidance_scale)


class BoundConditions:
    """Conditions that fit a network, for N images: gives the network of any chunk of them.

    Args:
        conditions: of the caller.
        network: the pipeline's.
        scheduler: tells T and the noise levels.
        num_images: N.
        device: where the samples are.

    Raises:
        ValueError: naming what does not fit.
    """

    def __init__(
        self,
        conditions: Conditions,
        network: Network,
        scheduler: Scheduler,
        num_images: int,
        device: torch.device,
    ) -> None:
        self.conditions, self.network, self.scheduler = conditions, network, scheduler
        self.classes = class_labels_of(network)
        self._check(device)
        self.labels: torch.Tensor | None = None
        self.weights: torch.Tensor | None = None
        known = known_classes(network, conditions.classifier)
        if conditions.class_labels is not None:
            self.labels, self.weights = read_labels(
                conditions.class_labels, known, num_images, device
            )
        elif self.classes is not None:
            null = _only_null(self.classes, conditions)
            self.labels = torch.full((num_images, 1), null, device=device)
        self.negative = self._negative(num_images, device)

    @property
    def numbers(self) -> list[int] | None:
        """Return the class of each image; None without labels, or with mixtures of them."""
        if self.labels is None or self.labels.shape[1] > 1:
            return None
        return self.labels[:, 0].tolist()

    def of(self, start: int, stop: int) -> Network:
        """Return the network for the images start .. stop - 1."""
        given, rows = self.conditions, slice(start, stop)
        network, w, interval = self.network, given.scale, self._interval()
        if self.classes is not None:
            network = self._labelled(network, rows)
        if given.classifier is not None:
            assert self.labels is not None
            one = self.labels[rows, 0]
            levels = Levels(self.scheduler)
            return ClassifierGuidedNetwork(network, given.classifier, one, w, levels, interval)
        if given.guide is not None:
            guide = given.guide
            if class_labels_of(guide) is not None:
                guide = self._labelled(guide, rows)
            return AutoGuidedNetwork(network, guide, w, given.guidance_rescale, interval)
        if self.negative is None:
            return network
        assert isinstance(network, LabelledNetwork)
        negative = self.negative[rows]
        return ClassifierFreeNetwork(network, negative, w, given.guidance_rescale, interval)

    def _labelled(self, network: Network, rows: slice) -> LabelledNetwork:
        assert self.labels is not None
        weights = None if self.weights is None else self.weights[rows]
        return LabelledNetwork(network, self.labels[rows], weights)

    def _interval(self) -> Interval | None:
        given = self.conditions.guidance_interval
        if given is None:
            return None
        return Interval(float(given[0]), float(given[1]), self.scheduler.config.num_train_timesteps)

    def _negative(self, num_images: int, device: torch.device) -> torch.Tensor | None:
        """Return the label of each image that takes the place of the null class."""
        given, classes = self.conditions, self.classes
        replaced = given.guide is not None or given.classifier is not None
        if classes is None or replaced or given.guidance_scale is None:
            return None
        if given.negative_label is not None:
            number = classes.number(given.negative_label, "negative_label")
        elif classes.null_class is not None:
            number = classes.null_class
        elif given.scale == 1 and not given.guidance_rescale:
            return None
        else:
            raise ValueError(
                f"`guidance_scale` is {given.guidance_scale!r}, but the network was trained "
                "without a null class; it must be 1, or give `negative_label`, `guide` or "
                "`classifier`."
            )
        return torch.full((num_images,), number, device=device)

    def _check(self, device: torch.device) -> None:
        given, classes = self.conditions, self.classes
        if classes is None and given.classifier is None:
            useless = sorted(given.given() & {"class_labels", "negative_label"})
            if useless:
                raise ValueError(
                    f"`{useless[0]}` is given, but `unet` is unconditional; it must be None, "
                    "or pass a `classifier`."
                )
            if given.guidance_scale is not None and given.guide is None:
                raise ValueError(
                    f"`guidance_scale` is {given.guidance_scale!r}, but `unet` is unconditional; "
                    "it must be None, or pass a `guide` or a `classifier`."
                )
        if given.classifier is not None:
            check_classifier(given.classifier, self.network, self.scheduler, classes)
            _check_asked(given)
            _check_place(given.classifier, "classifier", device)
        if given.guide is not None:
            self._check_guide(given.guide, device)

    def _check_guide(self, guide: Network, device: torch.device) -> None:
        check_network(guide, "guide")
        for key in ("in_channels", "sample_size"):
            own, other = self.network.config[key], guide.config[key]
            if own != other:
                raise ValueError(
                    f"`guide` has {key}={other!r}; it must be {own!r}, as that of `unet`."
                )
        _check_place(guide, "guide", device)
        other = class_labels_of(guide)
        if other is not None and (self.classes is None or other.ids != self.classes.ids):
            allowed = "be unconditional, as `unet`"
            if self.classes is not None:
                allowed = f"have those of `unet`, {_span(self.classes.ids)}, or none"
            raise ValueError(f"`guide` has the classes {_span(other.ids)}; it must {allowed}.")


def known_classes(network: Network, classifier: torch.nn.Module | None) -> ClassLabels | None:
    """Return the classes that can be asked for, of the network or else of the classifier.

    None: the network has none, and no classifier tells `names`, as that of `train-classifier` does.
    """
    if (classes := class_labels_of(network)) is not None:
        return classes
    names = getattr(classifier, "names", None)
    if not isinstance(names, Sequence) or not names:
        return None
    return ClassLabels(len(names), None, dict(enumerate(names)))


def check_same_process(own: Scheduler, other: Scheduler, name: str) -> None:
    """Check that a network was trained for the same noise levels and prediction as the pipeline's.

    Args:
        own: scheduler of the pipeline.
        other: scheduler that the network was saved with.
        name: of the network's argument, for the message.

    Raises:
        ValueError: naming what differs.
    """
    kinds = [scheduler.config.prediction_type for scheduler in (own, other)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"`{name}` predicts {kinds[1]!r}; it must predict {kinds[0]!r}.")
    tables = [alpha_bar_table(scheduler) for scheduler in (own, other)]
    # stock schedulers keep float32
    if len(tables[0]) != len(tables[1]) or bool(((tables[0] - tables[1]).abs() > 1e-6).any()):
        raise ValueError(
            f"`{name}` was trained with other noise levels than the pipeline; `betas` and "
            "`num_train_timesteps` must be the same."
        )


def check_interval(interval: Sequence[float] | None, name: str) -> None:
    """Check an interval of t / T.

    Raises:
        ValueError: unless it is None, or two numbers with 0 <= low < high <= 1.
    """
    if interval is None:
        return
    is_pair = (
        isinstance(interval, Sequence) and not isinstance(interval, str) and len(interval) == 2
    )
    if not is_pair or not all(map(_is_number, interval)) or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(
            f"`{name}` is {interval!r}; it must be None or two numbers [low, high], shares of "
            "t / T with 0 <= low < high <= 1."
        )


def one_class(conditions: dict[str, Any]) -> dict[str, Any]:
    """Return the conditions of a call whose images all share one class.

    Raises:
        TypeError: for a name that no condition has.
        ValueError: for labels of several images, or as `Conditions`.
    """
    labels = Conditions.of_call(conditions).class_labels
    if count_of(labels) is not None:
        raise ValueError(f"`class_labels` is {labels!r}; it must be a single class for all images.")
    return conditions


def _only_null(classes: ClassLabels, conditions: Conditions) -> int:
    """Return the null class where a call without labels means it.

    Raises:
        ValueError: unless the guidance scale is 0 and nothing else asks for a class.
    """
    plain = conditions.given() <= {"guidance_scale"}
    if classes.null_class is None or conditions.scale != 0 or not plain:
        remedy = (
            "" if classes.null_class is None else "; `guidance_scale=0` samples without a class"
        )
        raise ValueError(
            "`class_labels` is None, but `unet` is class-conditional; it must be "
            f"{classes.allowed()}{remedy}."
        )
    return classes.null_class


def _check_asked(given: Conditions) -> None:
    if given.class_labels is None or isinstance(given.class_labels, ClassMixture):
        kind = "None" if given.class_labels is None else "a ClassMixture"
        raise ValueError(
            f"`class_labels` is {kind}; with a `classifier` it must be a class, or one for each "
            "image."
        )


def _check_place(module: Any, name: str, device: torch.device) -> None:  # noqa: ANN401
    found = next((p.device for p in module.parameters()), device)
    if found != device:
        raise ValueError(f"`{name}` is on {found}; it must be on {device}, as the samples.")


def _span(ids: Sequence[int]) -> str:
    return f"{ids[0]} to {ids[-1]}"


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < float("inf")  # type: ignore[arg-type]


def _is_default(value: object, default: object) -> bool:
    return value is default or (isinstance(value, float | int) and value == default)


def _quoted(names: set[str]) -> str:
    return " and ".join(f"`{name}`" for name in sorted(names))
