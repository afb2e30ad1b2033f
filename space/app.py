"""The demo as a Space on the Hub. `FLEXTOK_MODEL` is a folder or Hub id; the default is the embedded model."""

import os

import torch

from flextok_hf import FlexTokPipeline, embedded_model
from flextok_hf.demo.page import build_demo, launch_options


model = os.environ.get("FLEXTOK_MODEL")
pipe = FlexTokPipeline.from_pretrained(model or embedded_model())
demo = build_demo(pipe.to("cuda" if torch.cuda.is_available() else "cpu"), model or "the embedded model")

if __name__ == "__main__":
    demo.launch(**launch_options())
