"""What turns a request's text into token ids and back: tokenizers and chat templates."""
