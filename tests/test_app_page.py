"""The playground in a real browser: one server, one Chromium, every control of every tab."""

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny_models import tiny_unet

from ddim_schedulers import GeneralizedDDIMScheduler
from ddim_schedulers.class_labels import note_class_labels
from ddim_schedulers.pipelines import GenerationPipeline
from ddim_schedulers.training.app.settings import SCHEDULERS, STOCK

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
TABS = ("sample", "watch", "compare", "interpolate", "reconstruct", "restore")

# A Space has the extra `app` alone. Each network call is counted by the size of the file `calls`,
# and takes long enough to be stopped.
PROGRAM = """
import sys, time
sys.modules |= dict.fromkeys(("accelerate", "datasets", "torchmetrics", "transformers"))
from diffusers import UNet2DModel
forward = UNet2DModel.forward
def counted(*words, **named):
    with open("calls", "a") as file:
        file.write(".")
    time.sleep(0.02)
    return forward(*words, **named)
UNet2DModel.forward = counted
from ddim_schedulers.training import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    unet = tiny_unet(blocks=(8, 8), num_class_embeds=4)
    note_class_labels(unet, 3, ["ant", "bee", "cat"])
    GenerationPipeline(unet, GeneralizedDDIMScheduler()).save_pretrained(folder / "tiny")
    (folder / "calls").touch()
    words = ["app", "--pipeline", "tiny", "--max_steps", "1000", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(folder / "files")},
    )
    with process.stdout:
        try:
            address = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())[0]
            calls = folder / "calls"
            yield SimpleNamespace(address=address, calls=lambda: calls.stat().st_size)
        finally:
            process.send_signal(signal.SIGINT)
            code = process.wait(timeout=60)
    assert code in (0, 130)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def opened(browser, address, **options):
    """An open page; nothing that it asks for leaves the machine, and its scripts do not fail."""
    asked, failed = [], []
    page = browser.new_page(**options)
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.set_default_timeout(WAIT)
    page.goto(address)
    page.locator("#sample_run").wait_for()
    yield page
    page.close()
    local = (address, "data:", "blob:", address.replace("http", "ws"))
    assert [url for url in asked if not url.startswith(local)] == []
    assert failed == []


@pytest.fixture(scope="module")
def desk(server, browser):
    with opened(browser, server.address, viewport={"width": 1280, "height": 900}) as page:
        yield page


def write(page, **values):
    for name, value in values.items():
        box = page.locator(f"#{name}").locator("input, textarea").first
        box.fill(str(value))
        box.press("Tab")


def choose(page, **values):
    for name, value in values.items():
        page.locator(f"#{name} input").first.click()
        page.get_by_role("option", name=value, exact=True).click()


def open_tab(page, tab):
    name = tab.capitalize()
    shown = page.get_by_role("tab", name=name, exact=True)
    if not shown.is_visible():  # a phone has them behind a button
        page.locator(".overflow-menu > button").click()
        shown = page.locator(".overflow-dropdown button").get_by_text(name, exact=True)
    shown.click()
    page.locator(f"#{tab}_run").wait_for()


def says(page, tab, words):
    from playwright.sync_api import expect

    status = page.locator(f"#{tab}_status textarea")
    expect(status).to_have_value(re.compile(words), timeout=WAIT)


def run(page, tab, note="", command="ddim-schedulers", python="from_pretrained"):
    """Run a tab to its end, and return the words of its command.

    `command` and `python` are a part of the code that the run before did not show.
    """
    from playwright.sync_api import expect

    page.locator(f"#{tab}_run").click()
    shown = {}
    for kind, part in (("command", command), ("python", python)):
        code = page.locator(f"#{tab}_{kind} .cm-content")
        expect(code).to_contain_text(part, timeout=WAIT)
        shown[kind] = code.inner_text()
    says(page, tab, f"^done. *{note}")
    page.locator(f"#{tab}_pictures img").first.evaluate("image => image.decode()")
    assert ".from_pretrained('tiny')" in shown["python"]
    return shlex.split(shown["command"], comments=True)


def pictures(page, tab):
    return page.locator(f"#{tab}_pictures img").count()


def upload(page, name, file):
    page.locator(f"#{name} input[type=file]").set_input_files(str(file))
    page.locator(f"#{name}").get_by_text(file.stem).first.wait_for()


def after(words, option):
    return words[words.index(option) + 1]


def test_every_control_of_the_sampler(desk):
    write(desk, steps=2, num_images=1)
    for name in SCHEDULERS:
        choose(desk, scheduler=name)
        if name in STOCK:
            assert not run(desk, "sample", python=f"{name}.from_config", command="# The")
        else:
            run(desk, "sample", command="" if name == "saved" else f"--scheduler {name}")
    choose(desk, scheduler="ddim")
    for name in ("calibrated", "few"):
        choose(desk, preset=name)
        run(desk, "sample", command=f"--preset {name}")
    choose(desk, preset="none")
    desk.get_by_text("Solver of your own").first.click()
    choose(desk, spacing="trailing", order="2", form="sample", variable="log_rho")
    choose(desk, weights="bh2", corrector="no")
    write(desk, seed=7, num_images=3, steps=4, eta=0, guidance_scale=2.5)
    desk.locator("#labels input").press("Backspace")  # the last of the three classes
    expected = (
        "ddim-schedulers sample --pipeline tiny --scheduler ddim --num_inference_steps 4 "
        "--eta 0.0 --timestep_spacing trailing --solver_order 2 --solver_form sample "
        "--solver_variable log_rho --solver_weights bh2 --no-solver_corrector "
        "--labels ant bee --guidance_scale 2.5 "
        "--num_images 3 --seed 7 --output samples --device cpu"
    )
    assert run(desk, "sample", command="--seed 7") == expected.split()
    assert pictures(desk, "sample") == 3
    write(desk, eta="much")
    desk.locator("#sample_run").click()
    says(desk, "sample", "^error: `eta` is 'much'; it must be a number, or empty.")


def test_every_tab(server, browser, desk, tmp_path):
    gradient, mask, no_image = (tmp_path / n for n in ("gradient.png", "mask.png", "no.png"))
    Image.linear_gradient("L").save(gradient)
    Image.new("L", (8, 8), 255).save(mask)
    no_image.write_text("not a picture")
    desk.reload()
    desk.locator("#sample_run").wait_for()
    write(desk, steps=3, num_images=2)

    open_tab(desk, "watch")
    run(desk, "watch")
    assert pictures(desk, "watch") == 2

    open_tab(desk, "compare")
    choose(desk, second_scheduler="ddpm", second_spacing="linspace")
    write(desk, second_steps=5)
    words = run(desk, "compare", "Mean absolute difference")
    second = words[words.index("sample", 3) :]
    assert after(second, "--scheduler") == "ddpm"
    assert after(second, "--num_inference_steps") == "5"
    assert after(second, "--timestep_spacing") == "linspace"

    open_tab(desk, "interpolate")
    write(desk, other_seed=5, num_points=3)
    words = run(desk, "interpolate")
    assert words[words.index("--seeds") :][:5] == ["--seeds", "0", "5", "--num_points", "3"]
    assert pictures(desk, "interpolate") == 3

    open_tab(desk, "reconstruct")
    desk.locator("#reconstruct_run").click()
    says(desk, "reconstruct", "^error: `picture` is missing; it must be an image file.")
    upload(desk, "reconstruct_picture", no_image)
    desk.locator("#reconstruct_run").click()
    says(desk, "reconstruct", r"^error: `picture` is .*no\.png.*; it must be an image.")
    desk.locator("#reconstruct_picture").get_by_label("Clear").click()
    upload(desk, "reconstruct_picture", gradient)
    write(desk, refinements=1)
    choose(desk, reconstruct_fit="squash")
    words = run(desk, "reconstruct", "The picture of 256x256 was resized: 8x8.")
    assert after(words, "--refinements") == "1"

    open_tab(desk, "restore")
    upload(desk, "restore_picture", gradient)
    choose(desk, mask="centre")
    run(desk, "restore", "The picture of 256x256 was resized and cut", "--mask centre")
    assert pictures(desk, "restore") == 4
    upload(desk, "mask_file", mask)
    choose(desk, restore_fit="squash")
    run(desk, "restore", command="--mask mask.png")


def still(server):
    """Wait until no network call comes any more, and return how many there were."""
    end = time.monotonic() + WAIT / 1000
    while time.monotonic() < end:
        before = server.calls()
        time.sleep(0.5)
        if server.calls() == before:
            return before
    raise AssertionError("the network is still called")


def test_a_run_ends_when_it_is_cancelled_and_when_the_page_is_closed(server, browser, desk):
    open_tab(desk, "sample")
    with opened(browser, server.address) as page:
        for leave in (False, True):
            write(page, steps=1000)
            before = server.calls()
            page.locator("#sample_run").click()
            says(page, "sample", "^network call")
            if leave:
                page.goto("about:blank")
            else:
                page.locator("#sample_cancel").click()
                says(page, "sample", "^cancelled$")
            assert 0 < still(server) - before < 1000
    write(desk, steps=2)
    run(desk, "sample")  # the network is free again


# What can be touched and lies beside the screen; a file's input lies unseen in its box.
CONTROLS = """
() => "button:not([tabindex='-1']),input:not([type=file]),textarea,img".split(",")
    .flatMap(kind => [...document.querySelectorAll(kind)])
    .filter(e => e.checkVisibility({opacityProperty: true, visibilityProperty: true}))
    .map(e => [e.outerHTML.slice(0, 200), e.getBoundingClientRect()])
    .filter(([_, box]) => box.width > 0 && box.height > 0)
    .filter(([_, box]) => box.left < 0 || box.right > window.innerWidth)
    .map(([text, _]) => text)
"""


def test_a_phone(server, browser, tmp_path):
    gradient = tmp_path / "gradient.png"
    Image.linear_gradient("L").save(gradient)
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    with opened(browser, server.address, **phone) as page:
        write(page, steps=2, num_images=2)
        for tab in TABS:
            open_tab(page, tab)
            if tab in ("reconstruct", "restore"):
                upload(page, f"{tab}_picture", gradient)
            page.locator(f"#{tab}_run").tap()
            says(page, tab, "^done")
            page.locator(f"#{tab}_pictures img").first.wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") == 390, tab
            assert page.evaluate(CONTROLS) == [], tab
            run_button = page.locator(f"#{tab}_run").bounding_box()
            assert run_button["width"] >= 100 and run_button["height"] >= 32
