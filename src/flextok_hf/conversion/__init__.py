"""Official checkpoints -> our models, in the order of the data.

`source.py` opens a checkpoint and `settings.py` reads its configuration as data. `tokenizer.py`, `vae.py`, `prior.py`
and `text_encoder.py`, each with what it needs, say what is what in our models. `components.py` reads tensors one after
the other, `original.py` puts a checkpoint together, and `convert.py` with `writing.py` writes it as a folder.

Imports `models`, `cards` and `utils`; only `convert.py`, which writes whole pipelines, imports `pipelines`.
"""
