"""Training on images of all proportions and other sizes: exact resuming, what the log says, and what is refused."""

import json
from dataclasses import replace

import datasets
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from image_rows import png
from tiny_models import make_decoder, make_encoder
from training_processes import SMALL_TOKENIZER, assert_same_state, errors, run

from flextok_hf.pipelines.images import prepare_each
from flextok_hf.pipelines.pipeline_flextok import FlexTokPipeline
from flextok_hf.training.arguments import PriorArguments, TokenizerArguments, VaeArguments
from flextok_hf.training.loop import Trainer
from flextok_hf.training.stages import train_prior, train_tokenizer, train_vae
from flextok_hf.training.starting_points import load_tokenizer
from flextok_hf.utils.measures import peak_signal_to_noise


SIZES = ((16, 16), (40, 20), (20, 40))  # width, height
STRETCH = {"positions": "stretch", "shape_conditioning": True}
SCHEDULE = {"max_train_steps": 6, "lr_warmup_steps": 2, "ema_decay": 0.9, "checkpointing_steps": 3, "logging_steps": 1}
DATA = {"resolution": 16, "train_batch_size": 2, "validation_steps": 0, "random_flip": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """30 images of three proportions, as a parquet file."""
    path = tmp_path_factory.mktemp("data") / "train.parquet"
    rows = {
        "image": [{"bytes": png(row, SIZES[row % 3]), "path": None} for row in range(30)],
        "text": ["a square", "a wide image", "a tall image"] * 10,
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features).to_parquet(str(path))
    return str(path)


def arguments_for(folder, data, kind=TokenizerArguments, **changes):
    sizes = {**SMALL_TOKENIZER, **STRETCH} if kind is TokenizerArguments else {}
    options = {**DATA, **SCHEDULE, **sizes, "train_data": [data], **changes}
    return kind(output_dir=str(folder), **options)


def curve(folder, *names):
    return [[json.loads(line)[name] for name in names] for line in (folder / "log.jsonl").read_text().splitlines()]


def recorded_shapes(monkeypatch):
    """Let the trainer record the shapes of its batches."""
    shapes, train_step = [], Trainer.train_step

    def record(trainer, micro_batches):
        def seen():
            for batch in micro_batches:
                shapes.append(tuple(batch["pixel_values"].shape[2:]))
                yield batch

        train_step(trainer, seen())

    monkeypatch.setattr(Trainer, "train_step", record)
    return shapes


# Resuming


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_in_memory": True}, {"streaming": True, "shuffle_buffer": 5, "dataloader_num_workers": 1}],
    ids=["rows", "cached", "stream"],
)
def test_a_run_in_buckets_resumes_to_bitwise_the_same_result(tmp_path, data, options, num_processes):
    options = {"buckets": True, "gradient_accumulation_steps": 2, **options}
    whole = arguments_for(tmp_path / "whole", data, **options)
    stopped = replace(whole, output_dir=str(tmp_path / "stopped"))
    assert run(lambda: train_tokenizer(whole), tmp_path / "whole", num_processes) == [0] * num_processes, errors(
        tmp_path / "whole"
    )

    def train_half():
        train_step = Trainer.train_step

        def step(trainer, micro_batches):
            if trainer.step == 4:
                raise KeyboardInterrupt
            train_step(trainer, micro_batches)

        Trainer.train_step = step  # runs in a separate process
        train_tokenizer(stopped)

    assert run(train_half, tmp_path / "stopped", num_processes) == [1] * num_processes
    resumed = replace(stopped, resume_from_checkpoint="latest")
    assert run(lambda: train_tokenizer(resumed), tmp_path / "stopped", num_processes) == [0] * num_processes
    assert_same_state(tmp_path / "whole" / "checkpoint-6", tmp_path / "stopped" / "checkpoint-6")
    names = ("step", "loss", "grad_norm")
    assert curve(tmp_path / "whole", *names) == curve(tmp_path / "stopped", *names)


def test_two_processes_in_buckets_have_the_loss_curve_of_one(tmp_path, data):
    one = arguments_for(tmp_path / "one", data, buckets=True, train_batch_size=4)
    two = replace(one, output_dir=str(tmp_path / "two"), train_batch_size=2)
    assert run(lambda: train_tokenizer(one), tmp_path / "one") == [0]
    assert run(lambda: train_tokenizer(two), tmp_path / "two", 2) == [0, 0], errors(tmp_path / "two")
    losses = [torch.tensor(curve(tmp_path / name, "loss")) for name in ("one", "two")]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)


# Shapes


def test_batches_have_all_shapes_and_the_log_counts_their_rows(tmp_path, data, monkeypatch, caplog):
    caplog.set_level("INFO")
    shapes = recorded_shapes(monkeypatch)
    train_tokenizer(arguments_for(tmp_path, data, buckets=True, max_train_steps=10, train_batch_size=4))
    messages = [record.getMessage() for record in caplog.records]
    found = set(shapes)
    assert len(found) == 3 and (16, 16) in found
    for height, width in found:
        assert f"{height} x {width}: 10 rows" in messages
    pipe = FlexTokPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.encoder.config.positions == pipe.decoder.config.positions == "stretch"
    assert pipe.encoder.shape_proj.weight.any() and pipe.decoder.shape_proj.weight.any()


def test_a_bucket_without_a_full_batch_is_a_warning(tmp_path, data, caplog):
    arguments = arguments_for(tmp_path, data, buckets=True, max_train_samples=16, train_batch_size=6)
    train_tokenizer(replace(arguments, max_train_steps=1))
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sum("5 rows, fewer than the 6 of a batch: they are never used" in message for message in messages) == 2


@pytest.mark.parametrize("max_area, side", [(24 * 24, 24), (32 * 32, 32), (700, 24), (64, 8)])
def test_another_area_trains_squares_of_it(tmp_path, data, monkeypatch, max_area, side):
    shapes = recorded_shapes(monkeypatch)
    train_tokenizer(arguments_for(tmp_path, data, max_area=max_area, max_train_steps=2))
    assert set(shapes) == {(side, side)}


def test_buckets_and_a_larger_area_go_together(tmp_path, data, monkeypatch):
    shapes = recorded_shapes(monkeypatch)
    train_tokenizer(arguments_for(tmp_path, data, buckets=True, max_area=32 * 32, max_train_steps=8))
    assert (32, 32) in shapes and len(set(shapes)) == 3
    assert all(0.85 * 32 * 32 <= height * width <= 32 * 32 for height, width in shapes)


def test_a_tokenizer_of_squares_is_fine_tuned_to_other_shapes(tmp_path, data):
    squares = {"positions": "crop", "shape_conditioning": False}
    train_tokenizer(arguments_for(tmp_path / "squares", data, max_train_steps=2, **squares))
    source = str(tmp_path / "squares" / "pipeline")
    options = {"pretrained_tokenizer": source, "buckets": True, "max_area": 24 * 24, "max_train_steps": 4}
    arguments = arguments_for(tmp_path / "shapes", data, **options)
    before, (pipe, _) = FlexTokPipeline.from_pretrained(source), load_tokenizer(arguments, None)
    encoder, decoder = pipe.encoder, pipe.decoder
    images, codes = torch.rand(2, 3, 16, 16) * 2 - 1, torch.zeros(2, 4, 2)
    with torch.no_grad():
        assert encoder.eval()(images).features.equal(before.encoder(images).features)
        velocities = [model.eval()(images, torch.tensor([0.5, 0.9]), codes) for model in (decoder, before.decoder)]
    assert velocities[0].velocity.equal(velocities[1].velocity)

    train_tokenizer(arguments)
    tuned = FlexTokPipeline.from_pretrained(tmp_path / "shapes" / "pipeline")
    assert tuned.decoder.config.positions == "stretch" and tuned.decoder.shape_proj.weight.any()
    assert json.loads((tmp_path / "shapes" / "arguments.json").read_text())["positions"] == "stretch"
    options["pretrained_tokenizer"] = str(tmp_path / "shapes" / "pipeline")
    again = arguments_for(tmp_path / "again", data, **{**options, **squares})  # the defaults: the model knows better
    assert load_tokenizer(again, None)[0].decoder.config.positions == "stretch"


def test_a_tokenizer_saved_without_the_settings_of_shapes_is_prepared_as_well(tmp_path, data):
    parts = make_encoder(), make_decoder(), FlowMatchEulerDiscreteScheduler()
    FlexTokPipeline(*parts, default_guidance_scale=3.0).save_pretrained(tmp_path)
    for part in ("encoder", "decoder"):
        path = tmp_path / part / "config.json"
        config = json.loads(path.read_text())
        removed = {name: config.pop(name, None) for name in STRETCH}
        assert removed["positions"] == "crop"
        path.write_text(json.dumps(config))
    options = {"pretrained_tokenizer": str(tmp_path), "buckets": True, "num_registers": None}
    pipe, _ = load_tokenizer(arguments_for("x", data, **options), None)
    for model in (pipe.encoder, pipe.decoder):
        assert model.config.positions == "stretch" and model.config.shape_conditioning is True
        assert not model.shape_proj.weight.any()
    assert pipe.decoder.config.default_guidance_scale == 3.0


def test_the_vae_and_cached_latents_train_in_buckets(tmp_path, data, monkeypatch):
    shapes = recorded_shapes(monkeypatch)
    small = {"block_out_channels": [8, 8], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
    vae = train_vae(arguments_for(tmp_path / "vae", data, VaeArguments, buckets=True, **small))
    assert len(set(shapes)) == 3 and all(height % 2 == width % 2 == 0 for height, width in shapes)
    monkeypatch.undo()
    patches = {"encoder_patch_size": 2, "decoder_patch_size": 2}
    cached = {"vae": str(vae), "cache_latents": True, "buckets": True, "max_train_steps": 8, **patches}
    whole = arguments_for(tmp_path / "whole", data, **cached)
    train_tokenizer(whole)
    stopped = replace(whole, output_dir=str(tmp_path / "stopped"), resume_from_checkpoint="latest")
    (tmp_path / "stopped").mkdir()
    (tmp_path / "whole" / "checkpoint-6").rename(tmp_path / "stopped" / "checkpoint-6")
    train_tokenizer(stopped)
    assert_same_state(tmp_path / "whole" / "checkpoint-8", tmp_path / "stopped" / "checkpoint-8")


def test_a_prior_trains_on_the_tokens_of_all_shapes(tmp_path, data, monkeypatch):
    tokenizer = train_tokenizer(arguments_for(tmp_path / "tokenizer", data, buckets=True, max_train_steps=2))
    shapes = recorded_shapes(monkeypatch)
    small = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "text_hidden_size": 32, "text_num_layers": 1}
    options = {"tokenizer": str(tokenizer), "caption_column": "text", "text_vocab_size": 300, "random_flip": False}
    options |= {"buckets": True, "shape_conditioning": True, **small}
    train_prior(arguments_for(tmp_path / "prior", data, PriorArguments, **options))
    assert len(set(shapes)) == 3
    prior = FlexTokPipeline.from_pretrained(tmp_path / "prior" / "pipeline").prior
    assert prior.config.shape_conditioning and prior.shape_proj.weight.any()


def test_validation_measures_wide_and_tall_crops_too(tmp_path, data):
    options = {"validation_data": [data], "validation_steps": 3, "num_validation_images": 3, "max_train_steps": 3}
    train_tokenizer(arguments_for(tmp_path / "run", data, buckets=True, **options))
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    measured = {name for name in last if name.startswith("psnr")}
    assert measured == {"psnr_1", "psnr_2", "psnr_4", "psnr_4_12x20", "psnr_4_20x12"}
    pipe = FlexTokPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    rows = datasets.load_dataset("parquet", data_files=data, split="train", cache_dir=str(tmp_path))
    photos = [rows[row]["image"] for row in (0, 10, 20)]
    for size in ((12, 20), (20, 12)):
        crops = torch.cat(prepare_each(photos, lambda *_: size, torch.device("cpu"))).view(3, 3, *size) / 2 + 0.5
        generator = torch.Generator().manual_seed(0)
        settings = {"num_inference_steps": 12, "guidance_scale": 1.0, "output_type": "pt", "generator": generator}
        (images,) = pipe.reconstruct(crops, [4], size=size, **settings)
        expected = peak_signal_to_noise(images, crops).mean().item()
        assert last[f"psnr_4_{size[0]}x{size[1]}"] == pytest.approx(expected, abs=1e-3)


def test_without_buckets_only_squares_are_measured(tmp_path, data):
    options = {"validation_data": [data], "validation_steps": 2, "num_validation_images": 2, "max_train_steps": 2}
    train_tokenizer(arguments_for(tmp_path, data, **options))
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert {name for name in last if name.startswith("psnr")} == {"psnr_1", "psnr_2", "psnr_4"}


# Refusals


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (TokenizerArguments, {"buckets": True}, '`buckets` needs a tokenizer for any shape, .* "crop"'),
        (TokenizerArguments, {"max_area": 512}, '`max_area` needs a tokenizer for any shape, .* "crop"'),
        (TokenizerArguments, {"positions": "free"}, "`positions` must be one of crop, stretch, got 'free'"),
        (TokenizerArguments, {"shape_conditioning": True}, '`shape_conditioning` is True, but `positions` is "crop"'),
        (TokenizerArguments, {"positions": "stretch", "token_layout": "grid"}, '"stretch" needs `token_layout`'),
        (
            TokenizerArguments,
            {"positions": "stretch", "buckets": True, "repa_network": "x"},
            "`repa_network` needs squares of `resolution`: drop it, or `buckets` and `max_area`",
        ),
        (VaeArguments, {"max_area": 16**3 + 1}, "`max_area` must be at most 16 times .* 4096, got 4097"),
        (VaeArguments, {"max_area": 0}, "`max_area` must be 1 or more, got 0"),
        (VaeArguments, {"buckets": True, "train_data": ["synthetic"]}, "`buckets` needs images of other shapes"),
        (PriorArguments, {"buckets": True, "token_column": "ids"}, "`buckets` applies to images, but `token_column`"),
        (PriorArguments, {"max_area": 64, "token_column": "ids"}, "`max_area` applies to images, but `token_column`"),
        (PriorArguments, {"shape_conditioning": True}, "`shape_conditioning` learns nothing from squares"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(kind, options, message):
    prior = {"tokenizer": "y", "caption_column": "text"} if kind is PriorArguments else {}
    with pytest.raises(ValueError, match=message):
        kind(output_dir="x", **{"resolution": 16, "train_data": ["photos"], **prior, **options})


def test_a_pretrained_tokenizer_of_squares_is_refused_until_it_is_asked_for_shapes(tmp_path, data):
    squares = {"positions": "crop", "shape_conditioning": False}
    source = str(train_tokenizer(arguments_for(tmp_path / "squares", data, max_train_steps=1, **squares)))
    for options in ({"buckets": True}, {"max_area": 400}):
        arguments = arguments_for(tmp_path / "x", data, **squares, pretrained_tokenizer=source, **options)
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` needs a tokenizer for any shape"):
            load_tokenizer(arguments, None)
    prior = {"tokenizer": source, "caption_column": "text", "random_flip": False}
    for options in ({"buckets": True}, {"shape_conditioning": True, "token_column": "text"}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` needs a tokenizer for any shape"):
            train_prior(arguments_for(tmp_path / "prior", data, PriorArguments, **prior, **options))


def test_an_area_below_one_patch_is_refused(tmp_path, data):
    with pytest.raises(ValueError, match="`max_area` is 15, but sides are multiples of 4 pixels: set 16 or more"):
        train_tokenizer(arguments_for(tmp_path, data, max_area=15))
