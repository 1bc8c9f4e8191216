r"""Multistep members of the family: a step of order k uses the last k predictions.

DDIM is Euler's method for the probability-flow ODE (DDIM, arXiv:2010.02502, Eq. 14). With
rho = sqrt(1 - alpha_bar) / sqrt(alpha_bar) and lambda = -log rho it reads

    d (x / sqrt(alpha_bar)) = eps d rho     or     d (x / sqrt(1 - alpha_bar)) = x0 d exp(lambda)

and Euler's method takes the prediction e_0 of the present step, eps or x0, as constant. Order k
puts the polynomial of degree k - 1 through e_0 and the predictions e_1, e_2 of the steps before in
its place: in rho for eps (variable-step Adams-Bashforth; DEIS, arXiv:2204.13902) and in lambda for
x0 (DPM-Solver++, arXiv:2211.01095). A constant is reproduced by every order, so that a step is the
first-order one plus differences of predictions:

    x_s = sqrt(abar_s) x0_hat + sqrt(1 - abar_s - sigma^2) eps_hat + sum_j w_j (e_j - e_0) + std z

A member sigma > 0 moves deterministically to rho_end = sqrt(1 - abar_s - sigma^2) / sqrt(abar_s),
below rho_s, while the predictions change as from rho_t to rho_s: the noise that is added brings the
sample back up. So the polynomial is averaged over the step as it is, with the kernel of the member
(SA-Solver, arXiv:2309.05019, for lambda). For Gaussian data the marginal variance is then of order
2 in the step for x0; for eps it stays of order 1, as the noise that is added is a part of every
later eps_hat.

The weights w_j are float64 and depend on the trajectory and on sigma alone.
"""

import torch

from .transition import direction

SOLVER_FORMS = ("epsilon", "sample")
MAX_ORDER = 3


def multistep_weights(
    form: str,
    order: int,
    alpha_bar_t: torch.Tensor,
    alpha_bar_s: torch.Tensor,
    sigma: torch.Tensor,
    lower_order_final: bool = False,
) -> torch.Tensor:
    """Return the weights of e_j - e_0 for every planned step and every number of known predictions.

    Args:
        form: `epsilon` or `sample`, what is interpolated.
        order: 2 or 3, at most `MAX_ORDER`.
        alpha_bar_t: of the n planned timesteps in the order of sampling, float64 (n,), increasing.
        alpha_bar_s: where each of these steps lands, (n,), above alpha_bar_t; the last may be 1.
        sigma: the member, (n,), 0 <= sigma^2 <= 1 - alpha_bar_s.
        lower_order_final: end with a step of order 1, after one of at most order 2.

    Returns:
        float64 (order, n, order - 1): entry [c, i, j - 1] is w_j in step i where the predictions of
        c steps just before it are known; 0 where that step is of too low an order to use e_j. A
        step that starts or had started at alpha_bar = 0 (rho infinite) gives no node, and in
        lambda a step that lands on alpha_bar = 1 has order 1.
    """
    n = alpha_bar_t.shape[0]
    first, second = _moments(form, alpha_bar_t, alpha_bar_s, sigma)
    node = _variable(form, alpha_bar_t)
    d1, d2 = (_earlier(node, j) - node for j in (1, 2))
    zero = torch.zeros_like(node)
    by_order = [
        (zero, zero),
        (first / d1, zero),
        (
            (second - d2 * first) / (d1 * (d1 - d2)),
            (second - d1 * first) / (d2 * (d2 - d1)),
        ),
    ]
    step = torch.arange(n, device="cpu")
    usable = (step - (alpha_bar_t == 0).sum()).clamp(min=0)  # steps before it that are nodes
    if lower_order_final:
        usable = torch.minimum(usable, n - 1 - step)
    if form == "sample":
        usable = torch.where(alpha_bar_s == 1, 0, usable)
    weights = torch.zeros(order, n, order - 1, dtype=torch.float64, device="cpu")
    for known in range(1, order):
        for nodes in range(1, known + 1):
            exact = usable == nodes if nodes < known else usable >= nodes
            for j in range(nodes):
                weights[known, :, j] = torch.where(exact, by_order[nodes][j], weights[known, :, j])
    return weights


def _variable(form: str, alpha_bar: torch.Tensor) -> torch.Tensor:
    """Return what the polynomial is a function of: rho for eps, lambda = -log rho for x0."""
    rho = ((1 - alpha_bar) / alpha_bar).sqrt()
    return rho if form == "epsilon" else -rho.log()


def _earlier(node: torch.Tensor, steps: int) -> torch.Tensor:
    """Return the node of the step that many steps before each; NaN where there is none."""
    none = torch.full_like(node[:steps], torch.nan)
    return torch.cat([none, node[: max(0, node.shape[0] - steps)]])


def _moments(
    form: str, alpha_bar_t: torch.Tensor, alpha_bar_s: torch.Tensor, sigma: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the integrals of u and u^2 over the step, u the distance from its start.

    The measure is the one whose integral of 1 is the weight of e_0 in the first-order step.
    """
    root = alpha_bar_s.sqrt()
    rho = ((1 - alpha_bar_t) / alpha_bar_t).sqrt()
    rho_s = (1 - alpha_bar_s).sqrt() / root
    rho_end = direction(alpha_bar_s, sigma) / root
    if form == "epsilon":
        mass, length = root * (rho_end - rho), rho_s - rho
        return mass * length / 2, mass * length**2 / 3
    # the kernel e^{c u} of the member, c = log(rho / rho_end) / log(rho / rho_s): 1 + eta^2 for
    # small steps, 1 without noise
    length, reach = (rho / rho_s).log(), (rho / rho_end).log()
    first = torch.where(reach == 0, 0.0, 1 + torch.expm1(-reach) / reach)
    second = torch.where(reach == 0, 0.0, 1 - 2 * first / reach)
    return root * length * first, root * length**2 * second
