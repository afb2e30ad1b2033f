"""The demo in the browser: `flextok demo`, or a Space on the Hub. Needs the extra `demo` (Gradio)."""
