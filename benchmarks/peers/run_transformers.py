"""transformers as the benchmark's engine: `generate`, or with `batching` its continuous batching.

Settings: `model`; `dtype`; `batching`; `threads`; `attention` (sdpa by default); `cache` (`static` pads to a fixed
length); for batching `page_size` and `max_batch_tokens`. The cache of continuous batching is made to measure for each
job, before the clock starts.
"""

import time

from worker import at_once, serve


class Transformers:
    def __init__(self, settings):
        import torch
        import transformers

        self.torch, self.transformers, self.settings = torch, transformers, settings
        if "threads" in settings:
            torch.set_num_threads(settings["threads"])
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            settings["model"],
            dtype=settings.get("dtype", "bfloat16"),
            attn_implementation=settings.get("attention", "sdpa"),
        ).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.about = {
            "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
            "threads": torch.get_num_threads(),
        }

    def run(self, requests):
        return self.continuous(requests) if self.settings.get("batching") else self.generate(requests)

    def generate(self, requests):
        at_once(requests, "generate")
        stamps = []

        class Clock(self.transformers.StoppingCriteria):
            def __call__(self, ids, scores, **_):
                stamps.append(time.perf_counter() - start)
                return ids.new_zeros(len(ids), dtype=bool)

        ids = self.torch.tensor([one.prompt for one in requests])
        options = {"cache_implementation": "static"} if self.settings.get("cache") == "static" else {}
        with self.torch.inference_mode():
            start = time.perf_counter()
            made = self.model.generate(
                ids, attention_mask=self.torch.ones_like(ids), max_new_tokens=requests[0].max_tokens, do_sample=False,
                stopping_criteria=[Clock()], **options,
            )  # fmt: skip
        return [stamps] * len(requests), made[:, ids.shape[1] :].tolist()

    def continuous(self, requests):
        page = self.settings.get("page_size", 64)
        config = self.transformers.ContinuousBatchingConfig(
            page_size=page, max_batch_tokens=self.settings.get("max_batch_tokens", 2048),
            num_blocks=8 + sum(-(-(len(one.prompt) + one.max_tokens) // page) for one in requests),
        )  # fmt: skip
        generation = self.transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        manager = self.model.init_continuous_batching(generation, config)
        manager.start()
        order, done = {}, {}

        def take(timeout):
            result = manager.get_result(timeout=timeout)
            if result is None and not manager.is_running():
                raise RuntimeError("continuous batching stopped by itself")
            if result is not None and result.error:
                raise RuntimeError(result.error)
            if result is not None and result.is_finished():
                done[order.get(result.request_id)] = result

        try:
            manager.add_request([0, 0], max_new_tokens=2)  # making its cache takes seconds, which nobody waits for here
            while not done:
                take(1)
            done.clear()
            start = time.perf_counter()
            for index in sorted(range(len(requests)), key=lambda i: requests[i].arrival):
                one = requests[index]
                time.sleep(max(0.0, one.arrival - (time.perf_counter() - start)))
                name = manager.add_request(one.prompt, max_new_tokens=one.max_tokens, record_timestamps=True)
                order[name] = index
            while len(done) < len(requests):
                take(1)
        finally:
            manager.stop(block=True)
        found = [done[index] for index in range(len(requests))]
        step = _steps([stamp for result in found for stamp in result.timestamps])
        return [[step[t] - start for t in r.timestamps] for r in found], [list(r.generated_tokens) for r in found]


def _steps(stamps, apart=0.001):
    """For each stamp the last one of its step: the tokens of one step are stamped one after another."""
    found, last, previous = {}, 0.0, float("inf")
    for stamp in sorted(set(stamps), reverse=True):
        last = stamp if previous - stamp > apart else last
        found[stamp], previous = last, stamp
    return found


if __name__ == "__main__":
    serve(Transformers)
