"""What a large guidance scale does to pictures, without a trained network.

python tests/proofs/guidance_picture.py --output docs/images/guidance.png

The data are a kernel density of the 1,797 digits of scikit-learn: each image with Gaussian noise of
0.2. Its eps is known in closed form for every class and for all together, so what the picture shows
is guidance alone. Prints for each row which share of the pixels leaves [-1, 1] by more than 0.25,
and the standard deviation between samples of a class.
"""

import argparse
import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from sklearn.datasets import load_digits

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.class_labels import note_class_labels
from ddim_schedulers.pipelines import GenerationPipeline, make_grid

WIDTH = 0.2
ROWS = {
    "w = 1": {"guidance_scale": 1},
    "w = 3": {"guidance_scale": 3},
    "w = 10": {"guidance_scale": 10},
    "w = 10, rescale 0.7": {"guidance_scale": 10, "guidance_rescale": 0.7},
    "w = 10, interval 0.1 to 0.5": {"guidance_scale": 10, "guidance_interval": [0.1, 0.5]},
}


class Density(ModelMixin, ConfigMixin):
    """eps of x_t where x_0 is a digit and noise; class 10 is all digits."""

    @register_to_config
    def __init__(self, sample_size=8, in_channels=1, out_channels=1, num_class_embeds=11):
        super().__init__()
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1
        self.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        self.images, self.labels = images.flatten(1), torch.tensor(digits.target)
        self.alpha_bar = GeneralizedDDIMScheduler().alpha_bar

    def forward(self, sample, timestep, class_labels):
        a = float(self.alpha_bar[int(timestep)])
        x, variance = sample.flatten(1), a * WIDTH**2 + 1 - a
        square = torch.cdist(x, math.sqrt(a) * self.images).square()
        others = (class_labels[:, None] != self.labels) & (class_labels[:, None] < 10)
        share = (-square / (2 * variance)).masked_fill(others, -math.inf).softmax(1)
        eps = math.sqrt(1 - a) / variance * (x - math.sqrt(a) * share @ self.images)
        return UNet2DOutput(sample=eps.view_as(sample))


def main():
    """Makes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    network = Density()
    note_class_labels(network, 10)
    pipe = GenerationPipeline(network, GeneralizedDDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    shown = []
    for name, settings in ROWS.items():
        images = pipe(
            seeds=range(160),
            class_labels=[i % 10 for i in range(160)],
            num_inference_steps=50,
            batch_size=160,
            output_type="latent",
            **settings,
        ).images
        out = float((images.abs() > 1.25).float().mean())
        spread = float(images.view(16, 10, -1).std(0).mean())
        print(f"{name}: {out:.3f} of the pixels outside, spread {spread:.3f}")
        shown.append(images[:20].clamp(-1, 1) / 2 + 0.5)
    make_grid(torch.cat(shown), 20, scale=4).save(args.output)


if __name__ == "__main__":
    main()
