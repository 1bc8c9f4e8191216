"""Statistics of a trained network, once for every sampler: gamma_t and the errors of its estimates.

They go into the scheduler's config under `calibration`, where `reverse_variance="optimal"`,
`variance_type="optimal"` and `timestep_spacing="optimal"` find them. A scheduler of stock diffusers
stays one: it carries them under its private key, and `from_config` of our classes restores them.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ddim_schedulers.plugin import SETTINGS_KEY, STOCK_CLASSES
from ddim_schedulers.training.batches import generator
from ddim_schedulers.training.checkpoints import to_json, write_file
from ddim_schedulers.training.passes import STATISTICS, Pass, Team, run_pass
from ddim_schedulers.training.subject import Subject

CONFIG_NAME = "scheduler_config.json"


@dataclass(frozen=True)
class Calibration:
    """Statistics of every timestep, lists of T numbers, and how they were got.

    Attributes:
        gamma: E||eps_theta||^2 / d (Analytic-DPM, arXiv:2201.06503, Eq. 8).
        eps_error: E||eps - eps_theta||^2 / d.
        x0_error: E||x_0 - x0_hat||^2 / d, x0_hat clipped as `clip` says.
        gamma_std_error: standard error of `gamma`, over the images.
        eps_error_std_error: of `eps_error`.
        x0_error_std_error: of `x0_error`.
        num_images: M.
        clip: limit of |x0_hat|, None for none.
        seed: of the noise and of the choice of images.
    """

    gamma: list[float]
    eps_error: list[float]
    x0_error: list[float]
    gamma_std_error: list[float]
    eps_error_std_error: list[float]
    x0_error_std_error: list[float]
    num_images: int
    clip: float | None
    seed: int


def calibration_of(result: Pass, clip: float | None, seed: int) -> Calibration:
    """Means and standard errors of a pass over all timesteps, with two images or more."""
    n = result.statistics.shape[1]
    means = result.statistics.mean(1)
    errors = result.statistics.std(1) / math.sqrt(n)
    values = {name: _short(means[i]) for i, name in enumerate(STATISTICS)}
    spread = {f"{name}_std_error": _short(errors[i]) for i, name in enumerate(STATISTICS)}
    return Calibration(**values, **spread, num_images=n, clip=clip, seed=seed)


def _short(values: torch.Tensor) -> list[float]:
    """Nine digits: more would only make the config longer."""
    return [float(f"{value:.9g}") for value in values.tolist()]


def choose_images(count: int, num_images: int, seed: int) -> list[int]:
    """`num_images` of `count` positions, without repetition, increasing.

    Raises:
        ValueError: if there are fewer, or if it is below 2, which leaves no standard error.
    """
    if not 2 <= num_images <= count:
        raise ValueError(f"num_images is {num_images}; it must be 2 to {count}, what the data hold")
    order = torch.randperm(count, generator=generator(seed, "images"))
    return sorted(order[:num_images].tolist())


def calibrate(
    subject: Subject,
    images: torch.Tensor,
    *,
    clip: float | None,
    seed: int = 0,
    batch_size: int = 64,
    work_dir: Path,
    team: Team | None = None,
    progress: Any = None,
) -> tuple[Calibration, dict[str, Any]]:
    """Estimate the statistics from `images`, (M, C, H, W), with T network calls for each.

    Returns:
        The statistics, and the cost: `network_calls` (in batches), `seconds`, `processes`.

    Raises:
        ValueError: as `run_pass`.
    """
    begun = time.perf_counter()
    result = run_pass(
        subject,
        images,
        range(len(subject.alpha_bar)),
        clip=clip,
        seed=seed,
        batch_size=batch_size,
        work_dir=work_dir,
        team=team,
        progress=progress,
    )
    cost = {
        "network_calls": result.calls,
        "seconds": time.perf_counter() - begun,
        "processes": 1 if team is None else team.count,
    }
    return calibration_of(result, clip, seed), cost


def save_calibration(calibration: Calibration, config_file: Path) -> None:
    """Put the statistics into a scheduler's config file, atomically; everything else stays.

    Raises:
        ValueError: if the file is not the config of a scheduler.
    """
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{config_file} is not a scheduler's config: {error}") from error
    if not isinstance(config, dict) or "_class_name" not in config:
        raise ValueError(f"{config_file} is not a scheduler's config: it has no _class_name")
    if config["_class_name"] in STOCK_CLASSES:
        config["calibration"] = asdict(calibration)
    else:
        record = config.setdefault(
            SETTINGS_KEY, {"class": "GeneralizedDDIMScheduler", "settings": {}, "stand_ins": {}}
        )
        record["settings"]["calibration"] = asdict(calibration)
    temporary = config_file.with_name(f".{config_file.name}.tmp")
    write_file(temporary, to_json(config))
    temporary.replace(config_file)


def summary(calibration: Calibration, timesteps: Sequence[int]) -> list[str]:
    """Lines of a table: statistics and standard errors at some timesteps."""
    lines = [f"{'t':>6} {'gamma':>20} {'eps_error':>20} {'x0_error':>20}"]
    for t in timesteps:
        cells = []
        for name in STATISTICS:
            value, error = (
                getattr(calibration, name)[t],
                getattr(calibration, f"{name}_std_error")[t],
            )
            cells.append(f"{value:.5f} +- {error:.5f}")
        lines.append(f"{t:>6} " + " ".join(f"{cell:>20}" for cell in cells))
    return lines
