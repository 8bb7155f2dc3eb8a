"""llama.cpp as the benchmark's engine, by its batch interface, so that several sequences share a step.

Settings: `model` (a GGUF file); `threads` (all cores by default); `ubatch`, tokens in one computation; `flash`, -1 to
let it choose. Each job gets a context made for its size, before the clock starts: that is the library's best case.
"""

import os
import time

from worker import at_once, serve


class LlamaCpp:
    def __init__(self, settings):
        import llama_cpp
        import numpy

        self.api, self.numpy, self.settings = llama_cpp, numpy, settings
        self.threads = settings.get("threads", os.cpu_count())
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(settings["model"].encode(), params)
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {settings['model']}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.about = {"versions": {"llama-cpp-python": llama_cpp.__version__}, "threads": self.threads}

    def run(self, requests):
        at_once(requests, "llama.cpp's library")
        api, size = self.api, len(requests)
        length, wanted = len(requests[0].prompt), requests[0].max_tokens
        params = api.llama_context_default_params()
        params.n_seq_max = size
        params.n_ctx = size * (-(-(length + wanted) // 256) * 256)
        params.n_batch = 2048
        params.n_ubatch = self.settings.get("ubatch", 512)
        params.n_threads = params.n_threads_batch = self.threads
        if "flash" in self.settings:
            params.flash_attn_type = self.settings["flash"]
        context = api.llama_init_from_model(self.model, params)
        batch = api.llama_batch_init(params.n_batch, 0, 1)
        try:
            return self._run(context, batch, requests, params.n_batch)
        finally:
            api.llama_batch_free(batch)
            api.llama_free(context)

    def _run(self, context, batch, requests, room):
        times, tokens = [[] for _ in requests], [[] for _ in requests]
        start = time.perf_counter()

        def flush(rows):
            """Compute what is in the batch, and take a token for each (row, sequence) of `rows`."""
            if batch.n_tokens == 0:
                return
            code = self.api.llama_decode(context, batch)
            if code:
                raise RuntimeError(f"llama_decode answered {code}")
            batch.n_tokens = 0
            for row, sequence in rows:
                logits = self.numpy.ctypeslib.as_array(self.api.llama_get_logits_ith(context, row), (self.vocab,))
                tokens[sequence].append(int(logits.argmax()))
            now = time.perf_counter() - start
            for _, sequence in rows:
                times[sequence].append(now)
            rows.clear()

        rows = []
        for sequence, one in enumerate(requests):
            for position, token in enumerate(one.prompt):
                last = position == len(one.prompt) - 1
                if last:
                    rows.append((batch.n_tokens, sequence))
                _add(batch, token, position, sequence, last)
                if batch.n_tokens == room:
                    flush(rows)
        flush(rows)
        for step in range(requests[0].max_tokens - 1):
            for sequence, one in enumerate(requests):
                rows.append((batch.n_tokens, sequence))
                _add(batch, tokens[sequence][-1], len(one.prompt) + step, sequence, True)
            flush(rows)
        return times, tokens


def _add(batch, token, position, sequence, wants_logits):
    row = batch.n_tokens
    batch.token[row], batch.pos[row] = token, position
    batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
    batch.logits[row] = wants_logits
    batch.n_tokens += 1


if __name__ == "__main__":
    serve(LlamaCpp)
