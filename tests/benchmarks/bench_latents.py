"""Training on cached latents against a bare loop, and the memory of decoding many images.

python tests/benchmarks/bench_latents.py --json latents.json

The bare loop is that of `bench_training.py`, with a batch of latents in memory. Both sides have the
same network, batch and optimiser settings, in one process; a ratio below 1 says that ours is
faster. The memory is the peak of a fresh process that samples so many images, above the output.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from bench_training import STEPS, steps_of
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel
from pairing import clock_of, paired, parser, report

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.pipelines import GenerationPipeline
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.networks.models import make_unet
from ddim_schedulers.training.trainer.latents import fill_cache
from ddim_schedulers.training.trainer.trainer import Trainer

SIDE = 64  # of the images; latents have a fourth


def small_vae():
    """Returns a random autoencoder: images (3, 4 h, 4 w), latents of 4 channels."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()


def ours(folder, batch_size):
    """Returns a function that does steps of the trainer on cached latents."""
    images = np.random.default_rng(0).integers(0, 256, (2 * batch_size, SIDE, SIDE, 3))
    np.save(folder / "images.npy", images.astype(np.uint8))
    small_vae().save_pretrained(folder / "vae")
    config = TrainingConfig(
        data=str(folder / "images.npy"),
        output_dir=str(folder / "run"),
        vae=str(folder / "vae"),
        model="small",
        batch_size=batch_size,
        max_train_steps=STEPS,
        lr_warmup_steps=0,
        validation_fraction=0.0,
        cpu=True,
    )
    trainer = Trainer(config)
    trainer.batches.cache = fill_cache(trainer)
    return steps_of(trainer)


def bare(batch_size):
    """Returns a function that does steps of the shortest loop that trains, and averages."""
    torch.manual_seed(0)
    unet = make_unet("small", channels=4, size=(SIDE // 4, SIDE // 4)).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-4, weight_decay=0.0, fused=True)
    average = [p.detach().clone() for p in unet.parameters()]
    alpha_bar = DDPMScheduler().alphas_cumprod
    x0 = torch.randn(batch_size, 4, SIDE // 4, SIDE // 4)

    def steps(count):
        for _ in range(count):
            noise, t = torch.randn_like(x0), torch.randint(1000, (batch_size,))
            a = alpha_bar[t][:, None, None, None]
            output = unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, return_dict=False)[0]
            (output - noise).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(average, list(unet.parameters()), 1e-4)

    return steps


def peak(count):
    """Samples `count` images in this process and returns the peak above the output, in MiB."""
    unet = UNet2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    scheduler = GeneralizedDDIMScheduler(clip_sample=False)
    pipe = GenerationPipeline(unet=unet, scheduler=scheduler, vae=small_vae())
    pipe.set_progress_bar_config(disable=True)
    images = pipe(count, batch_size=4, num_inference_steps=1, output_type="pt").images
    total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return total - images.numel() * images.element_size() / 2**20


def main():
    made = parser(__doc__)
    made.add_argument("--batch_size", type=int, default=32)
    made.add_argument("--steps", type=int, default=10, help="steps in each run of a pair")
    made.add_argument(
        "--counts", type=int, nargs="*", default=[4, 64, 256], help="images that are decoded"
    )
    made.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak is not None:
        print(json.dumps(peak(args.peak)))
        return
    with tempfile.TemporaryDirectory() as folder:
        one, two = ours(Path(folder), args.batch_size), bare(args.batch_size)
        found = paired(
            lambda: one(args.steps), lambda: two(args.steps), args.repeats, clock=clock_of(args)
        )
    peaks = {}
    for count in args.counts:
        words = [sys.executable, __file__, "--peak", str(count)]
        peaks[count] = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    names = {"labels": ["what", "batch"], "what": "cached latents", "batch": args.batch_size}
    report([{**found, **names, "peak_above_output_mib": peaks}], args.json)
    print(f"peak above the output, MiB by the number of images: {peaks}")


if __name__ == "__main__":
    main()
