r"""The variational bound on the negative log-likelihood, term by term.

For a trajectory tau with timesteps t_1 = 0 < ... < t_S and any member of the family with sigma > 0
(DDPM, arXiv:2006.11239, Eq. 5; DDIM, arXiv:2010.02502, Eq. 10-11):

    -log p(x_0) <= KL(q(x_{t_S} | x_0) || N(0, I))                              L_T, `prior_kl`
                 + sum_i KL(q_sigma(x_{t_{i-1}} | x_{t_i}, x_0) || p(.. | x_{t_i}))    `steps`
                 - log p(x_0 | x_{t_1})                                         L_0, `decoder_nll`

All terms are per image and in nats; `bits_per_dim` converts. x0_hat is limited to the range of the
data only where `clip` says so, and eps_hat follows it (the DDPM mean). Nothing is floored.

The network is a callable `predict(x_t, t) -> model_output` with x_t (B, ...) and t int64 (B,).
x_t follows q(x_t | x_0) for every member, hence one pass over t serves all members, variances and
trajectories: see `bound_from_errors`.
"""

from ..former import former
from .bound import (
    ESTIMATORS,
    Predict,
    Terms,
    bound_from_errors,
    default_proposal,
    draw_steps,
    expected_bound,
    predict_x0,
    variational_bound,
)
from .chain import VARIANCES, Chain, first_posterior_variance, make_chain, reverse_pair
from .coding import CodingPoint, Estimate, bits_per_dim, coding_curve, estimate
from .terms import GRID_TOLERANCE, decoder_nll, grid_levels, log_normal_interval, prior_kl

__all__ = [
    "ESTIMATORS",
    "GRID_TOLERANCE",
    "VARIANCES",
    "Chain",
    "CodingPoint",
    "Estimate",
    "Predict",
    "Terms",
    "bits_per_dim",
    "bound_from_errors",
    "coding_curve",
    "decoder_nll",
    "default_proposal",
    "draw_steps",
    "estimate",
    "expected_bound",
    "first_posterior_variance",
    "grid_levels",
    "log_normal_interval",
    "make_chain",
    "predict_x0",
    "prior_kl",
    "reverse_pair",
    "variational_bound",
]

__getattr__ = former(__name__, __name__, {"Plan": "Chain", "make_plan": "make_chain"})
