"""The converter of PyTorch DDPM checkpoints, against a forward pass of that layout written here."""

import math
import pickle
import resource
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline

from ddim_schedulers import MarkovianDDPMScheduler
from ddim_schedulers.training import cli
from ddim_schedulers.training.sharing import convert

WIDTH, MULTIPLIERS, BLOCKS, ATTENDS = 32, (1, 2, 2), 2, (1,)  # 32 x 32 images, attention at 16


def random_state(width=WIDTH, multipliers=MULTIPLIERS, blocks=BLOCKS, attends=ATTENDS, images=3):
    """A state dict of that layout: names and shapes as its modules have them."""
    state = {}

    def layer(name, out, into, size=None):
        shape = (out, into) if size is None else (out, into, size, size)
        state[f"{name}.weight"] = torch.randn(shape) / math.sqrt(math.prod(shape[1:]))
        state[f"{name}.bias"] = 0.1 * torch.randn(out)

    def norm(name, channels):
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(channels)
        state[f"{name}.bias"] = 0.1 * torch.randn(channels)

    def resnet(name, into, out):
        norm(f"{name}.norm1", into)
        layer(f"{name}.conv1", out, into, 3)
        layer(f"{name}.temb_proj", out, 4 * width)
        norm(f"{name}.norm2", out)
        layer(f"{name}.conv2", out, out, 3)
        if into != out:
            layer(f"{name}.nin_shortcut", out, into, 1)

    def attention(name, channels):
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", channels, channels, 1)

    layer("temb.dense.0", 4 * width, width)
    layer("temb.dense.1", 4 * width, 4 * width)
    layer("conv_in", width, images, 3)
    skips, channels, last = [width], width, len(multipliers) - 1
    for level, multiplier in enumerate(multipliers):
        for block in range(blocks):
            resnet(f"down.{level}.block.{block}", channels, width * multiplier)
            channels = width * multiplier
            if level in attends:
                attention(f"down.{level}.attn.{block}", channels)
            skips.append(channels)
        if level < last:
            layer(f"down.{level}.downsample.conv", channels, channels, 3)
            skips.append(channels)
    resnet("mid.block_1", channels, channels)
    attention("mid.attn_1", channels)
    resnet("mid.block_2", channels, channels)
    for level in range(last, -1, -1):
        for block in range(blocks + 1):
            out = width * multipliers[level]
            resnet(f"up.{level}.block.{block}", channels + skips.pop(), out)
            channels = out
            if level in attends:
                attention(f"up.{level}.attn.{block}", channels)
        if level:
            layer(f"up.{level}.upsample.conv", channels, channels, 3)
    norm("norm_out", channels)
    layer("conv_out", images, channels, 3)
    return state


class Reference:
    """The network of that layout as functions of its state dict (DDPM, App. B)."""

    def __init__(self, state, multipliers=MULTIPLIERS, blocks=BLOCKS):
        self.state, self.levels, self.blocks = state, len(multipliers), blocks
        self.width = state["conv_in.weight"].shape[0]

    def get(self, name):
        return self.state[f"{name}.weight"], self.state[f"{name}.bias"]

    def conv(self, name, x, **options):
        return F.conv2d(x, *self.get(name), **options)

    def normed(self, name, x):
        return F.group_norm(x, 32, *self.get(name), eps=1e-6)

    def resnet(self, name, x, time):
        h = self.conv(f"{name}.conv1", F.silu(self.normed(f"{name}.norm1", x)), padding=1)
        h = h + F.linear(F.silu(time), *self.get(f"{name}.temb_proj"))[:, :, None, None]
        h = self.conv(f"{name}.conv2", F.silu(self.normed(f"{name}.norm2", h)), padding=1)
        if f"{name}.nin_shortcut.weight" in self.state:
            x = self.conv(f"{name}.nin_shortcut", x)
        return x + h

    def attention(self, name, x):
        h = self.normed(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(q.shape[1]), dim=2)
        out = torch.einsum("bij,bcj->bci", weights, v).view_as(x)
        return x + self.conv(f"{name}.proj_out", out)

    def attend(self, name, x):
        return self.attention(name, x) if f"{name}.q.weight" in self.state else x

    def time(self, t):
        half = self.width // 2
        rates = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half))
        angles = t.float()[:, None] * rates
        h = F.linear(torch.cat([angles.sin(), angles.cos()], 1), *self.get("temb.dense.0"))
        return F.linear(F.silu(h), *self.get("temb.dense.1"))

    def __call__(self, x, t):
        time, skips = self.time(t), [self.conv("conv_in", x, padding=1)]
        for level in range(self.levels):
            for block in range(self.blocks):
                h = self.resnet(f"down.{level}.block.{block}", skips[-1], time)
                skips.append(self.attend(f"down.{level}.attn.{block}", h))
            if level < self.levels - 1:  # padded to the right and below only
                padded = F.pad(skips[-1], (0, 1, 0, 1))
                skips.append(self.conv(f"down.{level}.downsample.conv", padded, stride=2))
        h = self.resnet("mid.block_1", skips[-1], time)
        h = self.resnet("mid.block_2", self.attention("mid.attn_1", h), time)
        for level in range(self.levels - 1, -1, -1):
            for block in range(self.blocks + 1):
                h = torch.cat([h, skips.pop()], 1)
                h = self.resnet(f"up.{level}.block.{block}", h, time)
                h = self.attend(f"up.{level}.attn.{block}", h)
            if level:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
                h = self.conv(f"up.{level}.upsample.conv", h, padding=1)
        return self.conv("conv_out", F.silu(self.normed("norm_out", h)), padding=1)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return random_state()


@torch.no_grad()
def largest_difference(unet, state):
    noise = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 32, 32, generator=noise)
    t = torch.tensor([3, 917])
    wanted = Reference(state)(x, t)
    return float((unet(x, t).sample - wanted).abs().max() / wanted.abs().max())


def test_the_network_is_the_same(state, tmp_path):
    torch.save(state, tmp_path / "model.ckpt")
    argv = ["convert", "--checkpoint", str(tmp_path / "model.ckpt"), "--output"]
    assert cli.main([*argv, str(tmp_path / "p")]) == 0
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "p")  # loads without this package
    assert type(pipe.scheduler) is DDPMScheduler
    assert pipe.scheduler.config.variance_type == "fixed_large"
    assert pipe.unet.config.sample_size == 32
    assert largest_difference(pipe.unet, state) < 1e-5
    again = MarkovianDDPMScheduler.from_config(pipe.scheduler.config)
    assert again.config.beta_end == 0.02
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"freq_shift": 0},
        {"flip_sin_to_cos": True},
        {"norm_eps": 1e-2},
        {"attention_head_dim": 8},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_the_comparison_sees_a_wrong_config(wrong, state):
    from diffusers import UNet2DModel

    config = convert.unet_config(state)
    converted = convert.convert_state(state, 3)
    for settings, same in (({}, True), (wrong, False)):
        unet = UNet2DModel(**{**config, **settings}).eval()
        unet.load_state_dict(converted)
        assert (largest_difference(unet, state) < 1e-5) is same


def test_the_comparison_sees_swapped_weights(state):
    from diffusers import UNet2DModel

    unet = UNet2DModel(**convert.unet_config(state)).eval()
    swapped = convert.convert_state(state, 3)
    q, k = (f"mid_block.attentions.0.to_{part}.bias" for part in "qv")
    swapped[q], swapped[k] = swapped[k], swapped[q]
    unet.load_state_dict(swapped)
    assert largest_difference(unet, state) > 1e-4


def test_ema_raw_and_parallel_names(state, tmp_path):
    ema = {key: value + 1 for key, value in state.items()}
    raw = {f"module.{key}": value for key, value in state.items()}
    torch.save([raw, {"state": {}, "param_groups": []}, 3, 1000, ema], tmp_path / "ckpt.pth")
    for weights, wanted in (("ema", ema), ("raw", state)):
        found = convert.load_checkpoint(tmp_path / "ckpt.pth", weights)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in state)


def test_published_shapes():
    """CIFAR-10 and LSUN configs of the layout, on the `meta` device: names and shapes fit."""
    from diffusers import UNet2DModel

    published = {(1, 2, 2, 2): ((1,), 32, 35.7e6), (1, 1, 2, 2, 4, 4): ((4,), 256, 113.7e6)}
    for multipliers, (attends, size, parameters) in published.items():
        with torch.device("meta"):
            state = random_state(128, multipliers, 2, attends)
            config = convert.unet_config(state)
            unet = UNet2DModel(**config)
        assert config["sample_size"] == size
        assert abs(sum(p.numel() for p in unet.parameters()) - parameters) < 0.05e6
        converted = convert.convert_state(state, len(multipliers))
        convert._check_shapes(converted, unet.state_dict())


def test_a_wide_network_is_refused_before_it_is_built(state, tmp_path):
    """Numbers of no network, and shapes that fit no checkpoint: nothing is allocated for them."""
    first = torch.zeros(32 * 1000, 1, 1, 1)  # would ask for a network of 32,000 channels
    torch.save({**state, "down.2.block.0.conv1.weight": first}, tmp_path / "x.ckpt")
    begun = time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="`block_out_channels` is .*32000"):
        convert.convert_checkpoint(tmp_path / "x.ckpt", tmp_path / "out")
    # building it would take minutes; of the processor, so that a busy machine changes nothing
    assert time.process_time() - begun < 60
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert more < 500 * 1024  # KiB; the network would take tens of GiB


def test_half_precision_becomes_float32(state, tmp_path):
    torch.save({key: value.bfloat16() for key, value in state.items()}, tmp_path / "x.ckpt")
    convert.convert_checkpoint(tmp_path / "x.ckpt", tmp_path / "p")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "p")
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}
    rounded = {key: value.bfloat16().float() for key, value in state.items()}
    assert largest_difference(pipe.unet, rounded) < 1e-5


def test_a_warning_of_torch_is_no_damage_to_the_file(state, tmp_path, monkeypatch):
    """pytest makes errors of warnings here, as `python -W error` does."""
    real = torch.load

    def warns(*args, **kwargs):
        warnings.warn("sparse tensors take long", stacklevel=2)  # as torch 2.14 does
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "load", warns)
    moments = {"exp_avg": torch.ones(3).to_sparse()}
    torch.save([state, moments, 1, 2, state], tmp_path / "model.ckpt")
    found = convert.load_checkpoint(tmp_path / "model.ckpt")
    assert found.keys() == state.keys()
    with pytest.raises(UserWarning, match="take long"):  # outside, the filter is as it was
        torch.load(tmp_path / "model.ckpt", weights_only=True)


class Harm:
    def __reduce__(self):
        return (open, ("ran", "w"))


def test_refusals(state, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def refused(content, message, **options):
        torch.save(content, "x.ckpt")
        with pytest.raises(ValueError, match=message):
            convert.convert_checkpoint("x.ckpt", "out", **options)
        assert not (tmp_path / "out").exists()

    refused({"a": Harm()}, "no PyTorch file of tensors alone")
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(ValueError, match="no PyTorch file of tensors alone"):
        convert.convert_checkpoint("x.ckpt", "out")
    assert not (tmp_path / "ran").exists()
    refused([1, 2], "must hold a state dict")
    refused({"a": torch.zeros(1)}, "has no 'conv_in.weight'; it must be in the layout")
    refused(
        {**state, "down.0.other.weight": torch.zeros(1)}, "'down.0.other.weight'; every name must"
    )
    refused({**state, "up.7.block.0.conv1.weight": torch.zeros(1)}, "1 are unknown")
    refused({**state, "down.0.block.0.conv_shortcut.weight": torch.zeros(1)}, "3 x 3 shortcuts")
    refused({k: v for k, v in state.items() if k != "norm_out.bias"}, "1 tensors are missing")
    refused({k: v for k, v in state.items() if ".downsample." not in k}, "average pooling")
    refused({**state, "conv_out.bias": torch.zeros(7)}, "conv_out.bias of shape")
    refused({k: v for k, v in state.items() if ".attn." not in k}, "`image_size` is not set")
    refused(state, "`weights` is 'all'", weights="all")
    refused(state, "`variance_type` is 'learned_range'", variance_type="learned_range")
    for size in ("32", 32.0, True):
        refused(state, "it must be an integer", image_size=size)
    for size in (0, -4, 6, 33):
        refused(state, f"`image_size` is {size}; it must be a multiple of 4", image_size=size)
    for value in (math.nan, math.inf):
        refused(
            {**state, "conv_in.bias": torch.full((32,), value)}, "conv_in.bias that are not finite"
        )
    first = "down.0.block.0.conv1.weight"
    for key in ("conv_in.weight", "conv_out.weight", first):
        refused({**state, key: torch.tensor(1.0)}, f"{key} of shape")
    refused({**state, first: torch.zeros(33, 32, 3, 3)}, "33 output channels .* multiple of 32")
    refused({**state, first: torch.zeros(0, 32, 3, 3)}, "0 output channels")
    refused({**state, "conv_out.weight": torch.zeros(6, 32, 3, 3)}, "has 6 output channels")
    refused({**state, "mid.attn_1.q.weight": torch.zeros(64, 64, 3, 3)}, "to_q.weight of shape")
    refused({k: v for k, v in state.items() if k[:4] != "down"}, f"has no '{first}'")
    refused({**state, "module.conv_in.bias": state["conv_in.bias"]}, "with and without the prefix")
    for odd in (torch.zeros(32).int(), torch.zeros(32).to_sparse(), torch.zeros(32) * 1j):
        refused({**state, "conv_in.bias": odd}, "conv_in.bias is not a dense tensor")
    shared = torch.zeros(10**6)  # one memory under many names
    names = {f"down.0.block.{i}.conv1.weight": shared for i in range(100)}
    refused({**state, **names}, "makes 4[0-9]* bytes of weights; it must make at most 67108864")
    deep = {f"down.0.block.{i}.conv1.bias": torch.zeros(1) for i in range(1000)}
    refused({**state, **deep}, "`layers_per_block` is '1000'; it must be an integer, 1 to")
    many = torch.zeros(1).expand(10**9, 32, 3, 3)  # a small file for 10^12 bytes
    refused({**state, first: many}, "conv1.weight is not a dense tensor")
    with pytest.raises(ValueError, match="`checkpoint` is 'nothing'; it must be a file"):
        convert.convert_checkpoint("nothing", "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    torch.save(state, "x.ckpt")
    with pytest.raises(ValueError, match="a new or an empty folder"):
        convert.convert_checkpoint("x.ckpt", "full")
    assert cli.main(["convert", "--checkpoint", "nothing", "--output", "out"]) == 2
    assert capsys.readouterr().err.startswith("ddim-schedulers convert: error: `checkpoint`")
