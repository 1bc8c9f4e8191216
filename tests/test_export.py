"""The three export forms: what is written, and that each loads in a fresh process."""

import json
import re
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, DPMSolverMultistepScheduler

import ddim_schedulers
from ddim_schedulers import (
    GeneralizedDDIMInverseScheduler,
    GeneralizedDDIMScheduler,
    MarkovianDDPMScheduler,
    bundle,
    export,
    pipelines,
)
from ddim_schedulers.training import cli
from ddim_schedulers.training.sharing import hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # see test_hub

TOKEN = "hf_RecogniseMe0123456789abcdefghijklm"
SETTINGS = {"eta": 0.5, "timestep_spacing": "quadratic", "quadratic_end": 1.0, "beta_end": 0.03}


def ours(config):
    return {k: v for k, v in config.items() if not k.startswith("_")}


OUR_PIPELINES = (
    pipelines.AnnealedLangevinPipeline,
    pipelines.GenerationPipeline,
    pipelines.InterpolationPipeline,
    pipelines.InversionPipeline,
)
OWN = {
    "GeneralizedDDIMScheduler": lambda: GeneralizedDDIMScheduler(eta=0.5),
    "DDIMScheduler": DDIMScheduler,  # to be loaded without this package
}


@pytest.fixture(scope="module")
def folders(tiny_ddpm, tmp_path_factory):
    """The same pipeline saved in every form; in `own` what a pipeline of ours saves."""
    root = tmp_path_factory.mktemp("forms")
    pipeline = tiny_ddpm(GeneralizedDDIMScheduler(**SETTINGS))
    pipeline.set_progress_bar_config(disable=True)
    for form in export.FORMS:
        export.save_pipeline(pipeline, root / form, form)
    images = pipeline(
        generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type="np"
    ).images
    torch.save(torch.from_numpy(images), root / "images.pt")
    for name, make in OWN.items():
        pipelines.GenerationPipeline(**tiny_ddpm(make()).components).save_pretrained(
            root / "own" / name
        )
    return root


# What is common to the programs below: load, collect every log line and warning, sample.
PRELUDE = """
import json, logging, sys, warnings
import torch
lines = []
class Collect(logging.Handler):
    def emit(self, record):
        lines.append((record.levelname, record.getMessage()))
warnings.simplefilter("error")
# from diffusers' own `load_config`, for stock schedulers too
warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated")
import diffusers
from diffusers import DiffusionPipeline
for name in ("diffusers", "huggingface_hub", "transformers", ""):
    logging.getLogger(name).addHandler(Collect(logging.WARNING))
def load(path, **options):
    lines.clear()
    pipe = DiffusionPipeline.from_pretrained(path, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe, [line for line in lines if line[0] in ("WARNING", "ERROR")]
def sample(pipe):
    noise = torch.Generator().manual_seed(0)
    images = pipe(generator=noise, num_inference_steps=4, output_type="np").images
    return float((torch.from_numpy(images) - torch.load(sys_root + "/images.pt")).abs().max())
"""

WITHOUT = """
try:
    import ddim_schedulers
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package is not hidden")
seen = {}
for where, portable, bundled, plugin in places:
    pipe, told = load(portable)
    seen[where, "portable"] = type(pipe).__name__, type(pipe.scheduler).__name__, told
    pipe(num_inference_steps=2, output_type="np")
    try:
        load(bundled)
    except ValueError as error:
        seen[where, "no trust"] = str(error)
    pipe, told = load(bundled, trust_remote_code=True)
    seen[where, "trusted"] = type(pipe).__name__, type(pipe.scheduler).__name__, told
    seen[where, "difference"] = sample(pipe)
    seen[where, "config"] = dict(pipe.scheduler.config)
    try:
        load(plugin)
    except (ValueError, ModuleNotFoundError) as error:  # the latter from diffusers 0.40
        seen[where, "plug-in"] = str(error)
pipe.save_pretrained("again")  # saved once more, the code travels with it
pipe, _ = load("again", trust_remote_code=True)
seen["again", "difference"] = sample(pipe)
pipe, told = load(sys_root + "/own/DDIMScheduler")
pipe(num_inference_steps=2, output_type="np")
seen["own"] = type(pipe).__name__, type(pipe.scheduler).__name__, told
print("RESULT", repr(seen))
"""

WITH = """
import ddim_schedulers
from ddim_schedulers import GeneralizedDDIMScheduler as Ours
from ddim_schedulers.pipelines import GenerationPipeline
seen = {}
for where, portable, bundled, plugin in places:
    pipe, told = load(portable)
    pipe.scheduler = Ours.from_config(pipe.scheduler.config)
    seen[where, "portable"] = told, dict(pipe.scheduler.config), lines[:]
    as_ddpm = diffusers.DDPMPipeline(**pipe.components)
    as_ddpm.set_progress_bar_config(disable=True)
    seen[where, "portable difference"] = sample(as_ddpm)
    pipe, told = load(plugin)
    seen[where, "plug-in"] = type(pipe.scheduler) is Ours, told, dict(pipe.scheduler.config)
    seen[where, "plug-in difference"] = sample(pipe)
    pipe, told = load(bundled, trust_remote_code=True)
    seen[where, "trusted"] = type(pipe.scheduler) is Ours, told, dict(pipe.scheduler.config)
    seen[where, "trusted difference"] = sample(pipe)
    pipe.scheduler = Ours.from_config(pipe.scheduler.config)
    seen[where, "trusted and swapped difference"] = sample(pipe)
    lines.clear()
    for trust in ({}, {"trust_remote_code": True}):  # a pipeline of ours needs no trust
        pipe = GenerationPipeline.from_pretrained(bundled, **trust)
        seen[where, "ours"] = type(pipe.scheduler) is Ours, dict(pipe.scheduler.config), lines[:]
        as_ddpm = diffusers.DDPMPipeline(**pipe.components)
        as_ddpm.set_progress_bar_config(disable=True)
        seen[where, "ours difference"] = sample(as_ddpm)
    pipe, told = load(plugin, scheduler=Ours(eta=0.25))
    seen[where, "passed"] = pipe.scheduler.config.eta, told
    pipe, told = load(portable, scheduler=Ours(eta=0.25))
    seen[where, "passed to stock"] = told
scheduler = Ours.from_pretrained(portable, subfolder="scheduler")
seen["scheduler alone"] = dict(scheduler.config)
if push:  # as a user of diffusers does it
    stock = diffusers.DDPMPipeline.from_pretrained(sys_root + "/plug-in", scheduler=scheduler)
    stock.push_to_hub("me/swapped", token=push)
    pipe, told = load("me/swapped")
    seen["swapped"] = type(pipe.scheduler) is Ours, told, pipe.scheduler.config.eta
    own = sys_root + "/own/GeneralizedDDIMScheduler"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)  # see test_hub
        GenerationPipeline.from_pretrained(own).push_to_hub("me/generation", token=push)
    for place in (own, "me/generation"):
        pipe, told = load(place)
        pipe(num_inference_steps=2, output_type="np")
        seen["own", place] = type(pipe).__name__, type(pipe.scheduler).__name__, told
print("RESULT", repr(seen))
"""


def result(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return eval(re.search(r"RESULT (.*)", done.stdout)[1])


def test_every_form_in_fresh_processes_from_disk_and_from_the_hub(
    folders, loopback_hub, fresh_python, rounding
):
    loopback_hub.tokens[TOKEN] = ("me", True)
    for form in export.FORMS:
        hub.push_pipeline(folders / form, f"me/{form}", form=form, token=TOKEN)
    order = ("portable", "self-contained", "plug-in")
    places = [("disk", *(str(folders / f) for f in order)), ("hub", *(f"me/{f}" for f in order))]
    head = PRELUDE + f"sys_root = {str(folders)!r}\nplaces = {places!r}\npush = {TOKEN!r}\n"
    online = {"HF_ENDPOINT": loopback_hub.url, "HF_HUB_OFFLINE": "0"}
    wanted = ours(GeneralizedDDIMScheduler(**SETTINGS).config)

    seen = result(fresh_python(head + WITHOUT, without_package=True, **online))
    for where in ("disk", "hub"):
        assert seen[where, "portable"] == ("DDIMPipeline", "DDIMScheduler", [])
        assert "trust_remote_code=True" in seen[where, "no trust"]
        pipeline, scheduler, told = seen[where, "trusted"]
        assert (pipeline, scheduler) == ("DDPMPipeline", "GeneralizedDDIMScheduler")
        assert not [line for line in told if "trust" not in line[1]]
        assert ours(seen[where, "config"]) == wanted
        assert seen[where, "difference"] < rounding
        assert "ddim_schedulers" in seen[where, "plug-in"]
    assert seen["again", "difference"] < rounding
    assert seen["own"] == ("DDPMPipeline", "DDIMScheduler", [])

    seen = result(fresh_python(head + WITH, **online))
    for where in ("disk", "hub"):
        told, config, later = seen[where, "portable"]
        assert not told
        assert not later
        assert ours(config) == wanted
        assert seen[where, "portable difference"] < rounding
        is_ours, told, config = seen[where, "plug-in"]
        assert is_ours
        assert not told
        assert ours(config) == wanted
        assert seen[where, "plug-in difference"] < rounding
        is_ours, told, config = seen[where, "trusted"]
        assert not is_ours  # the code of the repository, beside the package's own class
        assert not [line for line in told if "trust" not in line[1]]
        assert ours(config) == wanted
        assert seen[where, "trusted difference"] < rounding
        assert seen[where, "trusted and swapped difference"] < rounding
        is_ours, config, told = seen[where, "ours"]
        assert is_ours
        assert not [line for line in told if "trust" not in line[1]]
        assert ours(config) == wanted
        assert seen[where, "ours difference"] < rounding
        assert seen[where, "passed"] == (0.25, [])
        # DDIMPipeline puts a stock scheduler in the place of any other, and diffusers says so
        [(_, told)] = seen[where, "passed to stock"]
        assert "{'eta': 0.25} were passed to DDIMScheduler" in told
    assert ours(seen["scheduler alone"]) == wanted
    assert seen["swapped"] == (True, [], 0.5)
    for place in (str(folders / "own" / "GeneralizedDDIMScheduler"), "me/generation"):
        assert seen["own", place] == ("DDPMPipeline", "GeneralizedDDIMScheduler", [])

    # a token is for the Hub, not for the store behind it
    cdn = [a for _, path, a, _ in loopback_hub.requests if path.startswith("/cdn/")]
    assert cdn
    assert set(cdn) == {None}


def contents(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", OWN)
def test_our_pipelines_are_saved_as_diffusers_loads_them(name, folders, tiny_ddpm, tmp_path):
    """One folder, whichever saved it: the test above loads it, and pushes it, in new processes."""
    saved = folders / "own" / name
    for cls in OUR_PIPELINES:
        cls(**tiny_ddpm(OWN[name]()).components).save_pretrained(tmp_path / cls.__name__)
        assert contents(tmp_path / cls.__name__) == contents(saved)
        loaded = cls.from_pretrained(saved)
        assert type(loaded) is cls and type(loaded.scheduler) is type(OWN[name]())
        assert ours(loaded.scheduler.config) == ours(OWN[name]().config)


def test_the_command_line_samples_a_self_contained_pipeline(folders, tmp_path):
    """With the installed class: the code beside the config would end the program."""
    root = shutil.copytree(folders / "self-contained", tmp_path / "p")
    [code] = root.rglob("*.py")
    code.write_text("raise SystemExit('ran')")
    options = ["--num_images", "2", "--num_inference_steps", "3", "--device", "cpu"]
    words = ["sample", "--pipeline", str(root), *options, "--output", str(tmp_path / "images")]
    assert cli.main(words) == 0
    assert len(list((tmp_path / "images" / "images").glob("*.png"))) == 2


def test_what_each_form_writes(folders):
    index = {f: json.loads((folders / f / "model_index.json").read_text()) for f in export.FORMS}
    assert index["portable"]["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["plug-in"]["scheduler"] == ["ddim_schedulers", "GeneralizedDDIMScheduler"]
    module, name = index["self-contained"]["scheduler"]
    assert name == "GeneralizedDDIMScheduler"
    assert (folders / "self-contained" / "scheduler" / f"{module}.py").is_file()
    # DDIMPipeline would put a stock scheduler in the place of ours
    assert {f: i["_class_name"] for f, i in index.items()} == {
        "portable": "DDIMPipeline",
        "plug-in": "DDPMPipeline",
        "self-contained": "DDPMPipeline",
    }
    assert not [p for form in export.FORMS for p in (folders / form).rglob("*.partial")]


@pytest.mark.parametrize("start", export.FORMS)
@pytest.mark.parametrize("goal", export.FORMS)
def test_every_form_becomes_every_other(start, goal, folders):
    made = export.export_folder(folders / start, goal)
    wanted = export.export_folder(folders / goal, goal)
    assert set(made.files) == set(wanted.files)
    for path, content in made.files.items():
        if isinstance(content, bytes):
            assert content == wanted.files[path], path
            assert content == (folders / goal / path).read_bytes(), path
    assert bool(made.notes) == (goal == "portable")


def test_saving_over_another_form_leaves_no_code_behind(tiny_ddpm, tmp_path):
    pipeline = tiny_ddpm(GeneralizedDDIMScheduler(eta=1.0))
    for form in ("self-contained", "plug-in", "self-contained", "portable"):
        notes = export.save_pipeline(pipeline, tmp_path / "p", form)
        code = list((tmp_path / "p").rglob("*.py"))
        assert len(code) == (form == "self-contained")
    assert notes == [
        "DDIMScheduler has no `eta`; without ddim_schedulers eta=1.0 has no effect. Pass `eta=1.0` "
        "to the pipeline where its call takes it."
    ]


@pytest.mark.parametrize("name", sorted(export.STOCK_CLASSES))
def test_the_bundle_is_the_package_in_one_file(name, tmp_path):
    module, source = bundle.bundle(name)
    assert module.startswith("ddim_schedulers_")
    assert bundle.bundle(name) == (module, source)
    assert not re.search(r"^\s*(from|import) (\.|ddim_schedulers)", source, re.M)
    assert "import_module" not in source
    (tmp_path / f"{module}.py").write_text(source)
    from diffusers.utils.dynamic_modules_utils import check_imports

    assert check_imports(tmp_path / f"{module}.py") == []


def test_a_bundle_refuses_a_name_that_two_modules_define(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    return 1\n")
    (tmp_path / "b.py").write_text("from .a import f\n\n\ndef f():\n    return 2\n")
    joined = bundle._Joined()
    with pytest.raises(ValueError, match="`f` is defined twice, by a.py and by b.py"):
        joined.add(tmp_path / "b.py")
    (tmp_path / "b.py").write_text("from . import a\n")
    with pytest.raises(ValueError, match="it must be `from .module import name`"):
        bundle._Joined().add(tmp_path / "b.py")


@pytest.mark.parametrize(
    "scheduler",
    [
        MarkovianDDPMScheduler(variance_type="fixed_large_log", timestep_spacing="trailing"),
        MarkovianDDPMScheduler(beta_schedule="sigmoid", timesteps=[900, 500, 100]),
        GeneralizedDDIMScheduler(beta_schedule="laplace", eta=1.0, reverse_variance="sigma_hat"),
        GeneralizedDDIMScheduler(
            sigma=torch.tensor([0.1, 0.05, 0.0]), timesteps=torch.tensor([900, 500, 100])
        ),
        GeneralizedDDIMScheduler(
            rescale_betas_zero_snr=True, prediction_type="v_prediction", trained_betas=[0.1] * 1000
        ),
        GeneralizedDDIMScheduler(
            eta=0.6, eta_interval=[0.2, 0.8], eps_scale=[1.0, 1.02], end_scale=1.03
        ),
        GeneralizedDDIMInverseScheduler(
            timestep_spacing="linspace", clip_sample=False, eps_scale=1.01, end_scale=0.9
        ),
    ],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.parametrize("form", export.FORMS)
def test_settings_survive_every_form(scheduler, form, tmp_path):
    entry, files, _ = export.scheduler_files(scheduler, form)
    config = json.loads(files["scheduler_config.json"])
    again = type(scheduler).from_config(config)
    assert ours(again.config) == json.loads(json.dumps(ours(scheduler.config), default=list))
    assert again.planned_pairs() == scheduler.planned_pairs()
    if form == "portable":
        stock = getattr(__import__("diffusers"), entry[1]).from_config(config)
        assert ours(type(scheduler).from_config(stock.config).config) == ours(again.config)


def test_other_schedulers_and_folders(tiny_ddpm, tmp_path):
    from diffusers import DDIMScheduler, PNDMScheduler

    stock = tiny_ddpm(PNDMScheduler())
    assert export.save_pipeline(stock, tmp_path / "stock") == []
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "stock").scheduler) is PNDMScheduler
    assert export.export_folder(tmp_path / "stock").schedulers == {}
    with pytest.raises(ValueError, match="no scheduler of .* is one of"):
        export.export_folder(tmp_path / "stock", "self-contained")
    with pytest.raises(ValueError, match="`pipeline_dir` is .*, which is not a saved pipeline"):
        export.export_folder(tmp_path)
    with pytest.raises(ValueError, match="`form` is 'zip'"):
        export.save_pipeline(stock, tmp_path / "zip", "zip")
    for form in ("plug-in", "self-contained"):
        with pytest.raises(ValueError, match="no scheduler of this DDPMPipeline is one of"):
            export.save_pipeline(stock, tmp_path / "none", form)
    assert not (tmp_path / "none").exists()
    mean = tiny_ddpm(GeneralizedDDIMScheduler(prediction_type="posterior_mean"))
    with pytest.raises(ValueError, match="'posterior_mean', with which a stock scheduler"):
        export.save_pipeline(mean, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
    with pytest.raises(ValueError, match="`scheduler` is a DDIMScheduler"):
        export.scheduler_files(DDIMScheduler(), "portable")
    (tmp_path / "stock" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="is a pickle"):
        export.export_folder(tmp_path / "stock")


def test_only_the_pipeline_is_exported(folders, tmp_path):
    root = shutil.copytree(folders / "plug-in", tmp_path / "p")
    for extra in ("optimizer.pt", "checkpoint-1/model.safetensors", "unet/scaler.pt", ".git/HEAD"):
        (root / extra).parent.mkdir(exist_ok=True)
        (root / extra).write_bytes(b"")
    (root / "samples.png").write_bytes(b"")
    made = export.export_folder(root)
    assert sorted(made.left_out) == [
        ".git/HEAD",
        "checkpoint-1/model.safetensors",
        "optimizer.pt",
        "unet/scaler.pt",
    ]
    assert "samples.png" in made.files
    index = json.loads((root / "model_index.json").read_text())
    (root / "model_index.json").write_text(json.dumps({**index, "_class_name": ["mine", "Mine"]}))
    (root / "mine.py").write_text("")
    assert "mine.py" in export.export_folder(root).files


def test_no_path_of_this_machine_is_exported(folders, tmp_path):
    pipeline = DDPMPipeline.from_pretrained(folders / "plug-in")
    export.save_pipeline(pipeline, tmp_path / "p", "plug-in")
    for path in (tmp_path / "p").rglob("*.json"):
        assert str(folders) not in path.read_text(), path


def test_package_exports_work_as_documented():
    assert ddim_schedulers.to_portable(GeneralizedDDIMScheduler())[1] == []


def test_a_stock_scheduler_swapped_in_is_not_turned_back(tmp_path, tiny_ddpm):
    """Our private settings survive in the config of whatever stock scheduler is made from it."""
    ours = GeneralizedDDIMScheduler(eta=0.5, timestep_spacing="quadratic")
    portable, _ = ddim_schedulers.to_portable(ours)
    other = DPMSolverMultistepScheduler.from_config(portable.config)
    tiny_ddpm(other).save_pretrained(tmp_path)
    exported = export.export_folder(tmp_path, "portable")
    assert not exported.schedulers and not exported.notes
    index = json.loads(exported.files["model_index.json"])
    assert index["scheduler"] == ["diffusers", "DPMSolverMultistepScheduler"]
    assert index["_class_name"] == "DDPMPipeline"


def test_a_portable_pipeline_in_memory_is_saved_in_every_form(folders, tmp_path):
    """Its stock scheduler carries our settings, so it counts as one of ours."""
    pipeline = DiffusionPipeline.from_pretrained(folders / "portable")
    for form in export.FORMS:
        export.save_pipeline(pipeline, tmp_path / form, form)
        index = (tmp_path / form / "model_index.json").read_text()
        assert (
            json.loads(index)["scheduler"]
            == (json.loads((folders / form / "model_index.json").read_text())["scheduler"])
        )
