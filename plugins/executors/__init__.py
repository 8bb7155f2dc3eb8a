"""Where a model's name leads when it is no path, each source a plugin."""
