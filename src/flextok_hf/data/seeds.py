"""Seeds for independent random draws, the same on every machine and for any number of processes."""

import hashlib

import torch


def draw_seed(*numbers: int) -> int:
    """Hash integers (seed, epoch, row, ...) into one 63-bit seed, the same on every machine."""
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_generator(draw: int | None) -> torch.Generator | None:
    """Return a generator with seed `draw`; `None` stands for PyTorch's global one."""
    return None if draw is None else torch.Generator().manual_seed(draw)
