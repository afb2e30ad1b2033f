"""The embedded model with few decoder steps, for tests of what surrounds the images: most time would go into them."""

import json
from pathlib import Path

from flextok_hf.embedded import EMBEDDED_MODEL_FOLDER


NUM_STEPS = 2


def link_quick_model(folder: Path) -> Path:
    """Fill a new folder with links to the embedded model, and a decoder whose default is `NUM_STEPS`; returns it."""
    (folder / "decoder").mkdir(parents=True)
    for path in EMBEDDED_MODEL_FOLDER.iterdir():
        if path.name != "decoder":
            (folder / path.name).symlink_to(path)
    for path in (EMBEDDED_MODEL_FOLDER / "decoder").iterdir():
        if path.name != "config.json":
            (folder / "decoder" / path.name).symlink_to(path)
    config = json.loads((EMBEDDED_MODEL_FOLDER / "decoder" / "config.json").read_text())
    settings = json.dumps({**config, "default_num_inference_steps": NUM_STEPS})
    (folder / "decoder" / "config.json").write_text(settings)
    return folder
