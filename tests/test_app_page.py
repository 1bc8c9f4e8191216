"""The playground in a real browser: one server, one Chromium, each tab's main control."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

from ddim_schedulers import GeneralizedDDIMScheduler

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = [
    name
    for name, there in (
        ("gradio", importlib.util.find_spec("gradio")),
        ("playwright", importlib.util.find_spec("playwright")),
        ("chromium", CHROMIUM),
    )
    if not there
]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
WAIT = 120_000  # milliseconds


@pytest.fixture(scope="module")
def address(tiny_ddpm, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("page")
    tiny_ddpm(GeneralizedDDIMScheduler()).save_pretrained(folder / "pipeline")
    words = ["app", "--pipeline", str(folder / "pipeline"), "--max_steps", "1000"]
    server = subprocess.Popen(
        [sys.executable, "-m", "ddim_schedulers.training.cli", *words, "--device", "cpu"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(folder / "files")},
    )
    try:
        line = server.stdout.readline()
        yield re.search(r"http://127\.0\.0\.1:\d+/", line)[0]
    finally:
        server.send_signal(signal.SIGINT)
        code = server.wait(timeout=60)
    assert code in (0, 130)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(address, browser):
    """An open page; nothing that it asks for leaves the machine."""
    asked = []
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.locator("#sample_run").wait_for(timeout=WAIT)
    yield page
    page.close()
    local = (address, "data:", "blob:", address.replace("http", "ws"))
    assert [url for url in asked if not url.startswith(local)] == []


def set_number(page, name, value):
    box = page.locator(f"#{name} input")
    box.fill(str(value))
    box.press("Tab")


def run(page, tab):
    page.get_by_role("tab", name=tab.capitalize(), exact=True).click()
    page.locator(f"#{tab}_run").click()


def says(page, tab, words):
    from playwright.sync_api import expect

    status = page.locator(f"#{tab}_status textarea")
    expect(status).to_have_value(re.compile(words), timeout=WAIT)
    return status.input_value()


def pictures(page, tab):
    found = page.locator(f"#{tab}_pictures img")
    found.first.wait_for(timeout=WAIT)
    return found.count()


def upload(page, tab, file):
    page.get_by_role("tab", name=tab.capitalize(), exact=True).click()
    page.locator(f"#{tab}_picture input[type=file]").set_input_files(str(file))
    page.locator(f"#{tab}_picture").get_by_text(file.stem).first.wait_for(timeout=WAIT)


def test_every_tab(page, tmp_path):
    picture = tmp_path / "picture.png"
    Image.linear_gradient("L").save(picture)
    set_number(page, "steps", 3)
    for tab, note in (
        ("sample", ""),
        ("watch", ""),
        ("compare", "Mean absolute difference"),
        ("interpolate", ""),
    ):
        run(page, tab)
        says(page, tab, f"done. *{note}")
        assert pictures(page, tab) >= 2
        assert "from_pretrained" in page.locator(f"#{tab}_python").inner_text()
        assert "ddim-schedulers" in page.locator(f"#{tab}_command").inner_text()
    for tab in ("reconstruct", "restore"):
        upload(page, tab, picture)
        run(page, tab)
        says(page, tab, "done. The picture of 256x256 was")
        assert pictures(page, tab) >= 2
