"""What the network predicts, and how to get x_0, eps and the score from it.

Every prediction m is affine in (x_0, eps), so that x0_hat and eps_hat are affine in (x_t, m):

    x0_hat = k_x x_t + k_m m          eps_hat = k_x' x_t + k_m' m

The coefficients are data (`x0_coefficients`, `eps_coefficients`); the schedulers fold them into
their tables. `alpha_bar_t` is in [0, 1) and `alpha_bar_before` is alpha_bar_{t-1} of the **training
chain** (1 at t = 0), used by `posterior_mean` alone; both broadcast against the batch (B, C, H, W).
Neither is checked, which would read it back from the device: out of bounds the results are NaN or
infinite.
"""

import torch

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "posterior_mean")

# `torch.quantile` takes no longer rows.
MAX_QUANTILE = 2**24

Coefficients = tuple[torch.Tensor, torch.Tensor]


def check_prediction_type(prediction_type: str) -> str:
    """Return `prediction_type` if it is one of `PREDICTION_TYPES`.

    Raises:
        ValueError: otherwise.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"`prediction_type` is {prediction_type!r}; it must be one of {PREDICTION_TYPES}."
        )
    return prediction_type


def posterior_mean_coefficients(
    alpha_bar_t: torch.Tensor, alpha_bar_before: torch.Tensor
) -> Coefficients:
    """Return (k_x0, k_x) of mu_tilde = k_x0 x_0 + k_x x_t, the posterior mean of DDPM, Eq. 7."""
    alpha_t = alpha_bar_t / alpha_bar_before
    k_x0 = alpha_bar_before.sqrt() * (1 - alpha_t) / (1 - alpha_bar_t)
    k_x = alpha_t.sqrt() * (1 - alpha_bar_before) / (1 - alpha_bar_t)
    return k_x0, k_x


def x0_coefficients(
    prediction_type: str, alpha_bar_t: torch.Tensor, alpha_bar_before: torch.Tensor | None = None
) -> Coefficients:
    """Return (k_x, k_m) of x0_hat = k_x x_t + k_m m.

    `epsilon` divides by sqrt(alpha_bar_t) (DDPM, Eq. 15) and is infinite at alpha_bar_t = 0;
    `v_prediction` (arXiv:2202.00512, App. D) and `sample` are finite everywhere. `posterior_mean`
    inverts DDPM's Eq. 7: mu_tilde is nearly x_t at large t (k_x0 is about 1e-4 at the end of the
    linear schedule), so that an error of the prediction, or of its rounding, grows by up to 1 /
    k_x0: expect to lose four digits there.

    Raises:
        ValueError: for an unknown prediction type, or `posterior_mean` without `alpha_bar_before`.
    """
    a, zero, one = alpha_bar_t, torch.zeros_like(alpha_bar_t), torch.ones_like(alpha_bar_t)
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return 1 / a.sqrt(), -(1 - a).sqrt() / a.sqrt()
    if prediction_type == "sample":
        return zero, one
    if prediction_type == "v_prediction":
        return a.sqrt(), -(1 - a).sqrt()
    k_x0, k_x = posterior_mean_coefficients(a, _needed(alpha_bar_before))
    return -k_x / k_x0, 1 / k_x0


def eps_coefficients(
    prediction_type: str, alpha_bar_t: torch.Tensor, alpha_bar_before: torch.Tensor | None = None
) -> Coefficients:
    """Return (k_x, k_m) of eps_hat = k_x x_t + k_m m, finite for every alpha_bar_t in [0, 1).

    Raises:
        ValueError: for an unknown prediction type, or `posterior_mean` without `alpha_bar_before`.
    """
    a, zero, one = alpha_bar_t, torch.zeros_like(alpha_bar_t), torch.ones_like(alpha_bar_t)
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return zero, one
    if prediction_type == "v_prediction":
        return (1 - a).sqrt(), a.sqrt()
    if prediction_type == "sample":
        return 1 / (1 - a).sqrt(), -a.sqrt() / (1 - a).sqrt()
    # mu_tilde = (x_t - beta_t / sqrt(1 - abar_t) eps) / sqrt(alpha_t), DDPM, Eq. 11
    alpha_t = a / _needed(alpha_bar_before)
    scale = (1 - a).sqrt() / (1 - alpha_t)
    return scale, -scale * alpha_t.sqrt()


def x0_from(
    prediction_type: str,
    model_output: torch.Tensor,
    x_t: torch.Tensor,
    alpha_bar_t: torch.Tensor,
    alpha_bar_before: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x0_hat from the prediction, in the shape of `x_t`. Raises as `x0_coefficients`."""
    k_x, k_m = x0_coefficients(prediction_type, alpha_bar_t, alpha_bar_before)
    return k_x * x_t + k_m * model_output


def eps_from(
    prediction_type: str,
    model_output: torch.Tensor,
    x_t: torch.Tensor,
    alpha_bar_t: torch.Tensor,
    alpha_bar_before: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return eps_hat from the prediction, in the shape of `x_t`. Raises as `eps_coefficients`."""
    k_x, k_m = eps_coefficients(prediction_type, alpha_bar_t, alpha_bar_before)
    return k_x * x_t + k_m * model_output


def score_from_eps(eps: torch.Tensor, alpha_bar_t: torch.Tensor) -> torch.Tensor:
    """Return -eps / sqrt(1 - alpha_bar_t) (DDPM, Sec. 3.2; arXiv:2011.13456, Eq. 29)."""
    return -eps / (1 - alpha_bar_t).sqrt()


def target(
    prediction_type: str,
    x0: torch.Tensor,
    eps: torch.Tensor,
    alpha_bar_t: torch.Tensor,
    alpha_bar_before: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what a perfect network would predict at x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.

    Raises:
        ValueError: for an unknown prediction type, or `posterior_mean` without `alpha_bar_before`.
    """
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x0
    root, rest = alpha_bar_t.sqrt(), (1 - alpha_bar_t).sqrt()
    if prediction_type == "v_prediction":
        return root * eps - rest * x0
    k_x0, k_x = posterior_mean_coefficients(alpha_bar_t, _needed(alpha_bar_before))
    return k_x0 * x0 + k_x * (root * x0 + rest * eps)


def clip(x0: torch.Tensor, limit: float) -> torch.Tensor:
    """Return `x0` with every element clipped to [-limit, limit], limit > 0."""
    return x0.clamp(-limit, limit)


def dynamic_threshold(x0: torch.Tensor, ratio: float, max_value: float) -> torch.Tensor:
    """Clip each sample to its own quantile, scaled back to [-1, 1] (arXiv:2205.11487, Sec. 2.3).

    Args:
        x0: batch (B, ...), float32 or float64.
        ratio: the quantile of |x0| of each sample, in (0, 1].
        max_value: largest threshold, >= 1; the smallest is 1, which is plain clipping.

    Returns:
        clamp(x0, -q, q) / q with q the quantile of the sample, within [1, max_value].
    """
    flat = x0.flatten(1)
    q = _quantile(flat.abs(), ratio).clamp(min=1, max=max_value)
    return (torch.clamp(flat, -q, q) / q).reshape(x0.shape)


def _quantile(values: torch.Tensor, ratio: float) -> torch.Tensor:
    """Return the quantile of each row, (B, 1), interpolated linearly as `torch.quantile` does."""
    count = values.shape[1]
    if count <= MAX_QUANTILE:
        return torch.quantile(values, ratio, dim=1, keepdim=True)
    place = ratio * (count - 1)
    low = int(place)
    ordered = values.sort(dim=1).values
    below, above = ordered[:, low].unsqueeze(1), ordered[:, min(low + 1, count - 1)].unsqueeze(1)
    return torch.lerp(below, above, place - low)


def _needed(alpha_bar_before: torch.Tensor | None) -> torch.Tensor:
    if alpha_bar_before is None:
        raise ValueError(
            "`alpha_bar_before` is None; for prediction_type='posterior_mean' it must be a tensor."
        )
    return alpha_bar_before
