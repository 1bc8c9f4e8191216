"""The data flags of `calibrate` and `likelihood`: which images, as the trainer would read them."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `--help` needs neither torch nor diffusers
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

    size = measured_model.unet.config.sample_size
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
    if data.channels != measured_model.channels:
        raise ValueError(
            f"`data`: the images have {data.channels} channels, the network "
            f"{measured_model.channels}; see --image_mode"
        )
    return data
