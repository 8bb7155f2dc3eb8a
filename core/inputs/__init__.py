"""What a request brings, made ready: text to token ids and back, chat templates, pictures, films and sounds."""
