"""What a sampler alone does to the distribution, in closed form: no network, no scatter.

    python tests/proofs/gaussian_presets.py --data IMAGES.npz

For Gaussian data with the mean and covariance of `IMAGES.npz` (uint8 `images`, N, H, W) the best
network is known and linear, so that x_0 is a sum of responses to x_T and to each noise. The Frechet
distance of the samples to the data is then exact: the sum over the principal axes of (sqrt(v') -
sqrt(v))^2, v the variance of the data and v' of the samples. The mean is exact at every order.
The end-point error is that of the deterministic rows: the mean squared error of x_0, per pixel.

Rows with noise answer whether the noise itself costs accuracy; what it repairs of a network's
errors shows in `solver_presets.py` alone.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from solver_presets import CALLS, OURS, ROWS

from ddim_schedulers import GeneralizedDDIMScheduler


def spectrum(path: Path) -> torch.Tensor:
    """Return the variances along the principal axes of the images in [-1, 1], float64 (d,)."""
    with np.load(path) as file:
        flat = file["images"].reshape(len(file["images"]), -1).astype(np.float64) / 127.5
    values = np.linalg.eigvalsh(np.cov(flat, rowvar=False))
    return torch.from_numpy(values.clip(min=0))


def measure(settings: dict, variances: torch.Tensor, calls: int) -> tuple[float, float]:
    """Return the Frechet distance, and the end-point error where there is no noise."""
    scheduler = GeneralizedDDIMScheduler(**{**settings, "clip_sample": False})
    scheduler.set_timesteps(calls)
    alpha_bar = scheduler.alpha_bar
    x = torch.zeros(calls + 1, len(variances), dtype=torch.float64)  # responses to x_T and noises
    x[0] = 1.0
    for i, t in enumerate(scheduler.timesteps.tolist()):
        a = alpha_bar[t]
        spread = a * variances + 1 - a
        eps = (1 - a).sqrt() / spread * x
        z = torch.zeros_like(x)
        z[i + 1] = 1.0
        x = scheduler.step(eps, t, x, variance_noise=z).prev_sample
    first = alpha_bar[scheduler.timesteps[0]]
    exact = (variances / (first * variances + 1 - first)).sqrt()  # the flow from x_T
    distance = float((x.square().sum(0).sqrt() - variances.sqrt()).square().sum())
    return distance, float((x[0] - exact).square().mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    variances = spectrum(arguments.data)
    print(f"| Frechet distance (end-point error) | {' | '.join(map(str, CALLS))} |")
    print("|---" * (len(CALLS) + 1) + "|")
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for name, (kind, settings, noisy) in ROWS.items():
        if kind != OURS:
            continue
        found[name] = {calls: measure(settings, variances, calls) for calls in CALLS}
        texts = [f"{d:.3g}" + ("" if noisy else f" ({e:.2g})") for d, e in found[name].values()]
        print(f"| {name} | {' | '.join(texts)} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
