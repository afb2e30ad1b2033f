"""What the three measurements share: model, data, saved sums, and the common fields of the record."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import find_executable_batch_size
from torch import Tensor, nn

from ..pipelines.loading import choose_device, load_pipeline
from ..pipelines.pipeline_flextok import FlexTokPipeline
from ..pipelines.token_checks import check_token_counts
from ..utils.files import check_folder_around
from ..utils.flops import FlopCounter
from .accumulators import Accumulator
from .distributions import check_sample_count
from .feature_networks import FeatureNetwork, load_feature_network
from .images import CROP, EvaluationImages, load_split
from .options import AUTO, NO_NETWORK, EvaluationOptions
from .progress import Evaluation
from .results import describe_machine, describe_model, public_name, rounded
from .sampling import cost_of


SPLITS = ("train", "validation")
CPU_BATCH_SIZE, MAX_BATCH_SIZE = 16, 512
# May change when a measurement is resumed: figures do not depend on them; weights are compared by their hash.
FREE_OPTIONS = ("output", "model", "model_name", "device", "batch_size")


def choose_batch_size(pipe: FlexTokPipeline) -> int:
    """Return half the largest batch that fits into the memory of an accelerator: measures need some too.

    A CPU is not faster with large batches, and its memory has no firm end: there it is 16.
    """
    return CPU_BATCH_SIZE if pipe.device.type == "cpu" else max(1, largest_batch_size(pipe, MAX_BATCH_SIZE) // 2)


@torch.no_grad()
def largest_batch_size(pipe: FlexTokPipeline, most: int) -> int:
    """Return how many images, up to about `most`, a pipeline can encode and decode at once; it tries."""

    @find_executable_batch_size(starting_batch_size=most)
    def try_out(batch_size: int) -> int:
        side = pipe.resolution
        pipe.tokenize_pixels(torch.zeros(batch_size, 3, side, side, dtype=torch.uint8, device=pipe.device))
        token_ids = torch.zeros(batch_size, pipe.num_registers, dtype=torch.long)
        pipe.detokenize(token_ids, 1, generator=torch.Generator().manual_seed(0), output_type="pt")
        return batch_size

    return try_out()


class Cost(Accumulator):
    """Number of generated images, and floating-point operations where they were counted."""

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("images")
        self.add_sum("flops")
        self.add_sum("flop_images")

    def update(self, images: int, flops: float | None = None) -> None:
        """Add a batch; `flops` if its operations were counted."""
        self.images += images
        if flops is not None:
            self.flops += flops
            self.flop_images += images

    def compute(self) -> Tensor:
        """Return the three sums, (3,)."""
        return torch.stack([self.images, self.flops, self.flop_images])

    def track(self, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Call `make`, return its batches of images and count them; count operations in the first call only."""
        if self.images > 0:
            batches = make()
            self.update(sum(map(len, batches)))
        else:
            with FlopCounter() as counter:
                batches = make()
            self.update(sum(map(len, batches)), float(counter.total))
        return batches


class Measurement:
    """Model, data and processes of one evaluation.

    Args:
        name: name of the measurement and its result files.
        options: its options.
    """

    def __init__(self, name: str, options: EvaluationOptions):
        self.name, self.options = name, options
        self.start = time.perf_counter()
        Path(options.output).mkdir(parents=True, exist_ok=True)
        check_folder_around(Path(options.output) / name)
        device = choose_device(options.device)
        self.state = PartialState(cpu=device.type == "cpu")
        self.device = str(self.state.device if self.state.num_processes > 1 else device)
        self.pipe = load_pipeline(options.model, self.device, decoder=options.decoder)
        self.pipe.set_progress_bar_config(disable=True)
        self.counts = check_token_counts(options.token_counts, self.pipe.num_registers)
        self.network: FeatureNetwork | None = None
        if options.feature_network != NO_NETWORK:
            self.network = load_feature_network(options.feature_network).to(self.device)
        is_auto = options.batch_size == AUTO
        self.batch_size = choose_batch_size(self.pipe) if is_auto else int(options.batch_size)
        model_name = options.model_name or (public_name(options.model) if options.model else "embedded")
        self.model = describe_model(self.pipe, model_name)
        self.protocol: dict[str, Any] = {
            "measurement": name,
            "data": public_name(options.data),
            "resolution": self.pipe.resolution,
            "crop_and_resize": CROP,
            "rounding": "8 bits",
            "token_counts": self.counts,
            "seed": options.seed,
            "feature_network": None if self.network is None else asdict(self.network.description),
        }
        self.skipped: dict[str, str] = {}
        self.seconds = 0.0
        self.passes: list[Evaluation] = []

    def images(self, rows: Any) -> EvaluationImages:
        """Return the images of `rows` at the resolution of the model."""
        return EvaluationImages(rows, self.pipe.resolution, self.options.image_column)

    def load_all_splits(self) -> list[dict]:
        """Return the rows of train and validation as dictionaries with undecoded images and their `split`.

        Raises:
            ValueError: if the data has neither split.
        """
        rows, errors = [], []
        for split in SPLITS:
            try:
                loaded = load_split(self.options.data, split, self.options.image_column)
            except (ValueError, FileNotFoundError) as error:
                errors.append(error)
                continue
            rows += [row | {"split": split} for row in loaded]
        if not rows:
            raise errors[0]
        return rows

    def check_distribution(self, num_samples: int, what: str) -> None:
        """Raise a ValueError before any work if there are too few images for the feature network."""
        if self.network is not None:
            try:
                check_sample_count(num_samples, self.network.description.num_features)
            except ValueError as error:
                raise ValueError(f"{what}: {error}") from error

    def run(
        self,
        name: str,
        accumulators: nn.ModuleDict,
        num_samples: int,
        measure: Callable[[list[int]], dict[int, str]],
    ) -> None:
        """Measure samples 0 to `num_samples` - 1 in batches split over all processes; see `Evaluation`."""
        folder = Path(self.options.output) / f".{self.name}-begun"
        options = {key: value for key, value in asdict(self.options).items() if key not in FREE_OPTIONS}
        known = {"protocol": self.protocol, "options": options, "weights_sha256": self.model["weights_sha256"]}
        evaluation = Evaluation(name, accumulators, num_samples, self.batch_size, known, folder, self.state)
        evaluation.run(measure)
        self.skipped |= {f"{name} {sample}": reason for sample, reason in evaluation.skipped.items()}
        self.seconds += evaluation.seconds
        self.passes.append(evaluation)

    def finish(self, make_record: Callable[[], dict], costs: Sequence[Cost], write: Callable[[dict], None]) -> dict:
        """Make, complete and write the record on the main process, which has all sums; then delete the saved sums.

        Returns:
            The record, empty on other processes.
        """
        complete: dict = {}
        if self.state.is_main_process:
            record = rounded(make_record())
            images, flops, flop_images = torch.stack([cost.compute() for cost in costs]).sum(dim=0).tolist()
            cost = cost_of(int(images), self.seconds, flops, int(flop_images))
            complete = {
                "measurement": self.name,
                "seed": self.options.seed,
                "token_counts": self.counts,
                **self.model,
                "protocol": self.protocol,
                **record,
                "skipped": self.skipped,
                "cost": {key: float(f"{value:.4g}") for key, value in cost.items()},
                "wall_time_s": round(time.perf_counter() - self.start, 1),
                **describe_machine(self.device, self.state.num_processes),
            }
            write(complete)
        for evaluation in self.passes:
            evaluation.discard()
        return complete
