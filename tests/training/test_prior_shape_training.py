"""Training a prior that is told the shape of the images: from images, latents, and token ids with sizes."""

import datasets
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_models import CODEBOOK_SIZE, NUM_REGISTERS, make_decoder, make_encoder, make_prior

from flextok_hf import FlexTokPipeline
from flextok_hf.data.batches import build_dataloader
from flextok_hf.data.columns import Columns
from flextok_hf.data.samples import ImageTransform
from flextok_hf.data.training_dataset import load_training_dataset
from flextok_hf.models.patches import features_of_sizes
from flextok_hf.training.arguments import PriorArguments
from flextok_hf.training.prior import PriorForTraining
from flextok_hf.training.stages import train_prior
from flextok_hf.training.step_rng import StepRng


SIZES = [(16, 16), (8, 32), (32, 8)]
REST = [5, 5, 5, 5, 5]
COLUMNS = Columns(
    class_label="label",
    token_ids="token_ids",
    num_classes=3,
    num_tokens=NUM_REGISTERS,
    codebook_size=CODEBOOK_SIZE,
    reads_sizes=True,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer():
    parts = make_encoder(positions="stretch"), make_decoder(positions="stretch"), FlowMatchEulerDiscreteScheduler()
    return FlexTokPipeline(*parts)


def write_ids(path, **changes):
    """Write 12 rows of token ids whose first token tells the shape; `None` leaves out a column."""
    number = list(range(12))
    rows = {
        "token_ids": [[[row % 3, *REST]] for row in number],
        "label": [0] * 12,
        "height": [SIZES[row % 3][0] for row in number],
        "width": [SIZES[row % 3][1] for row in number],
        **changes,
    }
    kinds = {"width": datasets.Value("string" if "16" in rows["width"] else "int32")}
    rows = datasets.Dataset.from_dict({name: values for name, values in rows.items() if values is not None})
    rows.cast_column("width", kinds["width"]).to_parquet(str(path))
    return str(path)


@pytest.mark.parametrize("kind", ["images", "latents", "token ids"])
def test_the_prior_is_told_the_shapes_of_a_batch(tokenizer, kind):
    options = {"class_column": "label", "shape_conditioning": True, "token_column": "token_ids"}
    prior = make_prior(text_hidden_size=None, num_classes=3, shape_conditioning=True)
    torch.nn.init.normal_(prior.shape_proj.weight, generator=torch.Generator().manual_seed(0))
    arguments = PriorArguments(output_dir="x", tokenizer="x", **options)
    model = PriorForTraining(prior, None, None, tokenizer, arguments).eval()
    labels, sizes = torch.tensor([0, 1]), torch.tensor([[8, 12], [8, 12]])
    if kind == "token ids":
        ids, sizes = torch.tensor([[1, *REST], [2, *REST]]), torch.tensor([[8, 12], [16, 16]])
        batch = {"token_ids": ids, "sizes": sizes}
    else:
        pixel_values = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
        ids = tokenizer.tokenize_pixels(pixel_values)
        batch = {"pixel_values" if kind == "images" else "latents": pixel_values}  # the same without a VAE
    inputs, features = prior.prepend_bos(ids), features_of_sizes(sizes, 16)
    with torch.no_grad():
        loss = model({**batch, "class_labels": labels}, 0, StepRng(0))[0]
        expected = prior(inputs, labels=inputs, class_labels=labels, shape_features=features).loss
        assert loss.equal(expected) and not loss.equal(prior(inputs, labels=inputs, class_labels=labels).loss)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_prior_learns_the_shape_from_token_ids_with_sizes(tmp_path, tokenizer, streaming):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = PriorArguments(
        output_dir=str(tmp_path / "run"),
        tokenizer=str(tmp_path / "tokenizer"),
        train_data=[write_ids(tmp_path / "ids.parquet")],
        streaming=streaming,
        token_column="token_ids",
        class_column="label",
        num_classes=1,
        shape_conditioning=True,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        max_train_steps=80,
        train_batch_size=12,
        learning_rate=2e-2,
        lr_warmup_steps=5,
        ema_decay=0.0,
        validation_steps=0,
    )
    pipe = FlexTokPipeline.from_pretrained(train_prior(arguments))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.prior.config.shape_conditioning
    for first, (height, width) in enumerate(SIZES):
        options = {"class_labels": 0, "top_k": 1, "prior_guidance_scale": 1.0}
        assert pipe.generate_tokens(**options, height=height, width=width).tolist() == [[first, *REST]]


def test_batches_of_token_ids_carry_the_sizes_of_their_rows(tmp_path):
    path = write_ids(tmp_path / "ids.parquet")
    dataset = load_training_dataset(path, transform=ImageTransform(16), columns=COLUMNS)
    for batch in build_dataloader(dataset, 4, seed=0):
        assert batch["sizes"].tolist() == [list(SIZES[first]) for first in batch["token_ids"][:, 0].tolist()]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"height": None}, "`shape_conditioning` needs the size of the image .* no column 'height' of whole numbers"),
        ({"width": ["16"] * 12}, "`shape_conditioning` needs the size of the image .* no column 'width' of whole"),
        ({"width": [None] * 12}, r"its height and width are \[\d+, None\], not a size"),
        ({"height": [0] * 12}, r"its height and width are \[0, \d+\], not a size"),
    ],
)
def test_token_ids_without_sizes_are_refused(tmp_path, changes, message):
    path = write_ids(tmp_path / "ids.parquet", **changes)
    with pytest.raises(Exception, match=message):
        dataset = load_training_dataset(path, transform=ImageTransform(16), columns=COLUMNS, fail_on_unreadable=True)
        dataset[0]
