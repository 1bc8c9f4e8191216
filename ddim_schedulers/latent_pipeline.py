"""The pipeline of a network of latents that a self-contained repository carries.

`LDMPipeline` of diffusers knows no classes and leaves out a shift of the latents. This one is
enough to use a repository that has either where this package is not installed.
`ddim_schedulers.pipelines.GenerationPipeline` does the same and more.
"""

from typing import Any

import torch

from .class_labels import ClassLabels, class_labels_of
from .class_pipeline import ClassConditionalPipeline
from .latent_scale import scale_in


class LatentPipeline(ClassConditionalPipeline):
    """Samples latents and decodes them; with or without classes and guidance.

    Args:
        unet: a `UNet2DModel` of latents.
        scheduler: any scheduler whose `step` takes the network's output as it is.
        vqvae: the autoencoder, whose config has the scale and the shift of the latents.
    """

    model_cpu_offload_seq = "unet->vqvae"
    stands_for = "GenerationPipeline"

    def __init__(self, unet: Any, scheduler: Any, vqvae: Any) -> None:
        super().__init__(unet, scheduler)
        self.register_modules(vqvae=vqvae)

    def _classes(self) -> ClassLabels | None:
        return class_labels_of(self.unet)

    def _pixels(self, x: torch.Tensor) -> torch.Tensor:
        scale, shift = scale_in(self.vqvae.config)
        z = (x / scale + shift).to(self.vqvae.dtype)
        return self.vqvae.decode(z).sample.to(x.dtype)
