"""Quadriga: PyTorch-native pre-training of Llama 3.1 models, from a laptop CPU to a GPU cluster."""

__version__ = "0.1.0"
