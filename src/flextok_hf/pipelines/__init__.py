"""`FlexTokPipeline` and the steps it consists of: input checks, images, latents, flow, guidance, token writing.

Imports `models`, `cards` and `utils`; `FlexTokPipeline.from_original` imports `conversion` when it is called.
"""
