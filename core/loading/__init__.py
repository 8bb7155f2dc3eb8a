"""From a name to a loaded model: resolve, read the configuration, stream the weights, prove completeness."""
