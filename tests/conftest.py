"""Settings and fixtures that every test shares."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

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

# `nohup pytest` and a shell's background jobs ignore these, and every process that a test starts
# would inherit it.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGTERM, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _seed():
    """Gives each test the same global seed, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def rounding():
    """How far samples in [0, 1] of one float32 network may differ where its weights lie elsewhere.

    safetensors gives tensors that do not begin at multiples of 64 bytes, and CPU kernels choose the
    order of their sums by that: on an AMD EPYC with AVX-512 a network that was loaded is 1e-7 to
    1e-6 from the one that was saved, with stock schedulers too. Another process, another number of
    threads or another batch size does the same. Another setting of a scheduler is seen at 1e-3.
    Schedulers, tables and noise have no such sums; they are compared to the bit.
    """
    return 1e-5


@pytest.fixture(scope="session")
def assert_close(rounding):
    """Compares what two JSON files say: floats but for `rounding`, everything else as it is."""

    def compare(one, other, tolerance=rounding, place="$"):
        assert type(one) is type(other), place
        if isinstance(one, dict):
            assert one.keys() == other.keys(), place
            for key in one:
                compare(one[key], other[key], tolerance, f"{place}.{key}")
        elif isinstance(one, list):
            assert len(one) == len(other), place
            for i, pair in enumerate(zip(one, other, strict=True)):
                compare(*pair, tolerance, f"{place}[{i}]")
        elif isinstance(one, float):
            assert one == pytest.approx(other, rel=tolerance, abs=tolerance, nan_ok=True), place
        else:
            assert one == other, place

    return compare


@pytest.fixture
def float64():
    """Makes float64 the default dtype during the test: closed forms are compared at 1e-12."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(before)


class ClosedForm:
    """The papers' formulas in float64, written out again: nothing here calls the package.

    DDPM is arXiv:2006.11239, DDIM arXiv:2010.02502. Numbers are Python floats, batches tensors.
    """

    @staticmethod
    def alpha_bar(schedule="linear", steps=1000, beta_start=1e-4, beta_end=0.02, zero_snr=False):
        """alpha_bar_t for every t as a list of floats (DDPM, Eq. 4)."""

        def between(low, high):
            return [low + (high - low) * i / max(steps - 1, 1) for i in range(steps)]

        def from_shares(share):
            ratios = [share((i + 1) / steps) / share(i / steps) for i in range(steps)]
            return [min(1 - ratio, 0.999) for ratio in ratios]

        def laplace(u):
            sign = 1.0 if u <= 0.5 else -1.0
            snr = math.exp(-0.5 * sign * math.log(1 - 2 * abs(0.5 - u) + 1e-6))
            return math.sqrt(snr / (1 + snr))

        if schedule == "linear":
            betas = between(beta_start, beta_end)
        elif schedule == "scaled_linear":
            betas = [root * root for root in between(math.sqrt(beta_start), math.sqrt(beta_end))]
        elif schedule == "squaredcos_cap_v2":
            betas = from_shares(lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)
        elif schedule == "sigmoid":
            betas = [
                beta_start + (beta_end - beta_start) / (1 + math.exp(-x)) for x in between(-6, 6)
            ]
        else:
            betas = from_shares(laplace)
        alpha_bar, product = [], 1.0
        for beta in betas:
            product *= 1 - beta
            alpha_bar.append(product)
        if zero_snr:  # arXiv:2305.08891, Algorithm 1
            first, last = math.sqrt(alpha_bar[0]), math.sqrt(alpha_bar[-1])
            alpha_bar = [((math.sqrt(a) - last) * first / (first - last)) ** 2 for a in alpha_bar]
        return alpha_bar

    @staticmethod
    def sigma(a_t, a_s, eta=1.0):
        """DDIM, Eq. 16."""
        return eta * math.sqrt((1 - a_s) / (1 - a_t)) * math.sqrt(1 - a_t / a_s)

    @staticmethod
    def posterior(a_t, a_s):
        """(weight of x_0, weight of x_t, variance) of q(x_s | x_t, x_0): DDPM, Eq. 6-7."""
        alpha = a_t / a_s
        beta = 1 - alpha
        return (
            math.sqrt(a_s) * beta / (1 - a_t),
            math.sqrt(alpha) * (1 - a_s) / (1 - a_t),
            (1 - a_s) / (1 - a_t) * beta,
        )

    @classmethod
    def predictions(cls, kind, m, x, a_t, a_before=None):
        """(x0_hat, eps_hat) of a prediction, from its definition."""
        m, x = m.double(), x.double()
        if kind == "epsilon":
            return (x - math.sqrt(1 - a_t) * m) / math.sqrt(a_t), m
        if kind == "v_prediction":  # v = sqrt(abar) eps - sqrt(1 - abar) x_0
            x0 = math.sqrt(a_t) * x - math.sqrt(1 - a_t) * m
            return x0, math.sqrt(1 - a_t) * x + math.sqrt(a_t) * m
        if kind == "sample":
            x0 = m
        else:
            of_x0, of_x, _ = cls.posterior(a_t, a_before)
            x0 = (m - of_x * x) / of_x0
        return x0, (x - math.sqrt(a_t) * x0) / math.sqrt(1 - a_t)

    @staticmethod
    def rederived(x, x0, a_t):
        """eps_hat that belongs to x0_hat (DDPM, Eq. 4)."""
        return (x.double() - math.sqrt(a_t) * x0) / math.sqrt(1 - a_t)

    @staticmethod
    def ddim(x0, eps, a_s, sigma, z, std=None):
        """DDIM, Eq. 12; `std` is the noise where it is not sigma."""
        rest = max(1 - a_s - sigma**2, 0.0)
        noise = (sigma if std is None else std) * z.double()
        return math.sqrt(a_s) * x0 + math.sqrt(rest) * eps + noise

    @classmethod
    def ddpm(cls, x0, x, a_t, a_s, std, z):
        """DDPM, Algorithm 2, through the posterior mean of Eq. 7."""
        of_x0, of_x, _ = cls.posterior(a_t, a_s)
        return of_x0 * x0 + of_x * x.double() + std * z.double()

    @staticmethod
    def limited(x0, config):
        """Clipping or dynamic thresholding (arXiv:2205.11487, Sec. 2.3) as the config asks."""
        if config.get("thresholding"):
            flat = x0.flatten(1)
            q = torch.quantile(flat.abs(), config["dynamic_thresholding_ratio"], dim=1)
            q = q.clamp(1, config["sample_max_value"]).view(-1, *[1] * (x0.ndim - 1))
            return torch.minimum(torch.maximum(x0, -q), q) / q
        if config["clip_sample"]:
            return x0.clamp(-config["clip_sample_range"], config["clip_sample_range"])
        return x0


@pytest.fixture(scope="session")
def closed_form():
    """The formulas that the mathematics and the schedulers are compared with."""
    return ClosedForm


@pytest.fixture
def log(monkeypatch, caplog):
    """What this package and diffusers log from WARNING on; diffusers does not propagate it."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.fixture
def loopback_hub(monkeypatch):
    """A running Hub on 127.0.0.1 (tests/loopback_hub.py) that this process's client may reach."""
    import loopback_hub as module
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    with module.running() as hub:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        hub.Fault = module.Fault
        yield hub
    assert not hub.unknown()


@pytest.fixture
def fresh_python(tmp_path):
    """Runs code in a new process with empty caches; `without_package` hides ddim_schedulers."""

    hide = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ddim_schedulers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""

    def run(code, *, without_package=False, timeout=120, **variables):
        environment = {
            **os.environ,
            "HF_HOME": str(tmp_path / "hf_home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            **{name: str(value) for name, value in variables.items()},
        }
        return subprocess.run(
            [sys.executable, "-c", (hide if without_package else "") + code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """Runs Python in several processes that find each other, as torchrun's do.

    `processes(words, count, cwd)` returns when all have ended: the text of their standard outputs
    and errors, one after the other. They are forked from one process (tests/fork_server.py) that
    has imported everything, because starting Python anew takes longer than most such tests.
    """
    server = None
    root = tmp_path_factory.mktemp("processes")

    def run(words, count, cwd):
        nonlocal server
        if server is None:
            server = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                cwd=root,  # not the repo's root, where a folder shadows an installed wheel
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        log = Path(tempfile.mkdtemp(dir=root))
        job = {"words": [str(w) for w in words], "count": count, "cwd": str(cwd), "log": str(log)}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        out, err = (
            "".join((log / f"{rank}.{name}").read_text() for rank in range(count))
            for name in ("out", "err")
        )
        assert codes == [0] * count, f"exit codes {codes}\n{out}\n{err}"
        return out, err

    yield run
    if server is not None:
        server.stdin.close()
        server.stdout.close()
        server.wait()


@pytest.fixture(scope="session")
def tiny_ddpm():
    """Makes a `DDPMPipeline` with random weights around a scheduler: 8 x 8 grey images."""
    from diffusers import DDPMPipeline
    from tiny_models import tiny_unet

    def make(scheduler, channels=1):
        return DDPMPipeline(tiny_unet(channels, blocks=(8, 8)), scheduler)

    return make
