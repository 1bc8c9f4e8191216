"""Peak memory and time of reading very large image files.

    python tests/proofs/large_images.py [SIDE]

Prints, for a square image of SIDE pixels (12,000) in several formats, how much the peak of a
process of its own grows while one image is loaded and prepared, and its ratio to the decoded bytes.
Exits with 1 if a ratio is above 1.5.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = [
    # name, mode, suffix, bytes a pixel, settings
    ("PNG", "RGB", "png", 3, {"fit": "resize_crop", "image_size": 32}),
    ("PNG", "RGB", "png", 3, {"fit": "squash", "image_size": 256}),
    ("PNG", "RGB", "png", 3, {"fit": "crop", "image_size": 256}),
    (
        "PNG with alpha",
        "RGBA",
        "png",
        4,
        {"fit": "resize_crop", "image_size": 32, "image_mode": "RGB"},
    ),
    ("PNG of 16 bits", "I;16", "png", 2, {"fit": "resize_crop", "image_size": 32}),
    ("PNG with a palette", "P", "png", 1, {"fit": "resize_crop", "image_size": 32}),
    ("TIFF", "RGB", "tif", 3, {"fit": "resize_crop", "image_size": 32}),
    ("JPEG", "RGB", "jpg", 3, {"fit": "resize_crop", "image_size": 32}),
]


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def child(folder: str, settings: dict) -> None:
    import torch

    from ddim_schedulers.training.config import TrainingConfig
    from ddim_schedulers.training.data.images import load_data

    torch.set_num_threads(1)
    config = TrainingConfig(data=folder, validation_fraction=0.0, **settings)
    before, began = peak(), time.perf_counter()
    image = load_data(config)[0].batch([0])[0]
    seconds = time.perf_counter() - began
    print(json.dumps({"grown": peak() - before, "seconds": seconds, "shape": list(image.shape)}))


def make(path: Path, mode: str, side: int) -> None:
    """In a process of its own, too: this one stays small."""
    code = (
        "import sys; from PIL import Image; Image.MAX_IMAGE_PIXELS = None; "
        "mode, side, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]; "
        "image = Image.new(mode, (side, side), 9 if mode in ('P', 'I;16') else None); "
        "image.save(path, **({'compress_level': 1} if path.endswith('png') else {}))"
    )
    subprocess.run([sys.executable, "-c", code, mode, str(side), str(path)], check=True)


def main(side: int) -> int:
    worst = 0.0
    with tempfile.TemporaryDirectory() as root:
        for number, (name, mode, suffix, each, settings) in enumerate(CASES):
            folder = Path(root, str(number))
            folder.mkdir()
            make(folder / f"a.{suffix}", mode, side)
            command = [sys.executable, __file__, "--child", str(folder), json.dumps(settings)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            result = json.loads(out.splitlines()[-1])
            decoded = each * side**2
            ratio = result["grown"] / decoded
            worst = max(worst, ratio)
            what = f"{name:20}{settings['fit']:12} {settings['image_size']:4}"
            grown = (
                f"{result['grown'] / 2**20:7,.0f} MiB, {ratio:.2f} of {decoded / 2**20:,.0f} MiB"
            )
            print(f"{what}: {grown} decoded, {result['seconds']:.1f} s", flush=True)
            (folder / f"a.{suffix}").unlink()
    return int(worst > 1.5)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], json.loads(sys.argv[3]))
    else:
        sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 12_000))
