"""Training of VAE, tokenizer and prior: options, losses, the loop around them, checkpoints and publishing.

Imports `data`, `pipelines`, `models`, `cards` and `utils`, never `evaluation`.
"""
