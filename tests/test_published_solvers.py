"""Published solvers are members of our table: their formulas, in float64, and diffusers' classes.

The formulas are written out here with lambda = log(alpha / sigma) = -log rho, and share nothing
with `multistep`: integrals in closed form, weights from a linear system.
"""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)

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


@pytest.mark.parametrize("order", [2, 3, 4])
def test_ipndm(order):
    """The classical Adams-Bashforth weights of eps in DDIM's step (arXiv:2204.13902)."""
    classical = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12]}
    classical[4] = [55 / 24, -59 / 24, 37 / 24, -9 / 24]
    levels, x, seen = Levels(), X, []
    for i, t in enumerate(PLAN):
        seen.append((x - levels.alpha[i] * network(x, t)) / levels.sigma[i])
        weights = classical[min(i + 1, order)]
        eps = sum(w * e for w, e in zip(weights, reversed(seen), strict=False))
        x_0 = (x - levels.sigma[i] * eps) / levels.alpha[i]
        x = levels.alpha[i + 1] * x_0 + levels.sigma[i + 1] * eps
    settings = {"solver_order": order, "solver_form": "epsilon", "solver_variable": "step"}
    assert_same(ours("epsilon", **settings), x)


# -- diffusers' classes


def stock_run(cls, count, noise=None, exact=True, **settings):
    """Return (x_0, timesteps, whether it lands on alpha_bar = 1) of a stock scheduler.

    `exact` gives it its noise levels in float64; its own are float32.
    """
    theirs = cls(beta_schedule="linear", prediction_type="sample", **settings)
    theirs.set_timesteps(count)
    plan = [int(t) for t in theirs.timesteps]
    alpha_bar = GeneralizedDDIMScheduler().alpha_bar
    rho = ((1 - alpha_bar) / alpha_bar).sqrt()
    end = 0.0 if float(theirs.sigmas[-1]) == 0 else float(rho[0])
    if exact:
        theirs.sigmas = torch.cat([rho[plan], torch.tensor([end], dtype=torch.float64)])
    x = X
    for i, t in enumerate(theirs.timesteps):
        arguments = {} if noise is None else noise(i)
        x = theirs.step(network(x, int(t)), t, x, **arguments).prev_sample
    return x, plan, end == 0


def assert_stock(cls, stock, mine, tolerance, noisy=False, counts=(7, 20)):
    for count in counts:
        noises = torch.randn(count, *X.shape, generator=torch.Generator().manual_seed(2))
        noises = noises.double()
        given = (lambda i: {"variance_noise": noises[i]}) if noisy else None  # noqa: B023
        x, plan, to_zero = stock_run(cls, count, given, **stock)
        as_it_comes, *_ = stock_run(cls, count, given, exact=False, **stock)
        late = count < 15 or cls is UniPCMultistepScheduler
        settings = {"lower_order_final": late, "set_alpha_to_one": to_zero, **LOG_RHO, **mine}
        scheduler = GeneralizedDDIMScheduler(
            clip_sample=False, prediction_type="sample", timesteps=plan, **settings
        )
        scheduler.set_timesteps()
        y = X
        for i, t in enumerate(plan):
            given = noises[i] if noisy else None
            y = scheduler.step(network(y, t), t, y, variance_noise=given).prev_sample
        assert_same(y, x, tolerance)
        assert_same(y, as_it_comes, 1e-3)  # its tables are float32


# diffusers itself converts a tensor in a way that numpy 2 deprecates
numpy_2 = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


@numpy_2
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [2, 3])
def test_diffusers_unipc(order, solver_type):
    """Both kinds of B(h) and of prediction; the second order is rho = 1/2."""
    for predict_x0 in (True, False):
        stock = {"solver_order": order, "solver_type": solver_type, "predict_x0": predict_x0}
        if not predict_x0 or solver_type == "bh1":
            stock["final_sigmas_type"] = "sigma_min"  # at rho = 0 these are NaN
        mine = {"solver_order": order, "solver_corrector": True, "solver_weights": solver_type}
        mine["solver_form"] = "sample" if predict_x0 else "epsilon"
        assert_stock(UniPCMultistepScheduler, stock, mine, 1e-9)


WEIGHTS = {"heun": "exact", "midpoint": "bh2"}


@numpy_2
@pytest.mark.filterwarnings("ignore:.*algorithm_types dpmsolver:FutureWarning")
@pytest.mark.parametrize("solver_type", ["heun", "midpoint"])
@pytest.mark.parametrize("kind", ["dpmsolver++", "sde-dpmsolver++", "dpmsolver"])
def test_diffusers_dpm_solver_2m(kind, solver_type):
    """The sample is float32 in diffusers, whatever it is given: 1e-5."""
    stock = {"solver_order": 2, "algorithm_type": kind, "solver_type": solver_type}
    mine = {"solver_order": 2, "solver_weights": WEIGHTS[solver_type]}
    if kind == "dpmsolver":
        stock["final_sigmas_type"], mine["solver_form"] = "sigma_min", "epsilon"
    noisy = kind.startswith("sde")
    mine["eta"] = 1.0 if noisy else 0.0
    assert_stock(DPMSolverMultistepScheduler, stock, mine, 2e-5, noisy)


@numpy_2
@pytest.mark.parametrize("order", [1, 2, 3])
def test_diffusers_deis(order):
    """DEIS in diffusers is the form `epsilon` in log rho, with the integrals."""
    mine = {"solver_order": order, "solver_form": "epsilon"}
    assert_stock(DEISMultistepScheduler, {"solver_order": order}, mine, 1e-9)


@numpy_2
@pytest.mark.parametrize("tau", [0, 1, "default"])
@pytest.mark.parametrize("orders", [(2, 2), (3, 3), (3, 4)])
def test_diffusers_sa_solver(orders, tau, monkeypatch):
    """Its default tau is eta = 1 in [0.2, 0.8]; where it has two nodes, the weights are `bh1`."""
    stock = {"predictor_order": orders[0], "corrector_order": orders[1]}
    mine = {"solver_order": orders[0], "solver_corrector_order": orders[1]}
    mine |= {"solver_corrector": True, "solver_weights": "bh1", "lower_order_final": True}
    if tau == "default":
        mine |= {"eta": 1.0, "eta_interval": [0.2, 0.8]}
    else:
        stock["tau_func"] = lambda t: tau
        mine["eta"] = float(tau)
    drawn = []
    from diffusers.schedulers import scheduling_sasolver

    def draw(shape, **_):
        drawn.append(torch.randn(shape, generator=torch.Generator().manual_seed(len(drawn))))
        return drawn[-1].double()

    monkeypatch.setattr(scheduling_sasolver, "randn_tensor", draw)
    for count in (7, 20):
        drawn.clear()
        x, plan, _ = stock_run(SASolverScheduler, count, **stock)
        scheduler = GeneralizedDDIMScheduler(
            clip_sample=False, prediction_type="sample", set_alpha_to_one=False, **LOG_RHO, **mine
        )
        scheduler.set_timesteps(timesteps=plan)
        y = X
        for i, t in enumerate(plan):
            noise = drawn[i].double()
            y = scheduler.step(network(y, t), t, y, variance_noise=noise).prev_sample
        assert_same(y, x)


# -- DPM-Solver++(3M), which is no member


def dpm_3m(levels, i, nodes, factor):
    """Return the weights of DPM-Solver++(3M) in diffusers, its D2 multiplied by `factor`.

    D2 there is the second divided difference, half of the second derivative, but stands where the
    derivative belongs.
    """
    if len(nodes) < 3:
        return dpm_2m(levels, i, nodes, 1, "heun")
    h, h_0, h_1 = (levels.lam[j + 1] - levels.lam[j] for j in nodes)
    r0, r1 = h_0 / h, h_1 / h
    d1_0, d1_1 = np.array([1, -1, 0]) / r0, np.array([0, 1, -1]) / r1
    d1 = d1_0 + r0 / (r0 + r1) * (d1_0 - d1_1)
    d2 = factor * (d1_0 - d1_1) / (r0 + r1)
    decay = math.exp(-h) - 1
    return -decay * np.array([1, 0, 0]) + (decay / h + 1) * d1 - ((decay + h) / h**2 - 0.5) * d2


def gaussian_error(count, factor):
    """Return the global error on N(0.4, 0.25) data, in even steps of lambda."""
    mean, variance = 0.4, 0.25
    levels = Levels()
    levels.lam = np.linspace(-math.log(200), -math.log(0.05), count + 1)
    levels.alpha = np.sqrt(1 / (1 + np.exp(-2 * levels.lam)))
    levels.sigma = levels.alpha * np.exp(-levels.lam)
    spread = np.sqrt(levels.alpha**2 * variance + levels.sigma**2)
    x, seen = levels.alpha[0] * mean + 1.3 * spread[0], []
    for i in range(count):
        a = levels.alpha[i]
        seen.append(mean + variance * a * (x - a * mean) / spread[i] ** 2)
        nodes = [*range(i, max(i - 3, -1), -1)]
        x = levels.sigma[i + 1] / levels.sigma[i] * x
        for weight, j in zip(dpm_3m(levels, i, nodes, factor), nodes, strict=True):
            x += levels.alpha[i + 1] * weight * seen[j]
    return abs(x - levels.alpha[-1] * mean - 1.3 * spread[-1])


def test_dpm_solver_pp_3m_has_order_2():
    """As published and in diffusers; with twice its D2 it has order 3, and is our order 3."""
    slopes = {}
    for factor in (1, 2):
        errors = [gaussian_error(count, factor) for count in (128, 256)]
        slopes[factor] = math.log2(errors[0] / errors[1])
    assert abs(slopes[1] - 2) < 0.15 and slopes[2] > 2.9, slopes
    doubled = published(lambda levels, i, nodes, _: dpm_3m(levels, i, nodes, 2), 3)
    assert_same(ours(solver_order=3, **LOG_RHO), doubled)


@numpy_2
def test_diffusers_dpm_solver_pp_3m_is_the_formula_with_half_its_d2():
    x, plan, _ = stock_run(DPMSolverMultistepScheduler, 20, solver_order=3, solver_type="heun")
    levels = Levels(plan=plan)
    y, seen = X, []
    for i, t in enumerate(plan):
        seen.append(network(y, t))
        nodes = [i] if i == len(plan) - 1 else [*range(i, max(i - 3, -1), -1)]
        y = levels.sigma[i + 1] / levels.sigma[i] * y
        weights = [1.0] if len(nodes) == 1 and i else dpm_3m(levels, i, nodes, 1)
        for weight, j in zip(weights, nodes, strict=True):
            y = y + levels.alpha[i + 1] * weight * seen[j]
    assert_same(y, x, 2e-5)


# -- docs/solvers.md


TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "solvers.md").read_text(encoding="utf-8")


@numpy_2
def test_the_recipe_of_the_page_is_stock_unipc():
    recipe = next(b for b in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "UniPC" in b)
    pipe = SimpleNamespace(scheduler=DDPMScheduler(prediction_type="sample"))
    names = {"pipe": pipe, "UniPCMultistepScheduler": UniPCMultistepScheduler}
    exec(recipe, names | {"GeneralizedDDIMScheduler": GeneralizedDDIMScheduler})
    scheduler, x = pipe.scheduler, X
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, int(t)), t, x).prev_sample
    assert_same(x, stock_run(UniPCMultistepScheduler, 10)[0])


def test_every_test_that_the_page_names_exists():
    defined = {
        path.name: set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M))
        for path in TESTS.glob("test_*.py")
    }
    named = re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", PAGE)
    assert len(named) > 10
    for file, name in named:
        assert name in defined[file or "test_published_solvers.py"], name
