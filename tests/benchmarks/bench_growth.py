"""How cost grows: a step, a plan and a sampling run by S, batch, resolution, T and solver order.

python tests/benchmarks/bench_growth.py --json growth.json

Every row is a ratio to the smallest of its group, in the same run.
"""

import torch
from bench_sampling import quiet
from diffusers import UNet2DModel
from pairing import clock_of, paired, parser, report

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.pipelines import GenerationPipeline


def step(batch=1, size=32, big_t=1000, order=1):
    """Returns a call that takes a whole plan of 20 steps without a network."""
    scheduler = GeneralizedDDIMScheduler(big_t, solver_order=order)
    scheduler.set_timesteps(20)
    x, m = torch.randn(2, batch, 3, size, size)

    def call():
        for t in scheduler.timesteps:
            scheduler.step(m, t, x)

    return call


def plan(steps=10, big_t=1000):
    """Returns a call that plans and takes one step: tables included."""
    scheduler = GeneralizedDDIMScheduler(big_t)
    x, m = torch.randn(2, 1, 1, 8, 8)

    def call():
        scheduler.set_timesteps(steps)
        scheduler.step(m, scheduler.timesteps[0], x)

    return call


def sample(steps=10, batch=4, size=16):
    """Returns a call that samples a batch with a small network."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
    ).eval()
    pipe = quiet(GenerationPipeline(unet, GeneralizedDDIMScheduler(eta=0.0)))
    settings = {"seeds": range(batch), "batch_size": batch, "output_type": "latent"}
    return lambda: pipe(num_inference_steps=steps, **settings)


GROUPS = (
    (step, "batch", (1, 4, 16, 64)),
    (step, "size", (32, 64, 128)),
    (step, "big_t", (1000, 4000)),
    (step, "order", (1, 2, 3)),
    (plan, "steps", (10, 100, 1000)),
    (plan, "big_t", (1000, 4000, 16000)),
    (sample, "steps", (10, 20, 40)),
    (sample, "batch", (4, 8, 16)),
    (sample, "size", (16, 32)),
)


def main():
    """Runs every group."""
    args = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for make, name, values in GROUPS:
        for value in values[1:]:
            figures = paired(
                make(**{name: value}),
                make(**{name: values[0]}),
                args.repeats,
                clock=clock_of(args),
            )
            what = f"{make.__name__}, {name} {value} against {values[0]}"
            rows.append({"labels": ["growth"], "growth": what, **figures})
            report(rows[-1:], None)
    if args.json:
        report(rows, args.json)


if __name__ == "__main__":
    main()
