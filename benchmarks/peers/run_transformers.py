"""transformers as the benchmark's engine: `generate`, or with `batching` its continuous batching.

Settings: `model`; `batching`; `threads`; `attention` (sdpa by default); `cache` (`static` pads to a fixed length);
for batching `page_size`, `num_blocks` and `max_batch_tokens`, which are guessed from a GPU's memory when left alone.
"""

import time

from worker import Unsupported, at_once, serve


class Transformers:
    def __init__(self, settings):
        import torch
        import transformers

        self.torch, self.transformers, self.settings = torch, transformers, settings
        if "threads" in settings:
            torch.set_num_threads(settings["threads"])
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype=torch.bfloat16, attn_implementation=settings.get("attention", "sdpa")
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
        get = self.settings.get
        config = self.transformers.ContinuousBatchingConfig(
            page_size=get("page_size", 64), num_blocks=get("num_blocks", 1024),
            max_batch_tokens=get("max_batch_tokens", 2048), allow_block_sharing=True,
        )  # fmt: skip
        generation = self.transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        manager = self.model.init_continuous_batching(generation, config)
        manager.start()
        try:
            start = time.perf_counter()
            order = {}
            for index in sorted(range(len(requests)), key=lambda i: requests[i].arrival):
                one = requests[index]
                time.sleep(max(0.0, one.arrival - (time.perf_counter() - start)))
                name = manager.add_request(one.prompt, max_new_tokens=one.max_tokens, record_timestamps=True)
                order[name] = index
            done = {}
            while len(done) < len(requests):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    if result.error:
                        raise RuntimeError(result.error)
                    done[order[result.request_id]] = result
                elif result is None and not manager.is_running():
                    raise Unsupported("continuous batching stopped by itself")
        finally:
            manager.stop(block=True)
        found = [done[index] for index in range(len(requests))]
        return [[stamp - start for stamp in r.timestamps] for r in found], [list(r.generated_tokens) for r in found]


if __name__ == "__main__":
    serve(Transformers)
