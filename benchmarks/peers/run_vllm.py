"""vLLM as the benchmark's engine, in this process, stepped by hand: its shortest way from a request to a token.

Settings besides `model` go to `vllm.LLM` (`enforce_eager`, `max_num_batched_tokens`, ...). Its variables of the
environment matter on CPU: VLLM_CPU_OMP_THREADS_BIND (`auto`, `nobind`, `0-1`), VLLM_CPU_KVCACHE_SPACE, LD_PRELOAD.
"""

import os
import time

from worker import serve

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Vllm:
    def __init__(self, settings):
        import torch
        import vllm
        from vllm.sampling_params import RequestOutputKind

        self.vllm, self.kind = vllm, RequestOutputKind.DELTA
        defaults = {
            "dtype": "bfloat16", "skip_tokenizer_init": True, "max_model_len": 2048, "max_num_seqs": 256,
            "enable_prefix_caching": True, "disable_log_stats": True,
        }  # fmt: skip
        self.engine = vllm.LLM(**{**defaults, **settings}).llm_engine
        self.made = 0
        self.about = {
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
            "threads": torch.get_num_threads(),
        }

    def run(self, requests):
        times, tokens = [[] for _ in requests], [[] for _ in requests]
        waiting = sorted(range(len(requests)), key=lambda i: requests[i].arrival, reverse=True)
        place = {}
        start = time.perf_counter()
        while waiting or self.engine.has_unfinished_requests():
            now = time.perf_counter() - start
            while waiting and requests[waiting[-1]].arrival <= now:
                index = waiting.pop()
                self.made += 1
                place[str(self.made)] = index
                params = self.vllm.SamplingParams(
                    temperature=0.0, max_tokens=requests[index].max_tokens, ignore_eos=True, detokenize=False,
                    output_kind=self.kind,
                )  # fmt: skip
                self.engine.add_request(str(self.made), {"prompt_token_ids": requests[index].prompt}, params)
            if not self.engine.has_unfinished_requests():
                time.sleep(max(0.0, requests[waiting[-1]].arrival - now))
                continue
            outputs = self.engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                new = output.outputs[0].token_ids
                times[place[output.request_id]] += [now] * len(new)
                tokens[place[output.request_id]] += new
        return times, tokens


if __name__ == "__main__":
    serve(Vllm)
