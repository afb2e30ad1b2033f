"""Bulk tokenization: reading, copying and computing overlap.

Letters: B batch, R resolution, K registers, k tokens kept.
"""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from ..models.latents import check_token_ids
from ..models.packed_linear import packed_weights
from .images import pixels_to_values
from .pipeline_flextok import FlexTokPipeline


Item = TypeVar("Item")
MANY_CALLS = 1000  # streams are assumed to be long


def read_ahead(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """Yield `items` in order while a background thread prepares the next ones.

    Args:
        items: an error that it raises reaches the caller after the items before it.
        depth: maximum number of prepared items to queue.
    """
    ready: queue.Queue = queue.Queue(depth)
    is_closed = threading.Event()
    end = object()

    def put(entry: tuple) -> None:
        while not is_closed.is_set():
            try:
                return ready.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((item, None))
                if is_closed.is_set():
                    return
            put((end, None))
        except BaseException as error:  # any error is passed on to the caller
            put((end, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        is_closed.set()
        thread.join()


def tokenize_batches(
    pipe: FlexTokPipeline, batches: Iterable[Tensor], max_tokens: int | None = None
) -> Iterator[Tensor]:
    """Tokenize batches of images; the next batch is read and copied while the current one is computed.

    Args:
        pipe: pipeline on any device and in any precision.
        batches: pixels, (B, 3, R, R) uint8, or float32 in [-1, 1]; R is the pipeline's resolution. A `DataLoader` with
            workers reads several in parallel.
        max_tokens: maximum number of tokens per image.

    Yields:
        Token ids of each batch, (B, k) int64 on the CPU.

    Raises:
        TypeError: if `batches` does not give tensors.
        ValueError: if a shape does not fit, or the VAE or the encoder computes NaN or infinity.
    """
    device = pipe._execution_device
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    if not isinstance(batches, Iterable) or (isinstance(batches, Tensor) and batches.ndim == 0):
        raise TypeError(f"`batches` must give batches of pixels one by one, got {type(batches).__name__}.")

    def upload(pixels: Tensor) -> tuple[Tensor, "torch.cuda.Event | None"]:
        if not isinstance(pixels, Tensor):
            raise TypeError(f"`batches` must give tensors of pixels, got {type(pixels).__name__}.")
        if copies is None or pixels.device.type != "cpu":  # only memory of the host can be pinned
            return pixels.to(device), None
        with torch.cuda.stream(copies):
            on_device = pixels.pin_memory().to(device, non_blocking=True)
            return on_device, copies.record_event()

    def finish(pixels: Tensor, host: Tensor, downloaded: "torch.cuda.Event | None") -> Tensor:
        token_ids = finish_download(host, downloaded)
        if (token_ids < 0).any():
            pixel_values = pixels_to_values(pixels) if pixels.dtype == torch.uint8 else pixels
            check_token_ids(token_ids, pixel_values, pipe.encoder, pipe.vae)
        return token_ids

    waiting: tuple[Tensor, Tensor, torch.cuda.Event | None] | None = None  # ids still being computed or copied
    with packed_weights(pipe.encoder, MANY_CALLS):
        for pixels, uploaded in read_ahead(map(upload, batches)):
            if uploaded is not None:
                torch.cuda.current_stream(device).wait_event(uploaded)
                pixels.record_stream(torch.cuda.current_stream(device))
            started = pixels, *download(pipe.tokenize_pixels(pixels, max_tokens))
            if waiting is not None:
                yield finish(*waiting)
            waiting = started
        if waiting is not None:
            yield finish(*waiting)


def download(token_ids: Tensor) -> tuple[Tensor, "torch.cuda.Event | None"]:
    """Start copying ids to the CPU; return the destination and its completion event, `None` without CUDA."""
    if token_ids.device.type != "cuda":
        return token_ids.cpu(), None
    host = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
    host.copy_(token_ids, non_blocking=True)
    return host, torch.cuda.current_stream(token_ids.device).record_event()


def finish_download(host: Tensor, downloaded: "torch.cuda.Event | None") -> Tensor:
    """Wait for a copy started by `download` and return it."""
    if downloaded is not None:
        downloaded.synchronize()
    return host
