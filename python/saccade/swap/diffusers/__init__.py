"""Adapters for diffusers' video transformers. None imports diffusers: what they need, the model's own classes have."""
