"""The former place of `ddim_schedulers.training.metrics.features`."""

from ddim_schedulers.former import former

__getattr__ = former(
    __name__,
    "ddim_schedulers.training.metrics.features",
    (
        "CLASSIFIER_KIND",
        "DINOV2",
        "IMAGENET_MEAN",
        "IMAGENET_STD",
        "DinoFeatures",
        "InceptionFeatures",
        "PooledPixels",
        "SmallClassifier",
        "class_names",
        "classifier_record",
        "extract",
        "fingerprint",
        "load_classifier",
        "make_feature_space",
        "save_classifier",
        "train_classifier",
    ),
)
