"""Bits per dimension of a saved pipeline: a table over steps, variances and trajectories.

Where every timestep is evaluated and no variance is learned, one pass over the union of all
trajectories serves the whole table, with the same noise in every cell: differences between cells
are differences between chains.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ddim_schedulers.likelihood import (
    ESTIMATORS,
    Chain,
    Terms,
    bits_per_dim,
    bound_from_errors,
    coding_curve,
    decoder_nll,
    default_proposal,
    estimate,
    grid_levels,
    make_chain,
    variational_bound,
)
from ddim_schedulers.optimal import Statistics, optimal_timesteps, statistics_of
from ddim_schedulers.pipelines.base import check_batch_size
from ddim_schedulers.reverse_noise import LearnedNoise, cost_name, noise_named
from ddim_schedulers.timesteps import make_timesteps
from ddim_schedulers.training.common.figures import save_figure
from ddim_schedulers.training.common.processes import Team
from ddim_schedulers.training.common.seeds import generator
from ddim_schedulers.training.likelihood.error_sweep import run_error_sweep
from ddim_schedulers.training.likelihood.measured_model import MeasuredModel

# "even" holds both ends, as a likelihood needs it; the other names are the samplers' spacings.
SPACINGS = {"even": "linspace"}


@dataclass(frozen=True)
class LikelihoodSettings:
    """What is computed.

    Attributes:
        steps: lengths S of the trajectories.
        variances: names as in `ddim_schedulers.likelihood`.
        trajectories: `even`, `optimal` (of each variance's own costs), or a spacing by name.
        eta: the member, > 0.
        clip: limit of |x0_hat|, None for none.
        num_bins: values that a pixel can take; None for a Gaussian density of continuous data.
        estimator: `all`, or a subset of t: `uniform`, `stratified`, `importance`.
        num_calls: network calls for each image, with a subset.
        batch_size: images in a network call.
        seed: of noise and t.
    """

    steps: tuple[int, ...] = (10, 25, 50, 100, 1000)
    variances: tuple[str, ...] = ("fixed_small", "fixed_large")
    trajectories: tuple[str, ...] = ("even",)
    eta: float = 1.0
    clip: float | None = 1.0
    num_bins: int | None = 256
    estimator: str = "all"
    num_calls: int | None = None
    batch_size: int = 64
    seed: int = 0


@dataclass(frozen=True)
class NamedChain:
    """A chain of the table, with the names that it has there."""

    steps: int
    variance: str
    trajectory: str
    chain: Chain


def make_chains(measured_model: MeasuredModel, settings: LikelihoodSettings) -> list[NamedChain]:
    """Return the chains of the table.

    Raises:
        ValueError: before any work, for all that `make_chain` refuses, a learned variance without a
            network that has one, or optimal choices without a calibration.
    """
    statistics = None
    if "optimal" in (*settings.variances, *settings.trajectories):
        if measured_model.calibration is None:
            asked = "variances" if "optimal" in settings.variances else "trajectories"
            raise ValueError(
                f"`{asked}` has 'optimal', but the pipeline's scheduler holds no statistics of its "
                "timesteps (`gamma` in `calibration`); run `ddim-schedulers calibrate --data ...` "
                "first (its --objective trajectory measures others)"
            )
        statistics = statistics_of(measured_model.calibration, measured_model.alpha_bar)
    for name in settings.variances:
        if isinstance(noise_named("variance", name), LearnedNoise) and not measured_model.learned:
            raise ValueError(
                f"`variance` is {name!r}, but the network predicts no variance; it must be "
                "a fixed one"
            )
    limit = 1.0 if settings.clip is None else settings.clip
    chains = []
    for trajectory in settings.trajectories:
        for variance in settings.variances:
            for count in settings.steps:
                tau = _trajectory(measured_model, statistics, settings, trajectory, variance, count)
                chain = make_chain(
                    measured_model.alpha_bar,
                    tau,
                    variance,
                    eta=settings.eta,
                    gamma=None if statistics is None else statistics.gamma,
                    x0_limit=limit,
                )
                chains.append(NamedChain(count, variance, trajectory, chain))
    return chains


def _trajectory(
    measured_model: MeasuredModel,
    statistics: Statistics | None,
    settings: LikelihoodSettings,
    name: str,
    variance: str,
    count: int,
) -> list[int]:
    if name != "optimal":
        return make_timesteps(SPACINGS.get(name, name), count, len(measured_model.alpha_bar))
    assert statistics is not None  # `make_chains` checked it
    own = cost_name(noise_named("variance", variance))
    limit = 1.0 if settings.clip is None else settings.clip
    return optimal_timesteps(measured_model.alpha_bar, statistics, count, own, settings.eta, limit)


def evaluate(
    measured_model: MeasuredModel,
    images: torch.Tensor,
    settings: LikelihoodSettings,
    work_dir: Path,
    *,
    team: Team | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Return the table as plain data: `settings`, `rows` and the `cost`.

    Each row has the trajectory, `total`, `prior` (L_T), `rate` (sum of L_{t-1}) and `decoder` (L_0)
    in bits per dimension, each with its standard error over the images, and, with all t, the
    progressive-coding `curve`.

    Args:
        measured_model: network and process, with the labels of the images if it has classes.
        images: (N, C, H, W) in [-1, 1], the same on every process.
        settings: what is computed.
        work_dir: where finished parts of a pass are kept, seen by all processes.
        team: the processes that share the work.
        progress: called with a line of text, or None.

    Raises:
        ValueError: as `make_chains`; for data off the grid; an unknown estimator, or a number of
            calls with one that evaluates all t.
    """
    check_batch_size(settings.batch_size)
    team = Team() if team is None else team
    if settings.estimator not in ESTIMATORS:
        raise ValueError(f"`estimator` is {settings.estimator!r}; it must be one of {ESTIMATORS}")
    if settings.estimator == "all" and settings.num_calls is not None:
        raise ValueError(
            f"`num_calls` is {settings.num_calls}, but estimator 'all' evaluates every t; choose a "
            f"subset: {ESTIMATORS[1:]}"
        )
    if settings.num_bins is not None:
        grid_levels(images, settings.num_bins)
    chains, begun = make_chains(measured_model, settings), time.perf_counter()
    learns = any(named.chain.log_variance_range is not None for named in chains)
    if settings.estimator == "all" and not learns:
        terms, calls = _one_pass(measured_model, images, chains, settings, work_dir, team, progress)
    else:
        terms, calls = _chain_by_chain(measured_model, images, chains, settings, team, progress)
    chosen = asdict(settings)
    return {
        "settings": chosen,
        "num_images": len(images),
        "image_shape": list(images.shape[1:]),
        "network": measured_model.fingerprint(),
        "rows": [_report(named, t, settings) for named, t in zip(chains, terms, strict=True)],
        "cost": {
            "network_calls": calls,
            "seconds": time.perf_counter() - begun,
            "processes": team.count,
        },
    }


def _one_pass(
    measured_model: MeasuredModel,
    images: torch.Tensor,
    chains: Sequence[NamedChain],
    settings: LikelihoodSettings,
    work_dir: Path,
    team: Team,
    progress: Callable[[str], None] | None,
) -> tuple[list[Terms], int]:
    union = sorted({t for named in chains for t in named.chain.timesteps})
    result = run_error_sweep(
        measured_model,
        images,
        union,
        clip=settings.clip,
        seed=settings.seed,
        batch_size=settings.batch_size,
        work_dir=work_dir,
        team=team,
        progress=progress,
    )
    column = {t: i for i, t in enumerate(result.timesteps)}
    terms = []
    for named in chains:
        picked = result.statistics[2][:, [column[t] for t in named.chain.timesteps]]
        decoder = decoder_nll(images, result.x0_hat, named.chain.variance[-1], settings.num_bins)
        terms.append(bound_from_errors(named.chain, images, picked, decoder))
    return terms, result.calls


def _chain_by_chain(
    measured_model: MeasuredModel,
    images: torch.Tensor,
    chains: Sequence[NamedChain],
    settings: LikelihoodSettings,
    team: Team,
    progress: Callable[[str], None] | None,
) -> tuple[list[Terms], int]:
    size = settings.batch_size
    chunks = math.ceil(len(images) / size)
    work = [(r, c) for r in range(len(chains)) for c in range(chunks)]
    done, calls, importance = [], 0, settings.estimator == "importance"
    for number, (r, c) in enumerate(work[team.index :: team.count]):
        named = chains[r]
        learned = named.chain.log_variance_range is not None
        model = measured_model.of(c * size, (c + 1) * size)
        terms = variational_bound(
            model.predict if learned else model.predict_mean,
            images[c * size : (c + 1) * size],
            named.chain,
            prediction_type=measured_model.prediction_type,
            clip=settings.clip,
            num_bins=settings.num_bins,
            estimator=settings.estimator,
            num_calls=settings.num_calls,
            proposal=_proposal(measured_model, named) if importance else None,
            generator=generator(settings.seed, "bound", r, c),
            dtype=measured_model.dtype,
        )
        done.append((r, c, terms))
        calls += terms.index.shape[1] + 1
        if progress is not None:
            progress(f"part {number + 1} of {len(work[team.index :: team.count])}")
    gathered = {(r, c): terms for r, c, terms in team.gather(done)}
    calls = sum(team.gather([calls]))
    return [_joined([gathered[r, c] for c in range(chunks)]) for r in range(len(chains))], calls


def _proposal(measured_model: MeasuredModel, named: NamedChain) -> torch.Tensor:
    error = None
    if measured_model.calibration is not None:
        table = statistics_of(measured_model.calibration, measured_model.alpha_bar).x0_error
        error = table[named.chain.timesteps]
    chain = named.chain
    if chain.log_variance_range is not None:  # the cost of fixed variances is a fair guess
        chain = dataclasses.replace(chain, variance=chain.log_variance_range.mean(1).exp())
    return default_proposal(chain, error)


def _joined(parts: Sequence[Terms]) -> Terms:
    names = ("prior", "index", "value", "weight", "decoder", "x0_error")
    return Terms(
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in names},
        dimensions=parts[0].dimensions,
    )


def _report(named: NamedChain, terms: Terms, settings: LikelihoodSettings) -> dict[str, Any]:
    sums = {
        "total": terms.total,
        "prior": terms.prior,
        "rate": terms.steps,
        "decoder": terms.decoder,
    }
    report: dict[str, Any] = {
        "steps": named.steps,
        "variance": named.variance,
        "trajectory": named.trajectory,
        "timesteps": named.chain.timesteps,
        "calls_per_image": terms.index.shape[1] + 1,
    }
    for name, nats in sums.items():
        got = estimate(bits_per_dim(nats, terms.dimensions))
        # JSON has no NaN, which is the spread of one image
        error = None if math.isnan(got.std_error) else got.std_error
        report[name] = {"mean": got.mean, "std_error": error}
    if settings.estimator == "all":
        report["curve"] = [asdict(p) for p in coding_curve(named.chain, terms, settings.num_bins)]
    return report


def table(report: dict[str, Any]) -> list[str]:
    """Return lines of the table: bits per dimension with standard errors, one column for each S."""
    counts = sorted({row["steps"] for row in report["rows"]})
    cells = {(r["trajectory"], r["variance"], r["steps"]): r for r in report["rows"]}
    kinds = list(dict.fromkeys((r["trajectory"], r["variance"]) for r in report["rows"]))
    lines = ["| tau, variance | " + " | ".join(f"S = {n}" for n in counts) + " |"]
    lines.append("|---" * (len(counts) + 1) + "|")
    for trajectory, variance in kinds:
        line = [f"{trajectory}, {variance}"]
        for n in counts:
            total = cells[trajectory, variance, n]["total"]
            error = "" if total["std_error"] is None else f" ± {total['std_error']:.3f}"
            line.append(f"{total['mean']:.3f}{error}")
        lines.append("| " + " | ".join(line) + " |")
    return lines


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw L_t against t and the progressive-coding curves of the longest chains, as PNG.

    Raises:
        ValueError: if the report has no curves (a subset of t).
    """
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if "curve" in row]
    if not rows:
        raise ValueError(
            "`report` has no terms for every t; for a plot, it must be made with estimator 'all'"
        )
    longest = max(row["steps"] for row in rows)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in rows:
        if row["steps"] != longest:
            continue
        name = f"{row['trajectory']}, {row['variance']}"
        curve = row["curve"]
        left.plot([p["timestep"] for p in curve], [p["term"] for p in curve], label=name, lw=1)
        right.plot([p["rate"] for p in curve], [p["distortion"] for p in curve], label=name, lw=1)
    left.set(xlabel="t", ylabel="L_t (bits/dim)", yscale="log", title=f"Terms, S = {longest}")
    left.set_xscale("symlog", linthresh=1)
    right.set(
        xlabel="rate (bits/dim)",
        ylabel="distortion (RMSE, grey levels)",
        title="Progressive coding",
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, path, dpi=120)
