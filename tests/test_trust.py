"""What a settings file of somebody else cannot do: run code, or upload."""

import re
import sys
from pathlib import Path

import pytest

from ddim_schedulers.training import cli
from ddim_schedulers.training.evaluation.config import load_evaluation
from ddim_schedulers.training.parsing import load_config, parse_args

EVALUATION = "pipeline: p\noutput_dir: o\ndata: {data: digits}\nfeatures: [pixels, planted:Space]\n"
EVALUATION += "tables: [{name: a, n: 8, grid: [{steps: [2], members: [0]}]}]\n"


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A module that tells when it is imported, and a file that names it."""
    (tmp_path / "planted.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    (tmp_path / "run.yaml").write_text("feature_space: planted:Space\nfrechet_images: 8\n")
    (tmp_path / "evaluation.yaml").write_text(EVALUATION)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("planted", None)


@pytest.mark.parametrize("more", [[], ["--dry_run"], ["--dry-run", "--lr", "1e-3"]])
def test_a_file_that_names_code_is_refused_before_it_runs(planted, more, capsys):
    assert cli.main(["train", "--config", "run.yaml", *more]) == 2
    assert "--trust_code" in capsys.readouterr().err
    assert cli.main(["evaluate", "--config", "evaluation.yaml"]) == 2
    assert "planted" in capsys.readouterr().err
    assert not (planted / "ran").exists()


def test_the_flag_the_same_setting_as_a_flag_or_the_call_allow_it(planted):
    words = ["--config", "run.yaml"]
    for more in (["--trust_code"], ["--trust-code"], ["--feature_space", "planted:Space"]):
        assert parse_args([*words, *more])[0].feature_space == "planted:Space"
    for arguments in ({"trust_code": True}, {"feature_space": "planted:Space"}):
        assert load_config("run.yaml", **arguments).feature_space == "planted:Space"
    with pytest.raises(ValueError, match="--trust_code"):
        load_config("run.yaml")
    assert load_evaluation("evaluation.yaml", trust_code=True).features[1] == "planted:Space"
    assert not (planted / "ran").exists()  # reading imports nothing


def test_a_dry_run_imports_nothing_even_where_it_is_allowed(planted):
    flags = ["--model", "tiny", "--batch_size", "2", "--num_train_timesteps", "4", "--cpu"]
    code = cli.main(["train", "--config", "run.yaml", "--trust_code", "--dry_run", *flags])
    assert code == 0
    assert not (planted / "ran").exists()


def test_a_file_does_not_upload(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("push_to_hub: true\nhub_repo_id: some/body\n")
    for more in ([], ["--dry_run"]):
        with pytest.raises(ValueError, match="`push_to_hub` is true in .*--push_to_hub"):
            parse_args(["--config", str(path), *more])
    with pytest.raises(ValueError, match="push_to_hub"):
        load_config(path)
    assert parse_args(["--config", str(path), "--push_to_hub"])[0].push_to_hub
    assert load_config(path, push_to_hub=True).push_to_hub
    assert not parse_args(["--config", str(path), "--push_to_hub", "false"])[0].push_to_hub


def test_every_claim_of_the_page_names_tests_that_exist():
    """A repository is one folder, where the pages are; an installed package has none."""
    root = Path(__file__).parents[1]
    page = (root / "docs" / "trust.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", page)
    assert len(named) > 20
    for file, test in named:
        text = (root / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {test}\(", text, re.M), f"{file}::{test}"
    for place in ("README.md", "SECURITY.md", "docs/share.md"):
        assert "trust.md" in (root / place).read_text(encoding="utf-8"), place
