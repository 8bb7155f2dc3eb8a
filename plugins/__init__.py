"""Built-in plugins: each family, format and source that modelport ships, under the same contract as anybody's."""
