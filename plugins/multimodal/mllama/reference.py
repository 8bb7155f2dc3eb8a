"""What Llama 3.2 Vision is checked against: transformers' class, mended where it departs from the authors' code."""

from typing import Any

import torch
from torch import nn


def reference(entries: dict[str, Any]) -> nn.Module:
    """transformers' class, mended where it departs from the authors': they read the states that go into the layers
    named, not those that come out, and tokens before every image get nothing from attention to images."""
    from transformers import MllamaConfig as Config
    from transformers import MllamaForConditionalGeneration
    from transformers.modeling_outputs import BaseModelOutput
    from transformers.models.mllama.processing_mllama import (
        convert_sparse_cross_attention_mask_to_dense,
        get_cross_attention_token_mask,
    )

    class Mended(MllamaForConditionalGeneration):
        def forward(self, input_ids, use_cache=False, pixel_values=None, aspect_ratio_ids=None, num_tiles=None):
            """Images of one prompt, as the input processor makes them."""
            if pixel_values is None:
                return super().forward(input_ids=input_ids, use_cache=False)
            ids, most, counts = input_ids[0].tolist(), pixel_values.shape[1], num_tiles.tolist()
            spans = get_cross_attention_token_mask(ids, self.config.image_token_index)
            seen = convert_sparse_cross_attention_mask_to_dense([spans], [counts], most, len(ids))
            return super().forward(
                input_ids=input_ids,
                pixel_values=pixel_values[None],
                aspect_ratio_ids=aspect_ratio_ids[None],
                aspect_ratio_mask=(torch.arange(most) < num_tiles[:, None]).long()[None],
                cross_attention_mask=torch.from_numpy(seen),
                use_cache=False,
            )

    def keep_mask(layer, args, kwargs):
        layer.cross_attn.seen = kwargs["full_text_row_masked_out_mask"]

    def mask(attention, args, out):
        return (out[0] if attention.seen is None else out[0] * attention.seen[:, 0], *out[1:])

    def before_layers(encoder):
        def forward(hidden_states, attention_mask=None):
            states = []
            for layer in encoder.layers:
                states.append(hidden_states)
                hidden_states = layer(hidden_states, attention_mask=attention_mask)
            return BaseModelOutput(last_hidden_state=hidden_states, hidden_states=tuple(states))

        return forward

    config = Config(**entries)
    config._attn_implementation = "eager"
    model = Mended(config)
    encoder = model.model.vision_model.transformer
    encoder.forward = before_layers(encoder)
    for layer in model.model.language_model.layers:
        if hasattr(layer, "cross_attn"):
            layer.register_forward_pre_hook(keep_mask, with_kwargs=True)
            layer.cross_attn.register_forward_hook(mask)
    return model
