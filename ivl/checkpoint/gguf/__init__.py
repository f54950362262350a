"""GGUF, the format of llama.cpp: language models in, whole models out. Needs the gguf package."""
