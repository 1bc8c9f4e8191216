"""Costs and figures of the likelihood, as docs/likelihood.md reports them.

python tests/benchmarks/bench_likelihood.py planning
python tests/benchmarks/bench_likelihood.py calls
python tests/benchmarks/bench_likelihood.py estimators --pipeline PATH --data digits --part held_out
python tests/benchmarks/bench_likelihood.py sampling --pipeline PATH --data digits --num_images 500
"""

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch
from bench_sampling import bare, network
from diffusers import DDIMScheduler
from pairing import paired, report

from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler
from ddim_schedulers.likelihood import default_proposal, draw_steps, make_chain
from ddim_schedulers.optimal import statistics_of
from ddim_schedulers.optimal import step_kl as nats


def planning():
    """Seconds of dynamic programming over T and S, first call and remembered."""
    print("| T | S | first call, s | again, ms |\n|---|---|---|---|")
    for big_t in (250, 500, 1000, 2000, 4000):
        base = MarkovianDDPMScheduler(num_train_timesteps=big_t)
        a = base.alpha_bar
        gamma = sum(0.5 * (1 - a) / (a * c + 1 - a) for c in (1.0, 0.001))
        scheduler = MarkovianDDPMScheduler(
            num_train_timesteps=big_t,
            variance_type="optimal",
            timestep_spacing="optimal",
            calibration={"gamma": gamma.tolist()},
        )
        for steps in (10, 100, 1000) if big_t == 1000 else (10,):
            seconds = []
            for _ in range(2):
                begun = time.perf_counter()
                scheduler.set_timesteps(steps)
                seconds.append(time.perf_counter() - begun)
            print(f"| {big_t} | {steps} | {seconds[0]:.2f} | {seconds[1] * 1e3:.1f} |")


def runs():
    """Returns a calibration, a likelihood and their bare network calls, by name."""
    from ddim_schedulers.training.likelihood.calibration import calibrate
    from ddim_schedulers.training.likelihood.measured_model import measured_model_of
    from ddim_schedulers.training.likelihood.table import LikelihoodSettings, evaluate

    big_t, batch = 20, 16
    unet = network(None)
    measured_model = measured_model_of(unet, dict(DDIMScheduler(num_train_timesteps=big_t).config))
    images = torch.randint(0, 256, (batch, 1, 32, 32)) / 127.5 - 1
    settings = LikelihoodSettings(steps=(5, 10, big_t), batch_size=batch)

    def in_new_folder(run):
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder) / "parts")

    def calibration(work):
        calibrate(measured_model, images, clip=1.0, batch_size=batch, work_dir=work)

    def likelihood(work):
        evaluate(measured_model, images, settings, work)

    return {
        "calibration": lambda: in_new_folder(calibration),
        "likelihood": lambda: in_new_folder(likelihood),
        "bare": lambda: bare(unet, images, torch.arange(big_t)),
    }


def calls(args):
    """Time of a calibration and of a likelihood against their bare network calls."""
    found, rows = runs(), []
    for name in ("calibration", "likelihood"):
        rows.append({"of": name, "labels": ["of"], **paired(found[name], found["bare"], repeats=9)})
    report(rows, args.json)


def estimators(args):
    """Spread of the estimators of the sum over t at several numbers of network calls.

    The terms of every image are measured once at all t; what is left to chance is the draw of t.
    """
    from ddim_schedulers.training.likelihood.calibration import choose_images
    from ddim_schedulers.training.likelihood.error_sweep import run_error_sweep
    from ddim_schedulers.training.likelihood.measured_data import load_measured_data
    from ddim_schedulers.training.likelihood.measured_model import load_measured_model

    measured_model = load_measured_model(args.pipeline)
    data = load_measured_data(args, measured_model)
    images = data.batch(choose_images(len(data), args.num_images, args.seed))[0]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(args.work_dir) if args.work_dir else Path(folder) / "parts"
        big_t = len(measured_model.alpha_bar)
        result = run_error_sweep(
            measured_model,
            images,
            range(big_t),
            clip=measured_model.clip,
            seed=args.seed,
            batch_size=args.batch_size,
            work_dir=work,
        )
    chain = make_chain(measured_model.alpha_bar, list(range(big_t - 1, -1, -1)), "fixed_large")
    error = result.statistics[2].flip(1)
    terms = nats(
        chain.posterior_variance[:-1], chain.variance[:-1], chain.weight[:-1], error[:, :-1]
    ) / math.log(2)
    known = statistics_of(measured_model.calibration, measured_model.alpha_bar).x0_error.flip(0)
    proposal = default_proposal(chain, known)
    print(f"{len(images)} images; std of one image's estimate in bits/dim, over 1000 draws of t")
    print("| calls | uniform | stratified | importance |\n|---|---|---|---|")
    for calls in (16, 64, 256):
        cells = []
        for name in ("uniform", "stratified", "importance"):
            generator = torch.Generator().manual_seed(0)
            index, weight = draw_steps(name, calls - 1, big_t - 1, 1000, proposal, generator)
            spread = torch.stack([(row[index] * weight).sum(1).std() for row in terms])
            cells.append(float((spread**2).mean().sqrt()))
        print(f"| {calls} | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |")


def frechet(first, second):
    """Distance of two samples (N, d) as Gaussians, with sqrtm by eigenvalues."""
    means, covariances = [], []
    for x in (first.double(), second.double()):
        means.append(x.mean(0))
        covariances.append(torch.cov(x.T))
    values = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0)
    trace = covariances[0].trace() + covariances[1].trace() - 2 * values.sqrt().sum()
    return float((means[0] - means[1]).square().sum() + trace)


def sampling(args):
    """Pixel Frechet distance with the member's own noise and with the optimal one."""
    from ddim_schedulers.pipelines import GenerationPipeline
    from ddim_schedulers.training.likelihood.measured_data import load_measured_data
    from ddim_schedulers.training.likelihood.measured_model import load_measured_model

    measured_model = load_measured_model(args.pipeline)
    data = load_measured_data(args, measured_model).all().flatten(1)
    half = torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed))
    floor = frechet(data[half[: args.num_images]], data)
    print(f"{args.num_images} samples against {len(data)} images; as many of those: {floor:.3f}")
    print("| tau | eta | noise | " + " | ".join(f"S = {n}" for n in args.steps) + " |")
    print("|---" * (3 + len(args.steps)) + "|")
    kinds = [
        ("trailing", 1.0, "sigma"),
        ("trailing", 1.0, "sigma_hat"),
        ("trailing", 1.0, "optimal"),
        ("trailing", 0.0, "sigma"),
        ("trailing", 0.0, "optimal"),
        ("optimal", 1.0, "optimal"),
        ("optimal", 0.0, "optimal"),
    ]
    for spacing, eta, noise in kinds:
        cells = []
        for steps in args.steps:
            scheduler = GeneralizedDDIMScheduler.from_config(
                measured_model.config, timestep_spacing=spacing, eta=eta, reverse_variance=noise
            )
            pipe = GenerationPipeline(unet=measured_model.unet, scheduler=scheduler)
            pipe.set_progress_bar_config(disable=True)
            images = pipe(
                seeds=list(range(args.num_images)),
                batch_size=args.batch_size,
                num_inference_steps=steps,
                use_clipped_model_output=eta > 0,
                output_type="pt",
            ).images
            cells.append(frechet(images.flatten(1) * 2 - 1, data))
        print(
            f"| {spacing} | {eta:g} | {noise} | " + " | ".join(f"{c:.3f}" for c in cells) + " |",
            flush=True,
        )


def main():
    from ddim_schedulers.training.likelihood.measured_data import add_data_arguments

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("planning")
    verbs.add_parser("calls").add_argument("--json", type=Path, help="write the figures here too")
    for name in ("estimators", "sampling"):
        verb = verbs.add_parser(name)
        verb.add_argument("--pipeline", required=True)
        add_data_arguments(verb)
        verb.add_argument("--num_images", type=int, default=64)
        verb.add_argument("--batch_size", type=int, default=64)
        verb.add_argument("--seed", type=int, default=0)
        verb.add_argument("--work_dir")
        verb.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50])
    args = parser.parse_args()
    torch.set_num_threads(1)
    planning() if args.verb == "planning" else globals()[args.verb](args)


if __name__ == "__main__":
    main()
