import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelport.kernels import attention, cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def batch(lengths: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, v_dim: int, block_size: int,
          dtype: torch.dtype = torch.float32, extra_rows: int = 0) -> dict[str, torch.Tensor]:  # fmt: skip
    """lengths: (queries, keys) of each sequence. Blocks lie scattered; slots nobody wrote hold NaN."""
    needed = [-(-keys // block_size) for _, keys in lengths]
    width = max(needed, default=0) + 1
    blocks = sum(needed) + 2
    order = torch.randperm(blocks).int()
    table = torch.full((len(lengths), width), -12345, dtype=torch.int32)
    k_cache = torch.full((blocks, kv_heads, block_size, dim), float("nan"), dtype=dtype)
    v_cache = torch.full((blocks, kv_heads, block_size, v_dim), float("nan"), dtype=dtype)
    used = 0
    for i, (_, keys) in enumerate(lengths):
        mine = order[used : used + needed[i]]
        table[i, : needed[i]] = mine
        used += needed[i]
        for j in range(keys):
            k_cache[mine[j // block_size], :, j % block_size] = torch.randn(kv_heads, dim).to(dtype)
            v_cache[mine[j // block_size], :, j % block_size] = torch.randn(kv_heads, v_dim).to(dtype)
    starts = torch.tensor([0, *(q for q, _ in lengths)]).cumsum(0).int()
    fused = torch.randn(int(starts[-1]) + extra_rows, (heads + 1) * dim).to(dtype)
    return {
        "q": fused[:, dim:].view(-1, heads, dim),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": table,
        "query_starts": starts,
        "seq_lens": torch.tensor([keys for _, keys in lengths], dtype=torch.int32),
    }


def check(arguments: dict, **options) -> None:
    options.setdefault("scale", arguments["q"].shape[2] ** -0.5)
    options.setdefault("max_query_len", 1 << 20)
    got = attention.paged_attention(**arguments, **options)
    want = attention.paged_attention_reference(**arguments, **options)
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@st.composite
def lengths(draw: st.DrawFn) -> tuple[int, int]:
    queries = draw(st.one_of(st.just(1), st.integers(0, 40)))
    return queries, queries + draw(st.integers(0, 150))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(lengths(), max_size=4), st.integers(1, 3), st.integers(1, 10),
    st.sampled_from((4, 16, 24, 33, 64, 80)), st.sampled_from((8, 16, 40, 64)), st.sampled_from((1, 5, 16, 32)),
    st.sampled_from(DTYPES), st.sampled_from((0, 1, 7, 70)), st.sampled_from((0.0, 5.0)), st.booleans(), st.booleans(),
)  # fmt: skip
def test_against_reference(
    sizes: list[tuple[int, int]], kv_heads: int, group: int, dim: int, v_dim: int, block_size: int,
    dtype: torch.dtype, window: int, softcap: float, alibi: bool, sink: bool,
) -> None:  # fmt: skip
    heads = kv_heads * group
    check(
        batch(sizes, heads, kv_heads, dim, v_dim, block_size, dtype, extra_rows=2), window=window, softcap=softcap,
        alibi_slopes=torch.rand(heads) * 0.1 if alibi else None, sinks=torch.randn(heads) if sink else None,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_contexts_are_cut_and_joined(dtype: torch.dtype) -> None:
    check(batch([(1, 1500), (5, 900), (1, 256), (1, 257), (200, 700)], 6, 2, 64, 64, 16, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(dtype: torch.dtype) -> None:
    arguments = batch([(1, 600), (30, 90)], 4, 2, 64, 64, 16, dtype)
    arguments["q"] *= 30
    check(arguments, sinks=torch.tensor([0.0, 100.0, -100.0, 5.0]))


def test_row_does_not_depend_on_its_company() -> None:
    together = batch([(1, 700), (40, 90), (1, 30), (3, 300)], 6, 2, 64, 64, 16)
    options = {"scale": 0.125, "max_query_len": 40}
    whole = attention.paged_attention(**together, **options)
    for i in range(4):
        a, b = together["query_starts"][i : i + 2].tolist()
        alone = {
            **together,
            "q": together["q"][a:b],
            "block_table": together["block_table"][i : i + 1],
            "query_starts": torch.tensor([0, b - a], dtype=torch.int32),
            "seq_lens": together["seq_lens"][i : i + 1],
        }
        torch.testing.assert_close(attention.paged_attention(**alone, **options), whole[a:b], rtol=1e-6, atol=1e-6)


def test_caches_that_share_one_tensor() -> None:
    arguments = batch([(1, 40), (20, 33)], 4, 2, 32, 32, 16)
    both = torch.stack((arguments["k_cache"], arguments["v_cache"]), 1)
    check({**arguments, "k_cache": both[:, 0], "v_cache": both[:, 1]})


def test_wide_table_view() -> None:
    arguments = batch([(1, 40), (20, 33)], 4, 2, 32, 32, 16)
    table = torch.full((2, 50), 99999, dtype=torch.int32)
    table[:, : arguments["block_table"].shape[1]] = arguments["block_table"]
    check({**arguments, "block_table": table[:, :5]})


def test_freed_blocks_before_the_window() -> None:
    arguments = batch([(1, 100), (4, 90)], 4, 2, 32, 32, 16)
    arguments["block_table"][:, :4] = -1  # keys 0 .. 63
    check(arguments, window=20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "window"), [([(1, 100), (4, 90)], 20), ([(70, 300), (1, 700), (9, 65)], 33)])
def test_nothing_before_the_window_is_read(sizes: list[tuple[int, int]], window: int, dtype: torch.dtype) -> None:
    arguments = batch(sizes, 6, 2, 32, 32, 16, dtype)
    clean = attention.paged_attention(**arguments, scale=0.2, max_query_len=70, window=window)
    for i, (queries, keys) in enumerate(sizes):
        low = max(0, keys - queries - window + 1)  # the first key that the sequence's first row sees
        table = arguments["block_table"][i]
        arguments["k_cache"][table[low // 16], :, : low % 16] = float("nan")
        arguments["v_cache"][table[low // 16], :, : low % 16] = float("nan")
        table[: low // 16] = torch.randint(-(1 << 31), 0, (low // 16,))
    arguments["block_table"][0, 0] = 1 << 30
    for attend in (attention.paged_attention, attention.paged_attention_reference):
        got = attend(**arguments, scale=0.2, max_query_len=70, window=window)
        torch.testing.assert_close(got, clean, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def taken(arguments: dict, **options) -> None:
    """As `check`, and the compiled kernel must not leave the call to the reference."""
    if cpu.lib is not None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "paged_attention_reference", None)
            attention.paged_attention(**arguments, **{"scale": 1.0, "max_query_len": 1 << 20, **options})
    check(arguments, **options)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(lengths(), max_size=4), st.randoms(use_true_random=False), st.sampled_from((1, 3, 9)),
    st.sampled_from((24, 33, 64)), st.sampled_from(DTYPES), st.sampled_from((0, 1, 7, 70)), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_ends(
    sizes: list[tuple[int, int]], random, group: int, dim: int, dtype: torch.dtype, window: int, alibi: bool, sink: bool
) -> None:
    arguments = batch(sizes, 2 * group, 2, dim, dim, 16, dtype, extra_rows=1)
    # from no key at all to more than there are
    ends = [random.randint(0, keys + 3) for queries, keys in sizes for _ in range(queries)]
    taken(
        arguments, ends=torch.tensor([*ends, 5], dtype=torch.int32), window=window,
        alibi_slopes=torch.rand(2 * group) * 0.1 if alibi else None, sinks=torch.randn(2 * group) if sink else None,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_attention(dtype: torch.dtype) -> None:
    """Every row sees all keys, which may be fewer than the rows, or none."""
    keys, queries = [40, 700, 3, 0], [20, 1, 130, 2]
    arguments = batch([(0, n) for n in keys], 4, 2, 64, 64, 16, dtype)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    q = torch.randn(int(starts[-1]), 4, 64).to(dtype)
    ends = torch.repeat_interleave(arguments["seq_lens"], torch.tensor(queries)).int()
    arguments = {**arguments, "q": q, "query_starts": starts}
    taken(arguments, ends=ends)
    got = attention.paged_attention(**arguments, ends=ends, scale=0.125, max_query_len=130)
    for i, (a, b) in enumerate(zip(starts.tolist(), starts.tolist()[1:], strict=False)):
        blocks = arguments["block_table"][i, : -(-keys[i] // 16)].long()
        k, v = (arguments[name][blocks].transpose(1, 2).flatten(0, 1)[: keys[i]].float().repeat_interleave(2, 1)
                for name in ("k_cache", "v_cache"))  # fmt: skip
        weights = (torch.einsum("qhd,khd->hqk", q[a:b].float(), k) * 0.125).softmax(-1)
        want = torch.einsum("hqk,khd->qhd", weights, v).to(dtype)
        torch.testing.assert_close(got[a:b], want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bidirectional_span(dtype: torch.dtype) -> None:
    """Rows of an image see to the image's end; text stays causal, so that changing its later keys changes nothing."""
    sizes = [(90, 120), (1, 50)]
    arguments = batch(sizes, 4, 2, 64, 64, 16, dtype)
    ends = torch.cat((torch.arange(31, 121), torch.tensor([50]))).int()
    causal = attention.paged_attention(**arguments, scale=0.125, max_query_len=90)
    options = {"scale": 0.125, "max_query_len": 90}
    same = attention.paged_attention(**arguments, ends=ends, **options)
    torch.testing.assert_close(same, causal, rtol=0, atol=0)
    ends[10:60] = 90
    taken(arguments, ends=ends)
    taken(arguments, ends=ends, window=40)
    changed = attention.paged_attention(**arguments, ends=ends, **options)
    outside = torch.ones(91, dtype=torch.bool)
    outside[10:59] = False
    torch.testing.assert_close(changed[outside], causal[outside], rtol=1e-5, atol=1e-5)
    assert (changed[10:59] - causal[10:59]).abs().amax((1, 2)).min() > 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim", "v_dim"), [(16, 576, 512), (128, 576, 512), (4, 96, 64), (20, 72, 40)])
def test_values_inside_the_keys(heads: int, dim: int, v_dim: int, dtype: torch.dtype) -> None:
    arguments = batch([(1, 300), (7, 40), (1, 1)], heads, 1, dim, v_dim, 16, dtype)
    arguments["v_cache"] = arguments["k_cache"][..., :v_dim]
    taken(arguments)


def test_other_dtypes_fall_back() -> None:
    arguments = batch([(1, 40), (20, 33)], 4, 2, 32, 32, 16)
    check({**arguments, "seq_lens": arguments["seq_lens"].long()})


def test_refusals() -> None:
    arguments = batch([(1, 40), (20, 33)], 4, 2, 32, 32, 16)

    def refused(match: str, **changes: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=match):
            attention.paged_attention(**{**arguments, **changes}, scale=1.0, max_query_len=20)

    refused("head_dim", q=arguments["q"][..., :16])
    refused("sequences", query_starts=arguments["query_starts"][:2])
    with pytest.raises(ValueError, match="sinks"):
        attention.paged_attention(**arguments, scale=1.0, max_query_len=20, sinks=torch.randn(3))
    with pytest.raises(ValueError, match="ends"):
        attention.paged_attention(**arguments, scale=1.0, max_query_len=20, ends=torch.ones(3, dtype=torch.int32))
    if cpu.lib is None:
        return
    outside = arguments["block_table"].clone()
    outside[1, 0] = arguments["k_cache"].shape[0]
    refused("block_table", block_table=outside)
    refused("block_table", block_table=arguments["block_table"][:, :2].contiguous())
    refused("query_starts", query_starts=arguments["query_starts"] + 1)
    refused("queries", seq_lens=torch.tensor([40, 19], dtype=torch.int32))
