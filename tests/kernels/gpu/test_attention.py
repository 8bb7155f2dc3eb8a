"""Decode and prefill kernels against the reference; slots that nobody wrote hold NaN, padding of tables anything."""

import os

import pytest
import torch

from modelport.kernels import attention

ON_CPU = os.environ.get("MODELPORT_TEST_DEVICE", "cpu") == "cpu"
DTYPES = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)]
if not ON_CPU:  # the interpreter only pretends to compute with bfloat16
    DTYPES.append(torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
MIXED = [(1, 40), (20, 33), (0, 5), (1, 1), (9, 9)]


def batch(
    lengths: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, v_dim: int, block_size: int = 4,
    dtype: torch.dtype = torch.float32, extra_rows: int = 0,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """lengths: (queries, keys) of each sequence."""
    needed = [-(-keys // block_size) for _, keys in lengths]
    order = torch.randperm(sum(needed) + 2).int().split([*needed, 2])
    table = torch.full((len(lengths), max(needed, default=0) + 1), -12345, dtype=torch.int32)
    caches = [torch.full((sum(needed) + 2, kv_heads, block_size, d), float("nan")).to(dtype) for d in (dim, v_dim)]
    for i, (_, keys) in enumerate(lengths):
        table[i, : needed[i]] = order[i]
        position = torch.arange(keys)
        for cache in caches:
            block = order[i][position // block_size].long()
            cache[block, :, position % block_size] = torch.randn(keys, kv_heads, cache.shape[3]).to(dtype)
    starts = torch.tensor([0, *(q for q, _ in lengths)]).cumsum(0).int()
    fused = torch.randn(int(starts[-1]) + extra_rows, (heads + 1) * dim).to(dtype)
    return {
        "q": fused[:, dim:].view(-1, heads, dim),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "block_table": table,
        "query_starts": starts,
        "seq_lens": torch.tensor([keys for _, keys in lengths], dtype=torch.int32),
    }


def check(arguments: dict, **options) -> None:
    options.setdefault("scale", arguments["q"].shape[2] ** -0.5)
    longest = int(arguments["query_starts"].diff().max()) if len(arguments["seq_lens"]) else 1
    options.setdefault("max_query_len", max(1, longest))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "paged_attention_reference", None)  # the kernel must not leave it to the reference
        got = attention.paged_attention(**arguments, **options)
    want = attention.paged_attention_reference(**arguments, **options)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=TOLERANCE[got.dtype], atol=TOLERANCE[got.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "group", "dim", "v_dim", "block_size"),
    [(MIXED, 3, 24, 16, 4), (MIXED, 1, 33, 40, 16), ([(1, 40), (1, 7)], 8, 80, 80, 5),
     ([(1, 3), (0, 2)], 20, 16, 16, 1), ([(40, 70)], 2, 64, 64, 16), ([], 2, 16, 16, 16)],
)  # fmt: skip
def test_shapes(
    sizes: list[tuple[int, int]], group: int, dim: int, v_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    check(batch(sizes, 2 * group, 2, dim, v_dim, block_size, dtype, extra_rows=2))


@pytest.mark.parametrize("sizes", [MIXED, [(1, 40), (1, 9), (0, 4), (1, 1)]])
@pytest.mark.parametrize("option", ["window", "narrow", "softcap", "alibi", "sinks", "all"])
def test_options(sizes: list[tuple[int, int]], option: str) -> None:
    settings = {
        "window": {"window": 7}, "narrow": {"window": 1}, "softcap": {"softcap": 2.0},
        "alibi": {"alibi_slopes": torch.rand(4)}, "sinks": {"sinks": torch.randn(4)},
    }  # fmt: skip
    settings["all"] = {key: value for one in list(settings.values()) for key, value in one.items()}
    check(batch(sizes, 4, 2, 16, 16), **settings[option])


def test_long_contexts_are_cut_and_joined() -> None:
    sizes = [(1, 300), (1, 129), (1, 128), (1, 1), (0, 0)]
    check(batch(sizes, 4, 2, 16, 16, 16, extra_rows=3), sinks=torch.randn(4), window=290)
    check(batch([*sizes, (3, 290)], 4, 2, 16, 16, 16), alibi_slopes=torch.rand(4) * 0.1)


@pytest.mark.parametrize("sizes", [[(20, 33), (1, 40), (5, 5)], [(1, 40), (1, 3)]])
@pytest.mark.parametrize("window", [0, 6])
def test_ends(sizes: list[tuple[int, int]], window: int) -> None:
    """From no key at all to more than there are."""
    arguments = batch(sizes, 4, 2, 16, 16, extra_rows=1)
    ends = torch.randint(0, 45, (arguments["q"].shape[0],), dtype=torch.int32)
    ends[0], ends[-2] = 0, 45
    check(arguments, ends=ends, window=window, alibi_slopes=torch.rand(4) * 0.1)
    check(arguments, ends=ends, window=window, sinks=torch.randn(4))


def test_more_rows_than_keys() -> None:
    arguments = batch([(0, 9), (0, 0), (0, 3)], 4, 2, 16, 16)
    starts = torch.tensor([0, 20, 21, 22], dtype=torch.int32)
    q, ends = torch.randn(22, 4, 16), torch.tensor([9] * 20 + [0, 3], dtype=torch.int32)
    check({**arguments, "q": q, "query_starts": starts}, ends=ends)


@pytest.mark.parametrize(("heads", "dim", "v_dim"), [(16, 576, 512), (20, 24, 16), (4, 48, 32), (3, 40, 20)])
def test_values_inside_the_keys(heads: int, dim: int, v_dim: int) -> None:
    arguments = batch([(1, 50), (7, 20), (1, 1)], heads, 1, dim, v_dim, 16)
    arguments["v_cache"] = arguments["k_cache"][..., :v_dim]
    check(arguments)
    check(batch([(1, 50)], heads, 1, dim, v_dim, 16) | {})


def test_freed_blocks_before_the_window() -> None:
    arguments = batch([(1, 50), (4, 45)], 4, 2, 16, 16, 8)
    arguments["block_table"][:, :4] = -1  # keys 0 .. 31
    check(arguments, window=10)


def test_keys_of_a_smaller_type() -> None:
    """A cache of 8-bit floats is widened as it is read."""
    arguments = batch([(1, 40), (12, 33)], 4, 2, 16, 16)
    kept = {name: arguments[name].nan_to_num().to(torch.float8_e4m3fn) for name in ("k_cache", "v_cache")}
    wide = {name: cache.float() for name, cache in kept.items()}
    options = {"scale": 0.25, "max_query_len": 12}
    got = attention.paged_attention(**{**arguments, **kept}, **options)
    want = attention.paged_attention_reference(**{**arguments, **wide}, **options)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
