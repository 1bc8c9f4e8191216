"""`GeneralizedDDIMScheduler`: the sigma-family of DDIM (arXiv:2010.02502)."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .attributes import is_part, watched
from .member import check_member
from .modes import outside_modes
from .reverse_noise import ANY_MEMBER
from .scheduling_base import logger
from .sigmas import as_sigma, check_eta, check_sigma, sigma_eta
from .solver_tables import SolverTable
from .step_inputs import check_on_plan, check_one_timestep, check_tensors, compute_dtype
from .stored_sampler import StoredSamplerMixin
from .tables import Multistep, Table, multistep_of
from .timesteps import in_interval

# Settings for good pictures in 5 to 50 network calls:
# `GeneralizedDDIMScheduler.from_config(pipe.scheduler.config, **FEW_STEPS)`. With a trajectory in
# `calibration` and at most ten calls, add `timestep_spacing="calibrated"`.
FEW_STEPS = {"solver_order": 2, "solver_corrector": True, "timestep_spacing": "trailing"}

# The table that `calibration` stores for the asked number of calls, and FEW_STEPS for any other:
# `ddim-schedulers calibrate --objective solver` makes them.
CALIBRATED = {**FEW_STEPS, "solver_calibrated": True}


class GeneralizedDDIMScheduler(  # type: ignore[misc]  # stock types attributes by a first None
    StoredSamplerMixin, DDIMScheduler, SchedulerMixin, ConfigMixin
):
    """Drop-in for `DDIMScheduler`: any member of the family, any trajectory, the exact neighbour.

    One step is DDIM, Eq. 12, to the next planned timestep s of the trajectory, whatever its
    spacing:

        x_s = sqrt(abar_s) x0_hat + sqrt(1 - abar_s - sigma^2) eps_hat + noise_std z

    With `solver_order` 2, 3 or 4 the predictions of the steps before sharpen the deterministic part
    (`multistep`), at no further network call. They count where a step goes on from the one before,
    from t to the s where that landed; after `set_timesteps`, at a timestep that is not planned, and
    wherever else the loop did not come from the planned step before, a step has order 1 and the
    history starts again. eps_hat is then always re-derived from a clipped x0_hat.

    Args:
        num_train_timesteps: T, from 1 to 100,000.
        beta_start: first beta of the schedules that have one, in (0, 1).
        beta_end: last beta, in (0, 1).
        beta_schedule: `linear`, `scaled_linear`, `squaredcos_cap_v2`, `sigmoid` or `laplace`.
        trained_betas: T explicit betas in (0, 1); they replace the schedule.
        clip_sample: clip x0_hat to +- `clip_sample_range`. Right for pixels in [-1, 1], ruinous for
            latents and for inversion.
        set_alpha_to_one: the last step lands on alpha_bar = 1 and returns x0_hat; with False on
            alpha_bar_0.
        steps_offset: added to `leading` timesteps.
        prediction_type: `epsilon`, `sample`, `v_prediction` or `posterior_mean` (mu-tilde of the
            training chain t -> t - 1, for every planned step; see
            `parameterization.x0_coefficients` on precision).
        thresholding: dynamic thresholding of x0_hat instead of clipping.
        dynamic_thresholding_ratio: its quantile, in (0, 1].
        clip_sample_range: > 0.
        sample_max_value: largest threshold of dynamic thresholding, >= 1.
        timestep_spacing: `leading`, `trailing`, `linspace`, `quadratic`, or `optimal`, the
            trajectory with the smallest likelihood bound for the member and noise in use (for eta 0
            or None, whose bound is infinite or unknown: for the Markovian member with the optimal
            noise); or `calibrated`, the one whose jumps miss a fine trajectory least. Both need
            `calibration`.
        rescale_betas_zero_snr: rescale the betas to zero terminal SNR (arXiv:2305.08891).
        eta: the member, sigma = eta sigma(1), >= 0. `None` follows the argument of `step`; a number
            wins over it, because pipelines pass `eta=0.0` whenever there is such an argument.
        sigma: the member as an explicit standard deviation for each step, in the order of sampling.
            It excludes `eta`.
        timesteps: explicit trajectory, strictly decreasing within 0 .. T - 1.
        reverse_variance: the noise that is added: `sigma` (the member's own), `sigma_hat` (DDPM's
            larger choice, DDIM, Sec. 5) or `learned_range` (Improved DDPM, Eq. 15; a network with 2
            C output channels), which both keep the direction of sigma(1) and need `eta=1`; or
            `optimal`, the one that minimises the likelihood bound, for any member
            (Analytic-DPM, arXiv:2201.06503; needs `calibration`).
        quadratic_end: where the quadratic trajectory ends as a share of T, in (0, 1]; 1.0 reaches T
            - 1.
        calibration: statistics of the network as `ddim-schedulers calibrate` writes them: a
            dictionary with the list `gamma`, T values of E||eps_theta||^2 / d, and the like.
        solver_order: 1 (DDIM), 2, 3 or 4: how many predictions a step uses. Above 1 it goes with
            `reverse_variance` `sigma` and `optimal`, and a step takes one timestep for the batch.
        solver_form: what is interpolated at higher order, `sample` (x0_hat; of order 2 in the
            variance for every eta) or `epsilon` (eps_hat).
        solver_corrector: with `solver_order` above 1, take each step once more, one order higher,
            when the prediction where it landed is there; no network call (UniPC, arXiv:2302.04867).
        lower_order_final: end with a step of order 1, after one of at most order 2.
        solver_variable: what the predictions are a polynomial of: `asinh` (of rho / 3), `log_rho`
            (DPM-Solver++, UniPC, SA-Solver; a step that lands on alpha_bar = 1 has order 1 then),
            `rho`, or `step`, its number (iPNDM). `None` is `asinh` for `solver_form` `sample` and
            `rho` for `epsilon`.
        solver_weights: how a step of order 2, and the corrector of one of order 1, weighs the
            difference of two predictions: `exact`, or as diffusers does, with `solver_variable`
            `log_rho`: `bh1` (UniPC `bh1`, SA-Solver) or `bh2` (UniPC `bh2`, DPM-Solver++
            `midpoint`).
        solver_corrector_order: how many predictions the corrector uses, that at t among them, from
            2 to `solver_order` + 1; `None` is the most.
        snr_shift_scale: divide alpha_bar / (1 - alpha_bar) by this before the rescaling to zero
            terminal SNR, > 0 (CogVideoX, arXiv:2408.06072).
        original_inference_steps: with `trailing`, pick the timesteps from this many equally spaced
            ones, those that a distilled network (LCM, TCD) knows.
        late_noise_cap: for the optimal noise: how many of its 256 levels the noise of the
            second-to-last step may move a pixel in the mean, > 0 (Analytic-DPM, App. F). `None`
            takes the paper's numbers, where x0_hat is clipped: 2 for eta = 1 and linear betas, 1
            otherwise (the authors use 1 for LSUN, too).
        eta_interval: [low, high], shares of t / T between which eta acts, both ends included, 0 <=
            low < high <= 1; steps from any other t have sigma = 0. It excludes `sigma`, and goes
            with `reverse_variance` `sigma` and `optimal`. `None` is every t.
        eps_scale: eps_hat is divided by it, before x0_hat is made of it and clipped (`scales`): a
            number > 0, or a line in t as two numbers [at t = 0, at t = T].
        end_scale: what the finished sample is multiplied by, > 0.
        solver_calibrated: take timesteps, weights, clipping and eta from the table that
            `calibration["solver"]` holds for the number of calls that `set_timesteps` is asked for
            (`solver_tables`). It remembers x_T and every prediction of a run. Where there is none,
            or it was not made for the other settings, the scheduler does without and says why.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    _end_name = "final_alpha_cumprod"
    _noise_key = "reverse_variance"
    final_alpha_cumprod = watched(_end_name)

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
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        eta: float | None = None,
        sigma: Sequence[float] | None = None,
        timesteps: Sequence[int] | None = None,
        reverse_variance: str = "sigma",
        quadratic_end: float = 0.8,
        calibration: dict[str, Any] | None = None,
        solver_order: int = 1,
        solver_form: str = "sample",
        solver_corrector: bool = False,
        lower_order_final: bool = False,
        snr_shift_scale: float = 1.0,
        original_inference_steps: int | None = None,
        late_noise_cap: float | None = None,
        eta_interval: Sequence[float] | None = None,
        eps_scale: float | Sequence[float] = 1.0,
        end_scale: float = 1.0,
        solver_variable: str | None = None,
        solver_weights: str = "exact",
        solver_corrector_order: int | None = None,
        solver_calibrated: bool = False,
    ) -> None:
        self._said_of_tables: set[str] = set()
        self._guidance = None
        self._sigma: torch.Tensor | None = None
        self._zeros_of_sigma: frozenset[int] = frozenset()
        self._warned_of_eta = False
        self._make_tables()

    def _check_config(self) -> None:
        super()._check_config()
        check_member(self.config)

    def _take_trajectory(self, listed: list[Any]) -> None:
        before = self._plan
        if self._sigma is not None and not is_part(listed, before):
            raise ValueError(
                f"`timesteps` is assigned {listed}, but the explicit `sigma` belongs to the plan "
                f"{before}; call `set_timesteps(timesteps=..., sigma=...)`."
            )
        super()._take_trajectory(listed)

    def _take_number(self, number: int | None) -> None:
        if self._sigma is not None and number not in (None, len(self._plan), len(self._shown)):
            raise ValueError(
                f"`num_inference_steps` is {number}, but the explicit `sigma` has "
                f"{len(self._plan)} values; call `set_timesteps`."
            )
        super()._take_number(number)

    @outside_modes
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Iterable[int] | None = None,
        sigma: Iterable[float] | None = None,
    ) -> None:
        """Plan the trajectory.

        Args:
            num_inference_steps: n, from 1 to T; with explicit timesteps or sigma in the config it
                must be their length or `None`.
            device: where `self.timesteps` is put.
            timesteps: explicit trajectory for this plan, strictly decreasing; excludes
                `num_inference_steps`.
            sigma: explicit standard deviations for this plan, one for each step in the order of
                sampling, 0 <= sigma^2 <= 1 - alpha_bar_s; 0 in a last step that lands on alpha_bar
                = 1.

        Raises:
            ValueError: naming the argument, its value and what is allowed.
        """
        self._follow()
        wanted = self.config.sigma if sigma is None else sigma
        member = None if wanted is None else as_sigma(wanted)
        if sigma is not None and (
            self.config.eta is not None
            or self.config.eta_interval is not None
            or self.config.reverse_variance not in ANY_MEMBER
        ):
            raise ValueError(
                f"`sigma` is given, but the config says eta={self.config.eta!r}, eta_interval="
                f"{self.config.eta_interval!r} and reverse_variance="
                f"{self.config.reverse_variance!r}; explicit sigma needs eta=None, "
                f"eta_interval=None and one of {ANY_MEMBER}."
            )
        if member is not None and num_inference_steps is None and timesteps is None:
            num_inference_steps = len(member) if self.config.timesteps is None else None
        self._guidance = self._input_rows = None
        stored = self._stored_for(num_inference_steps, timesteps, member)
        if stored is None:
            planned = self._resolve_timesteps(num_inference_steps, timesteps)
        else:
            planned = stored.timesteps
        if member is not None and len(member) != len(planned):
            raise ValueError(
                f"`sigma` has {len(member)} values, but the trajectory has {len(planned)} steps; "
                "give one for each."
            )
        self._commit(planned, member, stored)
        self._warn_of_terminal_signal()
        self._show(device)
        if not torch.compiler.is_dynamo_compiling():
            eta = None if self._sigma is not None else (self._settings.eta or 0.0)
            self._table_for(eta, False, self._public["timesteps"].device, torch.float32)

    def _commit(
        self, planned: list[int], member: torch.Tensor | None, stored: SolverTable | None
    ) -> None:
        """Replace the plan, or leave everything as it was if the new one is refused."""
        before = self._plan, self._stride, self._stored
        self._set_plan(planned, None, stored)
        try:
            self._check_plan_snr()
            if member is not None:
                check_sigma(member, self._alpha_bar_s[planned])
            elif self._settings.eta is not None:
                eta = self._settings.eta
                check_sigma(self._sigma_of(eta)[planned], self._alpha_bar_s[planned], eta)
        except ValueError:
            self._set_plan(*before)
            raise
        if member is not None or self._sigma is not None:  # no part of the trajectory
            self._forget_tables()
        self._sigma = None
        self._zeros_of_sigma = frozenset()
        if member is not None:
            numbers = member.tolist()
            self._zeros_of_sigma = frozenset(
                t for t, std in zip(planned, numbers, strict=True) if std == 0
            )
            self._sigma = torch.full_like(self._alpha_bar, torch.nan)
            self._sigma[planned] = member
        self._num_inference_steps = len(planned)
        self._planned = True

    def _sigma_of(self, eta: float) -> torch.Tensor:
        sigma = sigma_eta(self._alpha_bar, self._alpha_bar_s, eta)
        interval = self._acting("eta_interval")
        if interval is not None:
            sigma = torch.where(in_interval(interval, len(self)), sigma, 0.0)
        return sigma

    def _adds_none(self, t: int) -> bool:
        interval = self._acting("eta_interval")
        outside = interval is not None and not interval[0] <= t / len(self) <= interval[1]
        return outside or super()._adds_none(t) or t in self._zeros_of_sigma

    def _member(self, eta: float) -> float | None:
        """Return the eta that counts, or `None` for an explicit sigma."""
        set_in_config = self._settings.eta
        if set_in_config is None and self._sigma is None:
            if not self._settings.noise.any_member:
                check_member(self.config)
            return check_eta(eta)
        if eta != 0 and eta != set_in_config and not self._warned_of_eta:
            self._warned_of_eta = True
            if not torch.compiler.is_compiling():
                chosen = "explicit sigma" if self._sigma is not None else f"eta={set_in_config}"
                logger.warning(
                    f"`eta`={eta} is passed to `step`, but the scheduler's {chosen} counts."
                )
        return None if self._sigma is not None else set_in_config

    def _table_for(
        self, eta: float | None, rederive: bool, device: Any, dtype: torch.dtype
    ) -> Table:
        clips, order = self._settings.clips, self._settings.solver_order
        rederive = rederive or order > 1
        key = (eta, rederive and clips, device, dtype)
        table = self._tables.get(key)
        if table is None:
            table = self._keep(key, self._make_table(eta, rederive and clips, dtype), device)
        return table

    @outside_modes
    def _make_table(self, eta: float | None, rederive: bool, dtype: torch.dtype) -> Table:
        sigma = self._sigma if eta is None else self._checked_sigma(eta)
        assert sigma is not None  # `_member` returns None only for an explicit sigma
        if eta is None and not torch.compiler.is_compiling():  # alpha_bar may be new
            check_sigma(sigma[self._plan], self._alpha_bar_s[self._plan])
        made = self._table(sigma, rederive, dtype)
        if self._settings.solver_order > 1:
            made = made._replace(multistep=self._multistep(sigma, self._clips(), dtype))
        return made

    def _multistep(self, sigma: torch.Tensor, clips: bool, dtype: torch.dtype) -> Multistep:
        config = self.config
        solver = (config.solver_form, config.solver_order, config.solver_corrector)
        further = (config.solver_variable, config.solver_weights, config.solver_corrector_order)
        made = multistep_of(
            self._alpha_bar,
            self._alpha_bar_s,
            sigma,
            self._plan,
            *solver,
            config.lower_order_final,
            None if clips else config.prediction_type,
            dtype,
            self._scales(),
            *further,
        )
        return made if self._stored is None else self._with_stored_weights(made, dtype)

    def _checked_sigma(self, eta: float) -> torch.Tensor:
        sigma = self._sigma_of(eta)
        # up to eta = 1 every sigma is admissible; above it the plan decides (a traced call gets NaN
        # instead)
        if eta > 1 and not torch.compiler.is_compiling():
            check_sigma(sigma[self._plan], self._alpha_bar_s[self._plan], eta)
        return sigma

    def _get_variance(
        self, timestep: int | torch.Tensor, prev_timestep: int | torch.Tensor
    ) -> torch.Tensor:
        """Return sigma(1)^2 of the step from `timestep` to `prev_timestep` (DDIM, Eq. 16).

        Editing, inversion and reinforcement learning ask for it under stock's private name.

        Args:
            timestep: t in 0 .. T - 1, planned or not: an int or a tensor.
            prev_timestep: s in 0 .. T - 1, or negative for the end; broadcasts against `timestep`.

        Returns:
            float32, rounded once.

        Raises:
            ValueError: for a timestep out of range.
        """
        self._follow()
        a_t, a_s = self._at(self._alpha_bar, timestep), self._alpha_bar_or_end(prev_timestep)
        return sigma_eta(a_t, a_s).square().float()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Take one step, from t to the next planned timestep s (DDIM, Eq. 12).

        A `timestep` that is not planned lands on the largest planned one below it, or on the end.
        The step that lands on alpha_bar = 1 adds no noise.

        Args:
            model_output: prediction of the network, the shape of `sample`; or 2 C channels, of a
                network that predicts a variance in the second half. `reverse_variance` says whether
                it is used; where no noise is added it is left out.
            timestep: t in 0 .. T - 1: an int, a 0-d tensor, or, with `solver_order` 1, a tensor of
                shape (B,) with one t per sample.
            sample: x_t, (B, C, ...), any floating dtype; computed in float32 or better.
            eta: the member, >= 0, where the config leaves it open.
            use_clipped_model_output: re-derive eps_hat from the clipped x0_hat; needed for eta = 1
                to be DDPM where clipping acts.
            generator: of the noise, or a list of one for each sample.
            variance_noise: the noise itself, the shape of `sample`; excludes `generator`.
            return_dict: return a `DDIMSchedulerOutput` rather than a tuple.

        Returns:
            `prev_sample` (x_s) and `pred_original_sample` (x0_hat), in the dtype of `sample`.

        Raises:
            ValueError: before `set_timesteps`, or for an argument out of its range, naming it.
        """
        if not (isinstance(sample, torch.Tensor) and isinstance(model_output, torch.Tensor)):
            check_tensors(model_output=model_output, sample=sample)
        self._follow()
        if not self._planned:
            raise ValueError("`set_timesteps` has not been called; call it before `step`.")
        dtype = compute_dtype(sample, model_output)
        if self._stored is not None:
            self._check_table_fits(sample, timestep, eta, dtype)
        member = self._member(eta)
        if self._sigma is not None:
            check_on_plan(timestep, self._plan)
        settings = self._settings
        if settings.solver_order > 1:
            check_one_timestep(timestep, settings.solver_order)
        table = self._table_for(member, use_clipped_model_output, sample.device, dtype)
        adds_noise = member is None or member > 0 or not settings.noise.follows_sigma
        if settings.noise_is_unsaid and (member is None or member > 0):
            self._check_noise_is_said(model_output, sample, timestep)
        prev_sample, x0 = self._step(
            table,
            adds_noise,
            model_output,
            timestep,
            sample,
            settings.learned,
            generator,
            variance_noise,
        )
        if not return_dict:
            return prev_sample, x0
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)
