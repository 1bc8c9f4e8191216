"""Physics of deepinv as operators of a restoration, without a change.

    python tests/proofs/deepinv_physics.py

In an environment of its own, for deepinv needs torchvision: `pip install deepinv`. Prints for each
physics and method how far A x is from y, and for a mask how far the samples are from those of our
operator.
"""

import sys
from pathlib import Path

import deepinv
import torch

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.pipelines import RestorationPipeline
from ddim_schedulers.pipelines.restoration.operators import Inpainting, adjoint_error

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import tiny_unet

SHAPE = (1, 32, 32)


def main() -> None:
    pipe = RestorationPipeline(tiny_unet(size=32), GeneralizedDDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    mask = (torch.rand(1, 32, 32) < 0.5).float()
    physics = deepinv.physics
    known = {
        "Inpainting": physics.Inpainting(img_size=SHAPE, mask=mask),
        "Downsampling": physics.Downsampling(img_size=SHAPE, factor=4, filter="bicubic"),
        "BlurFFT": physics.BlurFFT(img_size=SHAPE, filter=physics.blur.gaussian_blur(sigma=(1, 1))),
        "CompressedSensing": physics.CompressedSensing(m=300, img_size=SHAPE),
    }
    x = torch.rand(2, *SHAPE) * 2 - 1
    settings = {"seeds": [1, 2], "num_inference_steps": 5, "output_type": "latent"}
    for name, operator in known.items():
        y = operator.A(x)
        print(f"{name}: its adjoint is off by {adjoint_error(operator, SHAPE):.1e}")
        for method in ("ddnm", "repaint", "pigdm", "dps", "mmps"):
            found = pipe(y, operator, method=method, **settings)
            print(f"  {method}: max |A x - y| = {float(found.residual.max()):.2e}")
    ours = Inpainting(mask, SHAPE)
    for method in ("ddnm", "repaint", "pigdm", "dps"):
        one, other = (
            pipe(operator.A(x), operator, method=method, **settings).images
            for operator in (ours, known["Inpainting"])
        )
        print(f"Inpainting, {method}: {float((one - other).abs().max()):.1e} from our operator")


if __name__ == "__main__":
    main()
