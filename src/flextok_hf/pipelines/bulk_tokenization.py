"""Many images to tokens: reading, copying and computing at the same time.

Letters: B batch, R resolution, K registers, k tokens kept.
"""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from ..models.packed_linear import packed_weights
from .pipeline_flextok import FlexTokPipeline


Item = TypeVar("Item")
MANY_CALLS = 1000  # a stream is expected to be long


def read_ahead(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """Yield `items` in their order, while a thread already makes the next ones.

    Args:
        items: its errors arrive at the caller, at their place in the order.
        depth: how many finished items may wait.
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
        except BaseException as error:  # whatever it is, the caller has to know
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
    """Turn batches of images into token ids; the next batch is read and copied while one is computed.

    Args:
        pipe: on any device; it computes in its own precision.
        batches: pixels, (B, 3, R, R) uint8, or float32 in [-1, 1]; R is the pipeline's resolution. A `DataLoader` with
            workers reads several at a time.
        max_tokens: most tokens per image.

    Yields:
        Token ids of each batch, (B, k) int64 on the CPU.
    """
    device = pipe._execution_device
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def upload(pixels: Tensor) -> tuple[Tensor, "torch.cuda.Event | None"]:
        if copies is None:
            return pixels.to(device), None
        with torch.cuda.stream(copies):
            uploaded = pixels.pin_memory().to(device, non_blocking=True)
            return uploaded, copies.record_event()

    waiting: tuple[Tensor, torch.cuda.Event | None] | None = None  # ids that are still computed or on their way
    with packed_weights(pipe.encoder, MANY_CALLS):
        for pixels, is_there in read_ahead(map(upload, batches)):
            if is_there is not None:
                torch.cuda.current_stream(device).wait_event(is_there)
                pixels.record_stream(torch.cuda.current_stream(device))
            started = download(pipe.tokenize_pixels(pixels, max_tokens))
            if waiting is not None:
                yield finish_download(*waiting)
            waiting = started
        if waiting is not None:
            yield finish_download(*waiting)


def download(token_ids: Tensor) -> tuple[Tensor, "torch.cuda.Event | None"]:
    """Start to copy ids to the CPU; returns where they arrive and what tells that they did."""
    if token_ids.device.type != "cuda":
        return token_ids.cpu(), None
    host = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
    host.copy_(token_ids, non_blocking=True)
    return host, torch.cuda.current_stream(token_ids.device).record_event()


def finish_download(host: Tensor, is_there: "torch.cuda.Event | None") -> Tensor:
    """Wait for what `download` started."""
    if is_there is not None:
        is_there.synchronize()
    return host
