"""Small autoencoders, and pipelines behind them, that several tests build."""

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


def small_vae(kind="kl", channels=1, seed=0, **changes):
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


def small_unet(side=4, seed=0, **changes):
    """Returns a random network of latents (4, side, side)."""
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=side,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        **changes,
    ).eval()


def latent_pipeline(vae=None, cls=GenerationPipeline, **changes):
    """Returns a pipeline of latents (4, 4, 4) and images (1, 8, 8)."""
    parts = {"unet": small_unet(), "scheduler": GeneralizedDDIMScheduler(clip_sample=False)}
    pipe = cls(**{**parts, "vae": small_vae() if vae is None else vae, **changes})
    pipe.set_progress_bar_config(disable=True)
    return pipe
