"""Model lookup: the small trained model that ships with the package, folders, Hub ids."""

from pathlib import Path


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
