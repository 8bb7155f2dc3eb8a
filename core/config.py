"""What users set (`EngineConfig`) and what models read (`TextConfig`).

Decisions: a model's configuration lists exactly what the model reads, with its defaults, under Hugging Face keys;
spellings of older checkpoints are folded into today's before validation, so that a family file sees one form.
"""

from typing import Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RopeParameters(BaseModel):
    """Rotary position settings, as transformers 5 writes them under `rope_parameters`.

    `max_position_embeddings` is the model's; `original_max_position_embeddings` what it was before it was extended.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    rope_type: str = "default"
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    factor: float | None = None
    max_position_embeddings: int | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None  # yarn, longrope: factor on cosines and sines
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()  # longrope
    long_factor: tuple[float, ...] = ()
    short_mscale: float | None = None
    long_mscale: float | None = None
    mrope_section: tuple[int, ...] = ()  # pairs that turn by each axis, for positions with several (Qwen2-VL)
    mrope_interleaved: bool = False  # axes take turns (Qwen3-VL) instead of one after the other


class TextConfig(BaseModel):
    """The common part of a text model's `config.json`; a family subclasses it and adds what it reads.

    `aliases` maps a family's own key names to the common ones (`{"n_embd": "hidden_size"}`).
    """

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())
    aliases: ClassVar[dict[str, str]] = {}

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0  # filled from num_attention_heads when absent
    head_dim: int = 0  # filled as hidden_size / num_attention_heads when absent
    intermediate_size: int = 0
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters = RopeParameters()
    rope_by_layer_type: dict[str, RopeParameters] = {}  # by layer type, for a family whose layers differ; see `rope`
    dtype: str | None = None
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None

    def rope(self, layer_type: str) -> RopeParameters:
        """Rotary settings of the layers of one type, such as "sliding_attention".

        :raises ValueError: the configuration has settings for other types only.
        """
        if not self.rope_by_layer_type:
            return self.rope_parameters
        if layer_type not in self.rope_by_layer_type:
            raise ValueError(f"rope_parameters has nothing for layers of type {layer_type!r}; it has "
                             f"{', '.join(self.rope_by_layer_type)}")  # fmt: skip
        return self.rope_by_layer_type[layer_type]

    @property
    def longest_context(self) -> int:
        """Positions up to which a model can be asked for; scaled angles may reach beyond `max_position_embeddings`.

        Published configurations differ in whether that number is the one before scaling or after it.
        """
        trained, rope = self.max_position_embeddings, self.rope_parameters
        if rope.factor is None or self.rope_by_layer_type:
            return trained
        if rope.rope_type in ("linear", "dynamic"):
            return max(trained, int(trained * rope.factor))
        if rope.rope_type == "yarn":
            return max(trained, int((rope.original_max_position_embeddings or trained) * rope.factor))
        return trained

    @model_validator(mode="before")
    @classmethod
    def _todays_spelling(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for old, new in cls.aliases.items():
            if old in data:
                data.setdefault(new, data.pop(old))
        # Published configs write null for "the default", except where None is a value of its own.
        data = {k: v for k, v in data.items() if v is not None or cls._takes_none(k)}
        if "torch_dtype" in data:
            data.setdefault("dtype", data.pop("torch_dtype"))
        names = ("rope_parameters", "rope_by_layer_type", "max_position_embeddings")
        data |= _rope(data, *(cls.model_fields[name].default for name in names))
        heads = data.get("num_attention_heads")
        if heads and "hidden_size" in data:
            data.setdefault("num_key_value_heads", heads)
            if cls.model_fields["head_dim"].default == 0:
                data.setdefault("head_dim", data["hidden_size"] // heads)
        return data

    @classmethod
    def _takes_none(cls, key: str) -> bool:
        return key in cls.model_fields and type(None) in get_args(cls.model_fields[key].annotation)


class MultimodalConfig(BaseModel):
    """The part of a `config.json` that lies around a language model's own; a family subclasses it."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        """Published configs write null for "the default", except where None is a value of its own."""
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        return {k: v for k, v in data.items() if v is not None or k in fields and fields[k].default is None}


_OLD_ROPE_TYPES = {"su": "longrope", "mrope": "default"}  # mrope: for text, all of its axes are the same position
_EXTENDED = ("llama3", "yarn", "longrope")  # types that read original_max_position_embeddings


def _rope(
    data: dict[str, Any], default: RopeParameters, defaults: dict[str, RopeParameters], max_len: int
) -> dict[str, Any]:
    """transformers 4 wrote `rope_theta` beside `rope_scaling: {type, factor}`; 5 writes one `rope_parameters`.

    Where layers differ, 5 writes one under the name of each layer type; 4 wrote `rope_local_base_freq` for the sliding
    ones, which know no scaling. `default` and `defaults` (by layer type) are the family's.
    """
    given = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(given, dict):
        return {"rope_parameters": given}
    by_type = {k: v for k, v in given.items() if isinstance(v, dict)}
    if not by_type and (defaults or "rope_local_base_freq" in data):
        local = data.get("rope_local_base_freq", defaults.get("sliding_attention", default).rope_theta)
        by_type = {"full_attention": given, "sliding_attention": {"rope_theta": local}}
    if not by_type:
        return {"rope_parameters": _rope_of_one(given, data, default, max_len)}
    by_type = {k: _rope_of_one(v, data, defaults.get(k, default), max_len) for k, v in by_type.items()}
    first = by_type.get("full_attention", next(iter(by_type.values())))
    return {"rope_parameters": first, "rope_by_layer_type": by_type}


def _rope_of_one(given: dict[str, Any], data: dict[str, Any], default: RopeParameters, max_len: int) -> dict[str, Any]:
    rope = {k: v for k, v in given.items() if v is not None}
    kind = rope.get("rope_type", rope.get("type", default.rope_type))
    rope["rope_type"] = kind = _OLD_ROPE_TYPES.get(kind, kind)
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in data:
            rope.setdefault(key, data[key])
    rope.setdefault("max_position_embeddings", data.get("max_position_embeddings", max_len))
    if kind in _EXTENDED:  # Phi-3 writes the original length outside, and that one counts
        if "original_max_position_embeddings" in data:
            rope["original_max_position_embeddings"] = data["original_max_position_embeddings"]
        original = default.original_max_position_embeddings or rope["max_position_embeddings"]
        rope.setdefault("original_max_position_embeddings", original)
    return default.model_dump(exclude_unset=True) | rope


class EngineConfig(BaseModel):
    """What a user sets when an engine is made. Everything but `model` has a measured or derived default."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field(description="path of a checkpoint, or a name that a source knows")
    revision: str | None = Field(None, description="branch, tag or commit of the model")
    tokenizer: str | None = Field(None, description="path or name of the tokenizer, when it is not the model's")
    skip_tokenizer_init: bool = Field(False, description="no tokenizer: prompts are token ids, outputs have no text")
    trust_remote_code: bool = Field(False, description="allow a tokenizer's own Python code to run")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="type of weights and cache")
    device: str = Field("auto", description="cpu, cuda, or auto")
    load_format: Literal["auto", "safetensors", "gguf", "pt", "dummy"] = Field("auto", description="checkpoint format")
    quantization: str | None = Field(None, description="how to quantise weights at load, such as int8 or fp8")
    tensor_parallel_size: int = Field(1, gt=0, description="places that divide every layer")
    pipeline_parallel_size: int = Field(1, gt=0, description="stages that divide the layers among them")
    data_parallel_size: int = Field(1, gt=0, description="copies of the model, each on places of its own")
    data_parallel_rank: int = Field(0, ge=0, description="number of this copy; set by the engine")
    pipeline_blocks: tuple[int, ...] = Field((), description="blocks of each stage; as equal as can be when not given")
    enable_expert_parallel: bool = Field(
        False, description="tensor-parallel places take whole experts of a mixture, not a part of each"
    )
    executor: str = Field("mp", description="who runs a divided model: mp, processes; ray, a cluster; inproc, threads")
    nnodes: int = Field(1, gt=0, description="machines that divide the model, with executor mp")
    node_rank: int = Field(0, ge=0, description="number of this machine; 0 has the engine, the others only workers")
    master_addr: str | None = Field(None, description="address of machine 0, which the others can reach")
    master_port: int = Field(29555, ge=0, lt=65536, description="port of machine 0 to which the others connect")
    worker_timeout: float = Field(4.0, gt=0, description="seconds without a sign of life after which a worker is lost")
    step_timeout: float = Field(300.0, gt=0, description="seconds that a step of a divided model may take")
    seed: int = Field(0, description="seed of requests that bring none")
    max_model_len: int | None = Field(None, gt=0, description="longest prompt plus output, in tokens")
    max_num_seqs: int | None = Field(None, gt=0, description="most requests in one step; 256 or fewer when not given")
    max_num_batched_tokens: int | None = Field(None, gt=0, description="most tokens in one step (prefill chunk size)")
    block_size: int = Field(16, gt=0, description="tokens in one block of the cache")
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        "auto", description="type of cached keys and values: the model's, fp8"
    )
    kv_cache_memory_bytes: int | None = Field(None, gt=0, description="memory for the cache; derived when not given")
    num_kv_blocks: int | None = Field(None, gt=0, description="blocks in the cache; overrides kv_cache_memory_bytes")
    enable_prefix_caching: bool = Field(True, description="share cache blocks between equal prompt beginnings")
    enable_lora: bool = Field(False, description="requests may bring adapters (LoRARequest)")
    max_loras: int = Field(8, gt=0, description="most adapters in one step")
    max_lora_rank: int = Field(64, gt=0, description="largest rank of an adapter")
    max_cpu_loras: int = Field(64, gt=0, description="adapters kept in memory, ready to be used")
    lora_modules: dict[str, str] = Field({}, description="adapters read at the start: path of each, by name")
    limit_mm_per_prompt: dict[str, int] = Field({}, description="most images, videos, sounds of a prompt, by modality")
    mm_processor_kwargs: dict[str, Any] = Field({}, description="entries that win over the preprocessor_config.json's")
    allowed_local_media_path: str | None = Field(None, description="folder of which messages may name files")
    allowed_media_domains: tuple[str, ...] = Field((), description="hosts of which media may be fetched; all if none")
    plugins: tuple[str, ...] = Field((), description="dotted names of plugin modules to load besides installed ones")
    blocked_plugins: tuple[str, ...] = Field((), description="names of plugins not to load")

    @property
    def takes_adapters(self) -> bool:
        """Whether requests may bring adapters."""
        return self.enable_lora or bool(self.lora_modules)

    @property
    def num_places(self) -> int:
        """How many divide the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size
