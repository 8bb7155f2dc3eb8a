"""modelport as the benchmark's engine; settings besides `model` are those of `EngineConfig`."""

from worker import serve


class ModelPort:
    def __init__(self, settings):
        import torch

        from modelport import __version__
        from modelport.cli import measure
        from modelport.frontend import Frontend, engine_config

        self.measure = measure
        model = settings.pop("model")
        self.front = Frontend(engine_config(model, settings))
        self.about = {
            "versions": {"modelport": __version__, "torch": torch.__version__},
            "threads": torch.get_num_threads(),
            "cache_bytes": measure.cache_bytes(self.front),
            "weight_bytes": measure.weight_bytes(self.front),
        }

    def run(self, requests):
        work = [self.measure.Work(*one) for one in requests]
        times, tokens, _ = self.measure.drive(self.front, work)
        return times, tokens


if __name__ == "__main__":
    serve(ModelPort)
