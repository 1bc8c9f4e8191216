"""Sampling end to end: our scheduler and pipeline against bare network calls and against stock.

python tests/benchmarks/bench_sampling.py --json sampling.json [--pipeline FOLDER] [--compile]

With --compile also `speed_up(...)` against stock DDIMPipeline in eager float32 on the same weights,
with the largest difference of the images (in [0, 1]) to ours in eager float32.
"""

import copy

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from pairing import clock_of, paired, parser, report

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler
from ddim_schedulers.pipelines import GenerationPipeline

STEPS, BATCH = 20, 4


def network(folder):
    """Returns the UNet of a pipeline, or one of 1.1 M random parameters for 32x32 grey images."""
    if folder:
        return UNet2DModel.from_pretrained(folder, subfolder="unet").eval()
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
    ).eval()


@torch.no_grad()
def bare(unet, x, timesteps):
    """Calls the network as often as a sampler would, and nothing else."""
    for t in timesteps:
        unet(x, t, return_dict=False)


def quiet(pipe):
    """Returns the pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main():
    """Runs every case."""
    options = parser(__doc__)
    options.add_argument("--pipeline", help="folder of a pipeline; random weights without it")
    options.add_argument("--compile", action="store_true", help="a minute of compiling each")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    unet = network(args.pipeline)
    size = unet.config.sample_size
    x = torch.randn(BATCH, unet.config.in_channels, size, size)
    ddim, ddpm = GeneralizedDDIMScheduler(), MarkovianDDPMScheduler()
    ddim.set_timesteps(STEPS)
    stock_ddim = quiet(DDIMPipeline(unet, DDIMScheduler()))
    stock_ddpm = quiet(DDPMPipeline(unet, DDPMScheduler()))
    in_stock = quiet(DDPMPipeline(unet, ddim))
    ours = quiet(GenerationPipeline(unet, ddim))
    ours_ddpm = quiet(GenerationPipeline(unet, ddpm))
    plain = {"num_inference_steps": STEPS, "output_type": "pt"}

    def generate(pipe, **more):
        return lambda: pipe(seeds=range(BATCH), batch_size=BATCH, **plain, **more)

    def stock(pipe):
        kind = "np" if isinstance(pipe, DDIMPipeline) else "pt"
        settings = {**plain, "output_type": kind}
        return lambda: pipe(
            batch_size=BATCH, generator=torch.Generator().manual_seed(0), **settings
        )

    calls = lambda: bare(unet, x, ddim.timesteps)  # noqa: E731
    rows = []

    def add(label, a, b, **more):
        figures = paired(a, b, args.repeats, clock=clock_of(args))
        rows.append({"sampling": label, "labels": ["sampling", *more], **more, **figures})
        report(rows[-1:], None)

    for label, a, b in (
        ("GenerationPipeline, DDIM, against bare network calls", generate(ours, eta=0.0), calls),
        ("GenerationPipeline, DDPM, against bare network calls", generate(ours_ddpm), calls),
        (
            "GenerationPipeline against stock DDIMPipeline",
            generate(ours, eta=0.0),
            stock(stock_ddim),
        ),
        ("our DDIM in DDPMPipeline against stock DDIMPipeline", stock(in_stock), stock(stock_ddim)),
        ("GenerationPipeline, DDPM, against DDPMPipeline", generate(ours_ddpm), stock(stock_ddpm)),
    ):
        add(label, a, b)
    eager = generate(ours, eta=0.0)().images
    for options in (
        {"dtype": torch.bfloat16, "channels_last": True},
        {"compile": True},
        {"compile": True, "dtype": torch.bfloat16, "channels_last": True},
    ):
        if args.compile or "compile" not in options:
            pipe = quiet(GenerationPipeline(copy.deepcopy(unet), ddim).speed_up(**options))
            run = generate(pipe, eta=0.0)
            difference = float((run().images - eager).abs().max())
            label = ", ".join(f"{k}={v}" for k, v in options.items())
            add(f"speed_up({label}) against stock", run, stock(stock_ddim), difference=difference)
    if args.json:
        report(rows, args.json)


if __name__ == "__main__":
    main()
