"""Inputs and outputs of the demo page, and how jobs of the model are run from it."""

import functools
import html
import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image

from .actions import DemoActions


logger = logging.getLogger(__name__)

MODEL_QUEUE = {"concurrency_id": "model", "concurrency_limit": 1}
EXAMPLES = Path(__file__).parent / "examples"


def on(event: Callable, run: Callable, inputs: list, outputs: list, api_name: str | None = None, **options) -> None:
    """Run a job of the model on an event, one at a time; only jobs with an `api_name` are in the public API."""
    visibility = "public" if api_name else "private"
    event(run, inputs, outputs, api_name=api_name, api_visibility=visibility, **MODEL_QUEUE, **options)


def answer(run: Callable) -> Callable:
    """Show errors that a visitor can cause as messages on the page; details of our own bugs go to the log only."""

    def to_message(error: Exception) -> gr.Error:
        if isinstance(error, ValueError | TypeError | OSError):
            return gr.Error(str(error), print_exception=False)
        logger.exception("a demo job failed")
        return gr.Error("Internal error; your input is fine. Please try again.", print_exception=False)

    @functools.wraps(run)
    def run_once(*arguments):
        try:
            return run(*arguments)
        except Exception as error:
            raise to_message(error) from error

    @functools.wraps(run)
    def run_in_parts(*arguments):
        try:
            yield from run(*arguments)
        except Exception as error:
            raise to_message(error) from error

    return run_in_parts if inspect.isgeneratorfunction(run) else run_once


def note_list(notes: Sequence[str]) -> str:
    """Return notes about a prompt for the page."""
    return "".join(f'<p role="status">{html.escape(note)}</p>' for note in notes)


def photo_examples(photo: gr.Image) -> list[Any]:
    """Show buttons for the images that ship with the package, and return the events after which `photo` holds one.

    `gr.Examples` would make the component anew for each visitor, without the checks of `photo_input`.
    """
    events = []
    with gr.Row():
        for path in sorted(EXAMPLES.glob("*.[jw]*")):
            button = gr.Button(f"Example: {path.stem}", size="sm", min_width=100)
            load = functools.partial(PIL.Image.open, path)
            events.append(button.click(load, None, photo, queue=False, api_visibility="private"))
    return events


def progress_bar(done: int, total: int, what: str) -> str:
    """Return a bar for the page: `done` of `total` images."""
    label = html.escape(f"{done} of {total} images: {what}" if done else f"{what} ...")
    return f'<label>{label}<progress max="{total}" value="{done}" aria-label="{label}"></progress></label>'


def photo_input() -> gr.Image:
    """Return an input for a photo, passed on as the path of the uploaded file.

    Gradio would open the file itself and fail on a bad one with a traceback; the actions say what is wrong with it.
    """
    photo = gr.Image(label="Photo", sources=["upload", "clipboard"], height=260, buttons=[], format="png")
    return pass_on(photo, lambda payload: None if payload is None else payload.path)


def pass_on(component: Any, preprocess: Callable = lambda value: value) -> Any:
    """Let the actions check the value of a component, instead of Gradio, whose errors are not for visitors."""
    # Not a subclass: Gradio would write a stub file for it into the package.
    component.preprocess = preprocess
    return component


def number_input(value: int, label: str, low: int, high: int) -> gr.Number:
    return pass_on(gr.Number(value, label=label, precision=0, minimum=low, maximum=high))


def seed_input() -> gr.Number:
    return number_input(0, "Seed: same seed, same image", 0, 2**32 - 1)


def shape_input(actions: DemoActions) -> gr.Checkbox:
    """Return a checkbox that is there only if the model knows other shapes than squares."""
    return pass_on(
        gr.Checkbox(
            False,
            label="Keep the proportions of the photo",
            info="Models that were trained on squares are better at squares.",
            visible=actions.pipe.size_rules.is_free,
        )
    )


def token_slider(actions: DemoActions, label: str, value: int, elem_id: str) -> gr.Slider:
    return pass_on(gr.Slider(1, actions.num_registers, value=value, step=1, label=label, elem_id=elem_id))


def guidance_slider(label: str, value: float, fixed_range: Sequence[float] | None = None) -> gr.Slider:
    """Return a slider for a guidance scale; it is hidden if the range of a distilled decoder leaves no choice."""
    low, high = fixed_range or (1, max(15, value))
    slider = gr.Slider(low, max(high, low + 1), value=value, step=0.5, label=label, visible=low < high)
    return pass_on(slider)


def image_output(actions: DemoActions, label: str, height: int = 260) -> gr.Image:
    classes = ["result", *pixel_classes(actions)]
    buttons: list = ["download", "fullscreen"]
    return gr.Image(label=label, interactive=False, format="png", height=height, buttons=buttons, elem_classes=classes)


def gallery_output(actions: DemoActions, label: str) -> gr.Gallery:
    buttons: list = ["download", "fullscreen"]
    classes = pixel_classes(actions)
    return gr.Gallery(
        label=label, columns=4, format="png", object_fit="contain", buttons=buttons, elem_classes=classes
    )


def pixel_classes(actions: DemoActions) -> list[str]:
    """Return CSS classes that enlarge small images without smoothing, which would flatter a small model."""
    return ["pixels"] if actions.pipe.resolution < 128 else []
