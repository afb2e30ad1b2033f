"""What a model knew stays: while adapters learn something else, the adapted model is drawn to the model without them.

Prior preservation (Ruiz et al., 2023, arXiv 2208.12242) trains on images that the model drew before. Here the model
itself is asked about them, as in learning without forgetting (Li and Hoiem, 2016, arXiv 1606.09282): its velocities
and its distributions of the next token are the targets. At the start these losses are 0, and no chance of a draw pulls
the model away from what it knew.

Letters: B images, K registers, Q code dimensions, C latent channels, h w latent grid, V ids.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.low_rank import taken_out
from ..pipelines.flow import add_noise
from .step_rng import StepRng


if TYPE_CHECKING:
    from .prior import PriorForTraining
    from .tokenizer import TokenizerForTraining

UNCONDITIONAL_SHARE = 0.1  # of the images, whose condition is left out, for guidance


def velocity_change(tokenizer: "TokenizerForTraining", token_ids: Tensor, latents: Tensor, rng: StepRng) -> Tensor:
    """Return the mean squared difference of velocities with and without the adapter of the decoder.

    Args:
        tokenizer: its decoder has an adapter.
        token_ids: of drawn images, (B, K).
        latents: the same images, (B, C, h, w).
        rng: of noise, noise levels and numbers of tokens.
    """
    count = latents.shape[0]
    codes = tokenizer.encoder.quantizer.ids_to_codes(token_ids)  # (B, K, Q)
    sigma, num_tokens, _ = tokenizer.draw(count, rng)
    noisy_latents = add_noise(latents, rng.normal_like(latents), sigma)
    is_unconditional = rng.bernoulli(UNCONDITIONAL_SHARE, count)
    inputs = (noisy_latents, sigma, codes, num_tokens, is_unconditional)
    with torch.no_grad(), taken_out([tokenizer.decoder]):
        before, _ = tokenizer.predict(*inputs)
    after, _ = tokenizer.predict(*inputs)
    return F.mse_loss(after.float(), before.float())


def distribution_change(prior: "PriorForTraining", token_ids: Tensor, captions: list[str], rng: StepRng) -> Tensor:
    """Return the Kullback-Leibler divergence, in nats per token, from the model without the adapter of the prior.

    Args:
        prior: with an adapter.
        token_ids: of drawn images, (B, K).
        captions: what they were drawn from.
        rng: says whose captions are left out.
    """
    is_dropped = rng.host_bernoulli(UNCONDITIONAL_SHARE, len(captions))
    condition = prior.encode_condition({"captions": captions}, is_dropped)
    input_ids = prior.prior.prepend_bos(token_ids)[:, :-1]  # (B, K)
    was_training = prior.training
    prior.eval()  # dropout would count as change

    def log_probabilities() -> Tensor:
        logits = prior.prior(input_ids=input_ids, use_cache=False, **condition).logits  # (B, K, V)
        return logits.float().log_softmax(-1).flatten(0, 1)

    with torch.no_grad(), taken_out([prior.prior]):
        before = log_probabilities()
    after = log_probabilities()
    prior.train(was_training)
    return F.kl_div(after, before, reduction="batchmean", log_target=True)
