"""Training of the VAE, the tokenizer and the prior: options, losses, training loop, checkpoints, publishing.

Imports `data`, `pipelines`, `models`, `cards` and `utils`, but never `evaluation`.
"""
