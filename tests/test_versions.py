"""The versions that results are stamped with."""

import platform

import sklearn
import torch

import ddim_schedulers
from ddim_schedulers.training.common.versions import versions


def test_each_version_stands_under_the_name_that_was_asked_for_in_that_order():
    found = versions("torch", "scikit-learn", "ddim_schedulers", "ddim-schedulers", "python")
    own = ddim_schedulers.__version__
    assert list(found.items()) == [
        ("torch", str(torch.__version__)),
        ("scikit-learn", sklearn.__version__),
        ("ddim_schedulers", own),
        ("ddim-schedulers", own),
        ("python", platform.python_version()),
    ]
    assert all(type(version) is str for version in found.values())  # torch's is a class of its own
