"""The actions behind the tabs of the demo, independent of the web page.

All input is untrusted: each method checks it, and raises an error with a message for the visitor if it is wrong.
"""

import functools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
from PIL import Image

from ..models.nested_dropout import token_ladder
from ..pipelines.images import PILLOW_BOMBS, PILLOW_ERRORS, ImageValueError, load_image, resize_and_crop
from ..pipelines.known_words import known_names
from ..pipelines.pipeline_flextok import FlexTokPipeline
from ..utils.files import save_animation
from ..utils.image_formats import open_image
from ..utils.measures import peak_signal_to_noise, stack_images
from ..utils.sheets import contact_sheet
from .uploads import read_upload


MAX_PROMPT_CHARACTERS = 500
MAX_PHOTO_MEGAPIXELS = 50  # about 150 MB once decoded
MAX_GUIDANCE = 100
MAX_SECONDS = 300  # per request, checked after every decoder step and every image
NUM_VARIATIONS = 4
ANIMATION_SIDE, FRAME_MS = 256, 700

Shape = tuple[int | None, int | None]  # height and width; `None` for the model's square


@dataclass(frozen=True)
class Reconstruction:
    """A photo as the model sees it, its reconstruction, and figures about it."""

    original: Image.Image
    image: Image.Image
    num_tokens: int
    bits: float
    psnr_db: float


def time_limit() -> Callable[..., dict]:
    """Return a function that raises a TimeoutError once a request takes too long; the pipeline can call it back."""
    end = time.monotonic() + MAX_SECONDS

    def stop(*arguments: Any) -> dict:
        if time.monotonic() > end:
            raise TimeoutError(f"This took more than {MAX_SECONDS} seconds and was stopped. Ask for fewer tokens.")
        return {}

    return stop


class DemoActions:
    """One pipeline and the actions of the demo.

    Args:
        pipe: any pipeline; one without a text prior supports photos only.
        upload_folder: photos are read from this folder only.
    """

    def __init__(self, pipe: FlexTokPipeline, upload_folder: str):
        self.pipe, self.upload_folder = pipe, upload_folder
        pipe.set_progress_bar_config(disable=True)

    @property
    def num_registers(self) -> int:
        """Maximum number of tokens of an image."""
        return self.pipe.num_registers

    @property
    def reads_prompts(self) -> bool:
        """Whether the model generates images from prompts."""
        return self.pipe.prior is not None and self.pipe.text_encoder is not None

    @functools.cached_property
    def names(self) -> list[str]:
        """Names that the model knows, as far as it records them."""
        return known_names(self.pipe.prior).get("names", [])

    @property
    def bits_per_token(self) -> float:
        """Information in one token if all codes were equally likely."""
        return math.log2(self.pipe.codebook_size)

    def open_photo(self, path: str | None, keeps_shape: Any = False) -> Image.Image:
        """Read an uploaded photo and crop it to what the model sees, in RGB: a square, or its own proportions.

        Raises:
            ValueError: if there is none, or it is not an uploaded file, not an image, damaged or too large; or if the
                model knows squares only.
        """
        if not isinstance(keeps_shape, bool):
            raise ValueError("Whether to keep the proportions must be true or false.")
        if keeps_shape and not self.pipe.size_rules.is_free:
            raise ValueError("This model knows squares only.")
        if not path:
            raise ValueError("Choose a photo first.")
        content = read_upload(path, self.upload_folder)
        try:
            with open_image(BytesIO(content)) as header:
                width, height = header.size
        except Image.UnidentifiedImageError as error:
            raise ValueError("This file is not an image that can be read. Upload a PNG, JPEG or WebP file.") from error
        except PILLOW_BOMBS as error:
            raise ValueError(self._too_large()) from error
        except PILLOW_ERRORS as error:
            raise ValueError("This image is damaged or truncated. Save it again and upload it once more.") from error
        if width * height > MAX_PHOTO_MEGAPIXELS * 10**6:
            raise ValueError(self._too_large(f" This one has {width} x {height}."))
        try:
            photo = load_image(content)
            size = self.pipe.size_rules.chooser("keep" if keeps_shape else None)(photo.height, photo.width)
            return resize_and_crop(photo, size)
        except ImageValueError as error:
            raise ValueError(f"This photo {error.__cause__}") from error
        except ValueError as error:
            raise ValueError("This image is damaged or truncated. Save it again and upload it once more.") from error

    def reconstruct(
        self, path: str | None, num_tokens: Any, seed: Any = 0, keeps_shape: Any = False
    ) -> Reconstruction:
        """Reconstruct a photo from its first tokens, as a square or in its own proportions."""
        photo = self.open_photo(path, keeps_shape)
        count = self.check_count(num_tokens, "tokens")
        size = photo.height, photo.width
        image = self.decode(self.pipe.tokenize(photo, count, size)[0].tolist(), seed, size)
        psnr = peak_signal_to_noise(stack_images([image]), stack_images([photo])).item()
        return Reconstruction(photo, image, count, count * self.bits_per_token, psnr)

    def reconstruct_all(self, path: str | None, seed: Any = 0, keeps_shape: Any = False) -> Iterator[Reconstruction]:
        """Reconstruct a photo from 1, 2, 4, ... tokens, all from the same noise."""
        photo = self.open_photo(path, keeps_shape)
        size = photo.height, photo.width
        first = self.check_seed(seed)
        token_ids = self.pipe.tokenize(photo, size=size)[0].tolist()
        stop = time_limit()

        def images() -> Iterator[Reconstruction]:
            for count in token_ladder(self.num_registers):
                image = self.decode(token_ids[:count], first, size)
                psnr = peak_signal_to_noise(stack_images([image]), stack_images([photo])).item()
                yield Reconstruction(photo, image, count, count * self.bits_per_token, psnr)
                stop()

        return images()

    def generate(
        self,
        prompt: Any,
        max_tokens: Any,
        seed: Any = 0,
        guidance_scale: Any = None,
        prior_guidance_scale: Any = None,
    ) -> Iterator[tuple[int, int, Image.Image]]:
        """Generate from a prompt; returns an iterator over (image number, number of tokens, image)."""
        text = self.check_prompt(prompt)
        most = self.check_count(max_tokens, "tokens")
        counts = [count for count in token_ladder(self.num_registers) if count < most] + [most]
        images = self.pipe.stream(
            text,
            counts,
            guidance_scale=self.check_guidance(guidance_scale),
            prior_guidance_scale=self.check_guidance(prior_guidance_scale),
            generator=self.generator(seed),
        )
        stop = time_limit()

        def numbered() -> Iterator[tuple[int, int, Image.Image]]:
            for number, (count, image) in enumerate(images, start=1):
                yield number, count, image
                stop()

        return numbered()

    def notes(self, prompt: Any) -> list[str]:
        """Return what the visitor should know about a prompt: words that the model does not know, and cut ends."""
        return self.pipe.prompt_notes(self.check_prompt(prompt, may_be_empty=True))

    def animation(self, images: Sequence[tuple[Image.Image, str]], prompt: Any) -> str:
        """Return the path of a GIF of images, each with its title, and with the prompt."""
        frames = [
            contact_sheet([[image]], [title], ANIMATION_SIDE, row_titles=[str(prompt)]) for image, title in images
        ]
        os.makedirs(self.upload_folder, exist_ok=True)
        path = os.path.join(tempfile.mkdtemp(dir=self.upload_folder), "flextok.gif")
        save_animation(frames, path, FRAME_MS)
        return path

    def vary(
        self, path: str | None, keep_tokens: Any, prompt: Any = "", seed: Any = 0, keeps_shape: Any = False
    ) -> Iterator[tuple[str, Image.Image]]:
        """Keep the first tokens of a photo and let the prior generate the rest, several times, in its shape.

        Returns:
            An iterator over (title, image): the kept tokens alone, then the variations, each with its own seed.
        """
        photo = self.open_photo(path, keeps_shape)
        keep = self.check_count(keep_tokens, "kept tokens")
        text = self.check_prompt(prompt, may_be_empty=True)
        first = self.check_seed(seed)
        height, width = photo.height, photo.width
        kept = self.pipe.tokenize(photo, keep, (height, width))
        stop = time_limit()

        def images() -> Iterator[tuple[str, Image.Image]]:
            yield "kept", self.decode(kept[0].tolist(), first, (height, width))
            for number in range(NUM_VARIATIONS):
                generator = self.generator(first + number)
                options = {"height": height, "width": width, "callback_on_step_end": stop}
                output = self.pipe(text, token_ids=kept, generator=generator, **options)
                yield f"variation {number + 1}", output.images[0]

        return images()

    def tokens_of_photo(self, path: str | None, keeps_shape: Any = False) -> tuple[list[int], Shape]:
        """Return all token ids of a photo, and its height and width as the model sees it."""
        photo = self.open_photo(path, keeps_shape)
        size = photo.height, photo.width
        return self.pipe.tokenize(photo, size=size)[0].tolist(), size

    def tokens_of_prompt(self, prompt: Any, seed: Any = 0) -> list[int]:
        """Return the token ids that the prior generates for a prompt."""
        text = self.check_prompt(prompt)
        return self.pipe.generate_tokens(text, generator=self.generator(seed))[0].tolist()

    @staticmethod
    def difference(before: Image.Image, after: Image.Image) -> tuple[Image.Image, float]:
        """Return where two images differ, in gray, white where they do most; and the mean difference, 0 to 1."""
        gap = (
            torch.stack([stack_images([before]), stack_images([after])]).diff(dim=0).abs()[0, 0].amax(dim=0)
        )  # (H, W)
        gray = (255 * gap / gap.max().clamp(min=1 / 255)).round().to(torch.uint8)
        return Image.fromarray(gray.numpy(), "L"), gap.mean().item()

    def token_rows(self, token_ids: list[int]) -> list[list]:
        """Return a row per token: its number (from 1), its id and its FSQ digits."""
        quantizer = self.pipe.encoder.quantizer
        return [
            [number, token_id, " ".join(str(digit) for digit in self.digits(token_id, quantizer))]
            for number, token_id in enumerate(token_ids, start=1)
        ]

    @staticmethod
    def digits(token_id: int, quantizer: Any) -> list[int]:
        """Return the level (from 0) of every code dimension of an id."""
        return [token_id // place % level for place, level in zip(quantizer.place_values, quantizer.levels)]

    def replace_token(
        self, token_ids: list[int] | None, number: Any, token_id: Any, seed: Any = 0, size: Shape = (None, None)
    ) -> tuple[list[int], Image.Image, Image.Image]:
        """Replace the id of one token.

        Returns:
            The new ids, and the images before and after, decoded from the same noise.
        """
        if not token_ids:
            raise ValueError("Tokenize a photo or a prompt first: there are no tokens to change yet.")
        place = self._whole_number(number, "The number of the token", 1, len(token_ids))
        new_id = self._whole_number(token_id, "The new id", 0, self.pipe.codebook_size - 1)
        changed = [*token_ids[: place - 1], new_id, *token_ids[place:]]
        return changed, self.decode(token_ids, seed, size), self.decode(changed, seed, size)

    def decode(self, token_ids: list[int], seed: Any = 0, size: Shape = (None, None)) -> Image.Image:
        """Decode one sequence of ids to an image, by default a square."""
        return self.pipe.detokenize(
            torch.tensor([token_ids]),
            height=size[0],
            width=size[1],
            generator=self.generator(seed),
            callback_on_step_end=time_limit(),
        ).images[0]

    def generator(self, seed: Any) -> torch.Generator:
        """Return a generator with this seed."""
        return torch.Generator().manual_seed(self.check_seed(seed))

    def check_seed(self, seed: Any) -> int:
        """Check a seed, which must leave room for the seeds of the variations."""
        return self._whole_number(seed, "The seed", 0, 2**32 - 1)

    def check_count(self, count: Any, what: str) -> int:
        """Check a number of tokens against what the model has."""
        return self._whole_number(count, f"The number of {what}", 1, self.num_registers)

    def check_step(self, step: Any, most: int) -> int:
        """Check the number of an image among those that were drawn."""
        return self._whole_number(step, "The step", 1, most)

    def check_guidance(self, scale: Any) -> float | None:
        """Check a guidance scale; `None` is the model's own."""
        is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if scale is None or (is_number and 0 <= scale <= MAX_GUIDANCE):
            return scale
        raise ValueError(f"Guidance must be a number from 0 to {MAX_GUIDANCE}.")

    def check_prompt(self, prompt: Any, may_be_empty: bool = False) -> str:
        """Check the length of a prompt and strip it; nothing is truncated silently."""
        if not self.reads_prompts:
            raise ValueError("This model has no text prior: it can only tokenize and reconstruct photos.")
        text = prompt.strip() if isinstance(prompt, str) else ""
        if not text and not may_be_empty:
            raise ValueError("Enter a prompt, for example: a cat.")
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise ValueError(
                f"The prompt has {len(text):,} characters. Shorten it to at most {MAX_PROMPT_CHARACTERS}."
            )
        return text

    @staticmethod
    def _too_large(detail: str = "") -> str:
        return f"This image is too large: upload one of at most {MAX_PHOTO_MEGAPIXELS} million pixels.{detail}"

    @staticmethod
    def _whole_number(value: Any, what: str, low: int, high: int) -> int:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or value != int(value):  # in this order: int() fails on infinity
            raise ValueError(f"{what} must be a whole number from {low} to {high:,}.")
        return int(value)
