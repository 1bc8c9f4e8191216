"""Statistics of a trained network, once for every sampler: gamma_t and the errors of its estimates.

They go into the scheduler's config under `calibration`, where `reverse_variance="optimal"`,
`variance_type="optimal"` and `timestep_spacing="optimal"` find them. A scheduler of stock diffusers
stays one: it carries them under its private key, and `from_config` of our classes restores them.
"""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.parameterization import eps_from
from ddim_schedulers.pipelines.base import check_batch_size
from ddim_schedulers.pipelines.files import write_bytes
from ddim_schedulers.plugin import SETTINGS_KEY, STOCK_CLASSES
from ddim_schedulers.reading import read_json
from ddim_schedulers.timesteps import make_timesteps
from ddim_schedulers.training.common.processes import Team
from ddim_schedulers.training.common.seeds import generator
from ddim_schedulers.training.common.storage import to_json
from ddim_schedulers.training.likelihood.error_sweep import STATISTICS, ErrorSweep, run_error_sweep
from ddim_schedulers.training.likelihood.measured_model import MeasuredModel, measured_model_of
from ddim_schedulers.trajectory import MAX_FINE_STEPS, pack_trajectory

CONFIG_NAME = "scheduler_config.json"
# Not `.json`: such a file is no part of the pipeline, and is not pushed.
KEPT = ".bak"


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


def calibration_of(result: ErrorSweep, clip: float | None, seed: int) -> Calibration:
    """Return means and standard errors of a pass over all timesteps, with two images or more."""
    n = result.statistics.shape[1]
    means = result.statistics.mean(1)
    errors = result.statistics.std(1) / math.sqrt(n)
    values = {name: _short(means[i]) for i, name in enumerate(STATISTICS)}
    spread = {f"{name}_std_error": _short(errors[i]) for i, name in enumerate(STATISTICS)}
    return Calibration(**values, **spread, num_images=n, clip=clip, seed=seed)


def _short(values: torch.Tensor) -> list[float]:
    """Round to nine digits: more would only make the config longer."""
    return [float(f"{value:.9g}") for value in values.tolist()]


def choose_images(count: int, num_images: int, seed: int) -> list[int]:
    """Choose `num_images` of `count` positions, without repetition, increasing.

    Raises:
        ValueError: if there are fewer, or if it is below 2, which leaves no standard error.
    """
    if not 2 <= num_images <= count:
        raise ValueError(
            f"`num_images` is {num_images}; it must be 2 to {count}, what the data hold"
        )
    order = torch.randperm(count, generator=generator(seed, "images"))
    return sorted(order[:num_images].tolist())


def calibrate(
    measured_model: MeasuredModel,
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
        ValueError: as `run_error_sweep`.
    """
    begun = time.perf_counter()
    result = run_error_sweep(
        measured_model,
        images,
        range(len(measured_model.alpha_bar)),
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


def measure_trajectory(
    measured_model: MeasuredModel,
    *,
    num_samples: int = 48,
    steps: int = 100,
    seed: int = 0,
    batch_size: int = 64,
    progress: Any = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Follow fine trajectories from noise, for `timestep_spacing="calibrated"`.

    The probability-flow ODE is solved at order 2 on `steps` evenly spaced timesteps from T - 1 to
    0, without clipping, and the inner products of the network's eps are averaged over samples and
    dimensions (see `ddim_schedulers.trajectory`).

    Returns:
        The value of `calibration`, and the cost: `network_calls` (in batches) and `seconds`.

    Raises:
        ValueError: for a count out of range, or a chain that starts at alpha_bar = 0.
    """
    big_t = len(measured_model.alpha_bar)
    most = min(MAX_FINE_STEPS, big_t)
    if not 2 <= steps <= most:
        raise ValueError(f"`trajectory_steps` is {steps}; it must be 2 to {most}")
    if num_samples < 1:
        raise ValueError(f"`num_images` is {num_samples}; it must be at least 1")
    if float(measured_model.alpha_bar[-1]) == 0:
        raise ValueError(
            "`objective` is 'trajectory', but the chain has zero terminal SNR, where the "
            "trajectory starts at an infinite rho; use timestep_spacing='trailing'"
        )
    check_batch_size(batch_size)
    begun = time.perf_counter()
    planned = make_timesteps("linspace", steps, big_t)
    # the member, the noise and the solver of sampling, which the config may hold, are not the ODE's
    scheduler = GeneralizedDDIMScheduler.from_config(
        measured_model.config,
        timesteps=planned,
        timestep_spacing="leading",
        clip_sample=False,
        thresholding=False,
        calibration=None,
        eta=0.0,
        sigma=None,
        reverse_variance="sigma",
        solver_order=2,
        solver_form="sample",
        solver_corrector=False,
        solver_corrector_order=None,
        solver_variable=None,
        solver_weights="exact",
        lower_order_final=False,
    )
    size = measured_model.unet.config.sample_size
    shape = (measured_model.channels, *((size, size) if isinstance(size, int) else size))
    noise = torch.randn((num_samples, *shape), generator=generator(seed, "trajectory"))
    gram = torch.zeros(steps, steps, dtype=torch.float64)
    calls = 0
    for start in range(0, num_samples, batch_size):
        stop = start + batch_size
        part, model = noise[start:stop], measured_model.of(start, stop)
        scheduler.set_timesteps()
        x, seen = part.to(measured_model.state_dtype), []
        for t in planned:
            output = model.predict_mean(x, torch.full((len(x),), t))
            now, before = measured_model.alpha_bar[t], measured_model.alpha_bar[max(t - 1, 0)]
            before = before if t else torch.ones_like(now)
            seen.append(eps_from(measured_model.prediction_type, output.double(), x, now, before))
            x = scheduler.step(output, t, x, return_dict=False)[0]
        curve = torch.stack([eps.flatten() for eps in seen])
        gram += curve @ curve.T
        calls += steps
        if progress is not None:
            progress(f"{calls} network calls")
    measured = {"trajectory": pack_trajectory(planned, gram / noise.numel())}
    return measured, {"network_calls": calls, "seconds": time.perf_counter() - begun}


def check_target(config_file: Path, measured_model: MeasuredModel) -> None:
    """Check that what is measured of a model belongs into a file, if there is one.

    Raises:
        ValueError: it is no config of a scheduler, or one of another process.
    """
    if not config_file.exists():
        return
    config = read_json(config_file)
    if "num_train_timesteps" not in config:
        raise ValueError(
            f"`--output` is {str(config_file)!r}, which is not the config of a scheduler; it must "
            "be one, or new"
        )
    there = measured_model_of(measured_model.unet, config)
    kinds = [each.prediction_type for each in (there, measured_model)]
    levels = [each.alpha_bar for each in (there, measured_model)]
    same = kinds[0] == kinds[1] and len(levels[0]) == len(levels[1])
    if not same or not torch.allclose(levels[0], levels[1], rtol=1e-6, atol=0):
        raise ValueError(
            f"`--output` is {str(config_file)!r}, the config of another process or prediction "
            "type; it must be of those of --pipeline, or new"
        )


def save_calibration(
    calibration: Calibration, config_file: Path, source: dict[str, Any] | None = None
) -> None:
    """Put the statistics into a scheduler's config file, as `add_to_calibration`."""
    add_to_calibration(asdict(calibration), config_file, source)


def add_to_calibration(
    values: dict[str, Any], config_file: Path, source: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Put values into `calibration` of a scheduler's config file, atomically; the rest stays.

    The former config is kept next to it, see `undo`.

    Args:
        values: what is added.
        config_file: may be missing where there is a `source`.
        source: the config that is written with `values` where there is no file yet.

    Returns:
        The former `calibration`; empty if there was none.

    Raises:
        ValueError: if the file is not the config of a scheduler.
    """
    if config_file.exists() or source is None:
        config = read_json(config_file)
    else:
        config = copy.deepcopy(source)
    if not isinstance(config.get("_class_name"), str):
        raise ValueError(
            f"`config_file` is {str(config_file)!r}, which has no _class_name; it must be the "
            "config of a scheduler"
        )
    if config["_class_name"] in STOCK_CLASSES:
        settings = config
    else:
        private = config.setdefault(
            SETTINGS_KEY, {"class": "GeneralizedDDIMScheduler", "settings": {}, "stand_ins": {}}
        )
        settings = private.get("settings") if isinstance(private, dict) else None
    before = settings.get("calibration") if isinstance(settings, dict) else 0
    if not isinstance(settings, dict) or not isinstance(before, dict | None):
        raise ValueError(
            f"`config_file` is {str(config_file)!r}; its `{SETTINGS_KEY}` and `calibration` must "
            "be objects, and were changed"
        )
    settings["calibration"] = {**(before or {}), **values}
    tables = (before or {}).get("solver")
    if "solver" in values and isinstance(tables, dict):  # keep tables for other numbers
        settings["calibration"]["solver"] = {**tables, **values["solver"]}
    replace_config(config, config_file)
    return before or {}


def replace_config(config: dict[str, Any], config_file: Path) -> None:
    """Write a scheduler's config, atomically; the former one is kept next to it, see `undo`."""
    written = to_json(config)
    if not config_file.exists():
        config_file.parent.mkdir(parents=True, exist_ok=True)
    elif (old := config_file.read_bytes()) != written:
        number = len(_kept(config_file)) + 1
        write_bytes(config_file.with_name(f"{config_file.name}.{number}{KEPT}"), old)
    write_bytes(config_file, written)


def undo(config_file: Path) -> Path:
    """Put back the config that the last calibration replaced.

    Returns:
        The file that held it, and is gone.

    Raises:
        ValueError: if none is kept.
    """
    if not (kept := _kept(config_file)):
        raise ValueError(
            f"`config_file` is {str(config_file)!r}, beside which no earlier config is kept "
            f"({config_file.name}.1{KEPT}); a calibration must have replaced one"
        )
    kept[-1].replace(config_file)
    return kept[-1]


def _kept(config_file: Path) -> list[Path]:
    """Return the configs that calibrations replaced, oldest first: `NAME.1.bak`, ..."""
    found: list[Path] = []
    while (path := config_file.with_name(f"{config_file.name}.{len(found) + 1}{KEPT}")).is_file():
        found.append(path)
    return found


def summary(calibration: Calibration, timesteps: Sequence[int]) -> list[str]:
    """Return lines of a table: statistics and standard errors at some timesteps."""
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
