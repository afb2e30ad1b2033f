"""Create the figures of the README and the documentation with a model, by default the embedded one.

    python scripts/draw_figures.py

Writes into `--output` (docs/assets):

    strip.webp         prompts at 1, 4, 16, 64 tokens (as many as the model has)
    stream.webp        animation of one prompt while its tokens are generated
    prefixes.webp      images that the model was not trained on, reconstructed from more and more tokens
    first_token.webp   whole images, and decodings of their first token alone from different noise
    few_steps.webp     the decoder of few steps beside the one that it learned from, if the model has both
    influence.webp     what each register attends to, measured by perturbing patches and registers one at a time
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flextok_hf import FlexTokPipeline, embedded_model
from flextok_hf.models.latents import encode_latents
from flextok_hf.models.nested_dropout import token_ladder
from flextok_hf.pipelines.images import load_image, prepare_images, resize_and_crop
from flextok_hf.pipelines.loading import use_flow_decoder
from flextok_hf.utils.files import save_animation, save_image
from flextok_hf.utils.sheets import contact_sheet, token_count_title


STRIP_COUNTS = (1, 4, 16, 64, 256)
NUM_GUESSES = 4  # images decoded from one first token
FRAME_MS = 700


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_strip(pipe: FlexTokPipeline, prompts: list[str], seed: int) -> Image.Image:
    """Return a sheet with a row per prompt and a column per number of tokens."""
    counts = [count for count in STRIP_COUNTS if count <= pipe.num_registers]
    if len(counts) < 4:
        counts = token_ladder(pipe.num_registers)[-4:]
        counts[0] = 1
    rows = [[image for _, image in pipe.stream(prompt, counts, generator=seeded(seed))] for prompt in prompts]
    return contact_sheet(rows, [token_count_title(count) for count in counts])


def draw_prefixes(pipe: FlexTokPipeline, images: list[Path], seed: int) -> Image.Image:
    """Return a sheet with a row per image: the original, then its reconstructions."""
    photos = [load_image(path) for path in images]
    counts = token_ladder(pipe.num_registers)
    columns = pipe.reconstruct(photos, counts, generator=[seeded(seed) for _ in photos])
    originals = [resize_and_crop(photo, max(128, pipe.resolution)) for photo in photos]
    return contact_sheet(list(zip(originals, *columns)), ["original", *map(token_count_title, counts)])


def draw_first_tokens(pipe: FlexTokPipeline, prompts: list[str], seed: int) -> Image.Image:
    """Return a sheet with a row per prompt: the whole image, then its first token decoded from different noise."""
    rows = []
    for prompt in prompts:
        whole = pipe(prompt, generator=seeded(seed))
        first = whole.token_ids[:, :1].repeat(NUM_GUESSES, 1)
        guesses = pipe.detokenize(first, generator=[seeded(seed + 1 + number) for number in range(NUM_GUESSES)])
        rows.append([whole.images[0], *guesses.images])
    titles = ["all tokens", "first token"] + [""] * (NUM_GUESSES - 1)
    return contact_sheet(rows, titles)


def draw_few_steps(pipe: FlexTokPipeline, flow: FlexTokPipeline, prompts: list[str], seed: int) -> Image.Image:
    """Return a sheet with a row per decoder and number of steps: from few tokens and all, of each prompt."""
    counts = (1, 4, pipe.num_registers)
    drawn = [pipe.generate_tokens(prompt, generator=seeded(seed)) for prompt in prompts]
    rows = []
    row_titles = []
    for drawing, num_steps in [(flow, 100), (flow, 20), (flow, 4), (pipe, 4), (pipe, 2), (pipe, 1)]:
        kind = "flow decoder, two passes a step" if drawing is flow else "distilled, one pass a step"
        row_titles.append(f"{num_steps} {'step' if num_steps == 1 else 'steps'} ({kind})")
        calls = [(ids[:, :count], num_steps) for ids in drawn for count in counts]
        rows.append([drawing.detokenize(*call, generator=seeded(seed)).images[0] for call in calls])
    titles = [token_count_title(count) for count in counts] * len(prompts)
    return contact_sheet(rows, titles, row_titles=row_titles)


@torch.no_grad()
def measure_influence(pipe: FlexTokPipeline, image: Path) -> Tensor:
    """Return which registers change when one input is perturbed, (K, N + K) boolean: patches first, then registers."""
    encoder = pipe.encoder
    latents = encode_latents(pipe.vae, prepare_images(load_image(image), pipe.resolution))
    num_registers, size = encoder.config.num_registers, encoder.config.patch_size

    def features(latents: Tensor) -> Tensor:
        return encoder(latents).features[0]  # (K, Q)

    before = features(latents)
    changed = []
    for top in range(0, latents.shape[2], size):
        for left in range(0, latents.shape[3], size):
            perturbed = latents.clone()
            perturbed[:, :, top : top + size, left : left + size] += 3.0
            changed.append((features(perturbed) - before).abs().amax(dim=1) > 1e-5)
    learned = encoder.register_tokens.clone()
    push = torch.randn(learned.shape[-1], generator=seeded(0))  # not a constant, which layer norm would cancel
    for register in range(num_registers):
        encoder.register_tokens[register] += push
        changed.append((features(latents) - before).abs().amax(dim=1) > 1e-5)
        encoder.register_tokens.copy_(learned)
    return torch.stack(changed, dim=1)


def draw_influence(influence: Tensor, width: int = 720) -> Image.Image:
    """Return the measured pattern as an image: a row per register, dark where it depends on the input."""
    cell = width // influence.shape[1]
    num_registers = influence.shape[0]
    shades = torch.where(influence, 70, 235).byte()
    gap = torch.full((num_registers, 2), 255, dtype=torch.uint8)
    num_patches = influence.shape[1] - num_registers
    pattern = torch.cat([shades[:, :num_patches], gap, shades[:, num_patches:]], dim=1)
    image = Image.fromarray(pattern.numpy())
    return image.resize((image.width * cell, image.height * cell), Image.Resampling.NEAREST).convert("RGB")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub id (default: the embedded model)")
    parser.add_argument("--output", type=Path, default=Path("docs/assets"), help="folder for the figures")
    parser.add_argument("--prompts", nargs="+", default=["a cat", "a red apple", "a 3d rocket"], help="prompts")
    parser.add_argument("--images", type=Path, nargs="+", help="images to reconstruct (default: those in docs/assets)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same figures")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    assets = Path(__file__).parents[1] / "docs" / "assets"
    images = options.images or [*sorted((assets / "held_out").glob("*.png")), assets / "parrots.jpg"]
    model = options.model or embedded_model()
    pipe = FlexTokPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    figures = {
        "strip": draw_strip(pipe, options.prompts, options.seed),
        "prefixes": draw_prefixes(pipe, images, options.seed),
        "first_token": draw_first_tokens(pipe, options.prompts, options.seed),
        "influence": draw_influence(measure_influence(pipe, images[0])),
    }
    if pipe.decoder.predicts_mean:
        flow = FlexTokPipeline.from_pipe(pipe)
        use_flow_decoder(flow, model)
        flow.set_progress_bar_config(disable=True)
        figures["few_steps"] = draw_few_steps(pipe, flow, options.prompts[:2], options.seed)
    for name, figure in figures.items():
        save_image(figure, options.output / f"{name}.webp")
    frames = [image for _, image in pipe.stream(options.prompts[0], generator=seeded(options.seed))]
    save_animation(frames, options.output / "stream.webp", FRAME_MS)
    for name in (*figures, "stream"):
        path = options.output / f"{name}.webp"
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
