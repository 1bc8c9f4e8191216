"""The member of the family that a config of `GeneralizedDDIMScheduler` asks for: its checks."""

from typing import Any

from .multistep import MAX_ORDER, SOLVER_FORMS, SOLVER_VARIABLES, SOLVER_WEIGHTS
from .reverse_noise import ANY_MEMBER, noise_named
from .sigmas import check_eta
from .timesteps import check_interval


def check_member(config: Any) -> None:
    """Check the noise and the solver of a config: settings that would contradict each other.

    Raises:
        ValueError: naming the setting, its value and what is allowed.
    """
    if config.eta is not None:
        check_eta(config.eta)
        if config.sigma is not None:
            raise ValueError(
                f"`eta` is {config.eta!r} and `sigma` is given; they are two ways to say the "
                "same, set one of them."
            )
    if config.eta_interval is not None:
        check_interval("eta_interval", config.eta_interval)
        if config.sigma is not None:
            raise ValueError(
                f"`eta_interval` is {config.eta_interval!r} and `sigma` is given, which says the "
                "noise of every step itself; set one of them."
            )
    noise_named("reverse_variance", config.reverse_variance)
    others = [k for k in ("sigma", "eta_interval") if config[k] is not None]
    if config.reverse_variance not in ANY_MEMBER and (config.eta != 1 or others):
        raise ValueError(
            f"`reverse_variance` is {config.reverse_variance!r}, which needs `eta=1.0` in the "
            f"config, for every step; it is eta={config.eta!r}"
            + (f", and `{others[0]}` is set" if others else "")
            + f". Every other member goes with one of {ANY_MEMBER}."
        )
    _check_solver(config)


def _check_solver(config: Any) -> None:
    if config.solver_form not in SOLVER_FORMS:
        raise ValueError(
            f"`solver_form` is {config.solver_form!r}; it must be one of {SOLVER_FORMS}."
        )
    if config.solver_variable not in (None, *SOLVER_VARIABLES):
        raise ValueError(
            f"`solver_variable` is {config.solver_variable!r}; it must be None or one of "
            f"{SOLVER_VARIABLES}."
        )
    if config.solver_weights not in SOLVER_WEIGHTS:
        raise ValueError(
            f"`solver_weights` is {config.solver_weights!r}; it must be one of {SOLVER_WEIGHTS}."
        )
    if config.solver_weights != "exact" and config.solver_variable != "log_rho":
        raise ValueError(
            f"`solver_weights` is {config.solver_weights!r}, a function of log rho, but "
            f"`solver_variable` is {config.solver_variable!r}; it must be 'log_rho', or "
            "`solver_weights` 'exact'."
        )
    orders = range(1, MAX_ORDER + 1)
    if type(config.solver_order) is not int or config.solver_order not in orders:
        raise ValueError(
            f"`solver_order` is {config.solver_order!r}; it must be one of {[*orders]}."
        )
    if config.solver_order == 1 and config.solver_corrector:
        raise ValueError(
            "`solver_corrector` is True, but `solver_order` is 1, which is DDIM; it must be "
            f"one of {[*orders][1:]}."
        )
    _check_corrector_order(config)
    if config.solver_order > 1 and config.reverse_variance not in ANY_MEMBER:
        raise ValueError(
            f"`solver_order` is {config.solver_order}, but `reverse_variance` is "
            f"{config.reverse_variance!r}, a noise that leaves the marginals of the ODE; a "
            f"higher order goes with {ANY_MEMBER}."
        )


def _check_corrector_order(config: Any) -> None:
    order, most = config.solver_corrector_order, config.solver_order + 1
    if order is None:
        return
    if not config.solver_corrector:
        raise ValueError(
            f"`solver_corrector_order` is {order!r}, but `solver_corrector` is False; it must be "
            "None without a corrector."
        )
    if type(order) is not int or order not in range(2, most + 1):
        raise ValueError(
            f"`solver_corrector_order` is {order!r}; it must be None or an integer from 2 to "
            f"`solver_order` + 1, which is {most}."
        )
