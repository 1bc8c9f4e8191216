"""The bound against closed forms of Gaussian data, its decoder against numerical integration."""

import itertools
import math

import numpy as np
import pytest
import torch
from tiny_models import gaussian_eps

from ddim_schedulers import likelihood
from ddim_schedulers.betas import alpha_bar_before, alpha_bar_from_betas, make_betas
from ddim_schedulers.likelihood import (
    bits_per_dim,
    bound_from_errors,
    coding_curve,
    decoder_nll,
    default_proposal,
    draw_steps,
    estimate,
    expected_bound,
    first_posterior_variance,
    make_chain,
    prior_kl,
    variational_bound,
)
from ddim_schedulers.optimal import step_kl, x0_variance
from ddim_schedulers.parameterization import target

pytestmark = pytest.mark.usefixtures("float64")

TRAJECTORIES = {
    40: [[39, 0], [39, 25, 10, 3, 0], [30, 29, 1, 0], list(range(39, -1, -1)), [0]],
    1000: [[999, 0], [999, 700, 333, 20, 1, 0]],
}


def _alpha_bar(steps):
    return alpha_bar_from_betas(make_betas("linear", steps, 1e-3, 0.2 if steps < 100 else 0.02))


def _oracle(alpha_bar, means, variances, prediction_type="epsilon"):
    """The perfect network for independent Gaussian dimensions, (d,) means and variances."""
    before = alpha_bar_before(alpha_bar)

    def predict(x_t, t):
        a, b = alpha_bar[t][:, None], before[t][:, None]
        slope, shift = gaussian_eps(a, means, variances)
        eps = slope * x_t + shift
        x0 = (x_t - (1 - a).sqrt() * eps) / a.sqrt()
        return target(prediction_type, x0, eps, a, b)

    return predict


def _grid(means, variances):
    """Nodes and weights of a product rule for one dimension of x_0 and one of eps: exact to x^9."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    weights = weights / weights.sum()
    u, e = np.meshgrid(nodes, nodes, indexing="ij")
    w = np.outer(weights, weights).ravel()
    u, e = torch.tensor(u.ravel()), torch.tensor(e.ravel())
    x0 = means + variances.sqrt() * u[:, None]
    return x0, e[:, None].expand_as(x0), torch.tensor(w)


def _expected(alpha_bar, tau, means, variances, **settings):
    """The expected bound of the real code; exact, as each term is quadratic in (x_0, eps)."""
    gamma = settings.pop("gamma", None)
    if gamma is None and settings.get("variance") == "optimal":
        slope = (1 - alpha_bar)[:, None] / (
            alpha_bar[:, None] * variances + (1 - alpha_bar)[:, None]
        )
        gamma = slope.mean(1)
    chain = make_chain(alpha_bar, tau, gamma=gamma, **settings)
    x0, noise, weights = _grid(means, variances)
    terms = variational_bound(
        _oracle(alpha_bar, means, variances),
        x0,
        chain,
        num_bins=None,
        noise=noise,
        dtype=torch.float64,
    )
    return float((terms.total * weights).sum()), chain


def _by_hand(alpha_bar, tau, means, variances, variance, eta):
    """Entropy + KL(q(x_T) || N) + the excess of every step, from joint covariances alone.

    By the chain rule from x_T down, the bound is H(x_0) + KL(q(x_T) || p(x_T)) + the sum of
    KL(q(x_s | x_t and all after it) || p(x_s | x_t)). In each of them p has the right mean given
    x_t and the variance v: 0.5 (log(v / own) + moment / v - 1), own and moment being the variances
    of x_s given all later states and given x_t. The first is found by Gaussian conditioning on a
    joint covariance that is built by ancestral sampling of q_sigma.
    """
    a = [float(alpha_bar[t]) for t in tau] + [1.0]
    total = 0.0
    steps, moments, owns, sigmas = len(tau), [], [], []
    for m, c in zip(means.tolist(), variances.tolist(), strict=True):
        total += 0.5 * math.log(2 * math.pi * math.e * c)
        end = a[0] * c + 1 - a[0]
        total += 0.5 * (end + a[0] * m * m - 1 - math.log(end))
        # rows: x_0, then x_T .. x_s in terms of independent standard normals
        rows = [np.eye(steps + 2)[0] * math.sqrt(c)]
        noise = np.eye(steps + 2)[1:]
        rows.append(math.sqrt(a[0]) * rows[0] + math.sqrt(1 - a[0]) * noise[0])
        moment, own = [], []
        for i in range(steps):
            a_t, a_s = a[i], a[i + 1]
            sigma = eta * math.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
            k = math.sqrt(max(1 - a_s - sigma**2, 0) / (1 - a_t))
            new = math.sqrt(a_s) * rows[0] + k * (rows[-1] - math.sqrt(a_t) * rows[0])
            new = new + sigma * noise[i + 1]
            later = np.stack(rows[1:])
            for given, kept in ((later[-1:], moment), (later, own)):
                joint = given @ given.T
                cross = given @ new
                kept.append(new @ new - cross @ np.linalg.solve(joint, cross))
            rows.append(new)
            sigmas.append(sigma)
        moments.append(moment)
        owns.append(own)
    for i in range(steps):
        a_t, a_s = a[i], a[i + 1]
        if variance == "optimal":
            v = sum(m[i] for m in moments) / len(moments)
        elif i == steps - 1:
            one, zero = float(alpha_bar[1]), float(alpha_bar[0])
            v = (1 - zero) / (1 - one) * (1 - one / zero)
        else:
            v = sigmas[i] ** 2 if variance == "fixed_small" else 1 - a_t / a_s
        for moment, own in zip(moments, owns, strict=True):
            total += 0.5 * (math.log(v / own[i]) + moment[i] / v - 1)
    return total


@pytest.mark.parametrize("mean, c", [(0.0, 1.0), (0.4, 0.3), (-0.2, 1e-3)])
def test_bound_is_exact_for_isotropic_gaussian_data(mean, c):
    means, variances = torch.tensor([mean]), torch.tensor([c])
    for steps, trajectories in TRAJECTORIES.items():
        alpha_bar = _alpha_bar(steps)
        for tau in trajectories:
            bound, chain = _expected(alpha_bar, tau, means, variances, variance="optimal")
            end = float(chain.alpha_bar[0]) * c + 1 - float(chain.alpha_bar[0])
            prior = 0.5 * (end + float(chain.alpha_bar[0]) * mean**2 - 1 - math.log(end))
            exact = 0.5 * math.log(2 * math.pi * math.e * c)
            assert bound - prior == pytest.approx(exact, abs=1e-9)


# sigma-hat needs eta = 1
@pytest.mark.parametrize(
    ("variance", "eta"),
    [*itertools.product(["optimal", "fixed_small"], [1.0, 0.7, 0.2]), ("fixed_large", 1.0)],
)
def test_excess_of_any_member_and_covariance(variance, eta):
    alpha_bar = _alpha_bar(40)
    means, variances = torch.tensor([0.3, -0.5, 0.0]), torch.tensor([0.9, 0.05, 0.3])
    for tau in TRAJECTORIES[40]:
        bound, _ = _expected(alpha_bar, tau, means, variances, variance=variance, eta=eta)
        exact = _by_hand(alpha_bar, tau, means, variances, variance, eta)
        assert bound / 3 == pytest.approx(exact / 3, abs=1e-9)
        if variance == "optimal":
            continue
        best, _ = _expected(alpha_bar, tau, means, variances, variance="optimal", eta=eta)
        assert best < bound


@pytest.mark.parametrize(
    "room, name, wrong",
    [
        (likelihood.chain, "x0_weight", lambda a_t, a_s, s: a_s.sqrt()),
        (likelihood.chain, "first_posterior_variance", lambda a: 1 - a[0]),
        (likelihood.bound, "prior_kl", lambda x, a: 0.5 * (a * x**2 - a - torch.log(a)).sum(1)),
        (likelihood.chain, "alpha_bar_before", torch.ones_like),
    ],
)
def test_a_wrong_formula_is_noticed(monkeypatch, room, name, wrong):
    alpha_bar, tau = _alpha_bar(40), [39, 25, 10, 3, 0]
    means, variances = torch.tensor([0.3]), torch.tensor([0.2])
    exact = _by_hand(alpha_bar, tau, means, variances, "fixed_small", 1.0)
    monkeypatch.setattr(room, name, wrong)
    kind = "posterior_mean" if name == "alpha_bar_before" else "epsilon"
    chain = make_chain(alpha_bar, tau, "fixed_small")
    x0, noise, weights = _grid(means, variances)
    terms = variational_bound(
        _oracle(alpha_bar, means, variances, kind),
        x0,
        chain,
        prediction_type=kind,
        num_bins=None,
        noise=noise,
        dtype=torch.float64,
    )
    assert abs(float((terms.total * weights).sum()) - exact) > 1e-3


def test_every_prediction_type_gives_the_same_bound():
    alpha_bar, means, variances = _alpha_bar(40), torch.tensor([0.3]), torch.tensor([0.2])
    chain = make_chain(alpha_bar, [39, 20, 5, 0], "fixed_large")
    x0, noise, _ = _grid(means, variances)
    totals = [
        variational_bound(
            _oracle(alpha_bar, means, variances, kind),
            x0,
            chain,
            prediction_type=kind,
            num_bins=None,
            noise=noise,
            dtype=torch.float64,
        ).total
        for kind in ("epsilon", "sample", "v_prediction", "posterior_mean")
    ]
    for total in totals[1:]:
        torch.testing.assert_close(total, totals[0], rtol=1e-9, atol=1e-9)


def test_expected_bound_of_the_statistics_is_the_expected_bound():
    alpha_bar, means, variances = _alpha_bar(40), torch.tensor([0.3]), torch.tensor([0.2])
    for variance, eta in (("optimal", 0.5), ("fixed_small", 1.0), ("fixed_large", 1.0)):
        bound, chain = _expected(
            alpha_bar, [39, 20, 5, 0], means, variances, variance=variance, eta=eta
        )
        error = 0.2 * (1 - chain.alpha_bar) / (0.2 * chain.alpha_bar + 1 - chain.alpha_bar)
        assert float(expected_bound(chain, error, 0.2 + 0.3**2)) == pytest.approx(bound, abs=1e-10)


def test_monte_carlo_agrees_with_the_closed_form():
    alpha_bar, d = _alpha_bar(40), 12
    means, variances = torch.linspace(-0.5, 0.5, d), torch.linspace(0.05, 0.5, d)
    x0 = means + variances.sqrt() * torch.randn(1500, d)
    tau = [39, 25, 15, 8, 3, 0]
    exact = _by_hand(alpha_bar, tau, means, variances, "fixed_small", 1.0)
    generator = torch.Generator().manual_seed(1)
    for estimator in ("all", "uniform", "stratified", "importance"):
        terms = variational_bound(
            _oracle(alpha_bar, means, variances),
            x0,
            make_chain(alpha_bar, tau, "fixed_small"),
            num_bins=None,
            estimator=estimator,
            num_calls=4,
            generator=generator,
            dtype=torch.float64,
        )
        assert terms.index.shape[1] == (5 if estimator == "all" else 3)
        got = estimate(terms.total)
        assert got.count == 1500 and got.std_error < 8
        assert abs(got.mean - exact) < 3 * got.std_error


def _spread(estimator, terms, calls, proposal=None):
    index, weight = draw_steps(
        estimator, calls, len(terms), 2000, proposal, torch.Generator().manual_seed(0)
    )
    return (terms[index] * weight).sum(1)


def test_stratified_and_importance_sampling_beat_uniform_t():
    alpha_bar = alpha_bar_from_betas(make_betas())
    chain = make_chain(alpha_bar, list(range(999, -1, -1)), "fixed_large")
    error = 0.25 * (1 - alpha_bar) / (0.25 * alpha_bar + 1 - alpha_bar)
    error = error.flip(0)
    terms = step_kl(
        chain.posterior_variance[:-1], chain.variance[:-1], chain.weight[:-1], error[:-1]
    )
    proposal = default_proposal(chain, error)
    spreads = {}
    for name in ("uniform", "stratified", "importance"):
        values = _spread(name, terms, 63, proposal)
        spreads[name] = float(values.std())
        tolerance = 4 * values.std() / math.sqrt(2000) + 1e-12
        assert abs(values.mean() - terms.sum()) < tolerance
    assert spreads["stratified"] < 0.7 * spreads["uniform"]
    assert spreads["importance"] < 0.1 * spreads["uniform"]
    # without the weights of the draws it would be biased
    index, _ = draw_steps("importance", 63, 999, 2000, proposal, torch.Generator().manual_seed(0))
    assert abs(terms[index].mean(1).mean() * 999 - terms.sum()) > terms.sum()


def test_weights_make_every_step_count_once():
    for name in ("uniform", "stratified", "importance"):
        proposal = torch.linspace(1, 9, 7)
        index, weight = draw_steps(name, 3, 7, 40_000, proposal, torch.Generator().manual_seed(0))
        counts = torch.zeros(7).index_add_(0, index.flatten(), weight.flatten()) / 40_000
        torch.testing.assert_close(counts, torch.ones(7), rtol=0.05, atol=0)
    index, weight = draw_steps("stratified", 7, 7, 5, None, torch.Generator().manual_seed(0))
    assert torch.equal(index, torch.arange(7).expand(5, 7)) and bool((weight == 1).all())


def _log_integral(low, high):
    """log of the integral of the normal density over [low, high] by Gauss-Legendre quadrature.

    The largest value is taken out first and the interval cut where the rest is below 1e-30 of it.
    """
    if low + high > 0:
        low, high = -high, -low
    top = min(high, 0.0)
    low = max(low, top - min(80 / max(-top, 1.0) + 1, 14.0)) if high < 0 else max(low, -14.0)
    high = min(high, 14.0)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    total, edges = 0.0, np.linspace(low, high, 41)
    for left, right in zip(edges[:-1], edges[1:], strict=True):
        z = left + (right - left) * (nodes + 1) / 2
        # z^2 - top^2, without cancellation
        total += (right - left) / 2 * float(weights @ np.exp(-0.5 * (z - top) * (z + top)))
    return -0.5 * top * top + math.log(total) - 0.5 * math.log(2 * math.pi)


@pytest.mark.parametrize("num_bins", [256, 17, 2])
@pytest.mark.parametrize("std", [1e-4, 1e-3, 0.01, 0.1, 1.0, 30.0])
def test_decoder_against_numerical_integration(num_bins, std):
    half = 1 / (num_bins - 1)
    levels = sorted({0, 1, num_bins // 2, num_bins - 2, num_bins - 1})
    for level in levels:
        x0 = torch.tensor([[2 * half * level - 1]])
        for mean in (-3.0, -1.0, -0.01, 0.5, 1.0, 2.5):
            low = -math.inf if level == 0 else (float(x0) - half - mean) / std
            high = math.inf if level == num_bins - 1 else (float(x0) + half - mean) / std
            got = -float(decoder_nll(x0, torch.tensor([[mean]]), torch.tensor(std**2), num_bins))
            want = _log_integral(max(low, -1e9), min(high, 1e9))
            assert math.isfinite(got)
            assert got == pytest.approx(want, rel=1e-9, abs=1e-9)
            # the naive difference, for the tails where it can be taken at all
            naive = torch.special.ndtr(torch.tensor(high)) - torch.special.ndtr(torch.tensor(low))
            if 1e-10 < naive < 1 - 1e-10 and abs(mean - float(x0)) < 5 * std:
                assert got == pytest.approx(math.log(float(naive)), abs=1e-4)


def test_bins_are_a_distribution():
    for mean, std in ((0.3, 0.05), (-1.2, 1e-3), (0.0, 3.0)):
        grid = (torch.arange(256) / 127.5 - 1)[:, None]
        nll = decoder_nll(grid, torch.full_like(grid, mean), torch.tensor(std**2))
        assert torch.exp(-nll).sum().item() == pytest.approx(1.0, abs=1e-12)


def test_far_tails_need_no_floor_and_a_floor_is_a_choice():
    x0, mean = torch.tensor([[-1.0], [0.0 + 1 / 255], [1.0]]), torch.tensor([[1.0], [-1.0], [-1.0]])
    nll = decoder_nll(x0, mean, torch.tensor(1e-10))
    assert bool(torch.isfinite(nll).all()) and float(nll.min()) > 1e9
    floored = decoder_nll(x0, mean, torch.tensor(1e-10), floor=1e-12)
    torch.testing.assert_close(floored, torch.full((3,), 12 * math.log(10)))


def test_decoder_has_gradients():
    x0 = torch.tensor([[-1.0, 1 / 255, 1.0]])
    mean = torch.tensor([[0.9, 0.0, 0.2]], requires_grad=True)
    variance = torch.tensor(0.01, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, v: decoder_nll(x0, m, v), (mean, variance))


def test_learned_variance_lies_between_the_fixed_ones():
    alpha_bar, tau = _alpha_bar(40), [39, 20, 5, 0]
    means, variances = torch.tensor([0.3]), torch.tensor([0.2])
    x0, noise, _ = _grid(means, variances)
    x0, noise = x0[:, :, None], noise[:, :, None]
    plain = _oracle(alpha_bar, means[:, None], variances[:, None])

    def run(variance, predict):
        return variational_bound(
            predict,
            x0,
            make_chain(alpha_bar, tau, variance),
            num_bins=None,
            noise=noise,
            dtype=torch.float64,
        )

    def network(raw):
        def predict(x_t, t):
            eps = plain(x_t[:, 0], t)[:, None]
            return torch.cat([eps, torch.full_like(eps, raw)], dim=1)

        return predict

    def eps(x_t, t):
        return plain(x_t[:, 0], t)[:, None]

    low, high = run("learned_range", network(-1.0)), run("learned_range", network(1.0))
    small, large = run("fixed_small", eps), run("fixed_large", eps)
    torch.testing.assert_close(low.total, small.total)
    torch.testing.assert_close(high.value, large.value)
    # L_0's upper bound is beta_0, which no fixed variance uses
    assert not torch.allclose(high.decoder, large.decoder)
    middle = run("learned_range", network(0.3))
    chain = make_chain(alpha_bar, tau, "learned_range")
    share = torch.exp(0.65 * chain.log_variance_range[:, 1] + 0.35 * chain.log_variance_range[:, 0])
    by_hand = bound_from_errors(
        likelihood.Chain(
            chain.timesteps,
            chain.alpha_bar,
            chain.alpha_bar_before,
            chain.posterior_variance,
            chain.weight,
            share,
        ),
        x0,
        middle.x0_error,
        middle.decoder,
    )
    torch.testing.assert_close(middle.value, by_hand.value)
    with pytest.raises(ValueError, match="learned variance"):
        bound_from_errors(chain, x0, middle.x0_error, middle.decoder)


def test_one_pass_serves_every_chain():
    alpha_bar = _alpha_bar(40)
    means, variances = torch.tensor([0.3, 0.0]), torch.tensor([0.2, 0.1])
    x0, noise, _ = _grid(means, variances)
    x0 = x0[:, :].clamp(-1, 1)
    gamma = torch.linspace(0.4, 1.01, 40)
    for variance, tau in (("optimal", [39, 12, 0]), ("fixed_large", [30, 29, 4, 0])):
        chain = make_chain(alpha_bar, tau, variance, gamma=gamma)
        terms = variational_bound(
            _oracle(alpha_bar, means, variances),
            x0,
            chain,
            num_bins=None,
            clip=0.9,
            noise=noise,
            dtype=torch.float64,
        )
        again = bound_from_errors(chain, x0, terms.x0_error, terms.decoder)
        torch.testing.assert_close(again.total, terms.total)


def test_clipping_is_a_choice():
    alpha_bar = _alpha_bar(40)
    x0 = torch.full((8, 1), 1.0)
    noise = torch.linspace(-3, 3, 8)[:, None]
    chain = make_chain(alpha_bar, [39, 20, 5, 0])
    free, clipped = (
        variational_bound(
            lambda x, t: torch.zeros_like(x),
            x0,
            chain,
            num_bins=None,
            clip=limit,
            noise=noise,
            dtype=torch.float64,
        )
        for limit in (None, 1.0)
    )
    assert bool((clipped.x0_error <= free.x0_error + 1e-12).all())
    assert float(clipped.total.sum()) < float(free.total.sum())
    assert float(clipped.x0_error.max()) <= 4


def test_coding_curve_adds_up():
    alpha_bar, d = _alpha_bar(40), 12
    means, variances = torch.zeros(d), torch.full((d,), 0.1)
    levels = torch.randint(0, 256, (50, d))
    chain = make_chain(alpha_bar, [39, 20, 5, 0], "fixed_large")
    terms = variational_bound(
        _oracle(alpha_bar, means, variances), levels / 127.5 - 1, chain, dtype=torch.float64
    )
    curve = coding_curve(chain, terms)
    assert [point.timestep for point in curve] == [39, 20, 5, 0]
    total = bits_per_dim(terms.total.mean(), d)
    assert curve[-1].rate + curve[-1].term == pytest.approx(float(total))
    assert curve[0].rate == pytest.approx(float(bits_per_dim(terms.prior.mean(), d)))
    assert all(b.rate > a.rate for a, b in zip(curve, curve[1:], strict=False))
    assert curve[-1].distortion == pytest.approx(
        127.5 * math.sqrt(float(terms.x0_error[:, -1].mean()))
    )
    part = variational_bound(
        _oracle(alpha_bar, means, variances),
        levels / 127.5 - 1,
        chain,
        estimator="stratified",
        num_calls=2,
        dtype=torch.float64,
    )
    with pytest.raises(ValueError, match="every step"):
        coding_curve(chain, part)


def test_a_float32_network_is_close_and_the_bound_stays_float64():
    alpha_bar, means, variances = _alpha_bar(40), torch.tensor([0.3]), torch.tensor([0.2])
    x0, noise, _ = _grid(means, variances)
    chain, oracle = make_chain(alpha_bar, [39, 20, 5, 0]), _oracle(alpha_bar, means, variances)
    seen = []

    def single(x_t, t):
        seen.append(x_t.dtype)
        return oracle(x_t.double(), t).float()

    half, full = (
        variational_bound(f, x0, chain, num_bins=None, noise=noise, dtype=dtype).total
        for f, dtype in ((single, torch.float32), (oracle, torch.float64))
    )
    assert set(seen) == {torch.float32} and half.dtype == torch.float64
    torch.testing.assert_close(half, full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"timesteps": [39, 5]}, "contains timestep 0"),
        ({"timesteps": [5, 39, 0]}, "decrease"),
        ({"eta": 0.0}, "infinite"),
        ({"sigma": [0.0, 0.0]}, "infinite"),
        ({"sigma": [0.1]}, "one value for each"),
        ({"eta": 0.5, "variance": "fixed_large"}, "eta=1"),
        ({"sigma": [0.1, 0.0], "variance": "learned_range"}, "explicit `sigma`"),
        ({"variance": "optimal"}, "calibration"),
        ({"variance": "optimal", "gamma": torch.ones(40)}, r"gamma\[0\]"),
        ({"variance": "beta"}, "one of"),
    ],
)
def test_plans_that_have_no_bound_are_refused(change, message):
    settings = {"timesteps": [39, 0], "variance": "fixed_small", **change}
    with pytest.raises(ValueError, match=message):
        make_chain(_alpha_bar(40), **settings)


@pytest.mark.parametrize("bad", [0.001, 1.1, -1.5, math.nan, 1.0 - 1e-5])
def test_data_off_the_grid_are_refused(bad):
    chain = make_chain(_alpha_bar(40), [39, 0])
    x0 = torch.tensor([[1.0, bad]])
    with pytest.raises(ValueError, match="equally spaced"):
        variational_bound(lambda x, t: x, x0, chain)
    digits = (torch.arange(17, dtype=torch.float32) / 8 - 1)[None]
    likelihood.grid_levels(digits, 17)
    with pytest.raises(ValueError, match="equally spaced"):
        likelihood.grid_levels(digits, 256)
    pixels = (torch.arange(256, dtype=torch.uint8).float() * (2 / 255)) - 1
    assert torch.equal(likelihood.grid_levels(pixels, 256), torch.arange(256))
    wide = torch.arange(65536).float() * (2 / 65535) - 1
    assert torch.equal(likelihood.grid_levels(wide, 65536), torch.arange(65536))


def test_bad_estimators_are_refused():
    chain = make_chain(_alpha_bar(40), [39, 0])
    x0 = torch.zeros(2, 1)
    for settings, message in (
        ({"estimator": "stratified"}, "num_calls"),
        ({"estimator": "uniform", "num_calls": 1}, "num_calls"),
        ({"estimator": "some", "num_calls": 4}, "estimator"),
        ({"estimator": "importance", "num_calls": 4, "proposal": torch.zeros(1)}, "proposal"),
    ):
        with pytest.raises(ValueError, match=message):
            variational_bound(lambda x, t: x, x0, chain, num_bins=None, **settings)


def test_small_pieces():
    alpha_bar = _alpha_bar(40)
    assert float(first_posterior_variance(alpha_bar[:1])) == pytest.approx(1e-3)
    x0 = torch.randn(3, 4)
    a = alpha_bar[20]
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(
        normal(a.sqrt() * x0, (1 - a).sqrt()), normal(0.0, 1.0)
    )
    torch.testing.assert_close(prior_kl(x0, a), want.sum(1))
    assert math.isnan(estimate(torch.ones(1)).std_error)
    assert float(bits_per_dim(torch.tensor(math.log(2) * 8), 8)) == pytest.approx(1.0)
    assert float(x0_variance(torch.tensor([0.0]), torch.tensor([0.01]))) == 1.0
