"""Settings from files and flags: types, names, bounds."""

import dataclasses
import itertools
import json
from importlib.resources import files

import pytest
import yaml

from ddim_schedulers.training.common.flags import STOCK_NAMES
from ddim_schedulers.training.config import COMPUTED_FROM, GROUPS, TrainingConfig
from ddim_schedulers.training.parsing import load_config, parse_args, to_yaml


def write(path, values):
    path.write_text(json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values))
    return str(path)


def test_a_path_is_as_good_as_text(tmp_path):
    config = TrainingConfig(output_dir=tmp_path / "a", data=tmp_path)
    assert (config.output_dir, config.data) == (str(tmp_path / "a"), str(tmp_path))
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "c.yaml") == config


def test_field_names_are_unique_and_explained():
    names = [field.name for group in GROUPS for field in dataclasses.fields(group)]
    assert len(names) == len(set(names))
    assert set(names) == {field.name for field in dataclasses.fields(TrainingConfig)}
    assert all(f.metadata["help"] for group in GROUPS for f in dataclasses.fields(group))
    assert set(names) >= COMPUTED_FROM and set(STOCK_NAMES.values()) <= set(names)


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_values_in_files_go_through_the_converters_of_the_flags(tmp_path, name):
    # PyYAML reads 1e-3 as a string, and JSON may hold numbers as strings.
    (tmp_path / "run.yaml").write_text(
        "lr: 1e-3\nbatch_size: '32'\nrandom_flip: true\nvalue_range: [-1e-3, 1]\n"
        "max_grad_norm: null\ndata: 123\n"
    )
    (tmp_path / "run.json").write_text(
        '{"lr": "1e-3", "batch_size": 32, "random_flip": "yes", "value_range": [-1e-3, 1],'
        ' "max_grad_norm": null, "data": 123}'
    )
    config = load_config(tmp_path / name)
    assert (config.lr, config.batch_size, config.random_flip) == (1e-3, 32, True)
    assert config.value_range == [-1e-3, 1.0] and config.max_grad_norm is None
    assert config.data == "123"


def test_flags_win_over_files(tmp_path):
    path = write(tmp_path / "run.yaml", {"lr": "1e-3", "batch_size": 8, "use_ema": True})
    config, dry_run = parse_args(["--config", path, "--lr", "2e-3", "--no_use_ema", "--dry-run"])
    assert (config.lr, config.batch_size, config.use_ema, dry_run) == (2e-3, 8, False, True)
    assert parse_args(["--batch-size", "4"])[0].batch_size == 4


@pytest.mark.parametrize("flag", ["--output_dir", "--output-dir", "--output"])
def test_the_folder_of_a_run_is_named_as_in_the_other_verbs(flag):
    assert parse_args([flag, "mine"])[0].output_dir == "mine"


def test_a_flag_can_take_back_what_a_file_sets(tmp_path):
    path = write(tmp_path / "run.yaml", {"dropout": 0.1, "value_range": [0, 1]})
    words = ["--dropout", "null", "--value_range", "null", "--max_grad_norm", "null"]
    config = parse_args(["--config", path, *words])[0]
    assert (config.dropout, config.value_range, config.max_grad_norm) == (None, None, None)
    with pytest.raises(ValueError, match="`--lr` is 'null'; it must be of the type float"):
        parse_args(["--lr", "null"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": "abc"}, "`lr` is 'abc'; it must be of the type float"),
        ({"batch_size": 1.5}, "`batch_size` is '1.5'; it must be of the type int"),
        ({"loss": "simpel"}, "`loss` is 'simpel'; it must be one of 'simple'"),
        (
            {"random_flip": "perhaps"},
            "`random_flip` must have another value: Truthy value expected",
        ),
        ({"seed": [1, 2]}, "`seed` is [1, 2]; it must be one value"),
        ({"batch_size": None}, "`batch_size` is null; it must have a value"),
        ({"bacth_size": 8}, "`bacth_size` is an unknown key; did you mean batch_size?"),
        ({"learning_rate": 8}, "`learning_rate` is an unknown key; did you mean lr?"),
        ({"qqqqqq": 8}, "`qqqqqq` is an unknown key; see --help"),
    ],
)
def test_bad_values_and_keys_in_files_are_named(tmp_path, values, message):
    with pytest.raises(ValueError) as caught:
        parse_args(["--config", write(tmp_path / "run.yaml", values)])
    assert message in str(caught.value) and "run.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "abc"], "`--lr` is 'abc'; it must be of the type float"),
        (["--batch", "8"], "unknown flag --batch; did you mean --batch_size?"),  # no abbreviations
        (["--resolution", "8"], "unknown flag --resolution; did you mean --image_size?"),
        (["--loss", "x"], "`--loss` is 'x'; it must be one of 'simple'"),
        (["stray"], "`stray` is no flag; a flag must come here"),
        (["--config"], "expected one argument"),
    ],
)
def test_bad_flags_are_named(argv, message):
    with pytest.raises(ValueError) as caught:
        parse_args(argv)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1\n- 2\n", "must hold a mapping"), ("a: [", "not valid YAML"), (None, "cannot be read")],
)
def test_unreadable_files_are_named(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_config(tmp_path / "run.json")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "`batch_size` is 0; it must be at least 1"),
        ({"lr": 0.0}, "`lr` is 0.0; it must be above 0"),
        ({"lr": float("nan")}, "`lr` is nan"),
        ({"ema_decay": 1.0}, "`ema_decay` is 1.0"),
        ({"max_grad_norm": -1.0}, "`max_grad_norm` is -1.0"),
        ({"loss": "nonsense"}, "`loss` is 'nonsense'; allowed: simple, gamma, vlb, min_snr"),
        ({"loss": "gamma"}, "`loss` is 'gamma'; it needs its weights"),
        ({"gamma": "ddim"}, "`gamma` is 'ddim', but loss is 'simple'"),
        ({"fit": "pad"}, "`fit` is 'pad'; it needs image_size"),
        ({"random_crop": True}, "`random_crop` is true; it needs fit"),
        ({"value_range": [1.0, 0.0]}, "two rising numbers"),
        ({"push_to_hub": True}, "`push_to_hub` is true; it needs hub_repo_id"),
        (
            {"push_to_hub": True, "hub_repo_id": "digits"},
            "`hub_repo_id` is 'digits'; it cannot be used",
        ),
        ({"push_to_hub": True, "hub_repo_id": "me/a--b"}, "it must be USER/NAME"),
        ({"push_to_hub": True, "hub_repo_id": "me/a/b"}, "it must be USER/NAME"),
        (
            {"push_to_hub": True, "hub_repo_id": "me/a", "prediction_type": "posterior_mean"},
            "set hub_form to 'plug-in' or 'self-contained'",
        ),
        ({"from_pretrained": "x", "dropout": 0.1}, "leave dropout out"),
        ({"from_pretrained": "x", "model": "small"}, "leave model out"),
        ({"best_by": "frechet"}, "needs `frechet_images`"),
        ({"frechet_images": 1}, "at least 2"),
        ({"streaming": True, "num_workers": 2}, "at most 1 worker"),
        ({"loss": "vlb", "hybrid_lambda": 0.1}, "no effect"),
    ],
)
def test_values_out_of_bounds_are_refused(values, message):
    with pytest.raises(ValueError) as caught:
        TrainingConfig(**values)
    assert message in str(caught.value)


def test_the_resolved_settings_can_be_run_again(tmp_path):
    config = TrainingConfig(lr=3e-4, value_range=[0.0, 2.0], loss="gamma", gamma="ddim", cpu=True)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_the_files_that_ship_are_valid():
    folder = files("ddim_schedulers.training") / "configs"
    for name in ("digits-8.yaml", "emoji-32.yaml", "fashion-mnist-32.yaml"):
        values = yaml.safe_load((folder / name).read_text())
        config = load_config(str(folder / name))
        assert config.output_dir == f"runs/{name.removesuffix('.yaml')}"
        assert all(getattr(config, key) is not None for key in values)


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(TrainingConfig):
        assert f"--{field.name}" in text


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_settings_file_is_read_within_bounds(tmp_path, suffix):
    path = tmp_path / f"settings{suffix}"
    laughs = "\n".join(
        ["a: &a [l,l,l,l,l,l,l,l,l]"]
        + [f"{y}: &{y} [{','.join([f'*{x}'] * 9)}]" for x, y in itertools.pairwise("abcdefghi")]
    )
    for text in (laughs, "[" * 10**5, '{"lr": 1, "lr": 2}', "\0", "{" * 99, "\xff" * 9):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(
            ValueError,
            match=r"^`config` is '.*settings.* cannot be read; its file must be whole: .*$",
        ):
            load_config(path)
