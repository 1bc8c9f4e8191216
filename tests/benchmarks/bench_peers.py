"""Sampling against other libraries that a user might pick, the same network behind each.

python tests/benchmarks/bench_peers.py --json peers.json [--pipeline FOLDER]

azula (`pip install --no-deps azula einops`) runs its DDIMSampler on our alpha_bar. k-diffusion and
denoising-diffusion-pytorch insist on torchvision and are not run.
"""

import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.noise import Schedule
from azula.sample import DDIMSampler
from bench_sampling import network, quiet
from diffusers import DPMSolverMultistepScheduler
from pairing import clock_of, paired, parser, report

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.pipelines import GenerationPipeline

STEPS, BATCH = 20, 4


class OnTheGrid(Schedule):
    """alpha and sigma at the index t of the discrete process; t below 0 is the end."""

    def __init__(self, alpha_bar):
        self.alpha_bar = torch.cat([alpha_bar, alpha_bar.new_ones(1)]).float()

    def __call__(self, t):
        a = self.alpha_bar[t.long()]  # -1 is the last entry
        return a.sqrt(), (1 - a).sqrt()


class OnTheNetwork(Denoiser):
    """azula's denoiser of a network that predicts eps, clipped as diffusers clips."""

    def __init__(self, unet, schedule):
        super().__init__()
        self.unet, self.schedule = unet, schedule

    def forward(self, x_t, t):
        alpha, sigma = self.schedule(t)
        x0 = (x_t - sigma * self.unet(x_t, t, return_dict=False)[0]) / alpha
        return DiracPosterior(x0.clamp(-1, 1))


class Planned(DDIMSampler):
    """azula's DDIM on the timesteps of a diffusers plan."""

    def __init__(self, plan, **settings):
        super().__init__(**settings)
        self.plan = plan

    @property
    def timesteps(self):
        return torch.cat([self.plan, torch.tensor([-1])])


def main():
    """Runs every case."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--pipeline", help="folder of a pipeline; random weights without it")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    unet = network(args.pipeline)
    size = unet.config.sample_size
    x = torch.randn(BATCH, unet.config.in_channels, size, size)
    scheduler = GeneralizedDDIMScheduler(eta=0.0)
    scheduler.set_timesteps(STEPS)
    denoiser = OnTheNetwork(unet, OnTheGrid(scheduler.alpha_bar))
    azula = Planned(scheduler.timesteps, denoiser=denoiser, silent=True)
    settings = {"batch_size": BATCH, "num_inference_steps": STEPS, "output_type": "latent"}
    pipe = quiet(GenerationPipeline(unet, scheduler))
    ours = lambda: pipe(latents=x, **settings).images  # noqa: E731
    # azula re-derives eps from the clipped x0, stock DDIM by default does not
    rederived = pipe(latents=x, use_clipped_model_output=True, **settings).images
    difference = float((azula(x) - rederived).abs().max())
    solver = quiet(GenerationPipeline(unet, DPMSolverMultistepScheduler()))
    order_2 = quiet(GenerationPipeline(unet, GeneralizedDDIMScheduler(eta=0.0, solver_order=2)))
    rows = []
    for label, a, b in (
        ("DDIM against azula's", ours, lambda: azula(x)),
        (
            "order 2 against DPM-Solver++(2M) in the same pipeline",
            lambda: order_2(latents=x, **settings),
            lambda: solver(latents=x, **settings),
        ),
    ):
        figures = paired(a, b, args.repeats, clock=clock_of(args))
        rows.append({"labels": ["sampling"], "sampling": label, **figures})
        report(rows[-1:], None)
    rows[0]["difference"] = difference
    print(f"largest difference of azula's samples to ours: {difference:.1e}")
    if args.json:
        report(rows, args.json)


if __name__ == "__main__":
    main()
