"""Checkpoints are whole or absent, and the newest whole one is found."""

import errno
import hashlib
import json
import math
import resource
import signal
import subprocess
import sys

import pytest
import torch

from ddim_schedulers.training.common import storage
from ddim_schedulers.training.networks import checkpoints
from ddim_schedulers.training.networks.checkpoint_contents import WEIGHTS
from ddim_schedulers.training.networks.checkpoints import CheckpointError


def contents(step):
    weights = torch.arange(50.0) + step
    moments = {"exp_avg": weights, "exp_avg_sq": weights**2, "step": torch.tensor(float(step))}
    state = {"step": step, "config": {}, "data": {}, "ema": {}, "best": {}}
    return {
        "state.json": storage.to_json(state),
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.safetensors": storage.pack({"w": weights}),
        "unet/weights.safetensors": storage.pack({"w": weights}),
        "optimizer.safetensors": storage.pack({f"0.{k}": v for k, v in moments.items()}),
    }


def rewrite(folder, name, data):
    """Changes a file together with what the manifest says of it; None takes it out of both."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if data is None:
        (folder / name).unlink()
        del manifest[name]
    else:
        (folder / name).write_bytes(data)
        manifest[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def root(tmp_path):
    for step in (10, 20, 30):
        checkpoints.write(tmp_path, step, contents(step))
    return tmp_path


def test_what_is_written_is_what_is_read(root):
    newest = checkpoints.newest_whole(root)
    assert newest == root / "step-00000030"
    loaded = storage.unpack(newest / "unet/weights.safetensors")
    assert torch.equal(loaded["w"], torch.arange(50.0) + 30)
    assert [checkpoints.step_of(p) for p in checkpoints.listed(root)] == [30, 20, 10]
    assert not list(root.glob(".*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "unet/weights.safetensors").unlink(), "weights.safetensors is missing"),
        (lambda p: (p / "unet/weights.safetensors").write_bytes(b"short"), "has 5 bytes instead"),
        (
            lambda p: (p / "state.json").write_bytes(contents(31)["state.json"]),
            "the contents of state.json have changed",
        ),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json cannot be used"),
        (lambda p: (p / "manifest.json").write_text("{}"), "does not list state.json"),
        (lambda p: (p / "manifest.json").write_text("[" * 10**5), "nested deeper"),
        (lambda p: (p / "manifest.json").write_text('{"state.json": 5}'), "cannot be used"),
        (lambda p: (p / "manifest.json").write_bytes(b"\xff"), "not UTF-8"),
        (lambda p: rewrite(p, "../../x", b"{}"), "cannot be used: its entry"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(root, damage, message):
    damage(root / "step-00000030")
    with pytest.warns(UserWarning, match=f"step-00000030 is damaged .*{message}") as caught:
        assert checkpoints.newest_whole(root) == root / "step-00000020"
    assert "using the one before" in str(caught[0].message)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.chosen(str(root / "step-00000030"), root)


MOMENTS = torch.arange(50.0)
STATES = [
    ({"step": value}, "step is") for value in (-5, 31, 30.0, "30", None, True, 10**18, [], math.nan)
] + [
    ({"config": []}, "config is"),
    ({"data": None}, "data is"),
    ({"best": 5}, "best is"),
    ({"best": {"step": 40, "value": 1.0, "figure": "f", "weights": "ema"}}, "best.step is"),
    ({"best": {"step": 10, "value": math.nan, "figure": "f", "weights": "ema"}}, "best.value is"),
    ({"best": {"step": 10, "value": 1.0, "figure": 5, "weights": "ema"}}, "best.figure is"),
    ({"place": [0]}, "place is"),
    ({"place": [0, -1]}, "place is"),
    ({"place": "00"}, "place is"),
    ({"ema": {"optimization_step": -1}}, "optimization_step is"),
    ({"ema": {"optimization_step": "3"}}, "optimization_step is"),
    ({"ema": {}, "config": {"use_ema": True}}, "optimization_step is"),
    ({"ema": {"optimization_step": 30}}, "does not list unet_ema"),
    ({"config": {"timestep_sampling": "loss_aware"}}, "does not list sampler.safetensors"),
    ({"scaler": 5}, "scaler is"),
    ({"scaler": {"scale": 1.0}}, "scaler is"),
]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        *[
            ("state.json", storage.to_json(json.loads(contents(30)["state.json"]) | change), m)
            for change, m in STATES
        ],
        ("state.json", b"", "not valid JSON"),
        ("state.json", b"{}", "step is 'None'"),
        ("state.json", b"[" * 10**5, "nested deeper"),
        ("state.json", b'{"step": 30, "step": 30}', "appears twice"),
        ("unet/config.json", None, "does not list unet/config.json"),
        ("unet/config.json", b"[]", "must hold a JSON object"),
        (f"unet/{WEIGHTS}", None, "does not list unet/"),
        (f"unet/{WEIGHTS}", b"", "no whole safetensors file"),
        (f"unet/{WEIGHTS}", storage.pack({}), "holds no weights"),
        ("optimizer.safetensors", None, "does not list optimizer.safetensors"),
        ("optimizer.safetensors", b"x" * 99, "no whole safetensors file"),
        ("optimizer.safetensors", storage.pack({}), "holds no moments"),
        ("optimizer.safetensors", storage.pack({"0.exp_avg": MOMENTS}), "not .'exp_avg', 'exp"),
        ("optimizer.safetensors", storage.pack({"7.exp_avg": MOMENTS}), "of no parameter"),
        ("optimizer.safetensors", storage.pack({"x": MOMENTS}), "of no parameter"),
        ("optimizer.safetensors", storage.pack({"0.exp_avg": MOMENTS[1:]}), "no weight has"),
    ],
)
def test_a_checkpoint_that_lacks_what_a_run_needs_is_passed_over(root, name, data, message):
    """The manifest fits the files; what they hold does not do."""
    rewrite(root / "step-00000030", name, data)
    with pytest.warns(UserWarning, match=f"step-00000030 is damaged .*{message}"):
        assert checkpoints.newest_whole(root) == root / "step-00000020"


def test_one_flipped_bit_is_noticed(root):
    path = root / "step-00000030/unet/weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert "have changed" in checkpoints.verify(root / "step-00000030")


def test_when_all_are_damaged_nothing_is_started(root):
    for folder in checkpoints.listed(root):
        (folder / "state.json").unlink()
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="all 3 checkpoints"):
        checkpoints.newest_whole(root)


def test_what_resume_means(root, tmp_path):
    assert checkpoints.chosen("latest", root) == root / "step-00000030"
    assert checkpoints.chosen("latest", tmp_path / "new") is None
    assert checkpoints.chosen("never", tmp_path / "new") is None
    assert checkpoints.chosen(str(root / "step-00000010"), root) == root / "step-00000010"
    with pytest.raises(ValueError, match="`resume` is 'never', but .* holds checkpoints"):
        checkpoints.chosen("never", root)
    with pytest.raises(ValueError, match="must be never, latest or a checkpoint folder"):
        checkpoints.chosen("newest", root)


def test_the_last_ones_and_the_best_are_kept(root):
    (root / ".writing-40").mkdir()
    (root / ".discarded-step-00000005").mkdir()
    checkpoints.write(root, 40, contents(40))
    checkpoints.prune(root, step=40, keep_last=2, best_step=10)
    assert [checkpoints.step_of(p) for p in checkpoints.listed(root)] == [40, 30, 10]
    assert not list(root.glob(".*"))


@pytest.mark.parametrize(("keep_last", "left"), [(1, [25]), (2, [25, 20])])
def test_a_run_resumed_before_a_damaged_checkpoint_keeps_its_own(root, keep_last, left):
    (root / "step-00000030" / "state.json").write_bytes(b"x")
    checkpoints.write(root, 25, contents(25))  # resumed at 20
    checkpoints.prune(root, step=25, keep_last=keep_last, best_step=None)
    assert [checkpoints.step_of(p) for p in checkpoints.listed(root)] == left
    assert all(checkpoints.verify(p) is None for p in checkpoints.listed(root))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_last_good_one(root, monkeypatch, number):
    real = checkpoints.write_file

    def full(path, data):
        if path.name == "weights.safetensors":
            real(path, data[: len(data) // 2])
            raise OSError(number, "No space left on device")
        real(path, data)

    monkeypatch.setattr(checkpoints, "write_file", full)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.write(root, 40, contents(40))
    assert "step 40 cannot be written" in str(caught.value)
    assert "the disk is full" in str(caught.value)
    assert f"the last good checkpoint is {root / 'step-00000030'}" in str(caught.value)
    assert checkpoints.newest_whole(root) == root / "step-00000030"
    assert not list(root.glob(".writing*"))


def test_the_limit_of_a_real_file_system_call_is_reported(root):
    """A real refusal by the kernel (a limit on file size), not a stand-in."""
    code = (
        "import sys; from pathlib import Path\n"
        "from ddim_schedulers.training.networks import checkpoints as c\n"
        "try: c.write(Path(sys.argv[1]), 40, {'state.json': b'0' * 100_000})\n"
        "except c.CheckpointError as error: print(error)"
    )

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = subprocess.run(
        [sys.executable, "-c", code, str(root)],
        cwd=root,  # not the repo's root, where a folder shadows an installed wheel
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )
    assert "the disk is full" in done.stdout, done.stderr
    assert checkpoints.newest_whole(root) == root / "step-00000030"


def test_moments_come_back_in_the_format_of_their_parameter():
    weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    saved = storage.pack(checkpoints.optimizer_tensors(optimizer))
    other = torch.optim.AdamW([weight], fused=True)
    from safetensors.torch import load

    checkpoints.restore_optimizer(other, load(saved))
    before, after = optimizer.state[weight], other.state[weight]
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert after["exp_avg"].stride() == weight.stride()


def test_nothing_in_a_checkpoint_is_pickled(root):
    for path in (root / "step-00000030").rglob("*"):
        assert path.is_dir() or path.suffix in (".json", ".safetensors")
    assert json.loads((root / "step-00000030/manifest.json").read_text())["state.json"]["size"] > 0
