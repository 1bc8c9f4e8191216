"""Do the schedulers give, to the bit, what an earlier revision of this repository gave?

    python tests/proofs/same_bits.py --before REVISION

Takes `ddim_schedulers/` of that revision out of git and runs the same steps through it and through
the one that is installed, each in a process of its own: beta schedules x predictions x clipping x
trajectories x eta x `use_clipped_model_output`, and the Markovian and inverse classes beside them.
The first release is 6a8ee76; order 1 of the multistep solver must be equal to it.
"""

import argparse
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
        command = ["git", "-C", str(ROOT), "archive", args.before, "ddim_schedulers"]
        archive = subprocess.run(command, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        before, now = run(folder), run(None)
    places = before.pop("from"), now.pop("from")
    assert places[0] != places[1], places
    differing = [name for name in before if before[name] != now[name]]
    print(f"{len(before)} cells, {len(differing)} differ", *differing, sep="\n")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
