"""Write the model card of the embedded model from its own configuration and from result files, never by hand.

    python scripts/write_model_card.py --model src/flextok_hf/embedded_model --results docs/results/embedded \
        --tokenizer_run runs/embedded_tokenizer --prior_run runs/embedded_prior --hardware "2 CPU cores"
"""

import argparse
import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from flextok_hf import FlexTokPipeline
from flextok_hf.outputs import write_atomically


TEMPLATE = """---
{metadata}
---

# A small FlexTok model of emoji

Draws {resolution} x {resolution} pictures from prompts such as "a cat" or "a 3d apple", with 1 to
{num_registers} tokens, and turns pictures into tokens and back. It ships inside `flextok_hf`, so that
everything can be tried without a download. The method is FlexTok (Bachmann et al., 2025, [arXiv
2502.13967](https://arxiv.org/abs/2502.13967)); none of the official weights were used.

```python
from flextok_hf import FlexTokPipeline, embedded_model

pipe = FlexTokPipeline.from_pretrained(embedded_model())
image = pipe("a cat", max_tokens=8).images[0]
```

## Model

Pixel space, no VAE; codebook of {codebook_size} (FSQ levels {levels}). Parameters: {parameters}. Stored in
half precision, loaded in float32.

## Data

{num_pictures} pictures of {num_names} names (animals, food, things) in three styles, 3d, flat and noto,
reduced to {resolution} pixels on white; {num_held_out} combinations of a name and a style were held out.
Captions are made from the names, such as "cat", "a picture of a cat", "a flat drawing of a cat"; nobody wrote
them looking at the picture.

- Noto Emoji, Google, Apache-2.0: <https://github.com/googlefonts/noto-emoji>
- Fluent Emoji, Microsoft Corporation, MIT: <https://github.com/microsoft/fluentui-emoji>
- Names and keywords: emojibase, MIT: <https://github.com/milesj/emojibase>

## Training

Two stages on {hardware}, float32, seed {seed}: tokenizer {tokenizer}; prior with its text encoder {prior}.
Recipes: `scripts/configs/embedded_tokenizer.yaml` and `scripts/configs/embedded_prior.yaml`.
The tokenizer's run was stopped after 250 steps and resumed with a schedule of 4,500 instead of 5,500 steps.

## Measured quality

Adherence: the share of pictures whose nearest neighbor among all {num_real} real pictures carries the name in
the prompt, with 95% Wilson intervals; chance is {chance}. Held out are combinations of name and style that
were never trained. The bound is the same measure on reconstructions of training pictures. Guidance is
{guidance} for the decoder, {prior_guidance} for the prior.

{adherence}

Reconstruction of the {num_held_out} held-out pictures (means; perceptual distance: 0 the same picture, 1 two
unrelated ones):

{reconstruction}

The feature space forgives blur: thumbnails of 6 x 6 pixels still find their name nine times out of ten. Look
at the pictures beside the figures. Protocol, intervals and pictures: `docs/results/embedded/` in the
repository.

## Limits and bias

It knows {num_names} names and little else: other prompts give some picture of what it knows. Pictures are
small and blurred, and a photo comes back as the nearest thing it knows. Emoji are drawings by two companies and
carry their view of what a thing looks like. For trying out and for teaching; not for anything that matters.
"""


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def share(value: dict) -> str:
    """Return `81% (78 to 84)`."""
    return f"{value['share']:.0%} ({100 * value['low']:.0f} to {100 * value['high']:.0f})"


def adherence_table(results: dict) -> str:
    """Rows are token counts, columns the sets of prompts."""
    sets = {
        "trained": "trained, with style",
        "plain": "trained, without style",
        "held_out": "held out",
        "reconstructions": "bound",
    }
    counts = list(results["trained"])
    return table(
        ["tokens", *sets.values()],
        [[count, *(share(results[key][count]["name"]) for key in sets)] for count in counts],
    )


def reconstruction_table(results: dict) -> str:
    """Rows are token counts, columns the measures."""
    measures = {"psnr_db": "PSNR (dB)", "ssim": "SSIM", "perceptual_distance": "perceptual distance"}
    rows = [[count, *(f"{value[key]['mean']:.3f}" for key in measures)] for count, value in results.items()]
    return table(["tokens", *measures.values()], rows)


def describe_run(folder: Path) -> str:
    """Say how long a stage was trained, from its options and its log."""
    arguments = json.loads((folder / "arguments.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    speeds = [entry for entry in log if "images_per_s" in entry]
    batch_size = arguments["train_batch_size"]
    seconds, last_step = 0.0, 0
    for entry in speeds:
        steps = entry["step"] - last_step
        if steps > 0:  # a resumed run repeats the steps after its checkpoint
            seconds += steps * batch_size / entry["images_per_s"]
        last_step = entry["step"]
    return f"{arguments['max_train_steps']:,} steps of {batch_size} pictures, {seconds / 60:.0f} minutes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, required=True, help="folder of the pipeline; README.md is written into it"
    )
    parser.add_argument(
        "--results", type=Path, required=True, help="folder with generation.json and reconstruction.json"
    )
    parser.add_argument("--tokenizer_run", type=Path, required=True, help="output folder of the tokenizer's training")
    parser.add_argument("--prior_run", type=Path, required=True, help="output folder of the prior's training")
    parser.add_argument("--hardware", required=True, help="what it was trained on, in words")
    options = parser.parse_args()

    pipe = FlexTokPipeline.from_pretrained(options.model)
    adherence = json.loads((options.results / "generation.json").read_text())
    reconstruction = json.loads((options.results / "reconstruction.json").read_text())
    metadata = ModelCardData(
        license="apache-2.0",
        library_name="flextok_hf",
        pipeline_tag="text-to-image",
        tags=["flextok", "image-tokenizer", "arxiv:2502.13967"],
        language="en",
    )
    card = TEMPLATE.format(
        metadata=metadata.to_yaml(),
        resolution=pipe.resolution,
        num_registers=pipe.num_registers,
        codebook_size=pipe.codebook_size,
        levels=pipe.encoder.config.fsq_levels,
        parameters=", ".join(f"{name} {count / 1e6:.1f}M" for name, count in adherence["parameters"].items()),
        num_pictures=adherence["real_pictures"] - reconstruction["count"],
        num_real=adherence["real_pictures"],
        num_names=adherence["names"],
        num_held_out=reconstruction["count"],
        chance=f"{1 / adherence['names']:.1%}",
        hardware=options.hardware,
        seed=json.loads((options.tokenizer_run / "arguments.json").read_text())["seed"],
        tokenizer=describe_run(options.tokenizer_run),
        prior=describe_run(options.prior_run),
        guidance=pipe.config.default_guidance_scale,
        prior_guidance=pipe.config.default_prior_guidance_scale,
        adherence=adherence_table(adherence["results"]),
        reconstruction=reconstruction_table(reconstruction["results"]),
    )
    ModelCard(card)  # refuses a card whose metadata cannot be read
    write_atomically(options.model / "README.md", lambda path: Path(path).write_text(card))


if __name__ == "__main__":
    main()
