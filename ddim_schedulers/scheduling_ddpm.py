"""`MarkovianDDPMScheduler`: DDPM (arXiv:2006.11239) as a diffusers scheduler."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .attributes import checked_plan, watched
from .modes import outside_modes
from .reverse_noise import MIN_STD, FixedNoise, LearnedNoise, Steps, cost_name, noise_named
from .scheduling_base import FamilySchedulerMixin
from .sigmas import sigma_eta
from .step_inputs import check_tensors, compute_dtype
from .tables import Table


class MarkovianDDPMScheduler(  # type: ignore[misc]  # stock types attributes by a first None
    FamilySchedulerMixin, DDPMScheduler, SchedulerMixin, ConfigMixin
):
    """Drop-in for `DDPMScheduler`: the Markovian member eta = 1, on any trajectory.

    One step draws from N(mu_tilde(x_t, x0_hat), std^2 I), DDPM, Eq. 6-7 and Algorithm 2, of the
    chain that visits only the planned timesteps. Without `set_timesteps` it walks the whole
    training chain.

    Args:
        num_train_timesteps: T, from 1 to 100,000.
        beta_start: first beta of the schedules that have one, in (0, 1).
        beta_end: last beta, in (0, 1).
        beta_schedule: `linear`, `scaled_linear`, `squaredcos_cap_v2`, `sigmoid` or `laplace`.
        trained_betas: T explicit betas in (0, 1); they replace the schedule.
        variance_type: the noise that is added: `fixed_small` (the posterior's), `fixed_large`
            (sigma-hat, beta_t), both also under their `_log` names, `learned` (the network's second
            C channels are the variance) or `learned_range` (they interpolate between the logarithms
            of the two fixed ones, Improved DDPM, Eq. 15) or `optimal` (the variance that minimises
            the likelihood bound, Analytic-DPM, arXiv:2201.06503; needs `calibration`).
        clip_sample: clip x0_hat to +- `clip_sample_range`.
        prediction_type: `epsilon`, `sample`, `v_prediction` or `posterior_mean`.
        thresholding: dynamic thresholding of x0_hat instead of clipping.
        dynamic_thresholding_ratio: its quantile, in (0, 1].
        clip_sample_range: > 0.
        sample_max_value: largest threshold of dynamic thresholding, >= 1.
        timestep_spacing: `leading`, `trailing`, `linspace`, `quadratic`, or `optimal`, the
            trajectory with the smallest likelihood bound, or `calibrated` (see
            `GeneralizedDDIMScheduler`); both need `calibration`.
        steps_offset: added to `leading` timesteps.
        rescale_betas_zero_snr: rescale the betas to zero terminal SNR (arXiv:2305.08891).
        timesteps: explicit trajectory, strictly decreasing within 0 .. T - 1.
        quadratic_end: where the quadratic trajectory ends as a share of T, in (0, 1].
        calibration: statistics of the network as `ddim-schedulers calibrate` writes them: a
            dictionary with the list `gamma`, T values of E||eps_theta||^2 / d, and the like.
        snr_shift_scale: divide alpha_bar / (1 - alpha_bar) by this before the rescaling to zero
            terminal SNR, > 0 (CogVideoX, arXiv:2408.06072).
        original_inference_steps: with `trailing`, pick the timesteps from this many equally spaced
            ones, those that a distilled network (LCM, TCD) knows.
        late_noise_cap: for the optimal noise: how many of its 256 levels the noise of the
            second-to-last step may move a pixel in the mean, > 0 (Analytic-DPM, App. F). `None`
            takes the paper's numbers, where x0_hat is clipped: 2 for eta = 1 and linear betas, 1
            otherwise (the authors use 1 for LSUN, too).
        eps_scale: eps_hat is divided by it, before x0_hat is made of it and clipped (`scales`): a
            number > 0, or a line in t as two numbers [at t = 0, at t = T].
        end_scale: what the finished sample is multiplied by, > 0.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    _end_name = "one"
    _noise_key = "variance_type"
    one = watched(_end_name)

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        timesteps: Sequence[int] | None = None,
        quadratic_end: float = 0.8,
        calibration: dict[str, Any] | None = None,
        snr_shift_scale: float = 1.0,
        original_inference_steps: int | None = None,
        late_noise_cap: float | None = None,
        eps_scale: float | Sequence[float] = 1.0,
        end_scale: float = 1.0,
    ) -> None:
        self._custom_timesteps = False
        self._make_tables()

    def _check_config(self) -> None:
        super()._check_config()
        self._check_variance_type()

    @property  # type: ignore[override]
    def variance_type(self) -> str:
        """Return the config's `variance_type`, under stock's attribute name."""
        return self.config.variance_type

    @variance_type.setter
    def variance_type(self, name: str) -> None:
        self.config.variance_type = self._check_variance_type(name)

    @property
    def custom_timesteps(self) -> bool:
        """Return whether `timesteps` are a trajectory of their own.

        As in stock, steps go to the next of `timesteps` where it is True or `num_inference_steps`
        is set, and otherwise from t to t - 1.
        """
        return self._custom_timesteps

    @custom_timesteps.setter
    def custom_timesteps(self, custom: bool) -> None:
        if not isinstance(custom, bool):
            raise ValueError(f"`custom_timesteps` is {custom!r}; it must be True or False.")
        self._follow()
        self._custom_timesteps = custom
        self._plan_shown(custom or self._num_inference_steps is not None)

    def _take_trajectory(self, listed: list[Any]) -> None:
        steps = self._num_inference_steps
        self._set_shown_plan(checked_plan(listed, len(self)))
        self._custom_timesteps = True
        self._num_inference_steps = steps if steps is None else len(listed)

    def _take_number(self, number: int | None) -> None:
        self._plan_shown(number is not None or self._custom_timesteps)

    def _plan_shown(self, shown: bool) -> None:
        self._set_shown_plan(self._shown if shown else list(range(len(self) - 1, -1, -1)))

    def _set_shown_plan(self, plan: list[int]) -> None:
        before = self._plan
        self._set_plan(plan)
        try:
            self._check_plan_snr()
        except ValueError:
            self._set_plan(before)
            raise

    @property
    def _default_end(self) -> float:
        """Return 1: the chain ends at x_0."""
        return 1.0

    def _check_variance_type(self, name: str | None = None) -> str:
        name = self.config.variance_type if name is None else name
        noise_named("variance_type", name)
        return name

    def _bound_member(self) -> tuple[str, float]:
        return cost_name(noise_named("variance_type", self.config.variance_type)), 1.0

    @outside_modes
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Iterable[int] | None = None,
    ) -> None:
        """Plan the trajectory.

        Args:
            num_inference_steps: n, from 1 to T; with timesteps in the config, their length or
                `None`.
            device: where `self.timesteps` is put.
            timesteps: explicit trajectory for this plan, strictly decreasing; excludes
                `num_inference_steps`.

        Raises:
            ValueError: naming the argument, its value and what is allowed.
        """
        self._follow()
        self._set_shown_plan(self._resolve_timesteps(num_inference_steps, timesteps))
        self._warn_of_terminal_signal()
        self._custom_timesteps = timesteps is not None
        self._num_inference_steps = len(self._plan)
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
        sigma = sigma_eta(self._alpha_bar, self._alpha_bar_s, 1.0)
        # the posterior mean is a function of x_t and the clipped x0_hat: eps_hat is always
        # re-derived
        return self._table(sigma, self._clips(), dtype)

    def _get_variance(
        self,
        t: int | torch.Tensor,
        predicted_variance: torch.Tensor | None = None,
        variance_type: str | None = None,
    ) -> torch.Tensor:
        """Return what stock calls the variance of the step from `t` to the next planned timestep.

        It is a variance for `fixed_small`, `fixed_large`, `optimal` and `learned`, a standard
        deviation for `fixed_small_log`, and the logarithm of a variance for `fixed_large_log` and
        `learned_range`: public code reads it so. The step itself uses standard deviations alone.

        Args:
            t: 0 .. T - 1, planned or not: an int or a tensor.
            predicted_variance: the network's second C channels, for the learned variances.
            variance_type: instead of the config's.

        Returns:
            float32, in the shape of `t`; for `learned_range` in that of `predicted_variance`, which
            `learned` returns as it is.

        Raises:
            ValueError: for an unknown `variance_type`, a timestep out of range, or a learned
                variance without `predicted_variance`.
        """
        name = self._check_variance_type(variance_type)
        noise = noise_named("variance_type", name)
        self._follow()
        if isinstance(noise, LearnedNoise):
            if predicted_variance is None:
                raise ValueError(
                    f"`predicted_variance` is None; with variance_type={name!r} it must be the "
                    "second half of the network's channels."
                )
            a_t, a_s = self._at(self._alpha_bar, t), self._at(self._alpha_bar_s, t)
            return noise.as_stock_has_it(predicted_variance, Steps(a_t, a_s, sigma_eta(a_t, a_s)))
        assert isinstance(noise, FixedNoise)
        sigma = sigma_eta(self._alpha_bar, self._alpha_bar_s)
        variance = self._at(noise.std(self._steps(noise, sigma)), t).square()
        if noise.follows_sigma:
            variance = variance.clamp(min=MIN_STD**2)
        if name == "fixed_small_log":
            return variance.sqrt().float()
        return (variance.log() if name == "fixed_large_log" else variance).float()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        variance_noise: torch.Tensor | None = None,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Take one step, from t to the next planned timestep s (DDPM, Algorithm 2).

        A `timestep` that is not planned lands on the largest planned one below it, or on the end.
        The step that lands on alpha_bar = 1 adds no noise.

        Args:
            model_output: prediction of the network, the shape of `sample`; 2 C channels for the
                learned variances, whose second half is the variance.
            timestep: t in 0 .. T - 1: an int, a 0-d tensor, or a tensor of shape (B,) with one t
                per sample.
            sample: x_t, (B, C, ...), any floating dtype; computed in float32 or better.
            generator: of the noise, or a list of one for each sample.
            return_dict: return a `DDPMSchedulerOutput` rather than a tuple.
            variance_noise: the noise itself, the shape of `sample`; excludes `generator`.

        Returns:
            `prev_sample` (x_s) and `pred_original_sample` (x0_hat), in the dtype of `sample`.

        Raises:
            ValueError: for an argument out of its range, naming it.
        """
        if not (isinstance(sample, torch.Tensor) and isinstance(model_output, torch.Tensor)):
            check_tensors(model_output=model_output, sample=sample)
        self._follow()
        table = self._table_for(sample.device, compute_dtype(sample, model_output))
        learned = self._settings.learned
        if self._settings.noise_is_unsaid:
            self._check_noise_is_said(model_output, sample, timestep)
        prev_sample, x0 = self._step(
            table, True, model_output, timestep, sample, learned, generator, variance_noise
        )
        if not return_dict:
            return prev_sample, x0
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)
