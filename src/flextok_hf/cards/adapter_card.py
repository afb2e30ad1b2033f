"""The card of an adapter: what it adapts, whether token ids change, and how to load it."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..utils.tables import markdown_table


CARD_NAME = "README.md"


def adapter_card(facts: Mapping[str, Any], adapter: Mapping[str, Any], notes: Sequence[str] = ()) -> str:
    """Write the card of an adapter.

    Args:
        facts: `base_model`, `changes_token_ids`, and `prompts`, what it was trained to draw.
        adapter: for each part, something with `ranks` and `tensors`.
        notes: further sentences.
    """
    prompts = facts["prompts"]
    base = facts["base_model"] or "not recorded"
    rows = [
        [part, str(len(own.ranks)), describe(own.ranks.values()), f"{sum(t.numel() for t in own.tensors.values()):,}"]
        for part, own in adapter.items()
    ]
    ids = "Token ids change: it adapts the encoder. Tokenize again what you stored, and use a prior for the new ids."
    if not facts["changes_token_ids"]:
        ids = "Token ids stay the same, bit for bit: it does not adapt the encoder."
    example = prompts[0] if prompts else "a cat"
    lines = [
        "---",
        "library_name: flextok_hf",
        "tags:",
        "- flextok",
        "- lora",
        "---",
        "",
        "# Adapter (LoRA) of a FlexTok model",
        "",
        f"Base model: {base}. {ids}",
        "",
        *([f"Trained for: {', '.join(f'`{prompt}`' for prompt in prompts)}.", ""] if prompts else []),
        *([" ".join(notes), ""] if notes else []),
        "```python",
        'pipe.load_lora_weights("this folder or repository")',
        f"image = pipe({example!r}).images[0]",
        "```",
        "",
        markdown_table(["part", "layers", "rank", "weights"], rows),
    ]
    return "\n".join(lines).rstrip() + "\n"


def describe(ranks: Any) -> str:
    """Return a rank, or the smallest and the largest one."""
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}"
