r"""Multistep members of the family: a step of order k uses the last k predictions.

DDIM is Euler's method for the probability-flow ODE (DDIM, arXiv:2010.02502, Eq. 14). With
rho = sqrt(1 - alpha_bar) / sqrt(alpha_bar) it reads

    d (x / sqrt(alpha_bar)) = eps d rho     or     d (x / sqrt(1 - alpha_bar)) = x0 d (1 / rho)

and Euler's method takes the prediction e_0 of the present step, eps or x0, as constant. Order k
puts the polynomial of degree k - 1 through e_0 and the predictions e_1, e_2 of the steps before in
its place (variable-step Adams-Bashforth). A constant is reproduced by every order, so that a step
is the first-order one plus differences of predictions:

    x_s = sqrt(abar_s) x0_hat + sqrt(1 - abar_s - sigma^2) eps_hat + sum_j w_j (e_j - e_0) + std z

What the polynomial is a function of: for eps rho, as in DEIS (arXiv:2204.13902). For x0 it is
asinh(rho / SCALE), which is log rho, DPM-Solver++'s variable (arXiv:2211.01095), where rho is large
and x0_hat settles with each doubling of the signal, and rho where it is small, so that the step
that lands on x_0 (rho = 0, log rho infinite) has a full order, too.

The corrector (UniC of UniPC, arXiv:2302.04867) takes the step to t once more when the prediction at
t is there, with the polynomial that passes through it as well. x_t is then better than the sample
that was handed in; in the step to s the difference is again a sum of differences of predictions, so
that it is a part of the weights and costs nothing but one more prediction remembered.

A member sigma > 0 moves deterministically to rho_end = sqrt(1 - abar_s - sigma^2) / sqrt(abar_s),
below rho_s, while the predictions change as from rho_t to rho_s: the noise that is added brings the
sample back up. So the polynomial is averaged over the step as it is, with the kernel of the member
(SA-Solver, arXiv:2309.05019). For Gaussian data the marginal variance is then of order 2 in the
step for x0; for eps it stays of order 1, as the noise that is added is a part of every later
eps_hat.

The weights w_j are float64 and depend on the trajectory and on sigma alone.
"""

import torch

from .transition import direction

SOLVER_FORMS = ("epsilon", "sample")
MAX_ORDER = 3
# rho below which x0_hat is a polynomial in rho rather than in log rho
SCALE = 3.0
# The kernel exp(-reach) beyond which it counts as all at the end of the step.
MAX_REACH = 60.0


def gauss_legendre(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the points and weights of Gauss-Legendre quadrature on [0, 1], float64 (count,).

    From the eigenvalues of the Jacobi matrix (Golub and Welsch, 1969).
    """
    k = torch.arange(1, count, dtype=torch.float64, device="cpu")
    beside = k / (4 * k**2 - 1).sqrt()
    points, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return 0.5 * (points + 1), vectors[0] ** 2


# enough for the kernels of all steps up to MAX_REACH to rounding
GAUSS_LEGENDRE = gauss_legendre(48)


def multistep_weights(
    form: str,
    order: int,
    alpha_bar_t: torch.Tensor,
    alpha_bar_s: torch.Tensor,
    sigma: torch.Tensor,
    corrector: bool = False,
    lower_order_final: bool = False,
) -> torch.Tensor:
    """Return the weights of e_j - e_0 for every planned step and every number of known predictions.

    Args:
        form: `epsilon` or `sample`, what is interpolated.
        order: 2 or 3, at most `MAX_ORDER`.
        alpha_bar_t: of the n planned timesteps in the order of sampling, float64 (n,), increasing.
        alpha_bar_s: where each of these steps lands, (n,), above alpha_bar_t; the last may be 1.
        sigma: the member, (n,), 0 <= sigma^2 <= 1 - alpha_bar_s.
        corrector: take each step once more with the prediction where it landed.
        lower_order_final: end with a step of order 1, after one of at most order 2.

    Returns:
        float64 (m + 1, n, m), m = order - 1, one more with the corrector: entry [c, i, j - 1] is
        w_j in step i where the predictions of c steps just before it are known. A step that starts
        at alpha_bar = 0, where rho is infinite, has order 1 and is no node of later ones.
    """
    n, memory = alpha_bar_t.shape[0], order - 1 + corrector
    moments = step_moments(form, alpha_bar_t, alpha_bar_s, sigma)
    node = variable(form, alpha_bar_t)
    past = [_earlier(node, j) - node for j in range(memory + 1)]  # of e_j, from the start of a step
    step = torch.arange(n, device="cpu")
    usable = (step - (alpha_bar_t == 0).sum()).clamp(min=0)  # steps before it that are nodes
    predictor = usable.clamp(max=order - 1)
    if lower_order_final:
        predictor = torch.minimum(predictor, n - 1 - step)
    carried = _carry(form, alpha_bar_t, alpha_bar_s, sigma)
    weights = torch.zeros(memory + 1, n, memory, dtype=torch.float64, device="cpu")
    for known in range(1, memory + 1):
        for nodes in range(1, min(known, order - 1) + 1):
            here = predictor.clamp(max=known) == nodes
            for j, weight in enumerate(_extrapolation(moments, past[1 : nodes + 1])):
                weights[known, :, j] = torch.where(here, weight, weights[known, :, j])
        if corrector:
            made_with = _earlier(predictor.double(), 1).clamp(max=known - 1)
            for nodes in range(min(known, order)):
                here = (made_with == nodes) & (usable > 0)
                correction = _correction(moments, past, node, nodes)
                for j, weight in enumerate(correction):
                    weights[known, :, j] += torch.where(here, carried * weight, 0.0)
    return weights


def variable(form: str, alpha_bar: torch.Tensor) -> torch.Tensor:
    """Return what the polynomial is a function of, increasing in rho."""
    return _variable(form, ((1 - alpha_bar) / alpha_bar).sqrt())


def _variable(form: str, rho: torch.Tensor) -> torch.Tensor:
    return rho if form == "epsilon" else torch.asinh(rho / SCALE)


def _earlier(values: torch.Tensor, steps: int) -> torch.Tensor:
    """Return the value of the step that many steps before each; NaN where there is none."""
    none = torch.full_like(values[:steps], torch.nan)
    return torch.cat([none, values[: max(0, values.shape[0] - steps)]])


def _extrapolation(
    moments: list[torch.Tensor], nodes: list[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Return the integrals of the Lagrange polynomials on 0 and one or two more nodes."""
    if len(nodes) == 1:
        return (moments[0] / nodes[0],)
    first, second = nodes
    return (
        (moments[1] - second * moments[0]) / (first * (first - second)),
        (moments[1] - first * moments[0]) / (second * (second - first)),
    )


def _correction(
    moments: list[torch.Tensor], past: list[torch.Tensor], node: torch.Tensor, nodes: int
) -> list[torch.Tensor]:
    """Return the weights by which the prediction at t mends the step that landed there.

    That step used the polynomial P through its own prediction and `nodes` earlier ones. With e_0
    the polynomial gains (e_0 - P(t)) prod (u - u_j) / prod (u_t - u_j) over the nodes u_j of P.
    """
    before = [_earlier(moment, 1) for moment in moments]
    roots = [_earlier(distance, 1) for distance in past[: nodes + 1]]  # the first is 0
    end = node - _earlier(node, 1)
    if nodes == 0:
        mass = before[0]
    elif nodes == 1:
        mass = before[1] - roots[1] * before[0]
    else:
        mass = before[2] - (roots[1] + roots[2]) * before[1] + roots[1] * roots[2] * before[0]
    gain = mass
    for root in roots:
        gain = gain / (end - root)
    weights = []
    for j, root in enumerate(roots):
        lagrange = -gain
        for i, other in enumerate(roots):
            if i != j:
                lagrange = lagrange * (end - other) / (root - other)
        weights.append(lagrange)
    return weights


def _carry(
    form: str, alpha_bar_t: torch.Tensor, alpha_bar_s: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """Return by how much x_s moves with x_t while the predictions stay."""
    if form == "epsilon":
        return (alpha_bar_s / alpha_bar_t).sqrt()
    return direction(alpha_bar_s, sigma) / (1 - alpha_bar_t).sqrt()


def step_moments(
    form: str, alpha_bar_t: torch.Tensor, alpha_bar_s: torch.Tensor, sigma: torch.Tensor
) -> list[torch.Tensor]:
    """Return the integrals of u, u^2, u^3 over the step, u the variable less that at its start.

    The measure is the one whose integral of 1 is the weight of e_0 in the first-order step.
    """
    root = alpha_bar_s.sqrt()
    rho = ((1 - alpha_bar_t) / alpha_bar_t).sqrt()
    rho_s = (1 - alpha_bar_s).sqrt() / root
    rho_end = direction(alpha_bar_s, sigma) / root
    if form == "epsilon":
        mass, length = root * (rho_end - rho), rho_s - rho
        return [mass * length**m / (m + 1) for m in (1, 2, 3)]
    # in v = log(rho_t / rho) the kernel is exp(c v), c = 1 + eta^2 for small steps and 1 without
    # noise, such that its integral is that of the first-order step
    length, reach = (rho / rho_s).log(), (rho / rho_end).log()
    whole = torch.isfinite(reach) & (reach <= MAX_REACH)
    length, reach = torch.where(whole, length, 1.0), torch.where(whole, reach, 1.0)
    start = _variable(form, rho)
    point, weight = GAUSS_LEGENDRE
    reach = reach[..., None]
    kernel = weight * reach * torch.exp(reach * (point - 1))
    u = _variable(form, rho[..., None] * torch.exp(-length[..., None] * point)) - start[..., None]
    totals = [(kernel * u**m).sum(-1) for m in (1, 2, 3)]
    to_end = _variable(form, rho_s) - start
    moments = [torch.where(whole, total, to_end ** (m + 1)) for m, total in enumerate(totals)]
    return [root * torch.where(torch.isnan(rho_end), torch.nan, moment) for moment in moments]
