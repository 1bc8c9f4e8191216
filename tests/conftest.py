"""Settings and fixtures that every test shares."""

import os

# Before torch, matplotlib or huggingface_hub are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks for the network fails at once
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # silences a warning about forked workers

import pytest
import torch

# One thread: sums come out in the same order on every machine, and tests that run beside others
# do not fight for the cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    """Gives each test the same global seed, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Makes float64 the default dtype during the test: closed forms are compared at 1e-12."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(before)
