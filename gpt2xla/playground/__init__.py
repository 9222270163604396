"""A local page in the browser for the models that were trained here. Needs the extra `playground` (Gradio)."""
