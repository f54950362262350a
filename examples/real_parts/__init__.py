"""A ViT and a language model that nobody here trained, joined and taught to caption: `python -m examples.real_parts`."""
