"""Does a config keep its process when it is read as one of ours?

    python tests/proofs/scheduler_configs.py

Takes every scheduler class of the installed diffusers at its defaults, and every config of
`tests/scheduler_vintages.py`, and compares with the class that the config names: alpha_bar, the
timesteps of 10 steps, and a loop of 10 steps with the perfect network for Gaussian data, whose
answer is known. A row says

- alpha_bar: the largest difference; 1e-6 is allowed, stock keeps float32;
- timesteps: the largest difference, or by which rule of `docs/swap.md` they are not stock's;
- loop: the largest difference of the samples; 1e-4 is allowed where the class takes DDIM's or
  DDPM's step. Where it is more, the loop is run again with float64 tables in the stock scheduler:
  what remains must be below 1e-5, the rest is rounding of stock's float32. For another solver (and
  DDIM on `linspace`, where stock steps to the wrong neighbour), how far each is from the exact
  solution of the ODE in the root mean square; 0.25 is allowed for ours, the standard deviation of
  the data: ten steps of first order are no more exact.

or the reason of the refusal. It ends with 1 if a row is worse.
"""

import inspect
import sys
import warnings
from pathlib import Path

import diffusers
import numpy as np
import torch

from ddim_schedulers import (
    GeneralizedDDIMInverseScheduler,
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
)
from ddim_schedulers.betas import alpha_bar_before

sys.path.insert(0, str(Path(__file__).parents[1]))
from scheduler_vintages import CONFIGS as VINTAGES  # noqa: E402
from scheduler_vintages import REFUSED, SOLVERS, config_of, stock_of  # noqa: E402

MEAN, STD, STEPS = 0.1, 0.25, 10
CLASSES = (GeneralizedDDIMScheduler, MarkovianDDPMScheduler, GeneralizedDDIMInverseScheduler)
DDPM_LIKE = ("DDPMScheduler", "DDPMParallelScheduler", "UnCLIPScheduler")
DDIM_LIKE = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler")


def network(x, alpha_bar, prediction, learned):
    """Returns the perfect prediction for data N(MEAN, STD^2), twice the channels if asked."""
    a, b = alpha_bar, 1 - alpha_bar
    centred = (x - a**0.5 * MEAN) / (a * STD**2 + b)
    x0, eps = MEAN + STD**2 * a**0.5 * centred, b**0.5 * centred
    found = {"epsilon": eps, "sample": x0, "v_prediction": a**0.5 * eps - b**0.5 * x0}[prediction]
    return torch.cat([found, torch.zeros_like(found)], dim=1) if learned else found


def sampled(scheduler, alpha_bar, start, learned):
    """Returns the samples of STEPS steps; the noise of both sides has one seed."""
    generator = torch.Generator().manual_seed(1)
    names = inspect.signature(scheduler.step).parameters
    arguments = {"generator": generator} if "generator" in names else {}
    prediction = scheduler.config.get("prediction_type", "epsilon")
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt().numpy()
    x = start * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        # between two timesteps: as Euler's scheduler, linear in sigma
        sigma = np.interp(float(t), np.arange(len(sigmas)), sigmas)
        scale = getattr(scheduler, "scale_model_input", lambda sample, _: sample)
        if "prev_timestep" in names:  # as UnCLIP's pipeline calls it
            later = [s for s in scheduler.timesteps.tolist() if s < int(t)]
            arguments["prev_timestep"] = later[0] if later else None
        m = network(scale(x, t), float(1 / (1 + sigma**2)), prediction, learned)
        x = scheduler.step(m, t, x, **arguments).prev_sample
    return x


def solution(start, alpha_bar_t):
    """Returns where the ODE takes `start`: for Gaussian data the standard score is constant."""
    spread = (alpha_bar_t * STD**2 + 1 - alpha_bar_t) ** 0.5
    return MEAN + STD * (start - alpha_bar_t**0.5 * MEAN) / spread


def compared(stock, config):
    """Returns the columns of a row, and whether all is well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = {cls: cls.from_config(config) for cls in CLASSES}
    want = stock.alphas_cumprod.double()
    apart = max(float((s.alpha_bar - want).abs().max()) for s in ours.values())
    name = type(stock).__name__
    cls = MarkovianDDPMScheduler if name in DDPM_LIKE else GeneralizedDDIMScheduler
    if "Inverse" in name:
        cls = GeneralizedDDIMInverseScheduler
    other = ours[cls]
    if name == "RePaintScheduler":
        return (f"{apart:.1e}", "jumps", "needs an image and a mask"), apart < 1e-6
    stock.set_timesteps(STEPS)
    other.set_timesteps(STEPS)
    told, asked = stock.timesteps.double(), other.timesteps.double()
    one_by_one = len(told) == len(asked)
    distance = f"{(told - asked).abs().max():.0f}" if one_by_one else f"{len(told)} calls"
    well = apart < 1e-6 and (name in SOLVERS or distance == "0")
    alpha_bar = ours[GeneralizedDDIMScheduler].alpha_bar.float()
    exact_start = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    learned = stock.config.get("variance_type") in ("learned", "learned_range")
    if name in ("CogVideoXDPMScheduler",) or name.endswith(("InverseScheduler", "SDEScheduler")):
        return (f"{apart:.1e}", distance, "step has other arguments"), well
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        here = sampled(other, alpha_bar, exact_start, learned and cls is MarkovianDDPMScheduler)
        there = sampled(stock, alpha_bar, exact_start, learned)
    wrong_neighbour = name in DDIM_LIKE and stock.config.timestep_spacing == "linspace"
    if name in (*DDPM_LIKE, *DDIM_LIKE) and not wrong_neighbour:
        error = float((here - there).abs().max())
        column = f"{error:.1e}"
        if error >= 1e-4:
            exact = ours[GeneralizedDDIMScheduler].alpha_bar
            stock.alphas_cumprod, stock.alphas = exact, exact / alpha_bar_before(exact)
            stock.betas = 1 - stock.alphas
            pair = [sampled(s, exact, exact_start, learned) for s in (other, stock)]
            error = float((pair[0] - pair[1]).abs().max())
            column += f", in float64 {error:.1e}"
            well = well and error < 1e-5
        return (f"{apart:.1e}", distance, column), well and error < 1e-4
    start = float(other.alpha_bar[other.timesteps[0]])
    exact = solution(exact_start, start)
    errors = [float((x - exact).square().mean().sqrt()) for x in (there, here)]
    column = f"stock {errors[0]:.3f}, ours {errors[1]:.3f}"
    return (f"{apart:.1e}", distance, column), well and errors[1] < 0.25


def refused(config):
    """Returns the reason, which must be the same for our three classes."""
    reasons = set()
    for cls in CLASSES:
        try:
            cls.from_config(config)
            return f"NOT REFUSED by {cls.__name__}", False
        except ValueError as error:
            reasons.add(str(error))
    return min(reasons), len(reasons) == 1


def classes():
    """Yields every scheduler of diffusers that can be built from nothing."""
    for name in sorted(n for n in dir(diffusers) if n.endswith("Scheduler")):
        cls = getattr(diffusers, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                stock = cls()
            except TypeError:
                continue  # it needs an argument: tokens, no process of ours
        if hasattr(stock, "config") and hasattr(stock, "step"):
            yield name, stock


def main():
    """Prints the table."""
    bad, rows = [], 0
    print("| config | class | alpha_bar | timesteps | loop of 10 |\n|---|---|---|---|---|")
    cases = [(f"defaults of {n}", s, s.config, hasattr(s, "alphas_cumprod")) for n, s in classes()]
    for name in VINTAGES:
        discrete = name not in REFUSED
        cases.append((name, stock_of(name) if discrete else None, config_of(name), discrete))
    for name, stock, config, discrete in cases:
        rows += 1
        kind = type(stock).__name__ if stock is not None else config["_class_name"]
        if discrete:
            columns, well = compared(stock, config)
            print(f"| {name} | {kind} | {' | '.join(columns)} |")
        else:
            reason, well = refused(config)
            print(f"| {name} | {kind} | refused: {reason} | | |")
        if not well:
            bad.append(name)
    print(f"\n{rows} rows, {len(VINTAGES)} vintages, {len(bad)} worse than allowed", *bad, sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
