"""Does an addition of each kind touch as few files as CONTRIBUTING.md says?

    python tests/proofs/recipes.py

Applies one recorded addition of each kind to a scratch checkout of HEAD, runs what it adds, and
counts the files that it touches: at most three, its docs and tests apart.
"""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST = 3

NOISE = '''class MeanNoise(FixedNoise):
    """The geometric mean of sigma(1) and sigma-hat."""

    reverse_variance = "mean"
    variance_types = ("mean",)

    def std(self, steps: Steps) -> torch.Tensor:
        """Return the root of the product."""
        return (steps.sigma * sigma_hat(steps.alpha_bar_t, steps.alpha_bar_s)).sqrt()


OWN, OPTIMAL ='''

# Of each kind: (file, what is replaced or None for a new file, by what), then what is run.
RECIPES = {
    "noise": (
        [
            ("ddim_schedulers/reverse_noise.py", "OWN, OPTIMAL =", NOISE),
            ("ddim_schedulers/reverse_noise.py", "LargeNoise(),", "LargeNoise(), MeanNoise(),"),
        ],
        """
import torch
from ddim_schedulers import GeneralizedDDIMScheduler, MarkovianDDPMScheduler, to_portable
from ddim_schedulers.likelihood import VARIANCES, make_chain
from ddim_schedulers.bundle import bundle
x, z = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
made = []
for name in ("sigma", "mean", "sigma_hat"):
    ddim = GeneralizedDDIMScheduler(eta=1.0, reverse_variance=name, clip_sample=False)
    ddim.set_timesteps(10)
    t = ddim.timesteps[2]
    noisy, still = (ddim.step(x, t, x, variance_noise=n).prev_sample for n in (z, 0 * z))
    made.append(noisy - still)
torch.testing.assert_close(made[1] ** 2, made[0] * made[2])
ddpm = MarkovianDDPMScheduler(variance_type="mean")
ddpm.step(x, 500, x)
assert "mean" in VARIANCES
chain = make_chain(ddpm.alpha_bar, [999, 500, 0], "mean")
names = ("fixed_small", "fixed_large")
small, large = (make_chain(ddpm.alpha_bar, [999, 500, 0], n) for n in names)
torch.testing.assert_close(chain.variance[:-1] ** 2, (small.variance * large.variance)[:-1])
stock, notes = to_portable(ddpm)
assert stock.config.variance_type == "fixed_small" and "mean" in notes[0], notes
back = MarkovianDDPMScheduler.from_config(stock.config)
assert back.config.variance_type == "mean"
assert "MeanNoise" in bundle("MarkovianDDPMScheduler")[1]
""",
    ),
    "spacing": (
        [
            (
                "ddim_schedulers/timesteps.py",
                '("leading", "trailing", "linspace", "quadratic")',
                '("leading", "trailing", "linspace", "quadratic", "cubic")',
            ),
            (
                "ddim_schedulers/timesteps.py",
                '    elif spacing == "quadratic":\n',
                '    elif spacing == "cubic":\n'
                "        ascending = sorted({int((i / n) ** 3 * big_t) for i in range(n)})\n"
                '    elif spacing == "quadratic":\n',
            ),
        ],
        """
from ddim_schedulers import GeneralizedDDIMScheduler, to_portable
ours = GeneralizedDDIMScheduler(timestep_spacing="cubic")
ours.set_timesteps(4)
assert ours.timesteps.tolist() == [421, 125, 15, 0], ours.timesteps
stock, notes = to_portable(ours)
assert stock.config.timestep_spacing == "leading" and "cubic" in notes[0]
""",
    ),
    "verb": (
        [
            (
                "training/commands/greet.py",
                None,
                '"""`ddim-schedulers greet`."""\n\nimport argparse\n\nHELP = "Greet."\n\n\n'
                "def add_arguments(parser: argparse.ArgumentParser) -> None:\n"
                '    """Add the options."""\n    parser.add_argument("--name", default="you")\n\n\n'
                "def run(args: argparse.Namespace) -> int:\n"
                '    """Greet."""\n    print(f"hello {args.name}")\n    return 0\n',
            ),
            (
                "training/cli.py",
                "VERBS: dict[str, str] = {\n",
                'VERBS: dict[str, str] = {\n    "greet": "Greet.",\n',
            ),
        ],
        """
from ddim_schedulers.training import cli
assert cli.main(["greet", "--name", "me"]) == 0
""",
    ),
    "metric": (
        [
            (
                "training/metrics/distances.py",
                '    "inception_score": Metric(',
                '    "spread": Metric("spread", 0, math.inf, scale=10.0, form=".5f"),\n'
                '    "inception_score": Metric(',
            ),
            (
                "training/metrics/distances.py",
                "def _checked(",
                "def feature_spread(fake: Tensor) -> float:\n"
                '    """Return the mean variance of the features."""\n'
                "    return float(fake.double().var(0).mean())\n\n\n"
                "def _checked(",
            ),
            (
                "training/evaluation/references.py",
                "    frechet_distance,\n",
                "    feature_spread,\n    frechet_distance,\n",
            ),
            (
                "training/evaluation/references.py",
                '            "kernel_std": spread,\n',
                '            "kernel_std": spread,\n            "spread": feature_spread(fake),\n',
            ),
        ],
        """
from types import SimpleNamespace as Made
import torch
from ddim_schedulers.reading import DamagedFileError
from ddim_schedulers.training.evaluation.cell_files import check_cell
from ddim_schedulers.training.evaluation.references import RealImages
from ddim_schedulers.training.evaluation.tables import everything
rows = torch.arange(40.0).reshape(20, 2) ** 0.5
real = Made(
    config=Made(neighbours=2, seed=0),
    features={"pixels": Made(train=rows, fingerprint="x")},
    networks={"pixels": None},
)
real.note = lambda name: RealImages.note(real, name)
found = RealImages.measure(real, "pixels", rows[:10])
own = {"row": "eta 0", "steps": 3, "n": 10, "repeat": 0}
cell = Made(sampler=Made(name="eta 0"), steps=3, n=10, repeat=0)
content = own | {"network_calls": 3, "processes": 1, "settings": ""}
check_cell(content | {"metrics": {"pixels": found}}, cell, "file")
try:
    check_cell(content | {"metrics": {"pixels": found | {"spread": -1.0}}}, cell, "file")
    raise AssertionError("a value out of its limits passes")
except DamagedFileError:
    pass
measured = {"pixels": {k: {"mean": v, "std": None} for k, v in found.items()}}
cell = own | {"repeats": 1, "network_calls": 3, "seconds": 1.0, "images_per_second": 10.0}
table = {"n": 10, "real": {"pixels": found}, "cells": [cell | {"metrics": measured}]}
lines = everything(table, "pixels")
assert "spread x 10" in lines[0] and f"{10 * found['spread']:.5f}" in lines[-1], lines
""",
    ),
    "config key": (
        [
            (
                "training/config.py",
                '    beta_start: float = option(1e-4, "first beta")\n',
                '    beta_start: float = option(1e-4, "first beta")\n'
                '    loss_scale: float = option(1.0, "factor of the loss")\n',
            ),
            (
                "training/objectives/losses.py",
                "    return torch.ones_like(alpha_bar)\n",
                "    return config.loss_scale * torch.ones_like(alpha_bar)\n",
            ),
        ],
        """
from ddim_schedulers.training.objectives.losses import make_objective
from ddim_schedulers.training.parsing import parse_args
config, _ = parse_args(["--data", "digits", "--output_dir", "x", "--loss_scale", "2"])
assert float(make_objective(config, 256).rows[3, 4]) == 2
""",
    ),
}


def main():
    """Applies, runs and counts; returns 1 if an addition fails or touches more."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", "HEAD"], check=True, capture_output=True
    ).stdout
    failed = []
    for kind, (edits, program) in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                tar.extractall(folder, filter="data")
            for name, old, new in edits:
                file = Path(folder, name)
                if old is None:
                    file.write_text(new)
                    continue
                text = file.read_text()
                assert text.count(old) == 1, f"{name} has {text.count(old)} times {old!r}"
                file.write_text(text.replace(old, new))
            done = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    "import ddim_schedulers; print(ddim_schedulers.__file__)" + program,
                ],
                env={**os.environ, "PYTHONPATH": folder},
                cwd=tempfile.gettempdir(),
                capture_output=True,
                text=True,
            )
        touched = sorted({name for name, _, _ in edits})
        ran = done.returncode == 0 and done.stdout.startswith(folder)
        print(f"{kind}: {len(touched)} files, {'runs' if ran else 'FAILS'}: {', '.join(touched)}")
        if not ran or len(touched) > MOST:
            print(done.stderr[-2000:])
            failed.append(kind)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
