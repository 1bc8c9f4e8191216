"""How far two sets of images are apart."""

from ddim_schedulers.former import former

__getattr__ = former(
    __name__,
    "ddim_schedulers.training.metrics.distances",
    ("frechet_distance", "inception_score", "kernel_distance", "neighbour_metrics"),
)
