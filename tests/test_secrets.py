"""What an upload refuses: credentials, files in disguise, links out of the folder."""

import json
import struct

import pytest

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.export import FORMS, export_folder
from ddim_schedulers.training.sharing.secrets import CREDENTIALS, check_upload

# Put together here, so that no scanner of this repository takes them for real ones.
FORGED = {
    "a Hugging Face token": ["hf_" + "a1B2" * 9],
    "a GitHub token": ["ghp_" + "x9" * 18, "github_pat_" + "11AB" * 20],
    "a GitLab token": ["glpat-" + "q" * 20],
    "an API key": ["sk-" + "ab12" * 12, "sk-ant-" + "api03-" * 6, "AIza" + "S" * 35]
    + ["xoxb-" + "1234567890-" * 2],
    "an AWS key": ["AKIA" + "Q" * 16],
    "a package index token": ["pypi-AgE" + "I" * 60, "npm_" + "z" * 36],
    "a signed web token": ["eyJ" + "a" * 20 + ".eyJ" + "b" * 20 + "." + "c" * 20],
    "a private key": ["-----BEGIN OPENSSH " + "PRIVATE KEY-----"],
    "a password in an address": ["https://user:" + "hunter22@example.org/x"],
    "a secret": ['"wandb_api_key": "' + "0f" * 20 + '"', "AWS_SECRET_ACCESS_KEY=" + "wJ" * 20],
}
OWN = "hf_" + "own" * 10
PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 8


@pytest.mark.parametrize("kind", CREDENTIALS)
def test_each_kind_of_credential_is_named_but_not_shown(kind, tmp_path):
    for forged in FORGED[kind]:
        for content in (f"x = {forged}\n".encode(), b"\xff\xfe" + forged.encode()):
            with pytest.raises(ValueError, match=f"^unet/notes.txt holds {kind}") as error:
                check_upload("unet/notes.txt", content, OWN)
            assert forged not in str(error.value)
        with pytest.raises(ValueError, match=kind):  # in the text of a picture, too
            check_upload("a.png", PNG + forged.encode(), OWN)
        header = json.dumps({"__metadata__": {"note": forged}}).encode()
        weights = tmp_path / "w.safetensors"
        weights.write_bytes(struct.pack("<Q", len(header)) + header)
        if '"' not in forged:
            with pytest.raises(ValueError, match=kind):
                check_upload("w.safetensors", weights, OWN)


def test_ordinary_files_are_not_taken_for_secrets(tmp_path):
    for text in (
        "eta: 0.5",
        "task-conditioned-diffusion-model-with-a-long-name",
        "see https://a.b/c",
    ):
        check_upload("README.md", text.encode(), OWN)
    weights = tmp_path / "w.safetensors"
    header = b'{"w":{"dtype":"U8","shape":[40],"data_offsets":[0,40]}}'
    weights.write_bytes(struct.pack("<Q", len(header)) + header + FORGED["an AWS key"][0].encode())
    check_upload("w.safetensors", weights, OWN)  # numbers are no text


def test_the_token_of_the_upload_itself_is_found_whatever_its_form():
    with pytest.raises(ValueError, match="a.txt holds a Hugging Face token"):
        check_upload("a.txt", b"key: short-one", "short-one")


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "b.webp", "b.gif"])
def test_a_picture_is_known_by_its_first_bytes(name):
    with pytest.raises(ValueError, match="no picture in spite of its name"):
        check_upload(name, b"ssh-rsa AAAA", OWN)


@pytest.fixture
def saved(tmp_path, tiny_ddpm):
    tiny_ddpm(GeneralizedDDIMScheduler()).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["unet/notes.txt", "unet/config.json", "sample.png"])
def test_a_link_out_of_the_folder_is_refused(saved, name, form, tmp_path):
    outside = tmp_path / "id_rsa"
    outside.write_bytes((saved / name).read_bytes() if (saved / name).exists() else PNG)
    (saved / name).unlink(missing_ok=True)
    (saved / name).symlink_to(outside)
    with pytest.raises(ValueError, match="is a link to .*id_rsa"):
        export_folder(saved, form)


def test_links_inside_the_folder_and_those_of_the_hub_cache_are_followed(saved, tmp_path):
    (saved / "sample.png").write_bytes(PNG)
    (saved / "grid.png").symlink_to("sample.png")
    assert export_folder(saved).files["grid.png"]
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in saved.rglob("*") if p.is_file())):
        blob, link = blobs / str(number), snapshot / path.relative_to(saved)
        blob.write_bytes(path.read_bytes())
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    assert set(export_folder(snapshot).files) == set(export_folder(saved).files)
