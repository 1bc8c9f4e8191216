"""The public attributes of a scheduler that public code assigns, with the tables behind them.

Stock schedulers compute from these attributes. Ours compute from float64 tables, so an assignment
of new values makes new tables, and a moved or cast copy of the same values changes nothing.
What is edited in place is found by the version that torch counts for every tensor.
"""

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch

from .betas import alpha_bar_before, alpha_bar_from_betas
from .config_types import check_numbers
from .modes import outside_modes
from .timesteps import check_timesteps

# Three names of one process; the one assigned last is the process.
PROCESS_ATTRIBUTES = ("betas", "alphas", "alphas_cumprod")
# How far betas and alpha_bar of one process are apart by rounding: float32, a product of T factors.
PROCESS_RTOL, PROCESS_ATOL = 1e-4, 1e-6


def watched(name: str) -> Any:
    """Return a property of `FamilyAttributesMixin` that hands out a tensor and takes another.

    Args:
        name: of the attribute; `_get_NAME` and `_put_NAME` do the work, or `_put_process` for one
            of `PROCESS_ATTRIBUTES` and `_put_end` for where the last step lands.
    """
    is_process, is_end = name in PROCESS_ATTRIBUTES, name != "timesteps"

    def get(self: Any) -> Any:
        return self._hand_out(name)

    def put(self: Any, values: Any) -> None:
        self._follow_config()  # a new plan belongs to the present config
        if is_process:
            self._put_process(name, values)
        elif is_end:
            self._put_end(name, values)
        else:
            self._put_timesteps(values)

    return property(get, put)


class FamilyAttributesMixin:
    """The attributes of stock diffusers that say which process and plan a step computes with."""

    config: Any
    _alpha_bar: torch.Tensor
    _plan: list[int]
    _shown: list[Any]  # the plan as `timesteps` has it
    _stride: int | None = None
    _planned_config: Any = None
    _planned_changes = -1

    betas = watched("betas")
    alphas = watched("alphas")
    alphas_cumprod = watched("alphas_cumprod")
    timesteps = watched("timesteps")

    # the name of the attribute that says where the last step lands
    _end_name: str

    def _set_process(self, betas: torch.Tensor) -> None:
        """Take the float64 betas of a config as the process, with float32 copies for the public."""
        with torch.inference_mode(False):  # its tensors have no version
            self._betas, self._alpha_bar = betas.clone(), alpha_bar_from_betas(betas.clone())
            # under diffusers' names, for training scripts and pipelines that read them
            self._public: dict[str, Any] = {n: self._exact(n).float() for n in PROCESS_ATTRIBUTES}
        self._end_given: float | None = None
        self._public.pop(self._end_name, None)
        self._marks: dict[str, tuple[Any, Any]] = {}

    def _exact(self, name: str) -> torch.Tensor:
        exact = {"betas": self._betas, "alphas": 1.0 - self._betas}
        return exact.get(name, self._alpha_bar)

    # -- what is handed out may be edited in place

    @outside_modes
    def _hand_out(self, name: str) -> Any:
        if name not in self._public:
            self._public[name] = torch.tensor(self.alpha_bar_end, device="cpu")
        value = self._public[name]
        if name not in self._marks:
            self._marks[name] = (value, mark_of(value))
        return value

    def _is_edited(self, name: str) -> bool:
        return name in self._marks and mark_of(self._marks[name][0]) != self._marks[name][1]

    @outside_modes
    def _take_edits(self) -> None:
        """Take over what was edited in place since it was handed out."""
        for name in [n for n in self._marks if self._is_edited(n)]:
            value = self._marks[name][0]
            if name == "alpha_bar":
                self._put_process("alphas_cumprod", value.float(), value)
            elif name == "timesteps":
                self._put_timesteps(value)
            elif name in PROCESS_ATTRIBUTES:
                self._put_process(name, value, value)
            else:
                self._put_end(name, value)

    def _publish(self, name: str, value: Any) -> None:
        self._public[name] = value
        self._marks.pop(name, None)

    def _accept(self, name: str, value: Any) -> None:
        """Return the assigned tensor itself: its owner may edit it later."""
        self._public[name] = value
        self._marks[name] = (value, mark_of(value))

    # -- the process

    @property
    def alpha_bar(self) -> torch.Tensor:
        """Return alpha_bar_t = prod_{i <= t} (1 - beta_i), float64, (T,) (DDPM, Eq. 4)."""
        self._follow()  # type: ignore[attr-defined]
        if "alpha_bar" not in self._marks:
            self._marks["alpha_bar"] = (self._alpha_bar, mark_of(self._alpha_bar))
        return self._alpha_bar

    @property
    def _default_end(self) -> float:
        """Return alpha_bar where the last step lands, by the config."""
        return 1.0 if self.config.get("set_alpha_to_one", True) else float(self._alpha_bar[0])

    @property
    def alpha_bar_end(self) -> float:
        """Return alpha_bar at the landing: 1, or alpha_bar_0 with `set_alpha_to_one=False`.

        Another one where `final_alpha_cumprod` (`initial_alpha_cumprod`, `one`) was assigned.
        """
        return self._default_end if self._end_given is None else self._end_given

    @outside_modes
    def _put_process(self, name: str, values: Any, edited: torch.Tensor | None = None) -> None:
        """Take assigned betas, alphas or alpha_bar: a copy as it is, new values as the process."""
        if edited is None:
            self._follow()  # type: ignore[attr-defined]
            shown = self._public[name]
            if values is shown:
                return
            tensor = _as_floats(name, values, len(self._alpha_bar))
            exact = self._exact(name).float()
            # a copy of what is shown, which may be a cast copy, but not one edited unnoticed
            of_shown = _same(tensor, shown) and _same(shown, exact)
            if not _has_numbers(tensor) or of_shown or _same(tensor, exact):
                self._accept(name, tensor)
                return
            edited = tensor.clone()
        else:
            tensor = _as_floats(name, values, len(self._alpha_bar))
        exact = edited.detach().to("cpu", torch.float64)
        alpha_bar = exact
        if name != "alphas_cumprod":
            betas = exact if name == "betas" else 1.0 - exact
            alpha_bar = alpha_bar_from_betas(betas)
        _check_assigned(name, exact, alpha_bar)
        self._alpha_bar = alpha_bar
        if name == "alphas_cumprod":
            betas = 1.0 - alpha_bar / alpha_bar_before(alpha_bar)
            # betas that say the same are better than a difference of nearly equal numbers
            told = alpha_bar_from_betas(self._betas)
            if torch.allclose(told, alpha_bar, rtol=PROCESS_RTOL, atol=PROCESS_ATOL):
                betas = self._betas
        others = [n for n in PROCESS_ATTRIBUTES if n != name]
        if name == "alphas_cumprod" and betas is self._betas:
            others = []
        self._betas = betas
        self._accept(name, tensor)
        for other in others:
            device = self._public[other].device
            self._publish(other, self._exact(other).float().to(device))
        if self._end_given is None:
            self._public.pop(self._end_name, None)
            self._marks.pop(self._end_name, None)
        self._marks.pop("alpha_bar", None)
        if exact is edited:  # `alpha_bar` itself was edited
            self._marks["alpha_bar"] = (exact, mark_of(exact))
        self._process_changed()  # type: ignore[attr-defined]

    @outside_modes
    def _put_end(self, name: str, value: Any) -> None:
        """Take alpha_bar where the last step lands; a copy of an entry is that entry, exactly."""
        if value is self._public.get(name) and name in self._marks and not self._is_edited(name):
            return
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not _has_numbers(value):
            self._accept(name, value)
            return
        is_scalar = isinstance(value, torch.Tensor) and value.numel() == 1
        number = value.item() if is_scalar else value
        valid = isinstance(number, Real) and not isinstance(number, bool)
        if not valid or not 0 < number <= 1:
            raise ValueError(f"`{name}` is {value!r}; it must be a number in (0, 1].")
        dtype = value.dtype if isinstance(value, torch.Tensor) else torch.float64
        given = torch.tensor(float(number), dtype=torch.float64, device="cpu")
        ends = torch.tensor([self.alpha_bar_end], dtype=torch.float64, device="cpu")
        entries = torch.cat([ends, self._alpha_bar])
        equal = (entries.float().to(dtype).double() == given) | (entries == given)
        before = self.alpha_bar_end
        self._end_given = float(entries[equal][0]) if bool(equal.any()) else float(number)
        self._accept(name, value if isinstance(value, torch.Tensor) else given.float())
        if self._end_given != before:
            self._process_changed()  # type: ignore[attr-defined]

    # -- the trajectory

    @outside_modes
    def _put_timesteps(self, values: Any) -> None:
        """Take an assigned trajectory, or a part of the planned one, which keeps its plan."""
        if values is self._public["timesteps"] and "timesteps" in self._marks:
            if not self._is_edited("timesteps"):
                return
        if isinstance(values, torch.Tensor) and not _has_numbers(values):
            if values.shape != (len(self._shown),):
                raise ValueError(
                    f"`timesteps` has shape {tuple(values.shape)} and no values (it is on the "
                    f"device {values.device}); it must have shape ({len(self._shown)},)."
                )
            self._accept("timesteps", values)
            return
        listed = _as_integers(values)
        if listed != self._shown:
            self._take_trajectory(listed)
            self._shown = listed
        self._accept("timesteps", values)

    def _take_trajectory(self, listed: list[Any]) -> None:
        """Plan what was assigned, in the order of the class's `timesteps`."""
        raise NotImplementedError

    def _show(self, device: Any = None) -> None:
        """Hand the plan out as `timesteps`."""
        timesteps = self._plan_tensor()  # type: ignore[attr-defined]
        self._shown = timesteps.tolist()
        self._publish("timesteps", timesteps.to(device))


def is_part(listed: list[Any], plan: list[int]) -> bool:
    """Tell whether timesteps are neighbours in a plan, in its order or backwards."""
    return any(
        plan[i : i + len(listed)] == order
        for order in (listed, listed[::-1])
        for i in ([plan.index(order[0])] if order and order[0] in plan else [0])
    )


def mark_of(value: Any) -> Any:
    """Return what changes when `value` is edited in place."""
    if isinstance(value, torch.Tensor):
        return None if value.is_inference() else value._version
    return value.tolist() if hasattr(value, "tolist") else list(value)


def _has_numbers(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor can be read: not on `meta`, and no stand-in of a tracer."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type != "meta"


def _same(tensor: torch.Tensor, kept: torch.Tensor) -> bool:
    """Tell whether a tensor is a moved or cast copy of another."""
    if not (_has_numbers(tensor) and _has_numbers(kept)) or tensor.shape != kept.shape:
        return False
    tensor, kept = tensor.detach(), kept.detach()
    return torch.equal(tensor.cpu(), kept.to("cpu", tensor.dtype))


def _as_floats(name: str, values: Any, big_t: int) -> torch.Tensor:
    if not isinstance(values, torch.Tensor):
        if values is None:
            raise ValueError(f"`{name}` is None; it must be a list of {big_t} numbers.")
        check_numbers(name, values)
        plain = values.tolist() if hasattr(values, "tolist") else list(values)
        values = torch.tensor(plain, dtype=torch.float64, device="cpu")
    if not values.is_floating_point() or values.shape != (big_t,):
        raise ValueError(
            f"`{name}` has shape {tuple(values.shape)} and dtype {values.dtype}; it must have one "
            f"floating-point value for each of the {big_t} training timesteps."
        )
    return values


def _as_integers(values: Any) -> list[Any]:
    """Return timesteps as a list; whole numbers of a floating dtype are a cast copy."""
    plain = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(plain, Iterable) or isinstance(plain, str | bytes):
        raise ValueError(f"`timesteps` is {values!r}; it must be a list of integers.")
    return [int(t) if isinstance(t, float) and t.is_integer() else t for t in plain]


def _check_assigned(name: str, values: torch.Tensor, alpha_bar: torch.Tensor) -> None:
    before = alpha_bar_before(alpha_bar)
    wrong = ~((alpha_bar >= 0) & (alpha_bar < before))
    if bool(wrong.any()):
        t = int(wrong.nonzero()[0])
        raise ValueError(
            f"`{name}[{t}]` is {float(values[t])}; alpha_bar must decrease strictly within [0, 1), "
            "that is, betas must lie in (0, 1) (the last one may be 1)."
        )


def checked_plan(listed: list[Any], big_t: int) -> list[int]:
    """Return assigned timesteps as a plan.

    Raises:
        ValueError: for none, for what is no integer in 0 .. T - 1, or does not decrease strictly.
    """
    if any(isinstance(t, bool) or (isinstance(t, float) and math.isnan(t)) for t in listed):
        raise ValueError(f"`timesteps` is {listed!r}; it must be a list of integers.")
    return check_timesteps(listed, big_t)
