"""Where models are found: the small trained one that ships inside the package, folders, Hub ids."""

from pathlib import Path


EMBEDDED_MODEL_FOLDER = Path(__file__).parent / "embedded_model"


def embedded_model() -> str:
    """Return the folder of the embedded model, in Diffusers layout, for `FlexTokPipeline.from_pretrained`.

    Raises:
        FileNotFoundError: the folder is incomplete, for instance in a checkout or wheel without the weights.
    """
    if not (EMBEDDED_MODEL_FOLDER / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the embedded model is missing: no `model_index.json` in {EMBEDDED_MODEL_FOLDER}."
            " Install flextok_hf again, or name another model (a folder or a Hub id) instead."
        )
    return str(EMBEDDED_MODEL_FOLDER)


def resolve_model(name: str | None) -> str:
    """Return what `FlexTokPipeline.from_pretrained` takes for the model that a user names.

    Args:
        name: folder of a saved pipeline or Hub id of the form owner/name; the embedded model by default.

    Raises:
        ValueError: a folder is meant, but there is none or it holds no pipeline.
    """
    if name is None:
        return embedded_model()
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"`model` {name!r} has no `model_index.json`; name the folder of a saved pipeline")
        return str(folder)
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"`model` {name!r} is neither a folder nor a Hub id of the form owner/name")
    return name
