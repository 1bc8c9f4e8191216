"""Repositories that mean harm: refused with a clear error, quickly, within little memory."""

import json
import math
import re
import time
import tracemalloc

import pytest

from ddim_schedulers import (
    GeneralizedDDIMInverseScheduler,
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
    export,
)
from ddim_schedulers.pipelines import GenerationPipeline

CLASSES = (GeneralizedDDIMScheduler, GeneralizedDDIMInverseScheduler, MarkovianDDPMScheduler)
NAN = math.nan
BILLION = 10**9
# Of the processor, so that a busy machine changes nothing; what the harm asks for takes minutes.
CPU_SECONDS = 30
LONG = "x" * 10**7
NO_NUMBERS = ("0.1", None, [0.1], {"a": 1}, 10**400, True)
NO_FLAGS = ("false", None, 2, [True], {"a": 1})
NO_NAMES = (5, ["linear"], {"a": 1}, "__import__('os')", LONG)
MANY = [0.1] * 10**6

HOSTILE = {
    "num_train_timesteps": (100_001, BILLION, 1000.0, "1000", -1, 0, True, [1000], {"a": 1}),
    "trained_betas": (
        [NAN] * 1000,
        [math.inf] * 1000,
        ["0.1"] * 1000,
        [True] * 1000,
        [None] * 1000,
        [0.1, [0.2]],
        [[0.1]] * 1000,
        [0.1] * 999,
        MANY,
        "abc",
        {"a": 1},
        5,
    ),
    "beta_start": (*NO_NUMBERS, NAN, math.inf, -1, 0),
    "beta_end": (*NO_NUMBERS, NAN, math.inf, -1, 1.5),
    "clip_sample_range": (*NO_NUMBERS, NAN, math.inf, -1),
    "sample_max_value": (*NO_NUMBERS, NAN, math.inf, -1),
    "dynamic_thresholding_ratio": (*NO_NUMBERS, NAN, math.inf, -1, 2.0),
    "quadratic_end": NO_NUMBERS,
    "steps_offset": ("1", None, [1], 1.5, NAN, -1, BILLION, True),
    "beta_schedule": NO_NAMES,
    "prediction_type": NO_NAMES,
    "timestep_spacing": NO_NAMES,
    "reverse_variance": NO_NAMES,
    "variance_type": NO_NAMES,
    "clip_sample": NO_FLAGS,
    "set_alpha_to_one": NO_FLAGS,
    "thresholding": NO_FLAGS,
    "rescale_betas_zero_snr": NO_FLAGS,
    "eta": ("x", NAN, -1, [1], {"a": 1}, True, 10**400),
    "sigma": ("abc", [NAN, 0.0], ["a"], 5, {"a": 1}, MANY, [[0.1]], [], [9.0], [-1.0]),
    "timesteps": (
        "abc",
        [NAN, 0],
        ["a"],
        5,
        {"a": 1},
        list(range(10**6, 0, -1)),
        [[1]],
        [],
        [1.5, 0],
        [5, 5],
        [1000],
        [-1],
        [True],
    ),
    "calibration": ("abc", 5, [1.0], {"gamma": "abc"}, {"gamma": [NAN] * 1000}, {"gamma": MANY}),
    "_ddim_schedulers": (
        5,
        "x",
        [],
        {},
        {"settings": 5},
        {"settings": {"eta": "x"}, "stand_ins": []},
        {"settings": {}, "stand_ins": "x"},
        LONG,
    ),
}


@pytest.mark.parametrize(
    ("cls", "key"),
    [
        pytest.param(cls, key, id=f"{cls.__name__}-{key}")
        for cls in CLASSES
        for key in HOSTILE
        if key.startswith("_") or key in cls._get_init_keys(cls)
    ],
)
def test_hostile_configs_are_refused(cls, key):
    cls.from_config(cls().config)  # diffusers looks at its other classes once, which takes seconds
    for value in HOSTILE[key]:
        config = {"_class_name": cls.__name__, "num_train_timesteps": 1000, key: value}
        config.setdefault("beta_schedule", "linear")
        if key == "calibration":
            config["timestep_spacing"] = "optimal"
        tracemalloc.start()
        begun = time.process_time()
        try:
            with pytest.raises(ValueError) as caught:
                scheduler = cls.from_config(config)
                scheduler.set_timesteps(None if key in ("sigma", "timesteps") else 10)
            took, (_, most) = time.process_time() - begun, tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        said = str(caught.value)
        assert key.removeprefix("_") in said, said[:200]
        assert len(said) < 500
        assert took < CPU_SECONDS
        assert most < 50e6


def test_the_same_configs_are_fine_without_the_harm():
    """The cases above are refused for their value, not for what surrounds it."""
    for cls in CLASSES:
        config = {"_class_name": cls.__name__, "num_train_timesteps": 1000}
        cls.from_config({**config, "beta_schedule": "linear"}).set_timesteps(10)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_portable_config_that_stock_would_build_is_refused_by_ours(cls, tmp_path):
    """The stock class would ask for 8 GB; ours reads the same folder and says no."""
    cls.from_config(cls().config)  # diffusers looks at its other classes once, which takes seconds
    config = {
        "_class_name": export.STOCK_CLASSES[cls.__name__],
        "num_train_timesteps": 2 * BILLION,
        "beta_schedule": "linear",
        "_ddim_schedulers": {"class": cls.__name__, "settings": {}, "stand_ins": {}},
    }
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    tracemalloc.start()
    begun = time.process_time()
    try:
        with pytest.raises(ValueError, match="`num_train_timesteps` is 2000000000"):
            cls.from_pretrained(tmp_path)
        took, (_, most) = time.process_time() - begun, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert took < CPU_SECONDS
    assert most < 50e6


INDEX = {
    "_class_name": "DDPMPipeline",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"_class_name": ', "not valid JSON"),
        ("[1]", "must hold a JSON object"),
        (
            {**INDEX, "../../outside": ["diffusers", "UNet2DModel"]},
            "is no name; a name must consist of",
        ),
        ({**INDEX, "/etc": ["diffusers", "UNet2DModel"]}, "is no name; a name must consist of"),
        ({**INDEX, "unet": ["diffusers"]}, "'unet' is .*; it must be a library and a class"),
        ({**INDEX, "unet": [{"a": 1}, 5]}, "it must be a library and a class"),
        ({**INDEX, "_class_name": 5}, "`_class_name` is 5; it must name the pipeline's class"),
        ({**INDEX, "scheduler": ["ddim_schedulers", "register"]}, "names the class 'register'"),
        (
            {**INDEX, "scheduler": ["ddim_schedulers.training.cli", "main"]},
            "names the class 'main'",
        ),
    ],
)
def test_a_hostile_index_is_not_exported(index, message, tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    text = index if isinstance(index, str) else json.dumps(index)
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        export.export_folder(tmp_path)


def test_code_in_a_repository_is_never_run_by_an_export_nor_by_our_pipelines(tiny_ddpm, tmp_path):
    """Both read the config of a downloaded self-contained repo, and never its code."""
    root = tmp_path / "p"
    export.save_pipeline(tiny_ddpm(GeneralizedDDIMScheduler(eta=0.5)), root, "self-contained")
    [code] = root.rglob("*.py")
    code.write_text("raise SystemExit('ran')")
    made = export.export_folder(root, "self-contained")
    assert made.schedulers["scheduler"].config.eta == 0.5
    assert GenerationPipeline.from_pretrained(root).scheduler.config.eta == 0.5
    [path] = [p for p in made.files if p.endswith(".py")]
    assert b"raise SystemExit" not in made.files[path]


PROGRAM = """
import os, resource, time
import ddim_schedulers
from diffusers import DiffusionPipeline
from diffusers.utils import logging
logging.set_verbosity_error()
seen = {}
for repo in repos:
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        pipe = DiffusionPipeline.from_pretrained(repo)
        said = "loaded " + type(pipe.scheduler).__name__
    except Exception as error:
        said = type(error).__name__ + ": " + str(error)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    seen[repo] = said, time.process_time() - begun, more
print("RESULT", repr(seen))
"""


def test_hostile_repositories_on_the_hub(tiny_ddpm, loopback_hub, fresh_python, tmp_path):
    root = tmp_path / "p"
    export.save_pipeline(tiny_ddpm(GeneralizedDDIMScheduler()), root, "plug-in")
    good = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    index, marker = json.loads(good["model_index.json"]), tmp_path / "ran"
    config = json.loads(good["scheduler/scheduler_config.json"])
    evil = f"open({str(marker)!r}, 'w').write('ran')\nclass GeneralizedDDIMScheduler: pass\n"

    def with_scheduler(*entry):
        return json.dumps({**index, "scheduler": list(entry)}).encode()

    def with_config(**settings):
        return {
            **good,
            "scheduler/scheduler_config.json": json.dumps({**config, **settings}).encode(),
        }

    name, package = "GeneralizedDDIMScheduler", "ddim_schedulers"
    repos = {
        "evil/good": good,
        "evil/outside": {**good, "../../../outside.txt": b"out"},
        "evil/folder": {**good, "scheduler/../../../../outside.json": b"out"},
        "evil/absolute": {**good, "scheduler//" + str(tmp_path) + "/outside.json": b"out"},
        "evil/code": {
            **good,
            "scheduler/evil.py": evil.encode(),
            "model_index.json": with_scheduler("evil", name),
        },
        "evil/module": {**good, "model_index.json": with_scheduler("os.path", "join")},
        "evil/function": {
            **good,
            "model_index.json": with_scheduler(package, "register"),
        },
        "evil/long": with_config(num_train_timesteps=2 * BILLION),
        "evil/nan": with_config(trained_betas=[NAN] * 1000),
        "evil/type": with_config(beta_start="0.1"),
        "evil/list": with_config(timesteps=list(range(10**6))),
    }
    for repo, files in repos.items():
        loopback_hub.add_repo(repo, files)
    done = fresh_python(
        f"repos = {list(repos)!r}\n" + PROGRAM,
        HF_ENDPOINT=loopback_hub.url,
        HF_HUB_OFFLINE="0",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = eval(re.search(r"RESULT (.*)", done.stdout)[1])
    said = {repo.removeprefix("evil/"): line[0] for repo, line in seen.items()}

    assert said["good"] == "loaded GeneralizedDDIMScheduler"
    # a file beside the pipeline's folders is not asked for; one that claims to be inside is refused
    assert said["outside"] == "loaded GeneralizedDDIMScheduler"
    assert re.match("ValueError: .*outside.json", said["folder"], re.S)
    assert said["absolute"] == "loaded GeneralizedDDIMScheduler"  # in a folder of the cache
    written = [p for p in tmp_path.rglob("outside*") if tmp_path / "hf_home" not in p.parents]
    assert not written
    assert not (tmp_path.parent / "outside.txt").exists()
    assert "trust_remote_code=True" in said["code"]
    assert not marker.exists()
    assert "is not a module in 'diffusers/pipelines'" in said["module"]
    assert re.match("(TypeError|ValueError|AttributeError)", said["function"])
    assert "`num_train_timesteps` is 2000000000; it must be an integer" in said["long"]
    assert "`trained_betas[0]` is nan" in said["nan"]
    assert "`beta_start` is '0.1'" in said["type"]
    assert "`timesteps` has 1000000 values" in said["list"]
    for repo, (_, seconds, mebibytes) in seen.items():
        if repo != "evil/good":  # the first one imports torch and diffusers' models
            assert seconds < CPU_SECONDS, repo
            assert mebibytes < 200, repo
