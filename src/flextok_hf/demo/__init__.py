"""The browser demo: `flextok demo`, or a Space on the Hub; needs the extra `demo` (Gradio).

Imports `pipelines`, `models` and `utils`.
"""
