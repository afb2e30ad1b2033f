"""Images and their originals -> similarity of each pair. Letters: B batch, H W image sides."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from ..utils.measures import peak_signal_to_noise


ImageMeasure = Callable[[Tensor, Tensor], Tensor]

IS_LOWER_BETTER = {"mae", "perceptual_distance", "lpips", "dreamsim"}
SSIM_BORDER = 5  # half the window


def measure_ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Return the structural similarity of each image, (B,), 1 for equal images.

    Wang et al., 2004 (doi:10.1109/TIP.2003.819861), with its Gaussian window of 11 x 11 pixels, standard deviation
    1.5, per color channel, over the pixels whose window lies inside the image; torchmetrics' own mean also
    includes the border, where the window extends into reflected padding.
    """
    _, similarity = structural_similarity_index_measure(
        images, originals, data_range=1.0, reduction="none", return_full_image=True
    )
    return similarity[..., SSIM_BORDER:-SSIM_BORDER, SSIM_BORDER:-SSIM_BORDER].flatten(1).mean(dim=1)


def measure_mae(images: Tensor, originals: Tensor) -> Tensor:
    """Return the mean absolute error of each image, (B,), 0 for equal images."""
    return (images - originals).abs().flatten(1).mean(dim=1)


def load_lpips(device: str) -> ImageMeasure:
    """Return LPIPS with AlexNet (Zhang et al., 2018, https://arxiv.org/abs/1801.03924).

    Raises:
        ImportError: if torchvision, which provides AlexNet, is missing.
    """
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", reduction="none", normalize=True).to(device)
    except (ImportError, ModuleNotFoundError) as error:
        raise ImportError("The measure `lpips` needs torchvision: `pip install torchvision`.") from error

    def measure(images: Tensor, originals: Tensor) -> Tensor:
        scores = metric(images.to(device), originals.to(device))
        metric.reset()  # otherwise its state grows with every image
        return scores.cpu()

    return measure


def load_dreamsim(device: str) -> ImageMeasure:
    """Return DreamSim (Fu et al., 2023, https://arxiv.org/abs/2306.09344), 0 for equal images.

    Raises:
        ImportError: if the package `dreamsim` is missing.
    """
    try:
        from dreamsim import dreamsim
    except ImportError as error:
        raise ImportError("The measure `dreamsim` needs the package: `pip install dreamsim`.") from error
    network, _ = dreamsim(pretrained=True, device=device)
    size = (224, 224)

    def measure(images: Tensor, originals: Tensor) -> Tensor:
        resized = [
            F.interpolate(x.to(device), size, mode="bicubic", antialias=True).clamp(0, 1) for x in (images, originals)
        ]
        return network(*resized).cpu()

    return measure


EXTRA_MEASURES = {"lpips": load_lpips, "dreamsim": load_dreamsim}


def check_images(images: Tensor, originals: Tensor) -> None:
    """Raise a ValueError if images cannot be compared with their originals."""
    if images.shape != originals.shape or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"Images and originals must both have the shape (batch, 3, height, width), got {tuple(images.shape)}"
            f" and {tuple(originals.shape)}. Resize one of them first."
        )
    if min(images.shape[-2:]) <= 2 * SSIM_BORDER:
        raise ValueError(f"SSIM needs images of at least 11 x 11 pixels, got {images.shape[-2]} x {images.shape[-1]}.")


def measure_images(measures: dict[str, ImageMeasure], images: Tensor, originals: Tensor) -> dict[str, Tensor]:
    """Return the values (B,) of each measure by name, for images and originals (B, 3, H, W) in [0, 1]."""
    check_images(images, originals)
    with torch.no_grad():
        return {name: measure(images, originals).reshape(len(images)) for name, measure in measures.items()}


PLAIN_MEASURES: dict[str, ImageMeasure] = {"psnr_db": peak_signal_to_noise, "ssim": measure_ssim, "mae": measure_mae}
ALL_MEASURES = (*PLAIN_MEASURES, "perceptual_distance", *EXTRA_MEASURES)  # per image
