"""`GeneralizedDDIMInverseScheduler`: DDIM encoding, from x_0 to x_T."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddim_inverse import DDIMInverseScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import deprecate

from .attributes import watched
from .config_types import check_types
from .family_config import FAMILY_KEYS
from .modes import outside_modes
from .scheduling_base import FamilySchedulerMixin, logger
from .step_inputs import check_tensors, compute_dtype
from .tables import Table, encoding_table


class GeneralizedDDIMInverseScheduler(  # type: ignore[misc]  # stock types attributes by a first None
    FamilySchedulerMixin, DDIMInverseScheduler, SchedulerMixin, ConfigMixin
):
    """Drop-in for `DDIMInverseScheduler`: the deterministic member run backwards.

    The pairs (t, s) are those of `GeneralizedDDIMScheduler` with the same settings, in reverse
    order. A step goes from s up to t, with the network asked at t, the later one of the pair
    (stock's convention):

        x_t = sqrt(abar_t) x0_hat + sqrt(1 - abar_t) eps_hat            DDIM, Sec. 4.3 and 5.4

    x0_hat and eps_hat follow from the prediction at the noise level of x_s, as in stock. In two
    cases that level does not determine eps_hat: for `posterior_mean`, which belongs to one t of the
    training chain, and for `sample` where x_s is x_0 itself (alpha_bar_s = 1), because there
    (x_s - m) / 0 is no eps. Then eps_hat follows at the level t, where the network was called, with
    x_s for x_t, and x0_hat = (x_s - sqrt(1 - abar_s) eps_hat) / sqrt(abar_s), as for an eps
    network. For `sample` this is eps_hat = (x_s - sqrt(abar_t) m) / sqrt(1 - abar_t) and
    x0_hat = x_s.

    Only for `solver_order` 1. A step of higher order uses predictions above x_s, which encoding has
    not reached: neither a closed form nor a fixed point in x_t alone gives them. `set_timesteps`
    refuses the config of such a scheduler; `from_config(config, solver_order=1)` encodes along the
    same probability-flow ODE at first order.

    For an eps that does not depend on x, without clipping, it is the exact inverse of the forward
    scheduler; for a network it is the first-order one that both papers use.

    Args:
        num_train_timesteps: T, from 1 to 100,000.
        beta_start: first beta of the schedules that have one, in (0, 1).
        beta_end: last beta, in (0, 1).
        beta_schedule: `linear`, `scaled_linear`, `squaredcos_cap_v2`, `sigmoid` or `laplace`.
        trained_betas: T explicit betas in (0, 1); they replace the schedule.
        clip_sample: clip x0_hat to +- `clip_sample_range`; stock's default, and wrong for exact
            inversion.
        set_alpha_to_one: x_0 is at alpha_bar = 1; with False, at alpha_bar_0.
        steps_offset: added to `leading` timesteps.
        prediction_type: `epsilon`, `sample`, `v_prediction` or `posterior_mean`.
        clip_sample_range: > 0.
        timestep_spacing: `leading`, `trailing`, `linspace`, `quadratic`, `optimal` or `calibrated`
            (the forward scheduler's; the latter two need `calibration`).
        rescale_betas_zero_snr: rescale the betas to zero terminal SNR (arXiv:2305.08891).
        timesteps: explicit trajectory, strictly decreasing as for the forward scheduler.
        quadratic_end: where the quadratic trajectory ends as a share of T, in (0, 1].
        calibration: statistics of the network, as for the forward scheduler.
        snr_shift_scale: divide alpha_bar / (1 - alpha_bar) by this before the rescaling to zero
            terminal SNR, > 0 (CogVideoX, arXiv:2408.06072).
        original_inference_steps: with `trailing`, pick the timesteps from this many equally spaced
            ones, those that a distilled network (LCM, TCD) knows.
        eps_scale: the forward scheduler's, undone: eps_hat is divided here, too.
        end_scale: the forward scheduler's, undone: the sample at the end is divided by it.
        **kwargs: settings of the forward schedulers (`thresholding`, `eta`, ...), which are kept in
            the config for them and do not act here, and stock's deprecated `set_alpha_to_zero`.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    _end_name = "initial_alpha_cumprod"
    initial_alpha_cumprod = watched(_end_name)

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        timesteps: Sequence[int] | None = None,
        quadratic_end: float = 0.8,
        calibration: dict[str, Any] | None = None,
        snr_shift_scale: float = 1.0,
        original_inference_steps: int | None = None,
        eps_scale: float | Sequence[float] = 1.0,
        end_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self._warned_of_table = False
        self._keep_others(kwargs)
        self._make_tables()

    def _keep_others(self, kwargs: dict[str, Any]) -> None:
        """Keep settings of the forward schedulers, and read stock's old name of one of ours."""
        oldest = kwargs.pop("set_alpha_to_zero", None)
        if oldest is not None:
            message = "Use `set_alpha_to_one`, which means the same here."
            deprecate("set_alpha_to_zero", "1.0.0", message, standard_warn=False)
            kwargs = {**kwargs, "set_alpha_to_one": oldest}
        unknown = sorted(kwargs.keys() - FAMILY_KEYS)
        if unknown:
            raise TypeError(
                f"{type(self).__name__}() got an unexpected keyword argument {unknown[0]!r}"
            )
        if kwargs:  # diffusers formats the whole config for its log, and a hostile list is long
            check_types(self.config)
            self.register_to_config(**kwargs)

    def _check_solver_order(self) -> None:
        order = self.config.get("solver_order", 1)
        if order != 1:
            raise ValueError(
                f"`solver_order` is {order!r} in the config; it must be 1, as only order 1 has an "
                "inverse: a step of higher order uses predictions above the point it starts from. "
                "Pass `solver_order=1` to `from_config`."
            )

    def _plan_tensor(self) -> torch.Tensor:
        return super()._plan_tensor().flip(0)

    def _in_order_of_sampling(self, listed: list[Any]) -> list[Any]:
        return listed[::-1]

    def _clips(self) -> bool:
        # stock's inverse has no thresholding; a hidden key must not act
        return bool(self.config.clip_sample)

    def _limit(self, x0: torch.Tensor) -> torch.Tensor:
        return self._clip(x0)

    def planned_pairs(self) -> list[tuple[int, int]]:
        """Return the planned steps [(t, s), ...] in the order of encoding, each from s up to t."""
        return super().planned_pairs()[::-1]

    @outside_modes
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Iterable[int] | None = None,
    ) -> None:
        """Plan the trajectory; `self.timesteps` holds it in increasing order.

        Args:
            num_inference_steps: n, from 1 to T; with timesteps in the config, their length or
                `None`.
            device: where `self.timesteps` is put.
            timesteps: explicit trajectory, strictly **decreasing**, as for the forward scheduler;
                excludes `num_inference_steps`.

        Raises:
            ValueError: naming the argument, its value and what is allowed.
        """
        self._check_solver_order()
        self._follow()
        if self.config.get("solver_calibrated") and not self._warned_of_table:
            self._warned_of_table = True
            logger.warning(
                "`solver_calibrated` is True, but a stored table has no inverse: inversion. The "
                "steps are those of `solver_order`=1."
            )
        before = self._plan, self._stride
        self._set_plan(self._resolve_timesteps(num_inference_steps, timesteps))
        try:
            self._check_plan_snr()
        except ValueError:
            self._set_plan(*before)
            raise
        self._num_inference_steps = len(self._plan)
        self._planned = True
        self._show(device)
        if not torch.compiler.is_dynamo_compiling():
            self._table_for(self._public["timesteps"].device, torch.float32)

    def _table_for(self, device: torch.device, dtype: torch.dtype) -> Table:
        key = (device, dtype)
        table = self._tables.get(key)
        if table is None:
            table = self._keep(key, self._make_table(dtype), device)
        return table

    @outside_modes
    def _make_table(self, dtype: torch.dtype) -> Table:
        self._check_plan_snr()
        process = self._alpha_bar, self._alpha_bar_s
        prediction = self.config.prediction_type
        return encoding_table(*process, prediction, self._clips(), dtype, self._scales())

    def step(  # type: ignore[override]  # stock has a second class of this name
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Take one encoding step, from the planned timestep below `timestep` up to it.

        Args:
            model_output: prediction of the network at `timestep`, the shape of `sample`; or 2 C
                channels, of a network that predicts a variance in the second half: it is left out.
            timestep: t in 0 .. T - 1, the level that is reached: an int, a 0-d tensor, or shape
                (B,).
            sample: x_s, (B, C, ...), any floating dtype; computed in float32 or better.
            return_dict: return a `DDIMSchedulerOutput` rather than a tuple.

        Returns:
            `prev_sample` (x_t) and `pred_original_sample` (x0_hat), in the dtype of `sample`.

        Raises:
            ValueError: before `set_timesteps`, or for an argument out of its range, naming it.
        """
        if not (isinstance(sample, torch.Tensor) and isinstance(model_output, torch.Tensor)):
            check_tensors(model_output=model_output, sample=sample)
        self._follow()
        if not self._planned:
            raise ValueError("`set_timesteps` has not been called; call it before `step`.")
        table = self._table_for(sample.device, compute_dtype(sample, model_output))
        x_t, x0 = self._step(table, False, model_output, timestep, sample, None, None, None)
        if not return_dict:
            return x_t, x0
        return DDIMSchedulerOutput(prev_sample=x_t, pred_original_sample=x0)
