"""Methods of restoration on Gaussian data, where everything is affine and known in closed form.

The network is the exact eps of x_0 ~ N(m, C). A method that is affine then makes of x_T and its
noise an affine map, whose mean and covariance the recursions below give step by step. They are
written with NumPy's matrices alone.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.pipelines import RestorationPipeline
from ddim_schedulers.pipelines.restoration import pipeline as module
from ddim_schedulers.pipelines.restoration.methods import Ddrm, Dps, Mmps, RePaint
from ddim_schedulers.pipelines.restoration.operators import Composition, Inpainting, Matrix

SHAPE = (1, 2, 3)
N = 6
NUMBERS = np.random.default_rng(7)
MEAN = 0.3 * NUMBERS.normal(size=N)
ROOT = 0.4 * NUMBERS.normal(size=(N, N))
COVARIANCE = ROOT @ ROOT.T + 0.05 * np.eye(N)
# singular values from 1.5 down to 0.2, and two directions that nothing is known of
_LEFT, _RIGHT = (np.linalg.qr(NUMBERS.normal(size=(k, k)))[0] for k in (4, N))
A = _LEFT @ np.diag([1.5, 1.0, 0.5, 0.2]) @ _RIGHT[:4]
TRUTH = MEAN + ROOT @ NUMBERS.normal(size=N)
MASK = np.array([1.0, 1, 0, 1, 0, 0])


class Output(BaseOutput):
    sample: torch.Tensor


class GaussianNetwork(ModelMixin, ConfigMixin):
    """eps_hat = sqrt(1 - abar) (abar C + (1 - abar) I)^-1 (x - sqrt(abar) m), as a network."""

    @register_to_config
    def __init__(self, sample_size=(2, 3), in_channels=1, out_channels=1):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        self.alpha_bar = GeneralizedDDIMScheduler().alpha_bar
        self.calls = 0

    def forward(self, sample, timestep):
        self.calls += 1
        a = float(self.alpha_bar[int(timestep)])
        inverse = np.linalg.inv(a * COVARIANCE + (1 - a) * np.eye(N))
        gain = torch.from_numpy((1 - a) ** 0.5 * inverse)
        eps = (sample.flatten(1) - a**0.5 * torch.from_numpy(MEAN)) @ gain.T
        return Output(sample=self.scale * eps.view_as(sample))


def make_pipe(**config):
    scheduler = GeneralizedDDIMScheduler(clip_sample=False, timestep_spacing="trailing", **config)
    pipe = RestorationPipeline(GaussianNetwork(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, operator, y, **settings):
    """Returns the samples of one measurement, (K, N)."""
    given = torch.from_numpy(y).view(1, *operator.measured_shape)
    return pipe(given, operator, output_type="latent", **settings).images.flatten(1).numpy()


def affine_map(monkeypatch, pipe, operator, y, **settings):
    """Returns (b, L) of x_0 = b + L (x_T's noise, then each draw), by one batch of unit vectors."""
    count = [0]

    def run(slots):
        count[0] = 0
        rows = 1 + N * slots
        given = torch.zeros(rows, slots, N, dtype=torch.float64)
        for i in range(1, rows):
            given[i, (i - 1) // N, (i - 1) % N] = 1

        def draw(shape, *_):
            count[0] += 1
            where = given[:, count[0] - 1] if count[0] <= slots else torch.zeros(rows, N)
            return where.double().view(shape)

        with monkeypatch.context() as patch:
            patch.setattr(module, "draw", draw)
            return sample(pipe, operator, y, seeds=range(rows), batch_size=rows, **settings)

    run(1)
    x = run(count[0])
    return x[0], (x[1:] - x[0]).T


class Level:
    """What the exact network says at a level: x0_hat = F x + f, eps_hat = E x + e."""

    def __init__(self, a):
        inverse = np.linalg.inv(a * COVARIANCE + (1 - a) * np.eye(N))
        self.a = a
        self.F = a**0.5 * COVARIANCE @ inverse
        self.f = MEAN - a**0.5 * self.F @ MEAN
        self.E = (1 - a) ** 0.5 * inverse
        self.e = -(a**0.5) * self.E @ MEAN

    def rederive(self, G, g):
        """eps_hat that belongs to x0_hat = G x + g."""
        root = (1 - self.a) ** 0.5
        return (np.eye(N) - self.a**0.5 * G) / root, -(self.a**0.5) * g / root


def guided(level, operator, y, noise, method):
    """(G, g, H, h): x0_hat = G x + g and eps_hat = H x + h of a method that only predicts."""
    a = level.a
    if method == "ddnm":
        inverse = np.linalg.pinv(operator)
        free = np.eye(N) - inverse @ operator
        return free @ level.F, inverse @ y + free @ level.f, level.E, level.e
    cover = (1 - a) * np.eye(N) if method == "pigdm" else (1 - a) / a**0.5 * level.F
    inner = operator @ cover @ operator.T + noise**2 * np.eye(len(operator))
    # of MMPS the covariance once more; of PiGDM sqrt(abar) J^T r^2
    push = a**0.5 * level.F.T * (1 - a) if method == "pigdm" else cover
    gain = push @ operator.T @ np.linalg.pinv(inner, rcond=1e-13)
    G, g = level.F - gain @ operator @ level.F, level.f + gain @ (y - operator @ level.f)
    return (G, g, level.E, level.e) if method == "pigdm" else (G, g, *level.rederive(G, g))


def sigma_of(a, b, eta, rule):
    if rule == "paper":
        return eta * (1 - b) ** 0.5
    return eta * ((1 - b) / (1 - a)) ** 0.5 * (1 - a / b) ** 0.5


def levels_of(scheduler, steps):
    scheduler.set_timesteps(steps)
    return [float(scheduler.alpha_bar[int(t)]) for t in scheduler.timesteps] + [1.0]


def recursion(levels, method, operator, y, noise, eta, rule="family", eta_b=1.0, start=None):
    """Returns the mean and covariance of x_0."""
    mean, cov = (np.zeros(N), np.eye(N)) if start is None else start
    for a, b in zip(levels, levels[1:], strict=False):
        level = Level(a)
        sigma = 0.0 if b == 1 else sigma_of(a, b, eta, rule)
        eps = max(1 - b - sigma**2, 0) ** 0.5
        if method in ("ddrm", "noisy ddnm"):
            M, c, Q = spectral(level, b, eps, sigma, operator, y, noise, eta_b)
        else:
            G, g, H, h = guided(level, operator, y, noise, method)
            M, c, Q = b**0.5 * G + eps * H, b**0.5 * g + eps * h, sigma**2 * np.eye(N)
        mean, cov = M @ mean + c, M @ cov @ M.T + Q
    return mean, cov


def spectral(level, b, eps, sigma, operator, y, noise, eta_b):
    """One step of DDRM, Eq. 7-8, in its own variables x / sqrt(abar), direction by direction."""
    U, s, Vt = np.linalg.svd(operator)
    s = np.concatenate([s, np.zeros(N - len(s))])
    seen = np.concatenate([U.T @ y, np.zeros(N - len(y))])[:N]
    level_s = ((1 - b) / b) ** 0.5  # the standard deviation of the noise there
    share = sigma / (1 - b) ** 0.5 if b < 1 else 0.0  # the paper's eta
    M, c, Q = np.zeros((N, N)), np.zeros(N), np.zeros(N)
    for i, v in enumerate(Vt):
        x0, f, e_x, e = v @ level.F, v @ level.f, v @ level.E, v @ level.e
        if s[i] < 1e-9:
            rest = (1 - share**2) ** 0.5 * level_s
            M[i], c[i], Q[i] = x0 + rest * e_x, f + rest * e, (share * level_s) ** 2
            continue
        error, known = noise / s[i], seen[i] / s[i]
        if level_s >= error:
            M[i], c[i] = (1 - eta_b) * x0, (1 - eta_b) * f + eta_b * known
            Q[i] = level_s**2 - (eta_b * error) ** 2
        else:
            rest = (1 - share**2) ** 0.5 * level_s / error
            M[i], c[i], Q[i] = (1 - rest) * x0, f + rest * (known - f), (share * level_s) ** 2
    back = b**0.5 * Vt.T
    return back @ M, back @ c, b * Vt.T @ np.diag(Q) @ Vt


def ddrm_start(a, operator, y, noise):
    U, s, Vt = np.linalg.svd(operator)
    mean, var = np.zeros(N), np.full(N, 1 - a)
    for i in range(len(s)):
        if s[i] > 1e-9 and ((1 - a) / a) ** 0.5 >= noise / s[i]:
            mean[i] = a**0.5 * (U.T @ y)[i] / s[i]
            var[i] = 1 - a - a * (noise / s[i]) ** 2
    return Vt.T @ mean, Vt.T @ np.diag(var) @ Vt


def compare(found, expected, tolerance=1e-10):
    b, L = found
    np.testing.assert_allclose(b, expected[0], rtol=0, atol=tolerance)
    np.testing.assert_allclose(L @ L.T, expected[1], rtol=0, atol=tolerance)


def measured(noise):
    return A @ TRUTH + noise * np.array([0.3, -1.2, 0.8, -0.1])


@pytest.mark.parametrize("steps", [5, 20, 100])
@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize(
    "method, noise",
    [("ddnm", 0.0), ("pigdm", 0.0), ("pigdm", 0.2), ("mmps", 0.0), ("mmps", 0.2)],
)
def test_methods_that_predict(method, noise, eta, steps, monkeypatch):
    pipe, y = make_pipe(), measured(noise)
    settings = {"noise_std": noise, "method": method, "eta": eta, "num_inference_steps": steps}
    found = affine_map(monkeypatch, pipe, Matrix(torch.from_numpy(A), SHAPE), y, **settings)
    expected = recursion(levels_of(pipe.scheduler, steps), method, A, y, noise, eta)
    compare(found, expected, 1e-8 if method == "mmps" else 1e-10)


@pytest.mark.parametrize("rule", ["family", "paper"])
@pytest.mark.parametrize("steps", [5, 20, 100])
@pytest.mark.parametrize("eta_b", [1.0, 0.7])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_ddrm(noise, eta_b, steps, rule, monkeypatch):
    pipe, y, eta = make_pipe(), measured(noise), 0.85
    settings = {"noise_std": noise, "method": Ddrm(eta_b), "eta": eta, "eta_rule": rule}
    settings["num_inference_steps"] = steps
    found = affine_map(monkeypatch, pipe, Matrix(torch.from_numpy(A), SHAPE), y, **settings)
    levels = levels_of(pipe.scheduler, steps)
    start = ddrm_start(levels[0], A, y, noise)
    compare(found, recursion(levels, "ddrm", A, y, noise, eta, rule, eta_b, start))


@pytest.mark.parametrize("steps", [5, 20, 100])
@pytest.mark.parametrize("rule", ["family", "paper"])
def test_noisy_ddnm_is_ddrm_with_eta_b_1_from_plain_noise(rule, steps, monkeypatch):
    pipe, y = make_pipe(), measured(0.2)
    settings = {"noise_std": 0.2, "method": "ddnm", "eta": 0.85, "eta_rule": rule}
    settings["num_inference_steps"] = steps
    found = affine_map(monkeypatch, pipe, Matrix(torch.from_numpy(A), SHAPE), y, **settings)
    levels = levels_of(pipe.scheduler, steps)
    compare(found, recursion(levels, "noisy ddnm", A, y, 0.2, 0.85, rule))


def repaint_way(steps, jump, times):
    """The authors' `get_schedule_jump`, with their t: steps - 1 is x_T, -1 the image."""
    jumps = {t: times - 1 for t in range(0, steps - jump, jump)}
    t, way = steps, []
    while t >= 1:
        t -= 1
        way.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            for _ in range(jump):
                t += 1
                way.append(t)
    return [*way, -1]


@pytest.mark.parametrize("steps, jump, times", [(5, 1, 3), (20, 4, 2), (20, 1, 2), (100, 10, 2)])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_repaint(steps, jump, times, eta, monkeypatch):
    operator, y = np.diag(MASK), MASK * TRUTH
    pipe, method = make_pipe(), RePaint(resamplings=times, jump_length=jump)
    mask = Inpainting(torch.from_numpy(MASK).view(2, 3), SHAPE)
    settings = {"method": method, "eta": eta, "num_inference_steps": steps}
    found = affine_map(monkeypatch, pipe, mask, y, **settings)
    levels = levels_of(pipe.scheduler, steps)
    mean, cov = np.zeros(N), np.eye(N)
    way = [steps - 1 - t for t in repaint_way(steps, jump, times)]
    for here, there in zip(way, way[1:], strict=False):
        a, b = levels[here], levels[there]
        if there < here:
            ratio = b / a
            mean, cov = ratio**0.5 * mean, ratio * cov + (1 - ratio) * np.eye(N)
            continue
        level, sigma = Level(a), 0.0 if b == 1 else sigma_of(a, b, eta, "family")
        eps, free = max(1 - b - sigma**2, 0) ** 0.5, np.eye(N) - operator
        M = free @ (b**0.5 * level.F + eps * level.E)
        c = free @ (b**0.5 * level.f + eps * level.e) + b**0.5 * y
        mean = M @ mean + c
        cov = M @ cov @ M.T + sigma**2 * free + (1 - b) * operator
    compare(found, (mean, cov))
    pipe.unet.calls = 0
    out = pipe(torch.from_numpy(y).view(1, *SHAPE), mask, seeds=0, output_type="pt", **settings)
    assert (
        out.network_calls
        == pipe.unet.calls
        == sum(b > a for a, b in zip(way, way[1:], strict=False))
    )


def posterior(y, noise, operator=A):
    inner = operator @ COVARIANCE @ operator.T + noise**2 * np.eye(len(operator))
    gain = COVARIANCE @ operator.T @ np.linalg.inv(inner)
    return MEAN + gain @ (y - operator @ MEAN), COVARIANCE - gain @ operator @ COVARIANCE


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_mmps_is_the_posterior(noise, eta, monkeypatch):
    """From q(x_T | y): its mean for every number of steps, its covariance at order 1."""
    pipe, y = make_pipe(), measured(noise)
    mean, cov = posterior(y, noise)
    errors = []
    for steps in (25, 50, 100):
        settings = {"noise_std": noise, "method": "mmps", "eta": eta, "num_inference_steps": steps}
        b, L = affine_map(monkeypatch, pipe, Matrix(torch.from_numpy(A), SHAPE), y, **settings)
        a = levels_of(pipe.scheduler, steps)[0]
        # the first N columns are of x_T, which is N(sqrt(a) mean, a cov + (1 - a) I) given y
        first, rest = L[:, :N], L[:, N:]
        np.testing.assert_allclose(b + a**0.5 * first @ mean, mean, rtol=0, atol=1e-12)
        whole = first @ (a * cov + (1 - a) * np.eye(N)) @ first.T + rest @ rest.T
        errors.append(np.abs(whole - cov).max())
    assert errors[0] < 0.2 and errors[-1] < 0.05
    for before, after in zip(errors, errors[1:], strict=False):
        assert 1.6 < before / after < 2.6


@pytest.mark.parametrize("eta, floor", [(0.0, 2e-2), (1.0, 2e-4)])
def test_the_floor_of_mmps_from_plain_noise(eta, floor, monkeypatch):
    """x_T ~ N(0, I) is not q(x_T | y): what is left of its signal stays in the mean."""
    pipe, y = make_pipe(), measured(0.2)
    settings = {"noise_std": 0.2, "method": "mmps", "eta": eta, "num_inference_steps": 100}
    b, _ = affine_map(monkeypatch, pipe, Matrix(torch.from_numpy(A), SHAPE), y, **settings)
    error = np.abs(b - posterior(y, 0.2)[0]).max()
    assert floor / 1000 < error < floor


@pytest.mark.parametrize("method", ["ddnm", "mmps", "pigdm"])
def test_the_wrong_eps_is_noticed(method, monkeypatch):
    """Keeping eps_hat where it is re-derived, or the other way, is another sampler."""
    pipe, y = make_pipe(), measured(0.0)
    settings = {"method": method, "eta": 0.0, "num_inference_steps": 20}
    b, L = affine_map(monkeypatch, pipe, Matrix(torch.from_numpy(A), SHAPE), y, **settings)
    levels, right = levels_of(pipe.scheduler, 20), guided

    def wrong(level, operator, y, noise, method):
        G, g, _, _ = right(level, operator, y, noise, method)
        return (G, g, level.E, level.e) if method == "mmps" else (G, g, *level.rederive(G, g))

    monkeypatch.setitem(globals(), "guided", wrong)
    mean, cov = recursion(levels, method, A, y, 0.0, 0.0)
    assert max(np.abs(b - mean).max(), np.abs(L @ L.T - cov).max()) > 0.1


@pytest.mark.parametrize("steps", [5, 20, 100])
@pytest.mark.parametrize("eta, zeta", [(0.0, 0.05), (1.0, 0.1)])  # larger: chaos near r = 0
def test_dps_step_by_step(eta, zeta, steps, monkeypatch):
    pipe, y = make_pipe(), measured(0.1)
    noise = NUMBERS.normal(size=(steps, N))
    given = iter(noise)

    def draw(shape, *_):
        return torch.from_numpy(next(given)).view(shape)

    levels = levels_of(pipe.scheduler, steps)
    with monkeypatch.context() as patch:
        patch.setattr(module, "draw", draw)
        settings = {"noise_std": 0.1, "method": Dps(zeta), "eta": eta, "num_inference_steps": steps}
        found = sample(pipe, Matrix(torch.from_numpy(A), SHAPE), y, seeds=0, **settings)[0]
    x, given = noise[0], iter(noise[1:])
    for a, b in zip(levels, levels[1:], strict=False):
        level, sigma = Level(a), 0.0 if b == 1 else sigma_of(a, b, eta, "family")
        x0, eps = level.F @ x + level.f, level.E @ x + level.e
        residual = y - A @ x0
        gradient = -2 * level.F.T @ A.T @ residual  # of |y - A x0_hat|^2 by x_t
        x = b**0.5 * x0 + (1 - b - sigma**2) ** 0.5 * eps
        x = x + (sigma * next(given) if sigma else 0)
        x = x - zeta / np.linalg.norm(residual) * gradient
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-9)


def test_pigdm_and_mmps_without_singular_values(monkeypatch):
    """A composition is solved by iterations, and another library's operator is, too."""
    whole = Matrix(torch.from_numpy(A), SHAPE)

    class Foreign:
        def A(self, x):  # noqa: N802
            return whole.A(x)

        def A_adjoint(self, y):  # noqa: N802
            return whole.A_adjoint(y)

        def A_dagger(self, y):  # noqa: N802
            return whole.A_dagger(y)

    pipe = make_pipe()
    for noise in (0.0, 0.2):
        y = measured(noise)
        for method in ("ddnm", "pigdm", "mmps", "dps"):
            if noise and method == "ddnm":
                continue
            settings = {"noise_std": noise, "method": method, "num_inference_steps": 10, "seeds": 3}
            expected = sample(pipe, whole, y, **settings)
            given = torch.from_numpy(y)[None]
            for operator in (Foreign(), Composition(SHAPE, whole)):
                found = pipe(given, operator, output_type="latent", **settings).images
                np.testing.assert_allclose(found.flatten(1), expected, rtol=0, atol=1e-7)


def test_an_unfinished_solution_is_told_of(caplog):
    pipe, y = make_pipe(), measured(0.2)
    from diffusers.utils import logging

    logging.enable_propagation()
    settings = {"noise_std": 0.2, "num_inference_steps": 5, "seeds": 0}
    whole = Matrix(torch.from_numpy(A), SHAPE)
    with caplog.at_level("WARNING"):
        sample(pipe, whole, y, method=Mmps(), **settings)
        assert not caplog.records
        sample(pipe, whole, y, method=Mmps(max_iterations=1), **settings)
    logging.disable_propagation()
    assert "relative residuals of up to" in caplog.text and "max_iterations" in caplog.text


PAGE = Path(__file__).parents[1] / "docs" / "results.md"
BIAS = re.findall(
    r"^\| `(\w+)`(?:, (\d+) times)? \| (0|0\.2) \| ([\d.]+)(, paper)? \| (.*) \|$",
    PAGE.read_text(),
    re.MULTILINE,
)


def bias(monkeypatch, method, noise, eta, rule, steps):
    """Returns the largest error of the mean, and the spread of the samples over the posterior's."""
    operator, matrix, y = Matrix(torch.from_numpy(A), SHAPE), A, measured(noise)
    if isinstance(method, RePaint):
        operator = Inpainting(torch.from_numpy(MASK).view(2, 3), SHAPE)
        matrix, y = np.eye(N)[MASK > 0], MASK * TRUTH
    settings = {"noise_std": noise, "method": method, "eta": eta, "eta_rule": rule}
    settings["num_inference_steps"] = steps
    b, L = affine_map(monkeypatch, make_pipe(), operator, y, **settings)
    given = matrix @ TRUTH if isinstance(method, RePaint) else y
    mean, cov = posterior(given, noise, matrix)
    return np.abs(b - mean).max(), np.sqrt(np.trace(L @ L.T) / np.trace(cov))


@pytest.mark.parametrize("row", BIAS, ids=lambda row: " ".join(row[:5]))
def test_the_page_says_how_far_each_method_is_from_the_posterior(row, monkeypatch):
    method, times, noise, eta, rule, shown = row
    chosen = RePaint(int(times)) if times else method
    cells = shown.split(" | ")
    for steps, said in ((20, cells[:2]), (100, cells[2:])):
        if said == ["", ""]:
            continue
        rule_name = "paper" if rule else "family"
        found = bias(monkeypatch, chosen, float(noise), float(eta), rule_name, steps)
        assert [float(s) for s in said] == pytest.approx(list(found), abs=6e-4)


def test_the_page_has_every_affine_method():
    assert {row[0] for row in BIAS} == {"ddnm", "ddrm", "repaint", "pigdm", "mmps"}
