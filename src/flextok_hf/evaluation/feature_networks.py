"""Images -> features and class probabilities of a public or custom network.

Results are labelled with the network's name and the hash of its weights. A Frechet distance is called FID only if the
network is the Inception network of Heusel et al. (2017), https://arxiv.org/abs/1706.08500.

Letters: B batch, R side of the square images, D features, C classes.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoTokenizer, CLIPModel

from ..utils.files import read_json
from ..utils.measures import weights_hash
from ..utils.vision_networks import read_preprocessing
from .results import public_name


INCEPTION = "inception"
TRAINING_RECORD = "training.json"  # next to weights that `train_feature_network.py` saved


@dataclass
class Description:
    """What result files state about the network behind a figure."""

    name: str
    sha256: str
    num_features: int
    num_classes: int
    input_size: int
    resize: str
    validation_accuracy: float | None = None

    @property
    def is_inception(self) -> bool:
        """Whether a Frechet distance in these features may be called FID."""
        return self.name == INCEPTION


class FeatureNetwork(nn.Module):
    """Interface of feature networks; any module with `description`, `class_names` and `forward` works.

    Attributes:
        description: for the result file.
        class_names: names of the classes, or `None` if there are none.
    """

    description: Description
    class_names: list[str] | None = None

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return features (B, D) and, if there are classes, log-probabilities (B, C) of images (B, 3, R, R) uint8."""
        raise NotImplementedError


class TransformersFeatures(FeatureNetwork):
    """A vision model of Transformers: features are the input of its classifier, or else its pooled output.

    Args:
        name: folder or Hub id.
    """

    def __init__(self, name: str):
        super().__init__()
        config = AutoConfig.from_pretrained(name)
        is_classifier = any("ForImageClassification" in kind for kind in config.architectures or [])
        kind = AutoModelForImageClassification if is_classifier else AutoModel
        self.network = kind.from_pretrained(name, dtype=torch.float32).requires_grad_(False).eval()
        self.classifier_input = torch.empty(0)
        if is_classifier:
            labels = self.network.config.id2label
            self.class_names = [labels[index] for index in range(len(labels))]
            self.network.classifier.register_forward_pre_hook(self._keep_classifier_input)
        self.input_size, mean, std = read_preprocessing(name)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        known = read_json(Path(name) / TRAINING_RECORD, {})
        self.description = Description(
            name=known.get("name", public_name(name)),
            sha256=weights_hash({"network": self.network}),
            num_features=self(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))[0].shape[1],
            num_classes=len(self.class_names or []),
            input_size=self.input_size,
            resize="bicubic (antialiased)",
            validation_accuracy=known.get("validation_accuracy"),
        )

    def _keep_classifier_input(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.classifier_input = arguments[0]

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return features and log-probabilities; see `FeatureNetwork.forward`."""
        images = pixels.to(self.mean.device).float() / 255
        if images.shape[-2:] != (self.input_size, self.input_size):
            size = (self.input_size, self.input_size)
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        output = self.network(pixel_values=(images - self.mean) / self.std)
        if self.class_names is not None:
            return self.classifier_input.flatten(1), output.logits.log_softmax(dim=1)
        if output.get("pooler_output") is not None:
            return output.pooler_output.flatten(1), None
        return output.last_hidden_state.mean(dim=1), None


class InceptionFeatures(FeatureNetwork):
    """The Inception network of the original FID, from torch-fidelity.

    Args:
        weights: local weight file (`pt_inception-2015-12-05-6726825d.pth`), or `None` to let torch-fidelity find or
            download it.
    """

    def __init__(self, weights: str | None = None):
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(
                "The feature network `inception` needs torch-fidelity: `pip install torch-fidelity`. Or pass another"
                " network: the folder or Hub id of a vision model."
            ) from error
        layers = ["2048", "logits_unbiased"]
        self.network = FeatureExtractorInceptionV3("inception", layers, feature_extractor_weights_path=weights)
        self.network.requires_grad_(False).eval()
        self.class_names = [str(index) for index in range(1008)]
        self.description = Description(
            name=INCEPTION,
            sha256=weights_hash({"network": self.network}),
            num_features=2048,
            num_classes=1008,
            input_size=299,
            resize="bilinear as in TensorFlow 1 (not antialiased)",
        )

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return features and log-probabilities; see `FeatureNetwork.forward`."""
        features, logits = self.network(pixels.to(next(self.network.parameters()).device))
        return features, logits.log_softmax(dim=1)


def load_feature_network(name: str) -> FeatureNetwork:
    """Load a network by name.

    Args:
        name: "inception", a .pth file of its weights, or the folder or Hub id of a vision model.

    Raises:
        FileNotFoundError: if `name` is a path that does not exist.
        ImportError: if the network needs a missing package.
    """
    if name == INCEPTION:
        return InceptionFeatures()
    is_path = name.endswith(".pth") or name.startswith((".", "/", "~")) or name.count("/") != 1
    if is_path and not Path(name).expanduser().exists():
        raise FileNotFoundError(
            f"`feature_network` {name!r} does not exist. Pass a folder, a file of Inception weights, a Hub id of the"
            " form owner/name, or `inception`."
        )
    if name.endswith(".pth"):
        return InceptionFeatures(str(Path(name).expanduser()))
    return TransformersFeatures(str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name)


class ClipScore(nn.Module):
    """How well images match texts: 100 times the cosine of their CLIP embeddings, at least 0 (Hessel et al., 2021,
    https://arxiv.org/abs/2104.08718).

    Args:
        name: folder or Hub id of a CLIP model of Transformers.
    """

    def __init__(self, name: str):
        super().__init__()
        self.network = CLIPModel.from_pretrained(name, dtype=torch.float32).requires_grad_(False).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.input_size = self.network.config.vision_config.image_size
        _, mean, std = read_preprocessing(name)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.sha256 = weights_hash({"network": self.network})

    @torch.no_grad()
    def forward(self, pixels: Tensor, texts: list[str]) -> Tensor:
        """Return the scores (B,) of images (B, 3, R, R) uint8 for B texts."""
        device = self.mean.device
        size = (self.input_size, self.input_size)
        images = F.interpolate(pixels.to(device).float() / 255, size, mode="bicubic", antialias=True).clamp(0, 1)
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
        output = self.network(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=(images - self.mean) / self.std,
        )
        cosine = F.cosine_similarity(output.image_embeds, output.text_embeds)
        return (100 * cosine).clamp(min=0).cpu()
