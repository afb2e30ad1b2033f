"""The stage that distills the decoder of a trained pipeline, from options to a saved pipeline."""

from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from ..data.columns import Columns
from ..pipelines.pipeline_flextok import FlexTokPipeline
from .adapters import add_adapters
from .arguments import check_shapes
from .distillation import DistillationForTraining, build_student
from .distillation_arguments import DistillationArguments
from .loop import Trainer
from .optimization import split_by_decay
from .publishing import export
from .stages import stage
from .starting_points import check_resolution, load_flow_decoder, load_whole
from .training_data import cached, load_train_data, patch_side, serve
from .validation import choose_images, held_out_batches, load_validation_data, tokenizer_validation


@stage
def train_distillation(arguments: DistillationArguments, accelerator: Accelerator) -> Path:
    """Distill the decoder of a pipeline to few steps, and save the pipeline with both decoders.

    Returns:
        The folder of the pipeline, `output_dir/pipeline`.

    Raises:
        ValueError: the decoder is distilled already, or options do not fit it.
    """
    source = load_whole("pretrained_tokenizer", arguments.pretrained_tokenizer)
    load_flow_decoder(source, arguments.pretrained_tokenizer)
    arguments = fit_arguments(arguments, source)
    student = build_student(source.decoder, arguments)
    for part in (source.decoder, source.encoder, source.vae):
        if part is not None:
            part.to(accelerator.device)
    columns = Columns(arguments.image_column)
    dataset = load_train_data(arguments, columns, patch_side(source.vae, source.encoder, student))
    held_out = load_validation_data(arguments, columns)
    if arguments.cache_latents:
        dataset = cached(dataset, source.vae, arguments)
    if arguments.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    model = DistillationForTraining(student, source.decoder, source.encoder, arguments, source.vae)
    add_adapters(arguments, accelerator, model)
    if arguments.compile:
        for block in (*student.transformer_blocks, *source.decoder.transformer_blocks, *source.encoder.blocks):
            block.compile()
    trainer = Trainer(arguments, accelerator, model, split_by_decay([model], arguments.learning_rate))
    trainer.resume()
    pipe = FlexTokPipeline.from_pipe(source, decoder=student)
    preview = tokenizer_validation(arguments, choose_images(arguments, held_out), pipe)
    batches = serve(arguments, accelerator, dataset)
    trainer.train(batches, preview, held_out_batches(arguments, held_out, accelerator))
    return export(trainer, pipe, "distillation", source.decoder)


def fit_arguments(arguments: DistillationArguments, source: FlexTokPipeline) -> DistillationArguments:
    """Check options against the pipeline to distill, and return them with what it decides filled in."""
    default = source.config.default_guidance_scale
    low, high = arguments.min_guidance_scale, arguments.max_guidance_scale
    low, high = (default, default) if low is None or high is None else (low, high)
    if not low <= default <= high:
        raise ValueError(
            f"`min_guidance_scale` ({low:g}) and `max_guidance_scale` ({high:g}) must have the model's default between"
            f" them, which is {default:g}."
        )
    check_resolution(arguments.resolution, arguments.pretrained_tokenizer, source)
    check_shapes(arguments, source.decoder.config.positions)
    return replace(arguments, resolution=source.resolution, min_guidance_scale=low, max_guidance_scale=high)
