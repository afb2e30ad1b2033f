"""The demo page: Gradio tabs over one `DemoActions`.

Jobs run one at a time (`MODEL_QUEUE`): a pipeline has one scheduler, and two parallel jobs would only compete for the
same cores. Other visitors wait in the queue, and the page says so.
"""

from importlib.metadata import PackageNotFoundError, metadata
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from ..pipelines.pipeline_flextok import FlexTokPipeline
from .actions import DemoActions
from .game import MIN_NAMES, add_guess
from .server import CheckedBlocks, CheckedRequests
from .tabs import add_generate, add_reconstruct, add_tokens, add_vary
from .uploads import MAX_PHOTO_BYTES


MAX_QUEUE_LENGTH = 64
MAX_SESSIONS = 100  # whose state is kept, the latest first: each takes about 0.5 MB at 128 x 128 pixels
KEEP_FILES_S = 3600  # how long photos and result images stay on disk

# System fonts: nothing is fetched from other hosts.
FONTS = ["system-ui", "sans-serif"]
CSS = """
.gradio-container {width: 100% !important; max-width: min(1100px, 100vw) !important; margin: 0 auto !important}
.result img {width: 100%; height: 100%; object-fit: contain}
.pixels img {image-rendering: pixelated}
.names {max-height: 16rem; overflow-y: auto}
@media (max-width: 640px) {.grid-container {grid-template-columns: repeat(2, minmax(0, 1fr)) !important}}
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
            f" {pipe.codebook_size:,} codes, {actions.bits_per_token:.1f} bits per token.{repository_link()}"
        )
        with gr.Tabs():
            if actions.reads_prompts:
                with gr.Tab("Generate"):
                    add_generate(actions)
            with gr.Tab("Reconstruct"):
                add_reconstruct(actions)
            if actions.reads_prompts:
                with gr.Tab("Vary"):
                    add_vary(actions)
                if len(actions.names) >= MIN_NAMES:
                    with gr.Tab("Guess"):
                        add_guess(actions)
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


def repository_link() -> str:
    """Return a link to the source code, if the installed package names it."""
    try:
        urls = metadata("flextok_hf").get_all("Project-URL") or []
    except PackageNotFoundError:
        return ""
    links = dict(url.split(", ", 1) for url in urls)
    address = links.get("Repository") or links.get("Source")
    return f" [Source code]({address})" if address else ""
