"""GGUF, llama.cpp's format: models and adapters written to it, read back to be compared, and models turned into Hugging
Face folders again. What needs the package `gguf` (extra `gguf`) is here and nowhere else in `ossia.export`.
"""
