"""The demo page: four Gradio tabs over one `DemoActions`.

Jobs run one at a time (`MODEL_QUEUE`): a pipeline has one scheduler, and two parallel jobs would only compete for the
same cores. Other visitors wait in the queue, and the page says so.
"""

import functools
import html
import inspect
import logging
from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from ..models.nested_dropout import token_ladder
from ..pipelines.pipeline_flextok import FlexTokPipeline
from ..utils.sheets import token_count_title
from .actions import MAX_PHOTO_BYTES, NUM_VARIATIONS, DemoActions
from .server import CheckedBlocks, CheckedRequests


logger = logging.getLogger(__name__)

MODEL_QUEUE = {"concurrency_id": "model", "concurrency_limit": 1}
MAX_QUEUE_LENGTH = 64
MAX_SESSIONS = 100  # whose state is kept, the latest first: each takes about 0.1 MB
KEEP_FILES_S = 3600  # how long photos and result images stay on disk

# System fonts: nothing is fetched from other hosts.
FONTS = ["system-ui", "sans-serif"]
CSS = """
.gradio-container {max-width: 1100px !important; margin: 0 auto !important}
.result img {width: 100%; height: 100%; object-fit: contain}
.pixels img {image-rendering: pixelated}
progress {width: 100%; height: 0.8rem; accent-color: var(--primary-500)}
"""


def build_demo(pipe: FlexTokPipeline, name: str = "the embedded model") -> gr.Blocks:
    """Build the page.

    Args:
        pipe: the model to show.
        name: its name on the page.

    Returns:
        The page with its queue; pass `launch_options()` to its `launch`.
    """
    folder = get_upload_folder()
    actions = DemoActions(pipe, folder)
    keep = (KEEP_FILES_S, KEEP_FILES_S)
    with CheckedBlocks(folder, title="FlexTok", analytics_enabled=False, delete_cache=keep) as demo:
        gr.Markdown(
            "# FlexTok: images as 1 to"
            f" {actions.num_registers} tokens\nThe first tokens describe what is in an image, later ones add detail;"
            f" any number of tokens decodes to an image. This is {name}: {pipe.resolution} x {pipe.resolution} pixels,"
            f" {pipe.codebook_size:,} codes, {actions.bits_per_token:.1f} bits per token."
        )
        with gr.Tabs():
            with gr.Tab("Reconstruct"):
                add_reconstruct(actions)
            if actions.reads_prompts:
                with gr.Tab("Generate"):
                    add_generate(actions)
                with gr.Tab("Vary"):
                    add_vary(actions)
            with gr.Tab("Tokens"):
                add_tokens(actions)
    return demo.queue(max_size=MAX_QUEUE_LENGTH)


def launch_options() -> dict[str, Any]:
    """Return the arguments of `launch` for this page: theme, limits, no footer links."""
    theme = gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"])
    return {
        "theme": theme,
        "css": CSS,
        "max_file_size": MAX_PHOTO_BYTES,
        "state_session_capacity": MAX_SESSIONS,
        "app_kwargs": {"middleware": [Middleware(CheckedRequests)]},
        "footer_links": [],
        "run_history": False,
    }


def add_reconstruct(actions: DemoActions) -> None:
    """Tab: a photo, a slider over the number of tokens, original and reconstruction side by side."""
    with gr.Row():
        with gr.Column(min_width=280):
            photo = photo_input()
            count = token_slider(actions, "Tokens", actions.num_registers, "reconstruct-tokens")
            seed = seed_input()
            keeps_shape = shape_input(actions)
            button = gr.Button("Reconstruct", variant="primary")
        with gr.Column(min_width=280, scale=2):
            with gr.Row():
                original = image_output(actions, "What the model sees")
                image = image_output(actions, "Reconstruction")
            facts = gr.Markdown(elem_id="reconstruct-facts")

    def run(path, num_tokens, seed, keeps):
        result = actions.reconstruct(path, num_tokens, seed, keeps)
        line = (
            f"**{token_count_title(result.num_tokens)}**, {result.bits:.0f} bits"
            f" ({result.bits / 8:.0f} bytes), PSNR {result.psnr_db:.1f} dB"
        )
        return result.original, result.image, line

    inputs, outputs = [photo, count, seed, keeps_shape], [original, image, facts]
    on(button.click, answer(run), inputs, outputs, api_name="reconstruct")
    on(photo.upload, answer(run), inputs, outputs)
    on(count.release, answer(run), inputs, outputs, trigger_mode="always_last")
    on(keeps_shape.input, answer(run), inputs, outputs)


def add_generate(actions: DemoActions) -> None:
    """Tab: a prompt; images appear as its tokens are generated."""
    with gr.Row():
        with gr.Column(min_width=280):
            prompt = gr.Textbox(label="Prompt", value="a cat", placeholder="a cat", max_lines=3)
            button = gr.Button("Generate", variant="primary")
            gr.Examples(["a cat", "a red apple", "a 3d rocket", "a castle"], prompt, label="Examples")
            count = token_slider(actions, "Maximum tokens", actions.num_registers, "generate-tokens")
            seed = seed_input()
            with gr.Accordion("Guidance", open=False):
                guidance = guidance_slider("Follow the tokens", actions.pipe.config.default_guidance_scale)
                prior_guidance = guidance_slider("Follow the prompt", actions.pipe.config.default_prior_guidance_scale)
        with gr.Column(min_width=280, scale=2):
            progress = gr.HTML(elem_id="generate-progress")
            image = image_output(actions, "The image so far", height=320)
            gallery = gallery_output(actions, "All steps")

    def run(text, max_tokens, seed, guidance_scale, prior_guidance_scale):
        images = actions.generate(text, max_tokens, seed, guidance_scale, prior_guidance_scale)
        total = len([step for step in token_ladder(actions.num_registers) if step < max_tokens]) + 1
        shown: list[tuple] = []
        yield progress_bar(0, total, "generating tokens"), None, []
        for number, num_tokens, image in images:
            title = token_count_title(num_tokens)
            shown.append((image, title))
            yield progress_bar(number, total, title), image, list(shown)

    inputs, outputs = [prompt, count, seed, guidance, prior_guidance], [progress, image, gallery]
    on(button.click, answer(run), inputs, outputs, api_name="generate", show_progress="hidden")
    on(prompt.submit, answer(run), inputs, outputs, show_progress="hidden")


def add_vary(actions: DemoActions) -> None:
    """Tab: a photo, the number of tokens to keep, and images that share them."""
    with gr.Row():
        with gr.Column(min_width=280):
            photo = photo_input()
            keep = token_slider(actions, "Tokens to keep", min(4, actions.num_registers), "vary-tokens")
            prompt = gr.Textbox(label="Prompt (optional)", max_lines=3)
            seed = seed_input()
            keeps_shape = shape_input(actions)
            button = gr.Button("Vary", variant="primary")
        with gr.Column(min_width=280, scale=2):
            progress = gr.HTML(elem_id="vary-progress")
            gallery = gallery_output(actions, "The kept tokens, and four variations")

    def run(path, keep_tokens, text, seed, keeps):
        images = actions.vary(path, keep_tokens, text, seed, keeps)
        total = 1 + NUM_VARIATIONS
        shown: list[tuple] = []
        yield progress_bar(0, total, "tokenizing the photo"), []
        for number, (title, image) in enumerate(images, start=1):
            shown.append((image, title))
            yield progress_bar(number, total, title), list(shown)

    inputs, outputs = [photo, keep, prompt, seed, keeps_shape], [progress, gallery]
    on(button.click, answer(run), inputs, outputs, api_name="vary", show_progress="hidden")


def add_tokens(actions: DemoActions) -> None:
    """Tab: the token ids of an image with their digits; replace one and see what changes."""
    token_ids, size = gr.State([]), gr.State((None, None))
    levels = " x ".join(map(str, actions.pipe.encoder.quantizer.levels))
    gr.Markdown(f"Each token is one of {actions.pipe.codebook_size:,} codes: {levels} levels, shown as digits.")
    with gr.Row():
        with gr.Column(min_width=280):
            photo = photo_input()
            keeps_shape = shape_input(actions)
            read = gr.Button("Tokenize the photo")
            if actions.reads_prompts:
                prompt = gr.Textbox(label="Or a prompt", value="a cat", max_lines=3)
                write = gr.Button("Generate tokens for the prompt")
            seed = seed_input()
        with gr.Column(min_width=280):
            table = gr.Dataframe(
                headers=["token", "id", "digits"],
                datatype=["number", "number", "str"],
                type="array",
                interactive=False,
                max_height=360,
                label="Tokens (click one to replace it)",
                elem_id="token-table",
            )
            number = number_input(1, "Token to replace", 1, actions.num_registers)
            new_id = number_input(0, "New id", 0, actions.pipe.codebook_size - 1)
            replace = gr.Button("Replace", variant="primary")
        with gr.Column(min_width=280):
            before = image_output(actions, "Before")
            after = image_output(actions, "After")

    def show(ids, size, seed):
        return ids, size, actions.token_rows(ids), None, actions.decode(ids, seed, size)

    def run_read(path, seed, keeps):
        return show(*actions.tokens_of_photo(path, keeps), seed)

    def run_write(text, seed):
        return show(actions.tokens_of_prompt(text, seed), (None, None), seed)

    def run_replace(ids, size, place, token_id, seed):
        changed, old, new = actions.replace_token(ids, place, token_id, seed, size)
        return changed, size, actions.token_rows(changed), new, old

    def choose(ids, event: gr.SelectData):
        place = event.index[0]
        return place + 1, ids[place] if place < len(ids) else 0

    outputs = [token_ids, size, table, after, before]
    on(read.click, answer(run_read), [photo, seed, keeps_shape], outputs)
    on(photo.upload, answer(run_read), [photo, seed, keeps_shape], outputs)
    if actions.reads_prompts:
        on(write.click, answer(run_write), [prompt, seed], outputs)
    on(replace.click, answer(run_replace), [token_ids, size, number, new_id, seed], outputs)
    table.select(choose, [token_ids], [number, new_id], queue=False, api_visibility="private")


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


def progress_bar(done: int, total: int, what: str) -> str:
    """Return a bar for the page: `done` of `total` images."""
    label = html.escape(f"{done} of {total} images: {what}" if done else f"{what} ...")
    return f'<label>{label}<progress max="{total}" value="{done}" aria-label="{label}"></progress></label>'


def photo_input() -> gr.Image:
    """Return an input for a photo, passed on as the path of the uploaded file.

    Gradio would open the file itself and fail on a bad one with a traceback; the actions say what is wrong with it.
    """
    photo = gr.Image(label="Photo", sources=["upload", "clipboard"], height=260, buttons=[])
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


def guidance_slider(label: str, value: float) -> gr.Slider:
    return pass_on(gr.Slider(1, max(15, value), value=value, step=0.5, label=label))


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
