"""Official checkpoints -> our models. The modules, in the order of the data flow:

`source.py` opens a checkpoint and `settings.py` reads its configuration as data. `tokenizer.py`, `vae.py`, `prior.py`
and `text_encoder.py` map settings and tensors to our models. `components.py` reads tensors one at a time,
`original.py` combines the parts, and `convert.py` with `writing.py` writes them to a folder.

Imports `models`, `cards` and `utils`; only `convert.py`, which writes whole pipelines, imports `pipelines`.
"""
