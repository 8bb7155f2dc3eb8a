"""Checkpoint formats other than safetensors, each a plugin."""
