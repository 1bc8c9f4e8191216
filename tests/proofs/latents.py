"""A small VAE and latent models on Fashion-MNIST, end to end on one core.

    python tests/proofs/latents.py vae --data fashion-mnist.npz --output OUT
    python tests/proofs/latents.py model --data fashion-mnist.npz --output OUT

The first trains an `AutoencoderKL` (32x32x1 to 8x8x4) and saves it in OUT/vae; the second trains
behind it, with and without classes, by the command line, samples, and measures the Frechet distance
beside the ceiling that the VAE sets.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from ddim_schedulers.pipelines import GenerationPipeline, make_grid
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.evaluation.config import parse_evaluation
from ddim_schedulers.training.evaluation.report import evaluate
from ddim_schedulers.training.train import train

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


def settings(args: argparse.Namespace, labelled: bool) -> TrainingConfig:
    """Returns the settings of a latent model; the data are the first images."""
    output = Path(args.output)
    return TrainingConfig(
        data=str(output / "first.npz"),
        array_key="images",
        image_size=32,
        fit="pad",
        vae=str(output / "vae"),
        class_conditional=labelled,
        model="tiny",
        output_dir=str(output / ("labelled" if labelled else "plain")),
        batch_size=args.batch_size,
        max_train_steps=args.steps,
        lr=1e-3,
        lr_schedule="cosine",
        lr_warmup_steps=50,
        ema_decay=0.99,
        checkpoint_every=0,
        validation_fraction=0.25,
        progress_bar=False,
        log_every=50,
        cpu=True,
    )


def train_models(args: argparse.Namespace) -> None:
    """Trains both, measures both, and says in one table what came of it."""
    output, whole = Path(args.output), np.load(args.data)
    first = {name: whole[name][: args.images] for name in ("images", "labels")}
    np.savez(output / "first.npz", **first)
    rows = []
    for labelled in (False, True):
        config = settings(args, labelled)
        began = time.perf_counter()
        result = train(config)
        seconds = time.perf_counter() - began
        block = {"steps": [args.sample_steps], "members": [0]}
        if labelled:
            block["guidance"] = [1, 2]
        evaluation = {
            "pipeline": str(result.pipeline_dir),
            "output_dir": f"{config.output_dir}-evaluation",
            "data": {
                "data": config.data,
                "array_key": "images",
                "image_size": 32,
                "fit": "pad",
                "validation_fraction": 0.25,
            },
            "features": ["pixels"],
            "batch_size": 64,
            "tables": [{"name": "samples", "n": args.n, "grid": [block]}],
        }
        (table,) = evaluate(parse_evaluation(evaluation))[1]["tables"]
        ceiling, real = table["ceiling"]["pixels"], table["real"]["pixels"]
        for cell in table["cells"]:
            rows.append(
                {
                    "classes": labelled,
                    "row": cell["row"],
                    "n": cell["n"],
                    "frechet": cell["metrics"]["pixels"]["frechet"]["mean"],
                    "ceiling": ceiling["frechet"],
                    "ceiling_n": ceiling["n"],
                    "held_out": real["frechet"],
                    "loss": result.final_loss,
                    "seconds": seconds,
                }
            )
            print(rows[-1], flush=True)
        pipe = GenerationPipeline.from_pretrained(result.pipeline_dir)
        pipe.set_progress_bar_config(disable=True)
        asked = {"class_labels": [i % 10 for i in range(40)], "guidance_scale": 2.0}
        images = pipe(
            seeds=range(40), num_inference_steps=args.sample_steps, **(asked if labelled else {})
        ).images
        make_grid(images, 10).save(output / f"{Path(config.output_dir).name}.png")
    (output / "latents.json").write_text(json.dumps(rows, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phase", choices=("vae", "model"))
    parser.add_argument("--data", required=True, help="an .npz file with images and labels")
    parser.add_argument("--output", required=True)
    parser.add_argument("--vae_steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--n", type=int, default=512, help="samples that are measured")
    parser.add_argument("--sample_steps", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    (train_vae if args.phase == "vae" else train_models)(args)


if __name__ == "__main__":
    main()
