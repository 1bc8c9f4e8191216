"""The data flags of `calibrate` and `likelihood`: which images, as the trainer would read them."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `--help` needs neither torch nor diffusers
    import torch

    from ddim_schedulers.class_labels import ClassLabels
    from ddim_schedulers.training.data.images import ImageData
    from ddim_schedulers.training.likelihood.measured_model import MeasuredModel


def add_data_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the flags; names and meanings are those of `ddim-schedulers train`."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=required,
        help="'digits', a folder of images, a .npy/.npz/.parquet file, or the name of a data set",
    )
    group.add_argument("--data_config", help="configuration name of a data set")
    group.add_argument("--split", default="train", help="split of a data set or folder (train)")
    group.add_argument(
        "--part",
        choices=("train", "held_out", "all"),
        default="train",
        help="which of the digits; other data are used whole (train)",
    )
    group.add_argument("--image_column", help="image column of a data set")
    group.add_argument("--array_key", help="array in an .npz file")
    group.add_argument("--image_size", type=int, help="side of the images; the network's otherwise")
    group.add_argument(
        "--fit",
        choices=("exact", "pad", "crop", "resize_crop", "squash"),
        default="exact",
        help="how images of another size are fitted (exact: refused); a likelihood needs pixels "
        "that were not resized",
    )
    group.add_argument(
        "--image_mode",
        choices=("keep", "L", "RGB", "RGBA"),
        default="keep",
        help="convert image files to grey, colour, or colour with alpha (keep)",
    )
    group.add_argument(
        "--background",
        default="white",
        help="colour that is seen through transparent pixels of image files (white)",
    )
    group.add_argument(
        "--max_image_pixels",
        type=int,
        help="pixels of the largest image file that is opened (Pillow's limit)",
    )
    group.add_argument(
        "--value_range", type=float, nargs=2, help="the two values that become -1 and 1"
    )


def add_condition_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of networks with classes: where labels are, and which are measured."""
    add_label_arguments(parser)
    parser.add_argument(
        "--labels",
        choices=("data", "null"),
        help="for a network with classes: the class of each image (of samples all in turn), or the "
        "null class for all (data)",
    )


def add_label_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which class an image is of, as in `ddim-schedulers train`."""
    group = parser.add_argument_group("classes")
    group.add_argument(
        "--label_column",
        help="column of a table, or array of an .npz file, with the class of each image (the only "
        "column of class labels, or the array `labels`)",
    )
    group.add_argument(
        "--class_names", nargs="+", help="names of all classes, in the order of their numbers"
    )


def load_measured_data(
    args: argparse.Namespace, measured_model: MeasuredModel, class_conditional: bool = False
) -> ImageData:
    """Return the images that the flags name, checked against the network.

    Args:
        args: the flags.
        measured_model: the network.
        class_conditional: whether the images have classes, see `add_label_arguments`.

    Raises:
        ValueError: as the trainer's `load_data`, or for images of other channels or another size.
    """
    from ddim_schedulers.pipelines.sampling_job import process_of
    from ddim_schedulers.training.config import TrainingConfig
    from ddim_schedulers.training.data.images import digits, load_data, with_classes

    size, codec = measured_model.unet.config.sample_size, measured_model.codec
    size = size * codec.factor if codec is not None and type(size) is int else size
    channels = measured_model.channels if codec is None else codec.channels
    own = args.image_size if args.image_size is not None else size if type(size) is int else None
    if args.data == "digits" and args.split != "train":
        raise ValueError(f"`--split` is {args.split!r}; the digits are divided by --part")
    names = ["data", "data_config", "split", "image_column", "array_key", "fit", "image_mode"]
    names += ["background", "max_image_pixels", "value_range"]
    names += ["label_column", "class_names"] if class_conditional else []
    config = TrainingConfig(
        **{name: getattr(args, name) for name in names},
        class_conditional=class_conditional,
        image_size=own,
        validation_fraction=0.0,
    )
    if args.data == "digits" and own in (None, 8):
        data = with_classes(digits(args.part), config)
    else:
        data = load_data(config)[0]
    if process_of()[0] == 0:
        print(data.inventory.line(), file=sys.stderr)
    if data.channels != channels:
        raise ValueError(
            f"`data` has images of {data.channels} channels; they must have "
            f"{channels}, as the network's (see --image_mode)"
        )
    return data


def load_measured_images(
    args: argparse.Namespace, measured_model: MeasuredModel, num_images: int
) -> tuple[ImageData, torch.Tensor, MeasuredModel]:
    """Return the data, the images (N, C, H, W) that are measured, and the model with their labels.

    Raises:
        ValueError: as `load_measured_data`, for too few images, or flags about classes that the
            network does not have.
    """
    from ddim_schedulers.training.likelihood.calibration import choose_images

    kind = kind_of_labels(args, measured_model)
    data = load_measured_data(args, measured_model, class_conditional=kind == "data")
    if data.classes is not None and measured_model.classes is not None:
        data = replace(data, classes=data.classes.for_network(measured_model.classes))
    chosen = choose_images(len(data), num_images, args.seed)
    labels = data.labels(chosen)
    if kind == "null":
        labels = null_labels(measured_model, num_images)
    images = encoded(measured_model, data.batch(chosen)[0], args.seed)
    return data, images, measured_model.labelled(labels)


def encoded(measured_model: MeasuredModel, images: torch.Tensor, seed: int) -> torch.Tensor:
    """Return images as samples of the network: of latents, draws of the encoder with `seed`."""
    import torch

    from ddim_schedulers.training.data.latents import ENCODED

    if (codec := measured_model.codec) is None:
        return images
    device = next(measured_model.unet.parameters()).device
    moments = torch.cat([codec.moments(part.to(device)).cpu() for part in images.split(ENCODED)])
    shape = codec.latent_shape((images.shape[1], images.shape[2], images.shape[3]))
    noise = torch.randn(len(images), *shape, generator=torch.Generator().manual_seed(seed))
    return codec.latents(moments, noise if codec.has_distribution else None)


def labels_in_turn(
    given: list[str] | None, measured_model: MeasuredModel, count: int
) -> torch.Tensor | None:
    """Return classes for `count` samples; None for a network without classes.

    Args:
        given: `--labels` of samples: `data` or None for all classes in turn, `null` for the null
            class, or names and numbers of classes that are taken in turn.
        measured_model: the network.
        count: N.

    Raises:
        ValueError: for classes that the network does not have.
    """
    import torch

    classes = measured_model.classes
    if classes is None:
        if given:
            raise ValueError(
                f"`--labels` is {given}; it must be left out, as the network has no classes"
            )
        return None
    if given == ["null"]:
        _check_null(classes)
        return null_labels(measured_model, count)
    if given is None or given == ["data"]:
        return torch.tensor(classes.balanced(count))
    numbers = [classes.number(label, "--labels") for label in given]
    return torch.tensor([numbers[i % len(numbers)] for i in range(count)])


def _check_null(classes: ClassLabels) -> None:
    if classes.null_class is None:
        raise ValueError("`--labels` is 'null'; it must be data: the network has no null class")


def null_labels(measured_model: MeasuredModel, count: int) -> torch.Tensor:
    """Return the null class for `count` images."""
    import torch

    classes = measured_model.classes
    assert classes is not None and classes.null_class is not None
    return torch.full((count,), classes.null_class, dtype=torch.int64)


def kind_of_labels(args: argparse.Namespace, measured_model: MeasuredModel) -> str | None:
    """Return which labels are measured, `data` or `null`; None for a network without classes.

    Raises:
        ValueError: for flags that do nothing with this network.
    """
    given = [name for name in ("labels", "label_column", "class_names") if getattr(args, name)]
    if (classes := measured_model.classes) is None:
        if given:
            raise ValueError(
                f"`--{given[0]}` is {getattr(args, given[0])!r}; it must be left out, as the "
                "network has no classes"
            )
        return None
    kind = args.labels or "data"
    if kind == "null":
        _check_null(classes)
    if kind == "null" and len(given) > 1:
        raise ValueError(
            f"`--{given[1]}` is {getattr(args, given[1])!r}; it must be left out with --labels null"
        )
    return kind
