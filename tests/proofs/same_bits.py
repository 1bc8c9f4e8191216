"""Do the schedulers give, to the bit, what an earlier revision of this repository gave?

    python tests/proofs/same_bits.py --before REVISION

Takes `ddim_schedulers/` and `pipelines/` of that revision out of git and runs the same steps
through it and through the one that is installed, each in a process of its own: beta schedules x
predictions x clipping x trajectories x eta x `use_clipped_model_output`, and the Markovian and
inverse classes beside them; then every noise by its name, in float32 and float64, planned
trajectories, and the bound; and what `InversionPipeline` encodes and decodes.
The first release is 6a8ee76; order 1 of the multistep solver must be equal to it.
"""

import argparse
import functools
import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMITS = (
    {"clip_sample": True},
    {"clip_sample": False},
    {"clip_sample": False, "thresholding": True, "sample_max_value": 1.5},
)
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
PLANS = (("leading", 10), ("leading", 30), ("trailing", 7), ("linspace", 1000), ("quadratic", 9))


def digests():
    """Returns a hash of the outputs of every cell, by its name."""
    import torch

    from ddim_schedulers import (
        GeneralizedDDIMInverseScheduler,
        GeneralizedDDIMScheduler,
        MarkovianDDPMScheduler,
    )

    torch.set_num_threads(1)
    x, m, z = torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = {}
    for schedule, kind, limit, (spacing, n) in itertools.product(
        SCHEDULES, PREDICTIONS, LIMITS, PLANS
    ):
        settings = dict(beta_schedule=schedule, prediction_type=kind, timestep_spacing=spacing)
        runs = [(GeneralizedDDIMScheduler, limit, o) for o in options(z)]
        runs.append((MarkovianDDPMScheduler, limit, {"variance_noise": z}))
        if "thresholding" not in limit:
            runs.append((GeneralizedDDIMInverseScheduler, limit, {}))
        for cls, more, arguments in runs:
            scheduler = cls(**settings, **more)
            scheduler.set_timesteps(n)
            hashed = hashlib.sha256()
            for t in scheduler.timesteps[:: max(1, n // 5)]:
                output = scheduler.step(m, t, x, **arguments)
                hashed.update(output.prev_sample.numpy().tobytes())
                hashed.update(output.pred_original_sample.numpy().tobytes())
            told = {k: v for k, v in arguments.items() if k != "variance_noise"}
            found[f"{cls.__name__} {settings} {more} {n} {told}"] = hashed.hexdigest()
    return {**found, **noises(x, m, z), **plans(x, m, z), **bounds(x, m, z), **encodings(x)}


def hash_of(*tensors):
    """Returns a hash of the bits of tensors."""
    hashed = hashlib.sha256()
    for each in tensors:
        hashed.update(each.detach().numpy().tobytes())
    return hashed.hexdigest()


def calibration():
    """Returns statistics of a network of T = 1000 that are near those of data of variance 1/4."""
    import torch

    from ddim_schedulers import trajectory
    from ddim_schedulers.betas import alpha_bar_from_betas, make_betas

    a = alpha_bar_from_betas(make_betas())
    fine = list(range(999, -1, -37))
    drawn = torch.randn(
        len(fine), 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    former = "trajectory_record"  # of revisions that have no `pack_trajectory`
    pack = getattr(trajectory, "pack_trajectory", None) or getattr(trajectory, former)
    measured = pack(fine, drawn @ drawn.T / 3)
    return {"gamma": ((1 - a) / (0.25 * a + 1 - a)).tolist(), "trajectory": measured}


def noises(x, m, z):
    """Returns a hash of the steps of every noise, by its name."""
    import torch

    from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler

    measured, found = calibration(), {}
    named = [("reverse_variance", n) for n in ("sigma", "sigma_hat", "learned_range", "optimal")]
    logs = ("fixed_small_log", "fixed_large_log")
    named += [("variance_type", n) for n in ("fixed_small", *logs, "fixed_large", "optimal")]
    named += [("variance_type", n) for n in ("learned", "learned_range")]
    whole = torch.arange(1000)
    for (key, name), limit, dtype, n in itertools.product(
        named, LIMITS, (torch.float32, torch.float64), (7, 1000)
    ):
        cls, more = MarkovianDDPMScheduler, {}
        if key == "reverse_variance":
            cls, more = GeneralizedDDIMScheduler, {"eta": 1.0}
        scheduler = cls(
            calibration=measured, timestep_spacing="linspace", **{key: name}, **limit, **more
        )
        scheduler.set_timesteps(n)
        output = torch.cat([m, z.abs().clamp(max=1)], dim=1) if "learned" in name else m
        outputs = []
        for t in scheduler.timesteps[:: max(1, n // 7)]:
            made = scheduler.step(output.to(dtype), t, x.to(dtype), variance_noise=z.to(dtype))
            outputs += [made.prev_sample, made.pred_original_sample]
        made = scheduler.step(
            output.to(dtype), scheduler.timesteps[-1], x.to(dtype), variance_noise=z.to(dtype)
        )
        outputs.append(made.prev_sample)
        if key == "variance_type" and hasattr(scheduler, "_get_variance"):  # not from the first on
            raw = z.mean(dim=(1, 2, 3)).repeat(250) if "learned" in name else None
            variance = scheduler._get_variance(whole, raw)
            found[f"_get_variance {name} {limit} {dtype} {n}"] = hash_of(variance)
        found[f"{key} {name} {limit} {dtype} {n}"] = hash_of(*outputs)
    return found


def plans(x, m, z):
    """Returns a hash of planned trajectories and of steps of higher order along them."""
    from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler

    measured, found = calibration(), {}
    for spacing, n in itertools.product(("optimal", "calibrated", "trailing"), (2, 5, 13)):
        for order, form in ((1, "sample"), (2, "sample"), (3, "epsilon")):
            solver = {"solver_order": order, "solver_form": form, "solver_corrector": order == 2}
            planned = {"timestep_spacing": spacing, "calibration": measured}
            scheduler = GeneralizedDDIMScheduler(**planned, **solver)
            scheduler.set_timesteps(n)
            sample = x
            for t in scheduler.timesteps:
                sample = scheduler.step(m, t, sample, eta=0.3, variance_noise=z).prev_sample
            found[f"{spacing} {n} {order} {form}"] = hash_of(scheduler.timesteps, sample)
        markovian = MarkovianDDPMScheduler(timestep_spacing=spacing, calibration=measured)
        markovian.set_timesteps(n)
        found[f"markovian {spacing} {n}"] = hash_of(markovian.timesteps)
    return found


def bounds(x, m, z):
    """Returns a hash of the terms of the likelihood bound for every variance."""
    import torch

    from ddim_schedulers import likelihood
    from ddim_schedulers.betas import alpha_bar_from_betas, make_betas

    a, found = alpha_bar_from_betas(make_betas()), {}
    gamma = torch.tensor(calibration()["gamma"], dtype=torch.float64)
    grid = ((x.clamp(-1, 1) + 1) * 8).round() / 8 - 1
    make_chain = getattr(likelihood, "make_chain", None) or likelihood.make_plan  # its former name
    for variance, tau in itertools.product(
        ("fixed_small", "fixed_large", "learned_range", "optimal"),
        ([999, 500, 30, 0], [70, 0], [0]),
    ):
        chain = make_chain(a, tau, variance, gamma=gamma)
        raw = [m, z.clamp(-1, 1)] if variance == "learned_range" else [m]
        network = functools.partial(lambda output, x_t, t: output, torch.cat(raw, dim=1))
        terms = likelihood.variational_bound(network, grid, chain, num_bins=17, noise=z)
        parts = (terms.prior, terms.value, terms.decoder, terms.x0_error)
        found[f"bound {variance} {tau}"] = hash_of(*parts, chain.weight, chain.variance)
    return found


def encodings(x):
    """Returns a hash of what inversion finds, and of what its latents decode to."""
    import torch
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.models.unets.unet_2d import UNet2DOutput

    from ddim_schedulers import GeneralizedDDIMScheduler
    from ddim_schedulers.pipelines import InversionPipeline

    class Bent(ModelMixin, ConfigMixin):
        """Steeper than what refinement can follow at ten steps."""

        @register_to_config
        def __init__(self, sample_size=8, in_channels=3, out_channels=3):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, timestep):
            return UNet2DOutput(sample=0.6 * x + torch.sin(2 * x.roll(1, dims=-1)) / 2)

    found = {}
    for kind, spacing, end in itertools.product(
        PREDICTIONS, ("leading", "trailing"), (True, False)
    ):
        scheduler = GeneralizedDDIMScheduler(
            prediction_type=kind, timestep_spacing=spacing, set_alpha_to_one=end
        )
        pipe = InversionPipeline(unet=Bent(), scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        for n, refinements, size in ((10, 0, 4), (10, 5, 3), (50, 3, 4), (7, 30, 1)):
            plan = {"num_inference_steps": n, "batch_size": size}
            made = pipe.encode(x / 3, refinements=refinements, tolerance=1e-3, **plan)
            outputs = [made.latents, pipe.decode(made.latents, output_type="latent", **plan)]
            outputs += [] if made.residual is None else [made.residual]
            name = f"encoding {kind} {spacing} {end} {n} {refinements} {made.converged}"
            found[name] = hash_of(*outputs)
    return found


def options(noise):
    """Returns the arguments of `step` that are tried for each setting."""
    for eta, rederive in itertools.product((0.0, 0.5, 1.0), (False, True)):
        yield {"eta": eta, "use_clipped_model_output": rederive, "variance_noise": noise}


def run(folder):
    """Returns the digests of the package in `folder`, or of the installed one."""
    environment = dict(os.environ)
    if folder is not None:
        environment["PYTHONPATH"] = str(folder)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--digests"],
        env=environment,
        cwd=tempfile.gettempdir(),
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


def main():
    """Compares, or prints the digests of this process's package."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--before", help="a git revision")
    options.add_argument("--digests", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.digests:
        found = digests()
        print(json.dumps({"from": sys.modules["ddim_schedulers"].__file__, **found}))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        command = ["git", "-C", str(ROOT), "archive", args.before, "ddim_schedulers", "pipelines"]
        archive = subprocess.run(command, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        # where no mapping of the installed package stands in between
        (Path(folder) / "pipelines").rename(Path(folder) / "ddim_schedulers" / "pipelines")
        before, now = run(folder), run(None)
    places = before.pop("from"), now.pop("from")
    assert places[0] != places[1], places
    differing = [name for name in before if before[name] != now[name]]
    print(f"{len(before)} cells, {len(differing)} differ", *differing, sep="\n")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
