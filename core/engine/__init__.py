"""The step: who runs (scheduler), where keys lie (cache), one forward pass (runner), the next token (sampler)."""
