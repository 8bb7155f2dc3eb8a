"""Mixers against those of transformers: whole, in pieces, among other sequences; states that are used again."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.modeling import Mamba2Mixer, MambaMixer, RMSNorm

HIDDEN, INNER, STATES, SLOTS = 32, 64, 6, 5


def mamba(bias: bool) -> tuple[nn.Module, nn.Module]:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer as Theirs

    cfg = MambaConfig(hidden_size=HIDDEN, state_size=STATES, time_step_rank=3, use_bias=bias, use_conv_bias=not bias)
    return Theirs(cfg, 0), MambaMixer(HIDDEN, INNER, STATES, 4, 3, bias=bias, conv_bias=not bias)


def jamba(bias: bool) -> tuple[nn.Module, nn.Module]:
    from transformers import JambaConfig
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer

    cfg = JambaConfig(
        hidden_size=HIDDEN,
        mamba_d_state=STATES,
        mamba_dt_rank=3,
        mamba_d_conv=3,
        mamba_proj_bias=bias,
        rms_norm_eps=1e-5,
    )
    ours = MambaMixer(HIDDEN, INNER, STATES, 3, 3, bias=bias, norm=lambda size: RMSNorm(size, 1e-5))
    return JambaMambaMixer(cfg, 0), ours


def mamba2(bias: bool) -> tuple[nn.Module, nn.Module]:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as Theirs

    groups, limits = (1, (0.0, float("inf"))) if bias else (2, (0.3, 0.9))
    cfg = Mamba2Config(
        hidden_size=HIDDEN, state_size=STATES, num_heads=4, head_dim=16, n_groups=groups, time_step_limit=limits,
        use_bias=bias, use_conv_bias=not bias, chunk_size=8, layer_norm_epsilon=1e-3,
    )  # fmt: skip
    ours = Mamba2Mixer(
        HIDDEN, 4, 16, STATES, 4, groups=groups, eps=1e-3, dt_limits=limits, bias=bias, conv_bias=not bias
    )
    return Theirs(cfg, 0), ours


@pytest.fixture(
    params=[(kind, bias) for kind in (mamba, jamba, mamba2) for bias in (False, True)],
    ids=lambda p: f"{p[0].__name__}-{p[1]}",
)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """Theirs and ours with the same weights, which forget slowly, and states that hold anything."""
    kind, bias = request.param
    torch.manual_seed(0)
    theirs, ours = kind(bias)
    for name, parameter in theirs.named_parameters():
        matrix = parameter.dim() > 1
        nn.init.normal_(parameter, 0.0 if matrix else 0.4, parameter.shape[-1] ** -0.5 if matrix else 0.2)
        if name == "A_log":
            nn.init.uniform_(parameter, -4.0, 0.0)
    ours.load_state_dict(theirs.state_dict())
    for module in ours.modules():
        if hasattr(module, "pack"):
            module.pack()
    spec = ours.cache_spec
    ours.attach(
        *(
            torch.full((SLOTS, *shape), float("nan"), dtype=dtype or torch.float32)
            for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)
        )
    )
    return theirs.eval(), ours


def batch(rows: list[tuple[int, int]], slots: list[int]) -> Batch:
    """Sequences that compute positions [first, end) now."""
    starts = torch.tensor([0, *itertools.accumulate(end - first for first, end in rows)], dtype=torch.int32)
    return Batch(
        positions=torch.cat([torch.arange(first, end) for first, end in rows]),
        query_starts=starts,
        seq_lens=torch.tensor([end for _, end in rows], dtype=torch.int32),
        pages=(),
        state_slots=torch.tensor(slots, dtype=torch.int32),
        max_query_len=max(end - first for first, end in rows),
    )


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [(0, 70), (0, 1, 2, 3, 40, 70), (0, 69, 70)])
@torch.inference_mode()
def test_pieces_are_the_whole_of_transformers(pair, cuts) -> None:
    theirs, ours = pair
    x = torch.randn(70, HIDDEN)
    found = [ours(x[a:b], batch([(a, b)], [3])) for a, b in itertools.pairwise(cuts)]
    close(torch.cat(found), theirs(x[None])[0])


@torch.inference_mode()
def test_sequences_side_by_side_and_states_used_again(pair) -> None:
    theirs, ours = pair
    first, second, third = (torch.randn(n, HIDDEN) for n in (40, 9, 12))
    one = ours(torch.cat((first[:39], second[:1])), batch([(0, 39), (0, 1)], [4, 0]))
    two = ours(torch.cat((second[1:], first[39:])), batch([(1, 9), (39, 40)], [0, 4]))
    close(torch.cat((one[:39], two[8:])), theirs(first[None])[0])
    close(torch.cat((one[39:], two[:8])), theirs(second[None])[0])
    close(ours(third, batch([(0, 12)], [4])), theirs(third[None])[0])  # where the first sequence was


@torch.inference_mode()
def test_a_residual_is_added(pair) -> None:
    _, ours = pair
    x, residual = torch.randn(5, HIDDEN), torch.randn(5, HIDDEN)
    close(ours(x, batch([(0, 5)], [0]), residual), residual + ours(x, batch([(0, 5)], [0])))


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="5 Mamba heads"):
        Mamba2Mixer(HIDDEN, 5, 16, STATES, 4, groups=2)
