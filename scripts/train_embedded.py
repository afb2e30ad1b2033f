r"""Train and measure the next embedded model, from source images to result files. Finished steps are skipped.

    python scripts/train_embedded.py --emoji emoji128 twemoji128 --clipart clipart128 --photos caltech101_128 \
        --photo_eval photo_eval

The design is in docs/log.md, the recipes are scripts/configs/embedded_256_*.yaml, the sources those of
scripts/prepare_embedded_data.py. A stage that was stopped continues from its latest checkpoint. `--toy` trains and
measures in miniature, in this process, to check that every step works; its results are meaningless.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from datasets import Dataset
from prepare_embedded_data import PHOTO, STYLES_WITHOUT_COMBINATIONS, is_chosen

from flextok_hf import embedded_model
from flextok_hf.pipelines.loading import FLOW_DECODER
from flextok_hf.utils.plain_errors import plain_errors


SCRIPTS = Path(__file__).parent
CONFIGS = SCRIPTS / "configs"
HELD_OUT_SHARE = 0.05
STAGES = ("tokenizer", "tokenizer_detail", "decoder")  # of the tokenizer, each from the one before
RECIPES = {"distill": "embedded_distill.yaml"}  # others are named embedded_256_{stage}.yaml
DISTILLATION_STEPS = 800  # what 25 minutes leave
TOKEN_SETS = ("prompts", "canvases")  # what the prior reads
COUNTS = (1, 4, 16, 64, 256)
ONE_STEP_MEAN = {"num_inference_steps": 1, "guidance_scale": 1}  # the decoder's best guess instead of a sample
RECOGNITION_AMONG = 500

TOY_SIDE = 32
TOY_TRAINING = {"resolution": TOY_SIDE, "max_train_steps": 2, "train_batch_size": 4, "lr_warmup_steps": 1}
TOY_TRAINING |= {"gradient_accumulation_steps": 1}
TOY_TRAINING |= {"dataloader_num_workers": 0, "mixed_precision": "no", "compile": "false", "validation_steps": 0}
TOY_SIZES = {
    "vae": {"block_out_channels": (16, 16), "latent_channels": 4, "random_crop": "false", "min_crop_scale": 1},
    "tokenizer": {"num_registers": 4, "encoder_hidden_size": 64, "decoder_hidden_size": 64}
    | {"encoder_num_layers": 1, "decoder_num_layers": 1, "encoder_patch_size": 8, "decoder_patch_size": 8},
    "tokenizer_detail": {"num_registers": 4},
    "decoder": {"num_registers": 4},
    "distill": {"teacher_steps": 4, "intervals_per_image": 2},
    "prior": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "text_hidden_size": 32, "text_num_layers": 1},
}
TOY_STEPS = {"max_images": 2, "token_counts": (1, 4), "step_counts": 1, "reference_steps": 2}
TOY_MEASUREMENT = {"num_inference_steps": 1, "batch_size": 4, "sheet_rows": 1}


Step = tuple[Path, Sequence[str]]  # what it writes, and its command


def flags(values: dict[str, object]) -> list[str]:
    """Return options as command line arguments; a tuple is a list of values."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", *map(str, value if isinstance(value, (tuple, list)) else [value])]
    return words


def data_steps(options: argparse.Namespace) -> Iterator[Step]:
    """Yield the preparation of all images: everything, what the prior reads, two-object canvases."""
    sources = {"emoji": options.emoji, "clipart": options.clipart, "photos": options.photos}
    common = ["--more_captions", *flags(sources | {"held_out_share": HELD_OUT_SHARE, "names": options.names})]
    common += flags({"resolution": TOY_SIDE} if options.toy else {})
    script = "prepare_embedded_data.py"
    everything, prompts, canvases = (
        options.data / name for name in ("next128", "next_prompts128", "next_canvases128")
    )
    recolored = ["--keep_proportions", *flags({"recolored_copies": 1, "output": everything})]
    yield everything / "validation.parquet", [script, *common, *recolored]
    words = [script, *common, "--everyday_only", "--max_photos", "1200", "--output", str(prompts)]
    yield prompts / "validation.parquet", words
    sizes = {"num_train": 8, "num_validation": 4, "resolution": TOY_SIDE} if options.toy else {}
    words = ["prepare_canvases.py", *flags({"data": prompts, "output": canvases} | sizes)]
    yield canvases / "validation.parquet", words


def training_steps(options: argparse.Namespace) -> Iterator[Step]:
    """Yield the training of VAE, tokenizer in three parts and prior, its default steps, and its distillation.

    The images of the prior are tokenized first.
    """
    images, canvases = (options.data / name / "train.parquet" for name in ("next128", "next_canvases128"))
    validation = options.data / "next128" / "validation.parquet"
    vae = options.output / "vae" / "vae"

    def train(stage: str, name: str, changes: dict[str, object]) -> list[str]:
        toy = TOY_TRAINING | TOY_SIZES[name] if options.toy else {}
        if name == "prior":
            toy = {key: value for key, value in toy.items() if key != "resolution"}
        config = {
            "config": CONFIGS / RECIPES.get(name, f"embedded_256_{name}.yaml"),
            "output_dir": options.output / name,
        }
        return ["train.py", stage, *flags(config | changes | toy | {"resume_from_checkpoint": "latest"})]

    yield vae, train("vae", "vae", {"train_data": (images,), "validation_data": (validation,)})
    before = None
    for name in STAGES:
        changes: dict[str, object] = {"train_data": (images, canvases), "vae": vae}
        changes |= {} if name == "decoder" else {"validation_data": (validation,)}
        changes |= {} if before is None else {"pretrained_tokenizer": before}
        before = options.output / name / "pipeline"
        yield before, train("tokenizer", name, changes)
    tokens = options.data / "next_tokens"
    for name in TOKEN_SETS:
        source = options.data / f"next_{name}128" / "train.parquet"
        values = {"train_data": source, "model": before, "caption_column": "captions", "output": tokens / name}
        values |= {"dataloader_num_workers": 0 if options.toy else 8}
        # complete when its card is written
        yield tokens / name / "README.md", ["tokenize_dataset.py", *flags(values)]
    changes = {"tokenizer": before, "train_data": (tokens,)}
    complete = options.output / "prior" / "pipeline"
    yield complete, train("prior", "prior", changes)
    steps = {"data": options.data / "next128", "model": complete, "output": options.output / "steps"}
    steps |= TOY_STEPS if options.toy else {"max_images": 64, "batch_size": 64, "token_counts": COUNTS}
    yield options.output / "steps" / "steps.json", ["evaluate.py", "steps", "--write_to_model", *flags(steps)]
    changes = {"pretrained_tokenizer": complete, "train_data": (images, canvases), "validation_data": (validation,)}
    changes |= {"max_train_steps": DISTILLATION_STEPS}
    yield options.output / "distill" / "pipeline", train("distill", "distill", changes)


def write_held_out(options: argparse.Namespace) -> None:
    """Write the held-out images on which models are compared: illustrations and photos, without those moved by hash.

    The model of today was trained on the combinations that the hash holds out, so they would favor it.
    """
    source = options.data / "next128" / "validation.parquet"
    for name in ("illustrations", "photos"):
        target = options.data / "next_held_out" / name / "validation.parquet"
        if target.exists():
            continue
        rows = Dataset.from_parquet(str(source))

        def belongs(style: str, thing: str, wanted: str = name) -> bool:
            moved = style not in STYLES_WITHOUT_COMBINATIONS and is_chosen(thing, style, HELD_OUT_SHARE)
            return (style == PHOTO) == (wanted == "photos") and not moved

        kept = rows.filter(belongs, input_columns=["style", "name"]).select_columns(["image", "style"])
        target.parent.mkdir(parents=True, exist_ok=True)
        kept.to_parquet(target)


def measuring_steps(options: argparse.Namespace) -> Iterator[Step]:
    """Yield the measurements of today's model and the next one, with the model's sampling and as one-step means."""
    write_held_out(options)
    models = {"embedded_256": options.output / "prior" / "pipeline"}
    distilled = {"embedded_256_distilled": options.output / "distill" / "pipeline"}
    models |= {} if options.toy else distilled | {"embedded": Path(embedded_model())}
    sets = {name: options.data / "next_held_out" / name for name in ("illustrations", "photos")}
    sets |= {"photo_eval": options.photo_eval} if options.photo_eval else {}
    sets = {"illustrations": sets["illustrations"]} if options.toy else sets
    for model, folder in models.items():
        for name, data in sets.items():
            among = {"recognition_among": 2 if options.toy else RECOGNITION_AMONG} if name != "photo_eval" else {}
            size = {"max_images": 2 if options.toy else RECOGNITION_AMONG}
            # a distilled decoder has its guidance in its weights; the one that it learned from takes any scale
            mean = ONE_STEP_MEAN | ({"decoder": FLOW_DECODER} if model == "embedded" else {})
            kinds = {"sampled": {}} if model in distilled else {"sampled": {}, "mean": mean}
            for kind, changes in kinds.items():
                output = options.results / model / f"{name}_{kind}"
                values = {"data": data, "model": folder, "model_name": model, "output": output, "baselines": "true"}
                values |= {"token_counts": (1, 4) if options.toy else COUNTS} | among | size
                values |= (TOY_MEASUREMENT if options.toy else {"batch_size": 64, "sheet_rows": 8}) | changes
                yield output / "reconstruction.json", ["evaluate.py", "reconstruction", *flags(values)]
        values = {"data": options.data / "next_prompts128", "model": folder, "model_name": model}
        values |= {"output": options.results / model / "prompts", "token_counts": (1, 4) if options.toy else COUNTS}
        values |= TOY_MEASUREMENT | {"max_prompts": 2} if options.toy else {"batch_size": 64, "max_prompts": 300}
        yield options.results / model / "prompts" / "generation.json", ["evaluate.py", "generation", *flags(values)]
        values |= {"data": options.data / "next_canvases128", "drawings": options.data / "next_prompts128"}
        values |= {"output": options.results / model / "two_objects"}
        result = options.results / model / "two_objects" / "two_objects.json"
        yield result, ["evaluate.py", "two_objects", *flags(values)]


def run(steps: Iterator[Step], in_process: bool) -> None:
    """Run the steps whose result does not exist yet, each in its own process unless `in_process`."""
    for result, (script, *words) in steps:
        if result.exists():
            print(f"{result} exists, skipped")
            continue
        print(f"{result} ...", flush=True)
        if in_process:
            import_module(Path(script).stem).main(words)
        else:
            subprocess.run([sys.executable, str(SCRIPTS / script), *words], check=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--emoji", required=True, nargs="+", help="folders or Hub datasets of emoji")
    parser.add_argument("--clipart", required=True, help="the same for clip art")
    parser.add_argument("--photos", required=True, help="the same for photos")
    parser.add_argument("--photo_eval", help="more photos, for evaluation only")
    parser.add_argument("--names", type=Path, default=CONFIGS / "embedded_names.txt", help="list of everyday names")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder for prepared images and tokens")
    parser.add_argument("--output", type=Path, default=Path("runs/embedded_256"), help="models and their checkpoints")
    parser.add_argument("--results", type=Path, default=Path("runs/embedded_256/results"), help="result files")
    parser.add_argument("--toy", action="store_true", help="every step in miniature; use separate folders")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    for steps in (data_steps, training_steps, measuring_steps):
        run(steps(options), options.toy)


if __name__ == "__main__":
    with plain_errors():
        main()
