"""Reading and writing pictures for the verbs `reconstruct` and `interpolate`."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from PIL import Image


def find(places: Sequence[str], limit: int | None) -> list[Path]:
    """List image files: those that are named, and those in the folders that are named, sorted.

    Says on the terminal what else lies in these folders.

    Raises:
        ValueError: for a place that does not exist, no image at all, or a limit below 1.
    """
    from ddim_schedulers.training.data.folders import files_of
    from ddim_schedulers.training.data.inventory import listed

    if limit is not None and limit < 1:
        raise ValueError(f"`--num_images` is {limit}; it must be >= 1.")
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    for place in map(Path, places):
        if not place.exists():
            raise ValueError(
                f"`--images` is {str(place)!r}, which does not exist; it must name image "
                "files or folders."
            )
        found.extend(files_of(place, left_out) if place.is_dir() else [place])
    if not found:
        raise ValueError(
            f"`--images` is {list(places)}, which holds no image; it must name image files, or "
            "folders with some."
        )
    if left_out:
        print(f"images: {len(found):,} found; left out {listed(left_out)}", file=sys.stderr)
    return found[:limit]


def read(paths: Sequence[Path]) -> "list[Image.Image]":
    """Read image files as every viewer shows them, see `ddim_schedulers.pipelines.image_files`.

    Raises:
        ValueError: naming a file that is no image, or none that can be used.
    """
    from ddim_schedulers.pipelines.images import read_image

    return [read_image(path, "--images") for path in paths]


def check_output(folder: Path, names: Sequence[str]) -> None:
    """Refuse an output folder that cannot be written, or that holds images of another run.

    Args:
        folder: the output; may be missing.
        names: of the images that this run writes, which may be there from the same run before.

    Raises:
        ValueError: naming the place, or one of the other images.
    """
    from ddim_schedulers.pipelines.files import check_folders

    check_folders(folder, "images", "--output")
    others = {path.name for path in (folder / "images").glob("*.png")} - set(names)
    if others:
        raise ValueError(
            f"`--output` is {str(folder)!r}, which holds images of another run ({len(others)}, "
            f"e.g. {min(others)}); choose another folder, or delete them."
        )


def write(folder: Path, names: Sequence[str], images: "Sequence[Image.Image]") -> None:
    """Write PNGs into `folder/images`."""
    from ddim_schedulers.pipelines.files import write_png

    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, images, strict=True):
        write_png(folder / "images" / name, image)


def write_grid(folder: Path, grid: "Image.Image") -> None:
    """Write `folder/grid.png`."""
    from ddim_schedulers.pipelines.files import write_png

    write_png(folder / "grid.png", grid)


def write_latents(path: Path, latents: "torch.Tensor") -> None:
    """Write latents (N, C, H, W) as safetensors, whole or not at all."""
    from safetensors.torch import save

    from ddim_schedulers.pipelines.files import write_bytes

    write_bytes(path, save({"latents": latents.contiguous()}))
