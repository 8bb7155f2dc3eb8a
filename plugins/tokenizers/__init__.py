"""Tokenizers that were published as Python code of their own: read from their files, without that code."""
