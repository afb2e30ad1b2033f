"""A model card for a freshly trained model, made from its own record and log."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


PIPELINE_TAGS = {"vae": "image-to-image", "tokenizer": "image-to-image", "prior": "text-to-image"}
USAGE = {
    "vae": 'vae = AutoencoderKL.from_pretrained("{name}")',
    "tokenizer": 'pipe = FlexTokPipeline.from_pretrained("{name}")\ntoken_ids = pipe.tokenize(picture)',
    "prior": 'pipe = FlexTokPipeline.from_pretrained("{name}")\nimage = pipe({condition}, max_tokens=16).images[0]',
}
IMPORTS = {"vae": "from diffusers import AutoencoderKL"}
TEMPLATE = """---
{metadata}
---

# {name}

{what}, trained with [flextok_hf](https://arxiv.org/abs/2502.13967) on {data}.

```python
{imports}

{usage}
```

## Training

{steps:,} steps of {batch:,} pictures at {resolution} pixels, seed {seed}. The options are in `training.json`.

Last entries of the log:

{figures}

No license is stated here: that of the data decides, and so do you.
"""


def write_card(folder: Path, name: str, log: list[dict[str, Any]]) -> None:
    """Write `README.md` for a saved model.

    Args:
        folder: the model with its `training.json`.
        name: what to call it.
        log: entries of the log of its training.
    """
    record = json.loads((folder / "training.json").read_text())
    arguments, stage = record["arguments"], record["stage"]
    condition = "class_labels=[0]" if arguments.get("class_column") else '"a prompt"'
    latest: dict[str, Any] = {}
    for entry in log:
        latest |= entry
    rows = [f"| {key} | {value:.6g} |" for key, value in latest.items()]
    metadata = ModelCardData(
        library_name="diffusers" if stage == "vae" else "flextok_hf",
        pipeline_tag=PIPELINE_TAGS[stage],
        tags=["flextok", "image-tokenizer", "arxiv:2502.13967"],
    )
    what = {"vae": "A VAE for FlexTok", "tokenizer": "A FlexTok image tokenizer", "prior": "A FlexTok model"}[stage]
    card = TEMPLATE.format(
        metadata=metadata.to_yaml(),
        name=name,
        what=what,
        data=", ".join(Path(source).name for source in arguments["train_data"]),
        imports=IMPORTS.get(stage, "from flextok_hf import FlexTokPipeline"),
        usage=USAGE[stage].format(name=name, condition=condition),
        steps=record["steps"],
        batch=record["images_per_step"],
        resolution=record["resolution"],
        seed=arguments["seed"],
        figures="\n".join(["| figure | value |", "| --- | --- |", *rows]),
    )
    ModelCard(card)  # refuses a card whose metadata cannot be read
    (folder / "README.md").write_text(card)
