"""Loading of saved weights: all of them, or an error."""

from safetensors import SafetensorError


class WholeWeightsMixin:
    """Makes `from_pretrained` refuse damaged or incomplete weights; must precede the library's base class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a model from a folder or the Hub as its library does, but never with missing weights.

        The libraries only warn about them: Transformers initializes them randomly, Diffusers not at all. Pickle files
        (`.bin`) are read with `use_safetensors=False` only.

        Raises:
            ValueError: if the file lacks weights of this model.
            OSError: if there is no weight file, or it cannot be read.
        """
        kwargs.setdefault("use_safetensors", True)  # pickle files can run code: only on request
        with_report = kwargs.pop("output_loading_info", False)
        source = f"{cls.__name__} in {str(pretrained_model_name_or_path)!r}"
        try:
            model, report = super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise OSError(
                f"The checkpoint file of {source} cannot be read ({error}). It is damaged or truncated: fetch or save"
                " it again."
            ) from error
        if report["missing_keys"]:
            raise ValueError(
                f"The checkpoint file of {source} lacks weights: {', '.join(sorted(report['missing_keys']))}. Fetch or"
                " save it again, and check that its config.json matches these weights."
            )
        return (model, report) if with_report else model
