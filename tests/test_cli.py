"""The command line: what it lists, what it imports, and how it fails."""

import argparse
import errno
import importlib
import importlib.metadata
import os
import pkgutil
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from safetensors import SafetensorError

import ddim_schedulers.training.commands
from ddim_schedulers.training import cli, parsing
from ddim_schedulers.training.common.flags import spelled

FAKE = "fake"


def fake_verb(monkeypatch, run, add_arguments=lambda parser: None):
    """Lists a verb `fake` whose `run` is given; returns its module."""
    module = types.ModuleType(f"ddim_schedulers.training.commands.{FAKE}")
    module.HELP = "Do nothing."
    module.add_arguments = add_arguments
    module.run = run
    monkeypatch.setitem(cli.VERBS, FAKE, module.HELP)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def raises(error):
    def run(args):
        raise error

    return run


def run_python(code, cwd):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_every_command_module_is_a_verb():
    modules = {
        info.name
        for info in pkgutil.iter_modules(ddim_schedulers.training.commands.__path__)
        if not info.name.startswith("_")
    }
    assert modules == {verb.replace("-", "_") for verb in cli.VERBS}
    assert set(cli.VERBS) >= cli.OWN_PARSER


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_help_of_each_verb(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    assert f"usage: ddim-schedulers {verb}" in capsys.readouterr().out
    module = sys.modules[cli.module_of(verb)]
    assert module.HELP == cli.VERBS[verb]


def test_help_lists_every_verb(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for verb, text in cli.VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(text)}$", out, re.MULTILINE)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    version = importlib.metadata.version("ddim-schedulers")
    assert capsys.readouterr().out == f"ddim-schedulers {version}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["--trace", FAKE], "unknown flag --trace; did you mean --traceback?"),
        ([FAKE, "--cou", "3"], "unknown flag --cou; did you mean --count?"),
        ([FAKE, "--cuont=3"], "unknown flag --cuont; did you mean --count?"),
        ([FAKE, "extra"], "unrecognized arguments: extra"),
    ],
)
def test_wrong_arguments_exit_with_2(argv, message, monkeypatch, capsys):
    fake_verb(monkeypatch, lambda args: 0, lambda parser: parser.add_argument("--count"))
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_no_arguments_print_the_help(capsys, monkeypatch):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in cli.VERBS)
    asked = []
    fake_verb(monkeypatch, lambda args: asked.append(args) or 0)
    assert cli.main([FAKE]) == 0 and asked  # nothing is required: it runs
    fake_verb(monkeypatch, None, lambda parser: parser.add_argument("--count", required=True))
    assert cli.main([FAKE]) == 2
    assert "--count" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["train"])
    assert stop.value.code == 0 and "--max_train_steps" in capsys.readouterr().out


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_dashes_and_underscores_are_as_good_in_every_verb(verb, capsys):
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    flags = set(re.findall(r"(?<!\S)--[\w-]+", capsys.readouterr().out))
    module = sys.modules[cli.module_of(verb)]
    if verb in cli.OWN_PARSER:
        parser = parsing._parser(verb)
    else:
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
    own = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    assert own and flags & set(own)
    for flag in own:
        for other in (flag.replace("_", "-"), "--" + flag[2:].replace("-", "_")):
            (word,) = spelled(parser, [f"{other}=1"])
            action = parser._option_string_actions[word.partition("=")[0]]
            assert action is parser._option_string_actions[flag] and word.endswith("=1")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        spelled(argparse.ArgumentParser(), ["--pipline"])
    assert spelled(parser, ["--", "--no-such"]) == ["--", "--no-such"]


@pytest.mark.parametrize("verb", sorted(set(cli.VERBS) - cli.OWN_PARSER))
def test_the_help_says_every_default(verb):
    parser = argparse.ArgumentParser()
    importlib.import_module(cli.module_of(verb)).add_arguments(parser)
    for action in parser._actions:
        if action.required or action.default in (None, False, argparse.SUPPRESS):
            continue
        values = action.default if isinstance(action.default, list) else [action.default]
        assert " ".join(map(str, values)) in action.help, action.option_strings


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b.png"),
            "No space left on device: 'a/b.png'",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "Permission denied: 'x'"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), "Is a directory: 'x'"),
        (OSError(errno.ENAMETOOLONG, "File name too long", b"x"), "File name too long: 'x'"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (OSError("of a library,\nin two lines"), "of a library, in two lines"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), os.strerror(28)),
    ],
)
def test_an_error_of_the_operating_system_is_one_sentence(error, said, monkeypatch, capsys):
    fake_verb(monkeypatch, raises(error))
    assert cli.main([FAKE]) == 1
    assert capsys.readouterr().err == f"ddim-schedulers fake: error: {said}\n"


def test_arguments_reach_the_verb_and_its_exit_code_comes_back(monkeypatch):
    seen = []

    def run(args):
        seen.append(args.count)
        return 7

    fake_verb(monkeypatch, run, lambda parser: parser.add_argument("--count", type=int))
    assert cli.main(["--traceback", FAKE, "--count", "3"]) == 7
    assert seen == [3]


def test_a_verb_with_its_own_parser_gets_the_rest_untouched(monkeypatch):
    seen = []
    module = fake_verb(monkeypatch, run=None)
    module.main = lambda argv: seen.extend(argv) or 0
    monkeypatch.setattr(cli, "OWN_PARSER", frozenset({FAKE}))
    assert cli.main([FAKE, "config.yaml", "--help", "--lr", "1e-3"]) == 0
    assert seen == ["config.yaml", "--help", "--lr", "1e-3"]


@pytest.mark.parametrize("missing", ["accelerate", "torchmetrics.image.fid"])
def test_a_missing_extra_is_one_sentence(missing, monkeypatch, capsys):
    fake_verb(
        monkeypatch, raises(ModuleNotFoundError(f"No module named {missing!r}", name=missing))
    )
    assert cli.main([FAKE]) == 2
    assert capsys.readouterr().err == (
        "`ddim-schedulers fake` needs the extra 'train': pip install \"ddim-schedulers[train]\"\n"
    )


def test_verbs_that_run_without_arguments_are_known():
    alone = set()
    for verb in set(cli.VERBS) - cli.OWN_PARSER:
        parser = argparse.ArgumentParser()
        importlib.import_module(cli.module_of(verb)).add_arguments(parser)
        if not any(action.required for action in parser._actions):
            alone.add(verb)
    assert alone == cli.WITHOUT_ARGUMENTS


def test_the_demo_runs_without_arguments(tmp_path):
    (tmp_path / "runs").write_text("a file where the demo wants a folder")
    code = f"import runpy; raise SystemExit(runpy.run_path({cli.__file__!r})['main'](['demo']))"
    done = run_python(code, tmp_path)
    assert done.returncode == 2, done.stderr
    assert "`--output` is 'runs/digits'" in done.stderr


def test_a_real_import_of_a_missing_extra(monkeypatch, capsys):
    def run(args):
        import sklearn.datasets  # noqa: F401

    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    fake_verb(monkeypatch, run)
    assert cli.main([FAKE]) == 2
    assert "needs the extra 'demo'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'nonsense'", name="nonsense"),
        ModuleNotFoundError("without a name"),
        # installed, but not the release we know: installing the extra again would not help
        ImportError("cannot import name 'x' from 'accelerate'", name="accelerate"),
        RuntimeError("a bug"),
    ],
)
def test_other_errors_are_not_swallowed(error, monkeypatch):
    fake_verb(monkeypatch, raises(error))
    with pytest.raises(type(error)) as caught:
        cli.main([FAKE])
    assert caught.value is error


def test_bad_input_is_one_line(monkeypatch, capsys):
    monkeypatch.delenv(cli.TRACEBACK_VARIABLE, raising=False)
    fake_verb(monkeypatch, raises(ValueError("`count` is 0; it must be at least 1.")))
    assert cli.main([FAKE]) == 2
    assert capsys.readouterr().err == (
        "ddim-schedulers fake: error: `count` is 0; it must be at least 1.\n"
    )


@pytest.mark.parametrize(("argv", "variable"), [(["--traceback", FAKE], "0"), ([FAKE], "1")])
def test_traceback_on_request(argv, variable, monkeypatch, capsys):
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, variable)
    fake_verb(monkeypatch, raises(ValueError("`count` is 0")))
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith("ddim-schedulers fake: error: `count` is 0\n")


def test_interrupt(monkeypatch, capsys):
    fake_verb(monkeypatch, raises(KeyboardInterrupt()))
    assert cli.main([FAKE]) == 130
    assert capsys.readouterr().err == "ddim-schedulers fake: interrupted\n"


def test_known_modules_are_those_of_the_extra():
    requirements = importlib.metadata.requires("ddim-schedulers")
    owners = importlib.metadata.packages_distributions()
    for extra, modules in cli.EXTRAS.items():
        declared = {
            re.match(r"[\w.-]+", line)[0].lower()
            for line in requirements
            if re.search(rf"extra == ['\"]{extra}['\"]", line)
        }
        # an extra that is not installed here is taken at its word: its module's own name
        named = {module: owners.get(module, [module.replace("_", "-")]) for module in modules}
        brought = {module: {name.lower() for name in names} for module, names in named.items()}
        assert set().union(*brought.values()) == declared - {"ddim-schedulers"}


def test_help_and_argument_errors_import_no_extra(tmp_path):
    code = f"""
import sys
from ddim_schedulers.training import cli
for verb in {[[], *([verb] for verb in cli.VERBS)]!r}:
    for argument, expected in (("--help", 0), ("--nonsense", 2)):
        try:
            status = cli.main([*verb, argument])
        except SystemExit as stop:
            status = stop.code
        assert status == expected, (verb, argument, status)
        heavy = {{"datasets", "torchmetrics", "matplotlib", "sklearn"}} & set(sys.modules)
        assert not heavy, (verb, argument, heavy)
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "status"),
    [(["--help"], 0), (["--version"], 0), ([], None), (["nonsense"], 2), (["--nonsense"], 2)],
)
def test_the_console_script_reads_the_command_line_before_it_imports(words, status, tmp_path):
    """In a process of its own; the file is the one that `pyproject.toml` names as the script."""
    root = Path(__file__).parents[1]
    assert 'ddim-schedulers = "ddim_schedulers_cli:main"' in (root / "pyproject.toml").read_text()
    code = f"""
import sys
sys.path.insert(0, {str(root)!r})
sys.argv[1:] = {words!r}
import ddim_schedulers_cli
try:
    status = ddim_schedulers_cli.main()
except SystemExit as stop:
    status = stop.code
heavy = {{"torch", "numpy", "diffusers", "ddim_schedulers"}} & set(sys.modules)
print("LEFT", status, sorted(heavy))
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    _, found, heavy = done.stdout.splitlines()[-1].split(" ", 2)
    assert heavy == "[]" and (status is None or found == str(status))
    assert "ddim-schedulers" in done.stdout + done.stderr


# Whose help imports torch (diffusers never), and why.
HELP_WITH_TORCH = {
    "train": "HfArgumentParser makes its flags of the settings, and transformers imports torch",
    "sample": "noises, spacings and solver forms are named beside the equations that they name",
    "reconstruct": "as sample",
    "interpolate": "as sample",
    "restore": "as sample",
}


def helps_of(verbs, tmp_path):
    """Returns which heavy modules one process has after the help of some verbs, and its output."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import ddim_schedulers_cli
for verb in {verbs!r}:
    for words in ([verb, "--help"], [verb, "--output", "x", "-h"]):
        sys.argv[1:] = words
        try:
            sys.exit(ddim_schedulers_cli.main())
        except SystemExit as stop:
            assert stop.code in (0, 2), (words, stop.code)
print("LEFT", *sorted({{"torch", "numpy", "diffusers"}} & set(sys.modules)))
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:], done.stdout


def test_help_of_a_verb_imports_no_torch(tmp_path):
    verbs = [verb for verb in cli.VERBS if verb not in HELP_WITH_TORCH]
    heavy, shown = helps_of(verbs, tmp_path)
    assert heavy == [] and len(verbs) >= 7
    assert all(f"usage: ddim-schedulers {verb}" in shown for verb in verbs)


def test_help_of_a_verb_with_torch_imports_no_diffusers(tmp_path):
    heavy, shown = helps_of(list(HELP_WITH_TORCH), tmp_path)
    assert "torch" in heavy and "diffusers" not in heavy
    assert all(f"usage: ddim-schedulers {verb}" in shown for verb in HELP_WITH_TORCH)


def test_the_console_script_runs_a_verb(tmp_path):
    script = Path(__file__).parents[1] / "ddim_schedulers_cli.py"
    for words, status, said in (
        (["push", "--help"], 0, "usage: ddim-schedulers push"),
        (["push", "--pipeline", "nowhere", "--repo_id", "a/b"], None, "nowhere"),
    ):
        command = [sys.executable, str(script), *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert said in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.returncode == status or (status is None and done.returncode > 0)


def test_module_form(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "ddim_schedulers.training.cli", "nonsense"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert done.returncode == 2
    assert "invalid choice: 'nonsense'" in done.stderr
    assert "Traceback" not in done.stderr


def test_processes_that_work_together_part_before_the_program_ends(monkeypatch):
    """Gloo's threads are aborted, and the process with them, where Python ends before they do."""
    import torch.distributed as group

    def verb(name, argv):
        group.init_process_group("gloo", store=group.HashStore(), rank=0, world_size=1)
        if argv:
            raise ValueError(argv[0])
        return 0

    monkeypatch.setattr(cli, "_run", verb)
    for words, code in ((["demo"], 0), (["demo", "bad"], 2)):
        assert cli.main(words) == code
        assert not group.is_initialized()
