"""Training: our step against a bare loop, and against stock diffusers pieces used as its example
does.

python tests/benchmarks/bench_training.py --json training.json

Same network, same batch, same optimiser settings, in one process. The bare loop has its batch in
memory and does nothing but draw noise and t, go forward and backward, clip and update. The stock
way is that of diffusers' `train_unconditional.py`: prepared loader, AdamW as it comes, EMA,
learning-rate scheduler, progress bar and the loss read in every step. Its data are a tensor in
memory, where the script decodes images with torchvision. A ratio below 1 says that ours is faster.
With `--compile` the other side stays eager; where ours has bf16 autocast the stock side has it too,
for Accelerate keeps it for the process.
"""

import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from pairing import clock_of, paired, parser, report
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.networks.models import make_unet
from ddim_schedulers.training.trainer.trainer import Trainer
from ddim_schedulers.training.trainer.training_log import Window

STEPS = 1_000_000  # more than any run takes


def ours(images, folder, preset, batch_size, **options):
    """Returns a function that does `log_every` steps of the trainer and its one reading."""
    np.save(folder / "images.npy", images)
    config = TrainingConfig(
        data=str(folder / "images.npy"),
        output_dir=str(folder / "run"),
        model=preset,
        batch_size=batch_size,
        max_train_steps=STEPS,
        lr_warmup_steps=0,
        validation_fraction=0.0,
        cpu=not torch.cuda.is_available(),
        **options,
    )
    trainer = Trainer(config)
    (folder / "run").mkdir()
    return steps_of(trainer)


def steps_of(trainer):
    """Returns a function that does steps of a trainer, and one reading."""

    def batches():
        with trainer.loader(STEPS) as loader:
            yield from loader

    loader, window = batches(), Window(trainer.share, 0)

    def steps(count):
        for _ in range(count):
            trainer.one_step(loader, window)
            trainer.step += 1
            trainer.average.step()
        reading = window.read(trainer.accelerator, False)
        trainer.log.take(reading, trainer.step, trainer.config.lr, trainer.config.batch_size)

    return steps


def bare(images, preset, batch_size, device):
    """Returns a function that does steps of the shortest loop that trains."""
    torch.manual_seed(0)
    unet = make_unet(preset, channels=1, size=images.shape[1:]).to(device).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-4, weight_decay=0.0, fused=True)
    alpha_bar = DDPMScheduler().alphas_cumprod.to(device)
    x0 = torch.from_numpy(images[:batch_size, None]).to(device) / 127.5 - 1

    def steps(count):
        for _ in range(count):
            noise = torch.randn_like(x0)
            t = torch.randint(0, 1000, (batch_size,), device=device)
            a = alpha_bar[t].view(-1, 1, 1, 1)
            output = unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, return_dict=False)[0]
            torch.nn.functional.mse_loss(output, noise).backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return steps


def stock(images, preset, batch_size):
    """Returns a function that does steps the way of diffusers' example script."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    unet = make_unet(preset, channels=1, size=images.shape[1:])
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-4, weight_decay=0.0)
    pixels = torch.from_numpy(images[:, None]) / 127.5 - 1
    loader = DataLoader(TensorDataset(pixels), batch_size=batch_size, shuffle=True)
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=STEPS)
    unet, optimizer, loader, rate = accelerator.prepare(unet, optimizer, loader, rate)
    ema.to(accelerator.device)
    process = DDPMScheduler()
    bar = tqdm(total=STEPS, disable=None)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def steps(count):
        for _ in range(count):
            (clean,) = next(batches)
            noise = torch.randn(clean.shape, dtype=torch.float32, device=clean.device)
            t = torch.randint(0, 1000, (clean.shape[0],), device=clean.device).long()
            with accelerator.accumulate(unet):
                output = unet(process.add_noise(clean, noise, t), t).sample
                loss = torch.nn.functional.mse_loss(output.float(), noise.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema.step(unet.parameters())
                bar.update(1)
            logs = {"loss": loss.detach().item(), "lr": rate.get_last_lr()[0]}
            logs["ema_decay"] = ema.cur_decay_value
            bar.set_postfix(**logs)
            accelerator.log(logs)

    return steps


def main():
    """Runs every case."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--preset", default="small", help="network, see --model of the trainer")
    options.add_argument("--batch_size", type=int, default=16)
    options.add_argument("--size", type=int, default=32, help="side of the images")
    options.add_argument("--steps", type=int, default=4, help="steps timed together, each time")
    options.add_argument(
        "--compile",
        action="store_true",
        help="also compiled, float32 and bfloat16: a minute each",
    )
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    clock = clock_of(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (1024, args.size, args.size)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    what = (images, args.preset, args.batch_size)
    rows = []
    against = [
        ("bare loop", lambda: bare(*what, device), {"use_ema": False}),
        ("stock example", lambda: stock(*what), {}),
    ]
    faster = [{"compile": True}, {"compile": True, "mixed_precision": "bf16"}]
    ways = [{}, *(faster if args.compile else [])]
    cases = [(name, make, {**c, **way}) for way in ways for name, make, c in against]
    for name, make, changes in cases:
        with tempfile.TemporaryDirectory() as folder:
            mine, theirs = ours(images, Path(folder), *what[1:], **changes), make()
            row = paired(
                lambda mine=mine: mine(args.steps),
                lambda theirs=theirs: theirs(args.steps),
                repeats=args.repeats,
                clock=clock,
            )
        row["ratio_of_throughput"] = 1 / row["ratio_median"]
        rows.append(
            row
            | {
                "labels": ["against", "ours"],
                "against": name,
                "ours": ", ".join(f"{k}={v}" for k, v in changes.items()) or "defaults",
                "preset": args.preset,
                "batch_size": args.batch_size,
                "size": args.size,
                "clock": clock.__name__,
            }
        )
    report(rows, args.json)


if __name__ == "__main__":
    main()
