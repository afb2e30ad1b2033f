"""What a prior was trained on, as far as it is recorded, to show to users."""

from ..models.modeling_prior import FlexTokPriorForCausalLM


def known_names(prior: FlexTokPriorForCausalLM | None) -> dict[str, list[str]]:
    """Return the lists that there are: `classes`; `names`, short prompts; `other_words`, the most frequent first."""
    known: dict[str, list[str]] = {}
    if prior is None:
        return known
    config = prior.config
    if config.num_classes is not None:
        labels = config.id2label if len(config.id2label) == config.num_classes else {}
        classes = [str(labels.get(number, number)) for number in range(config.num_classes)]
        # class names come with a model and are not checked: control characters could take over a terminal
        known["classes"] = [name if name.isprintable() else ascii(name) for name in classes]
    if config.known_words is not None:
        names = config.known_names or []
        in_names = {word for name in names for word in name.split()}
        known |= {"names": names, "other_words": [word for word in config.known_words if word not in in_names]}
    return known
