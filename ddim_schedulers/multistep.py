r"""Multistep members of the family: a step of order k uses the last k predictions.

DDIM is Euler's method for the probability-flow ODE (DDIM, arXiv:2010.02502, Eq. 14). With
rho = sqrt(1 - alpha_bar) / sqrt(alpha_bar) it reads

    d (x / sqrt(alpha_bar)) = eps d rho     or     d (x / sqrt(1 - alpha_bar)) = x0 d (1 / rho)

and Euler's method takes the prediction e_0 of the present step, eps or x0, as constant. Order k
puts the polynomial of degree k - 1 through e_0 and the predictions e_1, e_2 of the steps before in
its place (variable-step Adams-Bashforth). A constant is reproduced by every order, so that a step
is the first-order one plus differences of predictions:

    x_s = sqrt(abar_s) x0_hat + sqrt(1 - abar_s - sigma^2) eps_hat + sum_j w_j (e_j - e_0) + std z

What the polynomial is a function of (`SOLVER_VARIABLES`): for eps rho, as in DEIS
(arXiv:2204.13902), unless asked otherwise. For x0 it is asinh(rho / SCALE), which is log rho where
rho is large and x0_hat settles with each doubling of the signal, and rho where it is small, so that
the step that lands on x_0 (rho = 0) has a full order, too. log rho, which is -lambda, is the
variable of DPM-Solver++ (arXiv:2211.01095), UniPC and SA-Solver for x0, and of DPM-Solver
(arXiv:2206.00927) and diffusers' DEIS for eps. It is infinite at rho = 0: there the step that lands
on x_0 has order 1. The number of the step itself gives the classical weights, (3, -1) / 2, (23,
-16, 5) / 12 and so on, of iPNDM (arXiv:2204.13902, Sec. 3): of order 2 at most, as rho is not even
in it.

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

The weights are the integrals of the Lagrange polynomials. UniPC and SA-Solver in diffusers, and
DPM-Solver++ with `midpoint`, take another number where the polynomial is a straight line: the slope
times h B(h) / 2 (`SOLVER_WEIGHTS`; h is the step in log rho). It differs from the integral by
O(h^3), which leaves the order as it is.

The weights w_j are float64 and depend on the trajectory and on sigma alone.
"""

import torch

from .transition import direction

SOLVER_FORMS = ("epsilon", "sample")
SOLVER_VARIABLES = ("asinh", "log_rho", "rho", "step")
# The variable of each form where none is asked for.
OWN_VARIABLE = {"epsilon": "rho", "sample": "asinh"}
# `bh1` and `bh2`: UniPC's B(h), for x0 h and 1 - exp(-h).
SOLVER_WEIGHTS = ("exact", "bh1", "bh2")
MAX_ORDER = 4
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
    variable_name: str | None = None,
    weights_name: str = "exact",
    corrector_order: int | None = None,
) -> torch.Tensor:
    """Return the weights of e_j - e_0 for every planned step and every number of known predictions.

    Args:
        form: `epsilon` or `sample`, what is interpolated.
        order: from 2 to `MAX_ORDER`.
        alpha_bar_t: of the n planned timesteps in the order of sampling, float64 (n,), increasing.
        alpha_bar_s: where each of these steps lands, (n,), above alpha_bar_t; the last may be 1.
        sigma: the member, (n,), 0 <= sigma^2 <= 1 - alpha_bar_s.
        corrector: take each step once more with the prediction where it landed.
        lower_order_final: end with a step of order 1, after one of at most order 2.
        variable_name: one of `SOLVER_VARIABLES`, or None for that of the form.
        weights_name: one of `SOLVER_WEIGHTS`; other than `exact` with the variable `log_rho` alone.
        corrector_order: how many predictions the corrector uses, from 2 to order + 1; None is the
            most.

    Returns:
        float64 (m + 1, n, m), m = order - 1, one more with the corrector: entry [c, i, j - 1] is
        w_j in step i where the predictions of c steps just before it are known. A step that starts
        at alpha_bar = 0, where rho is infinite, has order 1 and is no node of later ones.
    """
    n, memory = alpha_bar_t.shape[0], order - 1 + corrector
    mended = order if corrector_order is None else corrector_order - 1
    step_of = (alpha_bar_t, alpha_bar_s, sigma)
    moments = step_moments(form, *step_of, variable_name)
    line = line_moment(moments[0], form, *step_of, variable_name, weights_name)
    node = variable(form, alpha_bar_t, variable_name)
    past = [_earlier(node, j) - node for j in range(memory + 1)]  # of e_j, from the start of a step
    step = torch.arange(n, device="cpu")
    usable = (step - (alpha_bar_t == 0).sum()).clamp(min=0)  # steps before it that are nodes
    most = torch.minimum(usable, n - 1 - step) if lower_order_final else usable
    predictor = torch.where(has_line(alpha_bar_s, variable_name), most.clamp(max=order - 1), 0)
    carried = _carry(form, alpha_bar_t, alpha_bar_s, sigma)
    weights = torch.zeros(memory + 1, n, memory, dtype=torch.float64, device="cpu")
    for known in range(1, memory + 1):
        for nodes in range(1, min(known, order - 1) + 1):
            here = predictor.clamp(max=known) == nodes
            for j, weight in enumerate(_extrapolation(line, moments, past[1 : nodes + 1])):
                weights[known, :, j] = torch.where(here, weight, weights[known, :, j])
        if not corrector:
            continue
        made_with = _earlier(predictor.double(), 1).clamp(max=known - 1)
        mended_with = _earlier(most.clamp(max=mended - 1).double(), 1).clamp(max=known - 1)
        for nodes in range(min(known, mended)):
            # fewer nodes than the corrector may have: the step was made with the same ones
            fewer = nodes < mended - 1
            for made in range(nodes, nodes + 1 if fewer else min(known, order)):
                here = (mended_with == nodes) & (made_with == made) & (usable > 0)
                correction = _correction(line, moments, past, node, nodes, made)
                for j, weight in enumerate(correction):
                    weights[known, :, j] += torch.where(here, carried * weight, 0.0)
    return weights


def variable(form: str, alpha_bar: torch.Tensor, name: str | None = None) -> torch.Tensor:
    """Return what the polynomial is a function of, increasing in rho.

    Args:
        form: whose own variable it is where `name` is None.
        alpha_bar: in [0, 1]; for `step`, of the planned timesteps in the order of sampling.
        name: one of `SOLVER_VARIABLES`, or None.
    """
    if name == "step":
        return -torch.arange(len(alpha_bar), dtype=torch.float64, device="cpu")
    return _variable(name or OWN_VARIABLE[form], ((1 - alpha_bar) / alpha_bar).sqrt())


def _variable(name: str, rho: torch.Tensor) -> torch.Tensor:
    if name == "asinh":
        return torch.asinh(rho / SCALE)
    return rho.log() if name == "log_rho" else rho


def has_line(alpha_bar_s: torch.Tensor, name: str | None) -> torch.Tensor:
    """Tell where a step may have an order above 1: log rho is infinite where rho is 0."""
    return (alpha_bar_s < 1) | (name != "log_rho")


def _earlier(values: torch.Tensor, steps: int) -> torch.Tensor:
    """Return the value of the step that many steps before each; NaN where there is none."""
    none = torch.full_like(values[:steps], torch.nan)
    return torch.cat([none, values[: max(0, values.shape[0] - steps)]])


def _extrapolation(
    line: torch.Tensor, moments: list[torch.Tensor], nodes: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the integrals of the Lagrange polynomials on 0 and one or more nodes."""
    if len(nodes) == 1:
        return [line / nodes[0]]
    weights = []
    for j, node in enumerate(nodes):
        others = nodes[:j] + nodes[j + 1 :]
        scale = node
        for other in others:
            scale = scale * (node - other)
        weights.append(_integral(moments, others) / scale)
    return weights


def _integral(moments: list[torch.Tensor], roots: list[torch.Tensor]) -> torch.Tensor:
    """Return the integral of u prod (u - root) over the step."""
    coefficients: list[torch.Tensor] = []  # of the product, below its leading 1, from the highest
    for root in roots:
        raised = [*coefficients, torch.zeros_like(root)]
        lowered = [root * c for c in [torch.ones_like(root), *coefficients]]
        coefficients = [a - b for a, b in zip(raised, lowered, strict=True)]
    total = moments[len(roots)]
    for power, coefficient in zip(reversed(range(len(roots))), coefficients, strict=True):
        total = total + coefficient * moments[power]
    return total


def _correction(
    line: torch.Tensor,
    moments: list[torch.Tensor],
    past: list[torch.Tensor],
    node: torch.Tensor,
    nodes: int,
    made: int,
) -> list[torch.Tensor]:
    """Return the weights by which the prediction at t mends the step that landed there.

    With P the polynomial through that step's own prediction and `nodes` earlier ones, it is mended
    to P + (e_0 - P(t)) prod (u - u_j) / prod (u_t - u_j) over the nodes u_j of P. It was made with
    `made` earlier predictions, at least as many.
    """
    exact = line is moments[0]
    moments = [_earlier(moment, 1) for moment in moments]
    line = moments[0] if exact else _earlier(line, 1)
    roots = [_earlier(distance, 1) for distance in past[: made + 1]]  # the first is 0
    end = node - _earlier(node, 1)
    gain = line if nodes == 0 else _integral(moments, roots[1 : nodes + 1])
    for root in roots[: nodes + 1]:
        gain = gain / (end - root)
    weights = []
    for j, root in enumerate(roots[: nodes + 1]):
        lagrange = -gain
        for i, other in enumerate(roots[: nodes + 1]):
            if i != j:
                lagrange = lagrange * (end - other) / (root - other)
        weights.append(lagrange)
    if made > nodes or (made == 1 and not exact):
        # P takes the place of what the step was made with
        weights += [torch.zeros_like(gain)] * (made - nodes)
        was = _extrapolation(line, moments, roots[1 : made + 1])
        now = _extrapolation(moments[0], moments, roots[1 : nodes + 1])
        for sign, each in ((-1, was), (1, now)):
            for j, weight in enumerate(each, 1):
                weights[0] = weights[0] - sign * weight
                weights[j] = weights[j] + sign * weight
    return weights


def _carry(
    form: str, alpha_bar_t: torch.Tensor, alpha_bar_s: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """Return by how much x_s moves with x_t while the predictions stay."""
    if form == "epsilon":
        return (alpha_bar_s / alpha_bar_t).sqrt()
    return direction(alpha_bar_s, sigma) / (1 - alpha_bar_t).sqrt()


def step_moments(
    form: str,
    alpha_bar_t: torch.Tensor,
    alpha_bar_s: torch.Tensor,
    sigma: torch.Tensor,
    variable_name: str | None = None,
) -> list[torch.Tensor]:
    """Return the integrals of u, u^2, ... over the step, u the variable less that at its start.

    There are `MAX_ORDER` of them. The measure is the one whose integral of 1 is the weight of e_0
    in the first-order step.
    """
    name = variable_name or OWN_VARIABLE[form]
    powers = range(1, MAX_ORDER + 1)
    root = alpha_bar_s.sqrt()
    rho = ((1 - alpha_bar_t) / alpha_bar_t).sqrt()
    rho_s = (1 - alpha_bar_s).sqrt() / root
    rho_end = direction(alpha_bar_s, sigma) / root
    mass, length = root * (rho_end - rho), rho_s - rho
    if name == "step":
        mass = mass if form == "epsilon" else root * (1 - rho_end / rho)
        return [mass * (-1) ** m / (m + 1) for m in powers]
    if form == "epsilon" and name == "rho":
        return [mass * length**m / (m + 1) for m in powers]
    start = _variable(name, rho)
    to_end = _variable(name, rho_s) - start
    point, weight = GAUSS_LEGENDRE
    # in v = log(rho_t / rho) the kernel of eps is exp(-v), and that of x0 is exp(c v), c = 1 +
    # eta^2 for small steps and 1 without noise, such that its integral is that of the first-order
    # step
    length = (rho / rho_s).log()
    reach = length if form == "epsilon" else (rho / rho_end).log()
    whole = torch.isfinite(reach) & (reach <= MAX_REACH)
    if form == "epsilon":  # what is beyond MAX_REACH counts nothing
        length = reach = torch.where(whole, reach, MAX_REACH)
        kernel = weight * reach[..., None] * torch.exp(-reach[..., None] * point)
        kernel = kernel / -torch.expm1(-reach[..., None])
    else:
        length, reach = torch.where(whole, length, 1.0), torch.where(whole, reach, 1.0)
        kernel = weight * reach[..., None] * torch.exp(reach[..., None] * (point - 1))
    u = _variable(name, rho[..., None] * torch.exp(-length[..., None] * point)) - start[..., None]
    totals = [(kernel * u**m).sum(-1) for m in powers]
    if form == "epsilon":
        return [mass * total for total in totals]
    moments = [torch.where(whole, totals[m - 1], to_end**m) for m in powers]
    return [root * torch.where(torch.isnan(rho_end), torch.nan, moment) for moment in moments]


def line_moment(
    exact: torch.Tensor,
    form: str,
    alpha_bar_t: torch.Tensor,
    alpha_bar_s: torch.Tensor,
    sigma: torch.Tensor,
    variable_name: str | None = None,
    weights_name: str = "exact",
) -> torch.Tensor:
    """Return what a step adds for each unit of slope where the polynomial is a straight line.

    That is `exact`, the integral of u, or, with `bh1` and `bh2`, half of u at the end times B: the
    integral of 1 (`bh2`), or what that is for small steps (`bh1`; it keeps the integral where the
    kernel is all at the end of the step).
    """
    if weights_name == "exact":
        return exact
    root = alpha_bar_s.sqrt()
    rho = ((1 - alpha_bar_t) / alpha_bar_t).sqrt()
    rho_s = (1 - alpha_bar_s).sqrt() / root
    rho_end = direction(alpha_bar_s, sigma) / root
    h, reach = (rho / rho_s).log(), (rho / rho_end).log()
    if form == "epsilon":
        mass = root * (rho_end - rho)
        small = mass * h / torch.expm1(h)
    else:
        mass = root * (1 - rho_end / rho)
        small = root * reach
    moment = -0.5 * h * (mass if weights_name == "bh2" else small)
    usable = torch.isfinite(h) & (torch.isfinite(reach) | (weights_name == "bh2"))
    return torch.where(usable, moment, exact)
