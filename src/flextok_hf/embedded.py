"""Model lookup: the small trained model that ships with the package, folders, Hub ids."""

from pathlib import Path


OFFICIAL_OWNER = "EPFL-VILAB"
OFFICIAL_TOKENIZERS = {
    "flextok_d12_d12_in1k": "342 M",
    "flextok_d18_d18_in1k": "950 M",
    "flextok_d18_d28_in1k": "2.5 B",
    "flextok_d18_d28_dfn": "2.5 B",
}
OFFICIAL_PRIORS = {
    "FlexAR-113M-T2I": "218 M",
    "FlexAR-382M-T2I": "537 M",
    "FlexAR-1B-T2I": "1.4 B",
    "FlexAR-3B-T2I": "3.4 B",
    "FlexAR-1B-C2I": "unknown",
    "GridAR-3B-T2I": "3.4 B",
}
EMBEDDED_MODEL_FOLDER = Path(__file__).parent / "embedded_model"


def embedded_model() -> str:
    """Return the folder of the embedded model, in Diffusers layout, for `FlexTokPipeline.from_pretrained`.

    Raises:
        FileNotFoundError: if the folder is incomplete, for example in a checkout or wheel without the weights.
    """
    if not (EMBEDDED_MODEL_FOLDER / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the embedded model is missing: no `model_index.json` in {EMBEDDED_MODEL_FOLDER}."
            " Reinstall flextok_hf, or pass another model (a folder or a Hub id)."
        )
    return str(EMBEDDED_MODEL_FOLDER)


def list_models() -> list[dict[str, str]]:
    """Return the models that are known by name: the embedded one, and the official ones on the Hub.

    The official files have not been tried yet; their format is tested. Priors come with a tokenizer, whose license
    applies to them as well: docs/migration.md.

    Returns:
        For each a `name`, `parameters` (without text encoders of official priors), `license`, and the `call` that
        loads it.
    """
    start, owner = "FlexTokPipeline.from_", OFFICIAL_OWNER
    models = [("embedded", "15.4 M", "Apache-2.0", f"{start}pretrained(embedded_model())")]
    for name, size in OFFICIAL_TOKENIZERS.items():
        models.append((f"{owner}/{name}", size, "Apple, research only", f'{start}original("{owner}/{name}")'))
    for name, size in OFFICIAL_PRIORS.items():
        call = f"flextok convert --prior {owner}/{name} --output FOLDER"
        if name.endswith("T2I") and name.startswith("Flex"):
            call = f'{start}original("{owner}/flextok_d18_d28_dfn", prior="{owner}/{name}")'
        models.append((f"{owner}/{name}", size, "Apache-2.0, its tokenizer: research only", call))
    return [dict(zip(("name", "parameters", "license", "call"), model)) for model in models]


def is_official(name: object) -> bool:
    """Return whether a name is the Hub id of an official checkpoint, which has a format of its own."""
    owner, _, model = str(name).partition("/")
    return owner == OFFICIAL_OWNER and model in OFFICIAL_TOKENIZERS | OFFICIAL_PRIORS and not Path(str(name)).is_dir()


def resolve_model(name: str | None) -> str:
    """Resolve a model name to a folder or Hub id for `FlexTokPipeline.from_pretrained`.

    Args:
        name: folder of a saved pipeline or Hub id of the form owner/name; the embedded model by default.

    Raises:
        ValueError: if `name` is neither a folder with a saved pipeline nor a Hub id.
    """
    if name is None:
        return embedded_model()
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"`model` {name!r} has no `model_index.json`; pass the folder of a saved pipeline")
        return str(folder)
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"`model` {name!r} is neither a folder nor a Hub id of the form owner/name")
    return name
