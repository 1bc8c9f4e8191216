"""The former place of `ddim_schedulers.training.likelihood.learned_betas`."""

from ddim_schedulers.former import former

__getattr__ = former(
    __name__,
    "ddim_schedulers.training.likelihood.learned_betas",
    ("LOG_SNR_MAX", "LOG_SNR_MIN", "LearnedBetas", "learn_betas", "save_betas"),
)
