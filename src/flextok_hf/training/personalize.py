"""An adapter that draws one's own images on request, in minutes: `flextok personalize`.

Prior and decoder learn the images. In each step they are also asked about images that the model drew before, and
drawn to what the model without the adapter answers, so that it still draws those. The encoder stays, so token ids do.

Letters: B images, K registers, C latent channels, h w latent grid.
"""

import math
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..cards.adapter_card import CARD_NAME
from ..data.seeds import draw_seed
from ..models.latents import encode_latents
from ..pipelines.images import prepare_images
from ..pipelines.pipeline_flextok import FlexTokPipeline
from ..utils.files import save_image
from ..utils.sheets import contact_sheet
from ..utils.words import split_words
from .adapters import freeze_with_adapter
from .arguments import PriorArguments, TokenizerArguments
from .personal_images import PersonalImages, prompts_of
from .preservation import distribution_change, velocity_change
from .prior import PriorForTraining
from .step_rng import StepRng
from .tokenizer import TokenizerForTraining


DRAW_BATCH, DRAW_STEPS = 16, 6
KEPT_STEPS = 3  # of images to keep: only noisy versions of them are looked at
KEPT_WEIGHT = 2.0  # of changes to what the model knew, relative to the losses on own images
PREVIEW_IMAGES, PREVIEW_ROWS = 4, 6
WARMUP, MAX_NORM, BETAS = 0.05, 1.0, (0.9, 0.99)
PREVIEW_FILE = "preview.png"


@dataclass(kw_only=True)
class PersonalizeOptions:
    """How to learn; the defaults were chosen with the embedded model.

    Attributes:
        steps: optimizer steps; half of what each sees are own images, half are drawn by the model before.
        lora_rank: of the adapters of prior and decoder.
        learning_rate: peak, of both.
        num_kept: images that the model draws beforehand, to keep what it knows; 0 for none.
        prior_batch: images per step of the prior; their tokens cost little.
        decoder_batch: images per step of the decoder.
        seed: of all draws.
        previews: how many rows of images are drawn while training.
    """

    steps: int = 120
    lora_rank: int = 8
    learning_rate: float = 2e-3
    num_kept: int = 128
    prior_batch: int = 16
    decoder_batch: int = 4
    seed: int = 0
    previews: int = 4


@dataclass
class Examples:
    """Images as both models learn them: token ids (n, K), latents (n, C, h, w), captions."""

    token_ids: Tensor
    latents: Tensor
    captions: list[str]

    def pick(self, count: int, draw: random.Random) -> tuple[Tensor, Tensor, list[str]]:
        """Draw some of them, each equally often if there are enough draws."""
        rows = draw_evenly(len(self.captions), count, draw)
        return self.token_ids[rows], self.latents[rows], [self.captions[row] for row in rows]


def draw_evenly(number: int, count: int, draw: random.Random) -> list[int]:
    """Draw `count` indices of `number` things: all of them in a random order, then again in another."""
    rounds = math.ceil(count / number)
    return [index for _ in range(rounds) for index in draw.sample(range(number), number)][:count]


def personalize(
    pipe: FlexTokPipeline,
    own: PersonalImages,
    name: str,
    folder: Path,
    options: PersonalizeOptions,
    is_quiet: bool = False,
) -> int:
    """Train an adapter and save it; the first Ctrl-C ends training and keeps what was learned.

    Args:
        pipe: a pipeline with a prior that reads text, without adapters.
        own: the images.
        name: the prompt that draws them.
        folder: where the adapter, its card and previews go.
        options: how to learn.
        is_quiet: no progress bars.

    Returns:
        Steps that were done; if none was, nothing is saved.

    Raises:
        ValueError: the pipeline has no prior that reads text, or a caption means nothing to it.
    """
    check_model(pipe, name)
    pipe.set_progress_bar_config(disable=True)
    folder.mkdir(parents=True, exist_ok=True)
    devices = [pipe.device] if pipe.device.type == "cuda" else []
    pipe._reported_words.update(split_words(" ".join(own.captions)))
    with torch.random.fork_rng(devices), stop_requests() as is_asked:
        torch.manual_seed(options.seed)
        new = read_examples(pipe, own)
        kept = draw_examples(pipe, options, is_quiet, is_asked)
        trainer = Personalizer(pipe, new, kept, options)
        done = trainer.train(Previews(pipe, name, own, folder, options), is_quiet, is_asked)
    for model in (pipe.encoder, pipe.decoder, pipe.prior):
        model.eval()
    if done == 0:
        return 0
    (folder / CARD_NAME).unlink(missing_ok=True)
    notes = [f"Learned in {done} steps from {len(own.images)} images by `flextok personalize`.", *own.notes]
    pipe.save_lora_weights(folder, prompts=prompts_of(own.captions, name), notes=notes)
    return done


def check_model(pipe: FlexTokPipeline, name: str) -> None:
    """Raise a ValueError unless the model draws from prompts and can read the name."""
    if pipe.prior is None or pipe.text_encoder is None or pipe.tokenizer is None:
        raise ValueError("`model` has no prior that reads text, so a name cannot draw anything. Pass one that does.")
    if pipe.decoder.predicts_mean:
        raise ValueError(
            "`model` is distilled to few steps: its decoder cannot learn. Pass a pipeline with the one that it learned"
            " from, which is in the subfolder `flow_decoder` if the model has it."
        )
    if pipe.get_list_adapters():
        raise ValueError("`model` has adapters already. Fuse them and save it, or start from the model without them.")
    plain = set(pipe.tokenizer("", add_special_tokens=True).input_ids)
    if set(pipe.tokenizer(name).input_ids) <= plain:
        raise ValueError(f"`name` {name!r} is nothing to the model's text tokenizer. Choose words.")


@torch.no_grad()
def read_examples(pipe: FlexTokPipeline, own: PersonalImages) -> Examples:
    """Encode one's own images."""
    ids, latents = [], []
    for start in range(0, len(own.images), DRAW_BATCH):
        pixel_values = prepare_images(own.images[start : start + DRAW_BATCH], pipe.resolution).to(pipe.device)
        latents.append(encode_latents(pipe.vae, pixel_values))
        ids.append(pipe.encoder(latents[-1]).token_ids)
    return Examples(torch.cat(ids), torch.cat(latents), own.captions)


@torch.no_grad()
def draw_examples(
    pipe: FlexTokPipeline, options: PersonalizeOptions, is_quiet: bool, is_asked: Callable[[], bool]
) -> Examples | None:
    """Let the model draw what it knows: the names in its configuration, or without any, whatever comes."""
    names = getattr(pipe.prior.config, "known_names", None) or [""]
    draw = random.Random(options.seed)
    drawn_names = [names[index] for index in draw_evenly(len(names), options.num_kept, draw)]
    prompts = [f"a {name}" if name else "" for name in drawn_names]
    generator = torch.Generator().manual_seed(options.seed)
    ids, latents = [], []
    for start in tqdm(
        range(0, len(prompts), DRAW_BATCH), desc="Drawing what it knows", disable=is_quiet or None, leave=False
    ):
        if is_asked():
            break
        some = prompts[start : start + DRAW_BATCH]
        ids.append(pipe.generate_tokens(some, prior_guidance_scale=1.0, generator=generator))
        drawn = pipe.detokenize(ids[-1], KEPT_STEPS, 1.0, generator=generator, output_type="latent").images
        latents.append(drawn)
    if not ids:
        return None
    return Examples(torch.cat(ids), torch.cat(latents), prompts[: sum(map(len, ids))])


class Personalizer:
    """Trains new adapters of prior and decoder together."""

    def __init__(self, pipe: FlexTokPipeline, new: Examples, kept: Examples | None, options: PersonalizeOptions):
        self.new, self.kept, self.options = new, kept, options
        base: dict[str, Any] = {"output_dir": "", "max_train_steps": options.steps}
        start = str(pipe.config.get("_name_or_path"))
        # What is drawn without a condition stays as it is: guidance of all prompts is relative to that.
        decoding = base | {"pretrained_tokenizer": start, "freeze_encoder": True, "logit_mean": 0.5}
        decoding |= {"null_condition_probability": 0.0, "full_length_probability": 0.5}
        writing = base | {"pretrained_prior": start, "caption_column": "text", "condition_dropout_probability": 0.0}
        self.tokenizer = TokenizerForTraining(pipe.encoder, pipe.decoder, TokenizerArguments(**decoding), pipe.vae)
        self.prior = PriorForTraining(pipe.prior, pipe.text_encoder, pipe.tokenizer, pipe, PriorArguments(**writing))
        self.tokenizer.requires_grad_(False)
        self.prior.requires_grad_(False)
        for part, model in (("decoder", pipe.decoder), ("prior", pipe.prior)):
            freeze_with_adapter(model, part, [part], options.lora_rank, options.lora_rank)
        models = (self.tokenizer, self.prior)
        self.trained = [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=options.learning_rate, betas=BETAS, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)

    def rate(self, step: int) -> float:
        """Return the learning rate relative to its peak: linear warm-up, then a cosine to 0."""
        warmup = max(1, round(WARMUP * self.options.steps))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, self.options.steps - warmup))

    def train(self, previews: "Previews", is_quiet: bool, is_asked: Callable[[], bool]) -> int:
        """Train until the steps are done or the user asks to stop; return the number of steps."""
        with tqdm(total=self.options.steps, desc="Learning", disable=is_quiet or None) as progress:
            for step in range(self.options.steps):
                if is_asked():
                    return step
                if previews.is_due(step):
                    previews.draw(step)
                losses = self.train_step(step)
                progress.set_postfix({name: f"{loss:.3g}" for name, loss in losses.items()}, refresh=False)
                progress.update()
        previews.draw(self.options.steps)
        return self.options.steps

    def train_step(self, step: int) -> dict[str, float]:
        """Run one step on own images and drawn ones."""
        seed = draw_seed(self.options.seed, step)
        draw = random.Random(seed)
        self.tokenizer.train()
        self.prior.train()
        num_images, num_sequences = self.options.decoder_batch, self.options.prior_batch
        if self.kept is not None:
            num_images, num_sequences = math.ceil(num_images / 2), math.ceil(num_sequences / 2)
        token_ids, _, captions = self.new.pick(num_sequences, draw)
        _, latents, _ = self.new.pick(num_images, draw)
        rng = StepRng(seed, latents.device)
        flow_loss, _ = self.tokenizer({"latents": latents}, step, rng)
        token_loss, _ = self.prior({"token_ids": token_ids, "captions": captions}, step, rng)
        losses = {"image loss": flow_loss, "token loss": token_loss}
        loss = flow_loss + token_loss
        if self.kept is not None:
            token_ids, _, captions = self.kept.pick(num_sequences, draw)
            losses["change"] = distribution_change(self.prior, token_ids, captions, rng)
            token_ids, latents, _ = self.kept.pick(num_images, draw)
            loss = loss + KEPT_WEIGHT * (losses["change"] + velocity_change(self.tokenizer, token_ids, latents, rng))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, MAX_NORM)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {name: value.item() for name, value in losses.items()}


class Previews:
    """Draws the name now and then, always from the same noise, onto one sheet with a row per time."""

    def __init__(
        self, pipe: FlexTokPipeline, name: str, own: PersonalImages, folder: Path, options: PersonalizeOptions
    ):
        self.pipe, self.name, self.path, self.options = pipe, name, folder / PREVIEW_FILE, options
        few = [image.resize((pipe.resolution,) * 2) for image in own.images[:PREVIEW_IMAGES]]
        while len(few) < PREVIEW_IMAGES:
            few.append(few[-1])
        self.rows: list[list[Image.Image]] = [few]
        self.titles = ["some of the images"]

    def is_due(self, step: int) -> bool:
        """Whether a row is to be drawn before this step."""
        return self.options.previews > 0 and step % max(1, self.options.steps // self.options.previews) == 0

    def draw(self, step: int) -> None:
        """Add a row and write the sheet in one go, so that a viewer may keep it open."""
        if not self.options.previews:
            return
        for model in (self.pipe.decoder, self.pipe.prior):
            model.eval()
        generators = [torch.Generator().manual_seed(number) for number in range(PREVIEW_IMAGES)]
        prompts = [self.name] * PREVIEW_IMAGES
        self.rows.append(self.pipe(prompts, num_inference_steps=DRAW_STEPS, generator=generators).images)
        self.titles.append(f"{self.name!r} after {step} steps")
        save_image(contact_sheet(self.rows, [""] * PREVIEW_IMAGES, row_titles=self.titles), self.path)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed; the second time it interrupts at once."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before)
        tqdm.write("Stopping: what was learned so far is kept. Ctrl-C again discards it.")

    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread, which alone gets signals
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
