"""Gradio, hardened: requests are checked before Gradio acts on them, and every wrong one gets one sentence.

Gradio's API passes on any path that a request names without metadata, downloads what it names by URL, and answers
wrong types with an empty error and a traceback in the log.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import gradio as gr
from starlette.responses import JSONResponse

from .uploads import MAX_PHOTO_BYTES, NOT_UPLOADED, is_inside


logger = logging.getLogger(__name__)

NOT_UNDERSTOOD = "This request is not one that the page sends. Reload the page and try again."
FILE_MARK = {"_type": "gradio.FileData"}
MAX_BODY_BYTES = 2**20  # prompts and numbers; an upload may have a photo more
# Parts of Gradio that this page does not use: they start programs or fetch addresses, or keep what visitors send.
CLOSED_ROUTES = ("/component_server", "/process_recording", "/proxy=", "/vibe-", "/stream/", "/deep_link")


class CheckedBlocks(gr.Blocks):
    """Blocks whose inputs are single values, and files only from the upload folder.

    Args:
        upload_folder: where Gradio stores uploads.
        options: arguments of `gr.Blocks`.
    """

    def __init__(self, upload_folder: str, **options: Any):
        self.upload_folder = upload_folder
        super().__init__(**options)

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        """Raise an error for the visitor if `inputs` are not what the page sends; Gradio calls it first."""
        if len(inputs) != len(block_fn.inputs):
            raise gr.Error(
                f"This action takes {len(block_fn.inputs)} inputs, got {len(inputs)}.", print_exception=False
            )
        for component, value in zip(block_fn.inputs, inputs, strict=True):
            if isinstance(component, gr.Image):
                self.check_file(value)
            elif not isinstance(value, str | int | float | None) and not component.stateful:
                raise gr.Error(NOT_UNDERSTOOD, print_exception=False)

    def check_file(self, value: Any) -> None:
        """Raise an error for the visitor unless `value` is `None` or marked as a file in the upload folder."""
        if value is None:
            return
        is_file = isinstance(value, dict) and value.get("meta") == FILE_MARK and isinstance(value.get("path"), str)
        if not is_file or not is_inside(value["path"], self.upload_folder):
            raise gr.Error(NOT_UPLOADED, print_exception=False)

    async def process_api(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run a job; whatever Gradio cannot make sense of gets one sentence."""
        try:
            return await super().process_api(*args, **kwargs)
        except Exception as error:
            if isinstance(error, gr.Error) and not error.print_exception:  # ours: a sentence for the visitor
                raise
            logger.warning("refused a request: %s", type(error).__name__)
            raise gr.Error(NOT_UNDERSTOOD, print_exception=False) from None


class CheckedRequests:
    """ASGI middleware: closes routes that the page does not use, limits bodies, and answers instead of failing."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limit = MAX_BODY_BYTES + (MAX_PHOTO_BYTES if scope["path"].endswith("/upload") else 0)
        refusal = self.refusal(scope, limit)
        if refusal is not None:
            return await refusal(scope, receive, send)
        received, has_started = 0, False

        async def receive_to_limit() -> dict[str, Any]:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:  # sent in parts, without its length
                raise ValueError("the body is too large")
            return message

        async def send_and_note(message: dict[str, Any]) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self.app(scope, receive_to_limit, send_and_note)
        except Exception as error:
            logger.warning("refused a request to %s: %s", scope["path"][:80], type(error).__name__)
            if not has_started:
                await JSONResponse({"error": NOT_UNDERSTOOD}, 400)(scope, receive, send)

    @staticmethod
    def refusal(scope: dict[str, Any], limit: int) -> JSONResponse | None:
        """Return the answer to a request that is not passed on, or `None`."""
        path, _, file = scope["path"].partition("/file=")
        length = dict(scope["headers"]).get(b"content-length", b"0").decode("latin-1")
        if any(route in path for route in CLOSED_ROUTES) or "://" in path + file:  # Gradio would fetch the address
            return JSONResponse({"error": "This page does not use this address."}, 404)
        if not length.isdecimal() or int(length) > limit:
            return JSONResponse({"error": f"This request may have at most {limit:,} bytes."}, 413)
        return None
