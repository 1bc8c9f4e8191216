"""Processes that were started together work together, or nothing runs."""

import pytest
import torch

from ddim_schedulers.training.common.processes import check_joined, on_cpu


@pytest.mark.parametrize("asked, available, used", [(0, 0, 1), (0, 1, 0), (1, 0, 1), (1, 1, 1)])
def test_the_cpu_is_used_where_it_is_asked_for_or_alone(monkeypatch, asked, available, used):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: bool(available))
    assert on_cpu(bool(asked)) == bool(used)


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    check_joined(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    check_joined(2)
    with pytest.raises(ValueError, match="`WORLD_SIZE` is 2.*use --cpu"):
        check_joined(1)
