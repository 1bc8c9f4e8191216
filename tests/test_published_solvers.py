"""Published solvers are members of our table: their formulas, in float64, and diffusers' classes.

The formulas are written out here with lambda = log(alpha / sigma) = -log rho, and share nothing
with `multistep`: integrals in closed form, weights from a linear system.
"""

import math

import numpy as np
import pytest
import torch

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.sigmas import sigma_eta, sigma_tau

PLAN = [999, 861, 700, 644, 500, 320, 190, 60]
# no multiple of another, so that a weight on the wrong prediction shows
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NOISES = torch.randn(8, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LOG_RHO = {"solver_variable": "log_rho"}


def network(x, t):
    """Return some x0_hat that is no polynomial."""
    return torch.tanh(0.8 * x + math.sin(0.01 * t)) + 0.1 * torch.cos(x * (1 + 0.002 * t))


def ours(prediction="sample", noisy=None, plan=PLAN, **settings):
    """Return x_0 of our scheduler, in float64.

    Args:
        prediction: what the network says; `epsilon` makes it out of the same x0_hat.
        noisy: the explicit sigma, or None.
        plan: the timesteps.
        **settings: of the scheduler.
    """
    scheduler = GeneralizedDDIMScheduler(clip_sample=False, prediction_type=prediction, **settings)
    scheduler.set_timesteps(timesteps=plan, sigma=noisy)
    x = X
    for i, t in enumerate(plan):
        m = network(x, t)
        if prediction == "epsilon":
            a = scheduler.alpha_bar[t]
            m = (x - a.sqrt() * m) / (1 - a).sqrt()
        x = scheduler.step(m, t, x, variance_noise=NOISES[i] if noisy else None).prev_sample
    return x


class Levels:
    """alpha, sigma and lambda of a plan and of where it ends."""

    def __init__(self, end=None, plan=PLAN):
        scheduler = GeneralizedDDIMScheduler(set_alpha_to_one=end is None)
        end_of = torch.tensor([scheduler.alpha_bar_end], dtype=torch.float64)
        a = torch.cat([scheduler.alpha_bar[plan], end_of])
        self.alpha, self.sigma = a.sqrt().numpy(), (1 - a).sqrt().numpy()
        with np.errstate(divide="ignore"):
            self.lam = np.log(self.alpha) - np.log(self.sigma)
        self.alpha_bar = a


def integrals(h, c, count):
    """Return the integrals of exp(c (s - h)) s^k over s in [0, h], k < count, by parts."""
    found = [(1 - math.exp(-c * h)) / c]
    for k in range(1, count):
        found.append(h**k / c - k / c * found[-1])
    return found


def adams(levels, i, nodes, c):
    """Return SA-Solver's weights (its Sec. 4) of x0 at `nodes` in step i, for 1 + tau^2 = c."""
    h = levels.lam[i + 1] - levels.lam[i]
    if math.isinf(h):
        return [1.0]
    s = np.array([levels.lam[j] - levels.lam[i] for j in nodes])
    system = np.vander(s, len(nodes), increasing=True).T
    return list(np.linalg.solve(system, c * np.array(integrals(h, c, len(nodes)))))


def unipc(levels, i, nodes, bh):
    """Return UniPC's weights for x0 (its Sec. 3); nodes[0] is i, and i + 1 is among a corrector's.

    With `bh` other than None, rho = 1/2 where there is but one difference, as in diffusers.
    """
    h = levels.lam[i + 1] - levels.lam[i]
    if len(nodes) == 1:
        return [1 - math.exp(-h)]
    r = np.array([(levels.lam[j] - levels.lam[i]) / h for j in nodes[1:]])
    big_b = {"bh1": -h, "bh2": math.expm1(-h), None: math.expm1(-h)}[bh]
    phi, factorial, right = math.expm1(-h) / -h - 1, 1, []
    for k in range(1, len(nodes)):
        right.append(phi * factorial / big_b)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    system = np.vander(r, len(r), increasing=True).T
    rhos = np.linalg.solve(system, np.array(right))
    if bh is not None and len(nodes) == 2:
        rhos = np.array([0.5])
    others = -big_b * rhos / r
    return [-math.expm1(-h) - others.sum(), *others]


def dpm_2m(levels, i, nodes, c, solver_type):
    """Return the weights of (SDE-)DPM-Solver++(2M), c = 1 or 2: the formulas of diffusers."""
    h = levels.lam[i + 1] - levels.lam[i]
    whole = 1 - math.exp(-c * h)
    if len(nodes) == 1:
        return [whole]
    r = (levels.lam[i] - levels.lam[nodes[1]]) / h
    slope = 0.5 * whole if solver_type == "midpoint" else 1 - whole / (c * h)
    return [whole + slope / r, -slope / r]


def published(weights_of, order, corrector=1, tau=None, lower=False, end=None):
    """Return x_0 of x_s = exp(-tau^2 h) sigma_s / sigma_t x + alpha_s sum_j b_j x0_j + noise.

    Args:
        weights_of: (levels, i, nodes, 1 + tau^2) -> b_j of the nodes, in the step from i.
        order: predictions of the predictor.
        corrector: predictions of the corrector, 1 for none.
        tau: of each timestep, a function; None for 0.
        lower: end with lower orders.
        end: None lands on alpha_bar = 1, 0 on that of timestep 0.
    """
    levels, x, before, seen = Levels(end), X, None, []
    for i, t in enumerate(PLAN):
        seen.append(network(x, t))

        def step(i, nodes, x):
            square = (tau(PLAN[i]) if tau else 0) ** 2
            h = levels.lam[i + 1] - levels.lam[i]
            keep = math.exp(-square * h) if square else 1.0
            out = keep * levels.sigma[i + 1] / levels.sigma[i] * x
            for weight, j in zip(weights_of(levels, i, nodes, 1 + square), nodes, strict=True):
                out = out + levels.alpha[i + 1] * weight * seen[j]
            return out + levels.sigma[i + 1] * math.sqrt(1 - keep**2) * NOISES[i]

        if corrector > 1 and i:
            most = corrector - 1 if not lower else min(corrector - 1, len(PLAN) - i + 1)
            nodes = [i - 1, *range(i - 2, max(i - 1 - most, -1), -1)]
            x = step(i - 1, [nodes[0], i, *nodes[1:]], before)
        most = order if not lower else min(order, len(PLAN) - i)
        most = 1 if math.isinf(levels.lam[i + 1]) else most
        before, x = x, step(i, [*range(i, max(i - most, -1), -1)], x)
    return x


def assert_same(got, expected, tolerance=1e-9):
    assert bool(torch.isfinite(got).all())
    assert float((got - torch.as_tensor(expected)).abs().max()) < tolerance


# -- formulas


@pytest.mark.parametrize("end", [None, 0])
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_unip_and_unipc(order, lower, end):
    """UniP-p and UniPC-p of UniPC (arXiv:2302.04867): B(h) cancels unless rho is fixed to 1/2."""
    settings = {"solver_order": order, "lower_order_final": lower, "set_alpha_to_one": end is None}
    for name in (None, "bh1", "bh2"):
        weights = {} if name is None else {"solver_weights": name}
        for corrected in (False, True):
            expected = published(
                lambda levels, i, nodes, _, name=name: unipc(levels, i, nodes, name),
                order,
                order + 1 if corrected else 1,
                lower=lower,
                end=end,
            )
            got = ours(**settings, **LOG_RHO, **weights, solver_corrector=corrected)
            assert_same(got, expected)


@pytest.mark.parametrize("solver_type", ["heun", "midpoint"])
def test_dpm_solver_pp_2m(solver_type):
    """DPM-Solver++(2M) (arXiv:2211.01095, Alg. 2) with the integral, and with half the step."""
    expected = published(lambda *args: dpm_2m(*args, solver_type), 2)
    name = "exact" if solver_type == "heun" else "bh2"
    assert_same(ours(solver_order=2, **LOG_RHO, solver_weights=name), expected)


@pytest.mark.parametrize("solver_type", ["heun", "midpoint"])
def test_sde_dpm_solver_pp_2m(solver_type):
    """SDE-DPM-Solver++(2M) (arXiv:2211.01095, Sec. 6) is eta = 1: 1 + tau^2 = 2."""
    expected = published(lambda *args: dpm_2m(*args, solver_type), 2, tau=lambda t: 1.0)
    alpha_bar = Levels().alpha_bar
    sigma = sigma_eta(alpha_bar[:-1], alpha_bar[1:]).tolist()
    name = "exact" if solver_type == "heun" else "bh2"
    assert_same(ours(noisy=sigma, solver_order=2, **LOG_RHO, solver_weights=name), expected)


TAUS = {"0": lambda t: 0.0, "0.4": lambda t: 0.4, "1": lambda t: 1.0, "1.3": lambda t: 1.3}
TAUS["200 to 800"] = lambda t: float(200 <= t <= 800)


@pytest.mark.parametrize("name", TAUS)
@pytest.mark.parametrize(("order", "corrector"), [(1, 1), (2, 2), (2, 3), (3, 3), (3, 4), (4, 4)])
def test_sa_solver_for_any_tau(order, corrector, name):
    """SA-Solver (arXiv:2309.05019, Sec. 4) with the sigma that its tau is."""
    tau, end = TAUS[name], None if name in ("0", "200 to 800") else 0
    levels = Levels(end)
    expected = published(adams, order, corrector, tau, end=end)
    each = [
        sigma_tau(levels.alpha_bar[i], levels.alpha_bar[i + 1], tau(t)).item()
        for i, t in enumerate(PLAN)
    ]
    settings = {"solver_order": order, "set_alpha_to_one": end is None}
    if corrector > 1:
        settings |= {"solver_corrector": True, "solver_corrector_order": corrector}
    assert_same(ours(noisy=each, **settings, **LOG_RHO), expected)


def test_tau_and_eta():
    """1 - exp(-2 tau^2 h) = eta^2 (1 - exp(-2 h)): equal at 0 and 1, and for short steps."""
    a_t, a_s = (torch.tensor(a, dtype=torch.float64) for a in (0.02, 0.3))
    h = 0.5 * (a_s / (1 - a_s) * (1 - a_t) / a_t).log()
    for tau in (0.0, 1.0):
        torch.testing.assert_close(sigma_tau(a_t, a_s, tau), sigma_eta(a_t, a_s, tau))
    for tau in (0.3, 0.7):
        eta = float(((1 - (-2 * tau**2 * h).exp()) / (1 - (-2 * h).exp())).sqrt())
        torch.testing.assert_close(sigma_tau(a_t, a_s, tau), sigma_eta(a_t, a_s, eta))
        assert eta > tau
        near = sigma_tau(a_t, a_t + 1e-6, tau) / sigma_eta(a_t, a_t + 1e-6, tau)
        assert float(near) == pytest.approx(1, abs=1e-4)
    one = torch.ones((), dtype=torch.float64)
    assert float(sigma_tau(a_t, one, 0.5)) == 0
    with pytest.raises(ValueError, match="`tau` is -1; it must be a finite number >= 0"):
        sigma_tau(a_t, a_s, -1)
