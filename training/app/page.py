"""The page of the playground: a thin layer of Gradio over `Playground`."""

import math
import os
import queue
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr
from PIL import Image

from ddim_schedulers.multistep import MAX_ORDER, SOLVER_FORMS, SOLVER_VARIABLES, SOLVER_WEIGHTS
from ddim_schedulers.pipelines.restoration.tasks import MASKS
from ddim_schedulers.planning import SCHEDULER_SPACINGS
from ddim_schedulers.training.app.playground import FITS, Limits, Playground, Report, Result
from ddim_schedulers.training.app.settings import SCHEDULERS, Settings
from ddim_schedulers.training.commands._model_options import PRESETS
from ddim_schedulers.training.common.failures import sentence

SHOWN_PIXELS = 640  # small pictures are enlarged up to this side
UPLOAD_HEIGHT = 140
MAX_UPLOAD = "20mb"
AS_SAVED = "as saved"
SAMPLER = (
    "scheduler",
    "preset",
    "num_inference_steps",
    "eta",
    "timestep_spacing",
    "solver_order",
    "solver_form",
    "solver_variable",
    "solver_weights",
    "solver_corrector",
)
COMMON = ("seed", "num_images", "labels", "guidance_scale")
# No request for a font leaves the page.
FONT, MONO = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]

# A gallery is as high as its pictures, of which a phone has two in a row, or a strip.
CSS = """
.pictures, .pictures .grid-wrap { min-height: 0 !important; max-height: none !important; }
@media (max-width: 640px) {
  .pictures .grid-container { grid-template-columns: repeat(2, 1fr) !important; }
  .strips .grid-container { grid-template-columns: 1fr !important; }
}
.strips .thumbnail-item { aspect-ratio: auto !important; }
.code .cm-gutters { display: none !important; }  /* they keep the height of a narrower page */
"""


class Stopped(Exception):  # noqa: N818
    """The person at the page has had enough of a run."""


class _Page:
    def __init__(self, playground: Playground) -> None:
        self.playground = playground
        self.stops: dict[str | None, threading.Event] = {}

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="ddim-schedulers", analytics_enabled=False) as blocks:
            c, h, w = self.playground.picture_shape
            gr.Markdown(f"## ddim-schedulers playground\nPixels {w}x{h}, channels {c}.")
            with gr.Row():
                with gr.Column(scale=1, min_width=300):
                    common = self._common()
                    with gr.Accordion("Sampler", open=True):
                        first = self._sampler()
                with gr.Column(scale=2, min_width=300):
                    self._tabs([*common, *first])
            blocks.unload(self._stop)
        return blocks

    def _common(self) -> list[Any]:
        limits, names = self.playground.limits, self.playground.class_names()
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, elem_id="seed", min_width=100)
            count = gr.Number(
                min(4, limits.num_images),
                label=f"Images (max {limits.num_images})",
                precision=0,
                elem_id="num_images",
                min_width=100,
            )
        labels = gr.Dropdown(
            names,
            value=names[:4],  # a network with classes may need one
            multiselect=True,
            label="Classes: image i has class i modulo their number",
            visible=bool(names),
            elem_id="labels",
        )
        guidance = gr.Textbox(
            label="Guidance scale (empty: without guidance)",
            visible=bool(names),
            elem_id="guidance_scale",
        )
        return [seed, count, labels, guidance]

    def _sampler(self, prefix: str = "") -> list[Any]:
        def choice(label: str, values: Sequence[Any], name: str) -> Any:  # noqa: ANN401
            words = [AS_SAVED, *map(str, values)]
            return gr.Dropdown(words, value=AS_SAVED, label=label, elem_id=prefix + name)

        most = self.playground.limits.steps
        scheduler = gr.Dropdown(
            list(SCHEDULERS), value="ddim", label="Scheduler", elem_id=f"{prefix}scheduler"
        )
        preset = gr.Dropdown(
            [("none", ""), *((p, p) for p in PRESETS)],
            value="",
            label="Preset (few: FEW_STEPS; calibrated: CALIBRATED)",
            elem_id=f"{prefix}preset",
        )
        steps = gr.Number(20, label=f"Steps (max {most})", precision=0, elem_id=f"{prefix}steps")
        # an empty `Number` would say 0
        eta = gr.Textbox(label="eta (empty: as saved; 0: DDIM; 1: DDPM)", elem_id=f"{prefix}eta")
        spacing = choice("Spacing", SCHEDULER_SPACINGS, "spacing")
        with gr.Accordion("Solver of your own", open=False):
            solver = [
                choice("Order", range(1, MAX_ORDER + 1), "order"),
                choice("Form", SOLVER_FORMS, "form"),
                choice("Variable", [v for v in SOLVER_VARIABLES if v is not None], "variable"),
                choice("Weights", SOLVER_WEIGHTS, "weights"),
                choice("Corrector", ("yes", "no"), "corrector"),
            ]
        return [scheduler, preset, steps, eta, spacing, *solver]

    def _tabs(self, inputs: list[Any]) -> None:
        play = self.playground
        with gr.Tab("Sample"):
            self._outputs("sample", _with_settings(play.sample), inputs)
        with gr.Tab("Watch"):
            gr.Markdown("x_t and x0_hat along the trajectory, a row for each image.")
            self._outputs("watch", _with_settings(play.watch), inputs, strips=True)
        with gr.Tab("Compare"):
            gr.Markdown("The sampler at the side, and a second one on the same seeds.")
            with gr.Accordion("Second sampler", open=True):
                second = self._sampler("second_")

            def compare(*values: Any, report: Report) -> Result:  # noqa: ANN401
                one, other = values[: len(inputs)], values[len(inputs) :]
                fixed = [*one[: len(COMMON)], *other]
                return play.compare(_settings(one), _settings(fixed), report)

            self._outputs("compare", compare, [*inputs, *second])
        with gr.Tab("Interpolate"):
            gr.Markdown("From the seed at the side to another one.")
            with gr.Row():
                end = gr.Number(1, label="Other seed", precision=0, elem_id="other_seed")
                points = gr.Number(8, label="Pictures", precision=0, elem_id="num_points")
            self._outputs("interpolate", _with_settings(play.interpolate), [*inputs, end, points])
        with gr.Tab("Reconstruct"):
            gr.Markdown("Invert a picture with DDIM, and decode it again.")
            upload, fit = self._upload("reconstruct")
            again = gr.Number(0, label="Refinements", precision=0, elem_id="refinements")
            self._outputs(
                "reconstruct", _with_settings(play.reconstruct), [*inputs, upload, fit, again]
            )
        with gr.Tab("Restore"):
            if play.no_restoration is None:
                self._restoration(inputs)
            else:
                gr.Markdown(f"Not for this pipeline: {play.no_restoration}.")

    def _restoration(self, inputs: list[Any]) -> None:
        gr.Markdown("Fill the hole of a picture.")
        upload, fit = self._upload("restore")
        mask = gr.Dropdown(list(MASKS), value="half", label="What is known", elem_id="mask")
        file = gr.File(
            label="Or a mask: white pixels are known", height=UPLOAD_HEIGHT, elem_id="mask_file"
        )
        restore = _with_settings(self.playground.restore)
        self._outputs("restore", restore, [*inputs, upload, fit, mask, file])

    def _upload(self, name: str) -> list[Any]:
        file = gr.File(label="Picture", elem_id=f"{name}_picture", height=UPLOAD_HEIGHT)
        fit = gr.Dropdown(
            list(FITS),
            value="resize_crop",
            label="Fit: how it becomes as large as the images",
            elem_id=f"{name}_fit",
        )
        return [file, fit]

    def _outputs(
        self,
        name: str,
        function: Callable[..., Result],
        inputs: list[Any],
        *,
        strips: bool = False,
    ) -> None:
        with gr.Row():
            go = gr.Button("Run", variant="primary", elem_id=f"{name}_run", min_width=100)
            cancel = gr.Button("Cancel", elem_id=f"{name}_cancel", min_width=100)
        status = gr.Textbox(label="Status", elem_id=f"{name}_status", interactive=False, lines=2)
        pictures = gr.Gallery(
            label="Pictures",
            elem_id=f"{name}_pictures",
            elem_classes=["pictures", "strips"] if strips else ["pictures"],
            object_fit="contain",
            columns=1 if strips else 4,
            height="auto",
            format="png",
            interactive=False,
        )
        python, command = (
            gr.Code(
                language=language,
                label=label,
                wrap_lines=True,
                show_line_numbers=False,  # beside wrapped lines they slip
                elem_classes=["code"],
                lines=1,
                elem_id=name + end,
            )
            for language, label, end in (
                ("python", "Python", "_python"),
                ("shell", "Command", "_command"),
            )
        )

        def run(request: gr.Request, *values: Any) -> Iterator[tuple]:  # noqa: ANN401
            yield from self._follow(request, function, values)

        go.click(run, inputs, [status, pictures, python, command], concurrency_id="network")
        cancel.click(self._stop, queue=False)

    def _stop(self, request: gr.Request) -> None:
        stop = self.stops.get(request.session_hash)
        if stop is not None:
            stop.set()

    def _follow(
        self, request: gr.Request, function: Callable[..., Result], values: Sequence[Any]
    ) -> Iterator[tuple]:
        """Run in a thread; tell what it reports, at last its result or what is wrong."""
        said: queue.Queue[Any] = queue.Queue()
        stop = self.stops[request.session_hash] = threading.Event()

        def report(text: str, picture: Image.Image | None) -> None:
            if stop.is_set():
                raise Stopped
            said.put((text, picture))

        def work() -> None:
            try:
                said.put(function(*values, report=report))
            except BaseException as error:
                said.put(error)

        threading.Thread(target=work, daemon=True).start()
        skip = gr.skip()
        try:
            yield "started", skip, skip, skip
            while True:
                found = _newest(said)
                if not isinstance(found, tuple):
                    break
                text, picture = found
                shown = skip if picture is None else [(_enlarged(picture), text)]
                yield text, shown, skip, skip
        finally:
            stop.set()  # nobody listens any more
            if self.stops.get(request.session_hash) is stop:
                del self.stops[request.session_hash]
        if isinstance(found, BaseException):
            yield _told(found), skip, skip, skip
            return
        pictures = [(_enlarged(i), c) for i, c in zip(found.images, found.captions, strict=True)]
        yield f"done. {found.note}".strip(), pictures, found.python, found.command


def _with_settings(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return a function of the values of the controls at the side, and of those of a tab."""
    count = len(COMMON) + len(SAMPLER)

    def call(*values: Any, report: Report) -> Result:  # noqa: ANN401
        return function(_settings(values[:count]), *values[count:], report=report)

    return call


def _settings(values: Sequence[Any]) -> Settings:
    given = dict(zip((*COMMON, *SAMPLER), values, strict=True))
    given = {key: None if value in (AS_SAVED, "") else value for key, value in given.items()}
    given["labels"] = tuple(given["labels"] or ())
    for key in ("eta", "guidance_scale"):
        given[key] = _number(key, given[key])
    if given["solver_order"] is not None:
        given["solver_order"] = int(given["solver_order"])
    given["solver_corrector"] = {"yes": True, "no": False}.get(given["solver_corrector"])
    return Settings(**given)


def _number(name: str, text: str | None) -> float | None:
    try:
        value = None if text is None or not text.strip() else float(text)
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise ValueError(f"`{name}` is {text!r}; it must be a number, or empty.")
    return value


def _newest(said: queue.Queue[Any]) -> Any:  # noqa: ANN401
    """Return the latest line of progress: a browser does not need every call of a fast network."""
    found = said.get()
    while not said.empty():
        later = said.get()
        if isinstance(later, tuple) and later[1] is None and isinstance(found, tuple):
            later = (later[0], found[1])
        found = later
    return found


def _told(error: BaseException) -> str:
    if isinstance(error, Stopped):
        return "cancelled"
    if isinstance(error, ValueError):
        return f"error: {error}"
    traceback.print_exception(error, file=sys.stderr)
    said = sentence(error) or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return f"error: {said}"


def _enlarged(image: Image.Image) -> Image.Image:
    factor = max(1, SHOWN_PIXELS // max(image.size))
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.NEAREST)


def make_page(playground: Playground) -> gr.Blocks:
    """Return the page, not yet served."""
    return _Page(playground).build()


def launch(page: gr.Blocks, host: str, port: int = 0, *, block: bool = True) -> str:
    """Serve a page and return its address.

    Args:
        page: of `make_page`.
        host: address to listen at.
        port: 0 takes a free one.
        block: wait until it is interrupted.

    Raises:
        ValueError: for a host or a port that cannot be had.
    """
    try:
        with socket.create_server((host, port)) as taken:
            port = taken.getsockname()[1]
    except OSError as error:
        raise ValueError(
            f"`--host` is {host!r} and `--port` {port}; they must be free to listen at: "
            f"{error.strerror or error}."
        ) from error
    page.queue(default_concurrency_limit=1, max_size=16)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        css=CSS,
        theme=gr.themes.Default(font=FONT, font_mono=MONO),
    )
    address = f"http://{host}:{port}/"
    print(f"The playground is at {address}; Ctrl-C ends it.", flush=True)
    if block:
        page.block_thread()
    return address


def serve(
    place: str,
    host: str = "127.0.0.1",
    port: int = 0,
    device: str | None = None,
    limits: Limits | None = None,
) -> None:
    """Read a pipeline and serve its page until it is interrupted.

    Raises:
        ValueError: as `Playground` and `launch`.
    """
    launch(make_page(Playground(place, device, limits)), host, port)
