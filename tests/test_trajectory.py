"""The calibrated trajectory: the curve, the costs of its jumps, the best path, the command."""

import itertools
import json

import pytest
import torch
from diffusers import DDIMScheduler
from tiny_models import gaussian_eps

from ddim_schedulers import GeneralizedDDIMInverseScheduler, GeneralizedDDIMScheduler, trajectory
from ddim_schedulers.timesteps import make_timesteps
from ddim_schedulers.training.cli import main
from ddim_schedulers.trajectory import (
    Trajectory,
    calibrated_timesteps,
    embed,
    fine_path,
    jump_costs,
    pack_trajectory,
    trajectory_of,
)

T = 1000


@pytest.fixture(scope="module")
def gaussian():
    """Scheduler, fine timesteps and exact eps of two dimensions of data N(0, v), from x_T on."""
    scheduler = GeneralizedDDIMScheduler()
    plan = make_timesteps("linspace", 60, T)
    a = scheduler.alpha_bar
    columns = []
    for variance in (0.05, 40.0):
        # x is a multiple of the standard deviation of the marginal, the same all along the ODE
        slope, _ = gaussian_eps(a, 0.0, variance)
        columns.append((slope * (a * variance + 1 - a).sqrt())[plan])
    return scheduler, plan, torch.stack(columns, dim=1)


def _paths(scheduler, plan):
    """xbar of the exact solution at the plan's timesteps and at the end."""
    a = torch.cat([scheduler.alpha_bar[plan], torch.ones(1, dtype=torch.float64)])
    return torch.stack([((a * v + 1 - a) / a).sqrt() for v in (0.05, 40.0)], dim=1)


def test_the_curve_keeps_inner_products(gaussian):
    *_, eps = gaussian
    points = embed(eps @ eps.T)
    assert points.shape == (60, 2)  # no more dimensions than there are
    torch.testing.assert_close(points @ points.T, eps @ eps.T)


def test_a_network_that_diverges_has_no_curve():
    with pytest.raises(ValueError, match="`trajectory` is not finite"):
        embed(torch.tensor([[1.0, torch.inf], [torch.inf, torch.nan]], dtype=torch.float64))


def test_the_fine_path_is_the_solution(gaussian):
    scheduler, plan, eps = gaussian
    a = scheduler.alpha_bar[plan]
    path = fine_path(eps, a, torch.cat([a[1:], torch.ones(1, dtype=torch.float64)]))
    exact = _paths(scheduler, plan)
    assert float((path - exact + exact[0]).abs().max()) < 0.01 * float(exact.abs().max())


@pytest.mark.parametrize("form", ["sample", "epsilon"])
@pytest.mark.parametrize(
    ("order", "variable", "weights"),
    [
        (1, None, "exact"),
        (2, None, "exact"),
        (2, "log_rho", "exact"),
        (2, "log_rho", "bh1"),
        (2, "log_rho", "bh2"),
        (2, "step", "exact"),
    ],
)
def test_a_cost_is_the_miss_of_the_scheduler_itself(
    gaussian, form, order, variable, weights, monkeypatch
):
    """From the fine trajectory's own points, steps of the scheduler with these timesteps."""
    scheduler, plan, eps = gaussian
    exact = _paths(scheduler, plan)
    monkeypatch.setattr(trajectory, "fine_path", lambda *_: exact - exact[0])
    a = torch.cat([scheduler.alpha_bar[plan], torch.ones(1, dtype=torch.float64)])
    chosen = {"variable_name": variable, "weights_name": weights}
    cost = jump_costs(eps, a[:-1], a[-1:], order, form, **chosen)
    settings = {"solver_form": form, "solver_variable": variable, "solver_weights": weights}
    solver = GeneralizedDDIMScheduler(clip_sample=False, solver_order=order, **settings)
    x = exact * a.sqrt()[:, None]
    for p, i, k in ((0, 5, 9), (10, 11, 40), (30, 50, 60)):
        rest = [plan[k]] if k < 60 else []
        solver.set_timesteps(timesteps=[plan[p], plan[i], *rest])
        solver.step(eps[p][None], plan[p], x[p][None])
        landed = solver.step(eps[i][None], plan[i], x[i][None]).prev_sample
        assert float(cost[p, i, k]) == pytest.approx(float((landed - x[k]).square().sum()))
    assert torch.equal(cost[60], jump_costs(eps, a[:-1], a[-1:], 1, form)[60])


def test_the_path_is_the_best_of_all(gaussian):
    generator = torch.Generator().manual_seed(0)
    n = 6
    cost = torch.rand(n + 1, n, n + 1, generator=generator, dtype=torch.float64)
    forward = torch.arange(n + 1)[None, :] > torch.arange(n)[:, None]
    cost = torch.where(forward, cost, torch.inf)
    for p in range(n):
        cost[p, : p + 1] = torch.inf

    def total(path):
        steps = [n, *path, n]
        return sum(
            float(cost[steps[j - 1], steps[j], steps[j + 1]]) for j in range(1, len(steps) - 1)
        )

    for count in range(1, n + 1):
        every = [(0, *rest) for rest in itertools.combinations(range(1, n), count - 1)]
        best = min(every, key=total)
        got = trajectory._best_path(cost, count)
        assert got == list(best), (count, got, best)
        wrong = trajectory._best_path(cost.flip(0), count)
        assert count in (1, n) or wrong != got or total(wrong) == total(best)


def _calibrated(gaussian, **settings):
    _, plan, eps = gaussian
    measured = {"trajectory": pack_trajectory(plan, eps @ eps.T)}
    return GeneralizedDDIMScheduler(
        timestep_spacing="calibrated", calibration=measured, clip_sample=False, **settings
    )


def test_calibrated_steps_miss_less_than_the_named_spacings(gaussian):
    """The end of Gaussian data, known exactly, at 8 steps of the order that was planned."""
    start = torch.tensor([0.05, 40.0], dtype=torch.float64)
    for order in (1, 2):
        errors = {}
        for spacing in ("calibrated", "trailing", "linspace", "quadratic"):
            scheduler = _calibrated(gaussian, solver_order=order)
            scheduler.register_to_config(timestep_spacing=spacing, quadratic_end=1.0)
            scheduler.set_timesteps(8)
            a = scheduler.alpha_bar
            x = (a[-1] * start + 1 - a[-1]).sqrt()[None]
            for t in scheduler.timesteps.tolist():
                eps = (1 - a[t]).sqrt() * x / (a[t] * start + 1 - a[t])
                x = scheduler.step(eps, t, x).prev_sample
            errors[spacing] = float((x - start.sqrt()).square().sum())
        assert errors["calibrated"] < min(errors["trailing"], errors["linspace"]), (order, errors)


def test_any_number_of_steps_and_the_classes_that_share_the_plan(gaussian):
    scheduler = _calibrated(gaussian, solver_order=2)
    inverse = GeneralizedDDIMInverseScheduler.from_config(scheduler.config, solver_order=1)
    euler = GeneralizedDDIMScheduler.from_config(scheduler.config, solver_order=1)
    for steps in (1, 2, 7, 60):
        for each in (scheduler, euler, inverse):
            each.set_timesteps(steps)
        assert len(scheduler.timesteps) == steps and scheduler.timesteps[0] == T - 1
        assert inverse.timesteps.flip(0).tolist() == euler.timesteps.tolist()
    with pytest.raises(ValueError, match="`num_inference_steps` is 61; .* lie in 1 .. 60"):
        scheduler.set_timesteps(61)


def test_bad_measured_trajectories(gaussian):
    with pytest.raises(ValueError, match="no `trajectory`.*--objective trajectory"):
        GeneralizedDDIMScheduler(timestep_spacing="calibrated")
    _, plan, eps = gaussian
    good = pack_trajectory(plan, eps @ eps.T)
    for change, message in (
        ({"timesteps": plan[1:]}, "from T - 1 on"),
        ({"timesteps": "many"}, "`timesteps"),
        ({"points": good["points"][1:]}, "must be 60 lists"),
        ({"points": [[float("nan")]] * 60}, "finite"),
        ({"points": "x"}, "must be 60 lists"),
    ):
        with pytest.raises(ValueError, match=message):
            trajectory_of({"trajectory": {**good, **change}}, T)
    flat = Trajectory(plan, eps)
    zero = torch.linspace(0.99, 0, T, dtype=torch.float64)
    with pytest.raises(ValueError, match="alpha_bar > 0"):
        calibrated_timesteps(flat, zero, 1.0, 5)


def test_the_command_measures_and_writes_what_a_scheduler_reads(tiny_ddpm, tmp_path, capsys):
    folder = tmp_path / "pipeline"
    tiny_ddpm(DDIMScheduler()).save_pretrained(folder)
    config = folder / "scheduler" / "scheduler_config.json"
    command = ["calibrate", "--objective", "trajectory", "--pipeline", str(folder), "--cpu"]
    assert main([*command, "--num_images", "3", "--trajectory_steps", "24"]) == 0
    assert "24 network calls" in capsys.readouterr().out
    scheduler = GeneralizedDDIMScheduler.from_config(
        json.loads(config.read_text()), timestep_spacing="calibrated", solver_order=2
    )
    scheduler.set_timesteps(6)
    assert len(scheduler.timesteps) == 6 and scheduler.timesteps[0] == 999
    first = config.read_text()
    assert main([*command, "--num_images", "3", "--trajectory_steps", "24"]) == 0
    assert config.read_text() == first  # a seed gives the same trajectory
    for bad, word in (
        (["--num_images", "0"], "num_images"),
        (["--trajectory_steps", "1"], "trajectory_steps"),
        (["--data", "digits"], "--data"),
    ):
        assert main([*command, *bad]) == 2
        assert word in capsys.readouterr().err
    assert main(["calibrate", "--pipeline", str(folder)]) == 2
    assert "`--data` is missing" in capsys.readouterr().err
