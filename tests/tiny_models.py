"""Networks, autoencoders and pipelines so small that many tests build them anew."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DModel, VQModel

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.pipelines import GenerationPipeline

_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "mid_block_add_attention": False,
}
_TINY = {
    "encoder_block_out_channels": (4, 4),
    "decoder_block_out_channels": (4, 4),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}


def tiny_vae(kind="kl", channels=1, seed=0, **changes):
    """Returns a random autoencoder: images (channels, 2 h, 2 w), latents of 4 channels."""
    torch.manual_seed(seed)
    common = {"in_channels": channels, "out_channels": channels, "latent_channels": 4}
    if kind == "tiny":
        return AutoencoderTiny(**{**common, **_TINY, **changes}).eval()
    if kind == "vq":
        return VQModel(**{**common, **_BLOCKS, "num_vq_embeddings": 16, **changes}).eval()
    return AutoencoderKL(**{**common, **_BLOCKS, **changes}).eval()


class ExactVae(AutoencoderTiny):
    """An orthogonal codec: 2x2 pixels to 4 channels with signs, exact in every float."""

    def __init__(self):
        super().__init__(in_channels=1, out_channels=1, latent_channels=4, **_TINY)

    @staticmethod
    def signs(like):
        return torch.tensor([1.0, -1.0, -1.0, 1.0]).to(like)[None, :, None, None]

    def encode(self, x):
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput

        z = torch.nn.functional.pixel_unshuffle(x, 2)
        return AutoencoderTinyOutput(latents=z * self.signs(z))

    def decode(self, z):
        from diffusers.models.autoencoders.vae import DecoderOutput

        return DecoderOutput(sample=torch.nn.functional.pixel_shuffle(z * self.signs(z), 2))


def tiny_unet(channels=1, size=8, blocks=(8,), seed=0, **changes):
    """Returns a random network of images (channels, size, size)."""
    torch.manual_seed(seed)
    settings = {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": blocks,
        "down_block_types": ("DownBlock2D",) * len(blocks),
        "up_block_types": ("UpBlock2D",) * len(blocks),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return UNet2DModel(**{**settings, **changes}).eval()


def latent_unet(size=4, **changes):
    """Returns a random network of latents (4, size, size)."""
    return tiny_unet(4, size, (8, 8), **changes)


def latent_pipeline(vae=None, cls=GenerationPipeline, **changes):
    """Returns a pipeline of latents (4, 4, 4) and images (1, 8, 8)."""
    parts = {"unet": latent_unet(), "scheduler": GeneralizedDDIMScheduler(clip_sample=False)}
    pipe = cls(**{**parts, "vae": tiny_vae() if vae is None else vae, **changes})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gaussian_eps(alpha_bar, mean, variance):
    """Returns (k_x, k_1) of the perfect eps_hat = k_x x_t + k_1 for data N(mean, variance I).

    Then gamma_t = b_t / (a_t variance + b_t) and Var(x_0 | x_t) = variance b_t / (a_t variance +
    b_t), with a_t = alpha_bar and b_t = 1 - a_t.
    """
    slope = (1 - alpha_bar).sqrt() / (alpha_bar * variance + (1 - alpha_bar))
    return slope, -slope * alpha_bar.sqrt() * mean
