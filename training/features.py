"""The former place of `ddim_schedulers.training.metrics.features`."""

from ddim_schedulers.former import former

_NAMES = (
    "CLASSIFIER_KIND",
    "DINOV2",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "DinoFeatures",
    "InceptionFeatures",
    "PooledPixels",
    "SmallClassifier",
    "class_names",
    "extract",
    "load_classifier",
    "make_feature_space",
    "save_classifier",
    "train_classifier",
)

__getattr__ = former(
    __name__,
    "ddim_schedulers.training.metrics.features",
    {name: name for name in _NAMES}
    | {"classifier_record": "classifier_facts", "fingerprint": "space_fingerprint"},
)
