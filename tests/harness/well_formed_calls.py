"""Well-formed calls of every op of ops/schemas.txt, which raw_calls.py makes as they are and with one thing wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ops = torch.ops.megatron_samoe
Arguments = tuple[Any, ...]


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, 0.5, dtype=torch.float32).to(dtype)


def _i(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _int32(*shape: int) -> Tensor:
    return _i(*shape, dtype=torch.int32)


def _expert_stack(E: int, H: int, F: int, kind: torch.dtype = torch.float32) -> Arguments:
    """Index1 to gated, of gated experts with all that is optional."""
    scales = (floats(E, 2, F), floats(E, H)) if kind == torch.int8 else (None, None)
    w1, w2 = floats(E, 2, F, H, dtype=kind), floats(E, H, F, dtype=kind)
    return _i(E), _i(E), w1, scales[0], floats(E, 2, F), w2, scales[1], floats(E, H), floats(E), floats(E), True


def _router(E: int, H: int) -> Arguments:
    """Router to mixing_bias."""
    return floats(E, H), floats(1), floats(E), torch.ones(E), floats(2, H), floats(2)


def _norm(H: int) -> Arguments:
    return floats(H), floats(H), 1e-5, True


def _plan(T: int = 2, H: int = 8, V: int = 5, P: int = 16, R: int = 4, N: int = 1) -> int:
    norm = _norm(H)
    number = ops.decode_plan(
        floats(V, H),
        None,
        floats(P, H),
        floats(V, H),
        None,
        *norm,
        floats(P, R),
        floats(P, R),
        floats(T, H),
        floats(4096),
        N,
    )
    close_later(ops.decode_plan_close, number)
    return number


def _plan_with_layer(T: int = 2, H: int = 8, E: int = 2, V: int = 5, N: int = 1) -> int:
    number = _plan(T, H, V, N=N)
    ops.decode_plan_attention(number, *_decode_plan_attention()[1:])
    ops.decode_plan_mlp(number, *_decode_plan_mlp(H=H, E=E)[1:])
    return number


def _communicator(world: int = 1) -> int:
    handle = ops.shm_create(0, world, 0, 1.0)
    close_later(ops.all_to_all_close, handle)
    return handle


_to_close: list[tuple[Callable[[int], None], int]] = []


def close_later(close: Callable[[int], None], number: int) -> None:
    """Has what a call made closed when the calls that use it have ended."""
    _to_close.append((close, number))


def close_all() -> None:
    while _to_close:
        close, number = _to_close.pop()
        close(number)


def _decode_attention(
    T: int, H: int, G: int, D: int, P: int, pages: int
) -> tuple[Arguments, Arguments, Arguments, Arguments]:
    qkv = floats(G, 4, D, H), None, floats(G * 4 * D), [floats(D) for _ in range(4)]
    return (
        qkv,
        (floats(16, 4), floats(16, 4)),
        (_int32(T), _int32(T), _int32(1, pages)),
        (floats(P, G, D, 16), floats(P, G, 16, D)),
    )


def _decode_attention_block(T: int = 2, H: int = 8, G: int = 1, D: int = 4, P: int = 2, S: int = 4096) -> Arguments:
    qkv, angles, places, cache = _decode_attention(T, H, G, D, P, 1)
    return floats(T, H), *_norm(H), *qkv, *angles, *places, *cache, floats(H, G * 2 * D), None, floats(H), floats(S)


def _decode_plan_attention(G: int = 1, D: int = 4, P: int = 2) -> Arguments:
    qkv, _, _, cache = _decode_attention(2, 8, G, D, P, 1)
    return _plan(), *_norm(8), *qkv, *cache, floats(8, G * 2 * D), None, floats(8)


def _decode_plan_mlp(H: int = 8, F: int = 6, E: int = 2) -> Arguments:
    number = _plan(H=H)
    if H == 8:
        ops.decode_plan_attention(number, *_decode_plan_attention_of_no_plan())
    return number, *_norm(H), *_router(E, H), True, False, 1, 1, 1.0, 1, *_expert_stack(E, H, F)


def _decode_plan_attention_of_no_plan() -> Arguments:
    return _decode_plan_attention()[1:]


def _decode_linear(T: int, K: int, N: int, kind: torch.dtype, tokens: int) -> Arguments:
    ops.set_products("fp32", tokens, tokens)
    return (
        floats(T, K),
        floats(N, K, dtype=kind),
        floats(N) if kind == torch.int8 else None,
        floats(N),
        floats(T, N),
        False,
    )


def _decode_experts(T: int, K: int, H: int, F: int, E: int, kind: torch.dtype, tokens: int) -> Arguments:
    """By whole products from a number of tokens on."""
    ops.set_products("fp32", tokens, tokens)
    stack = _expert_stack(E, H, F, kind)
    return floats(T, H), _i(T, K), floats(T, K), *stack, floats(T, K, H), True, floats(T, H), floats(4096)


def _grouped_mlp(E: int = 3, H: int = 3, F: int = 4, R: int = 2, dtype: torch.dtype = torch.float32) -> Arguments:
    weights = (floats(*shape, dtype=dtype) for shape in ((E, 2, F, H), (E, H, F), (E, 2, F), (E, H)))
    return floats(E * R, H, dtype=dtype), [R] * E, *weights, True, True


def _grouped_mlp_backward(
    E: int = 3, H: int = 3, F: int = 4, R: int = 2, dtype: torch.dtype = torch.float32
) -> Arguments:
    x, rows, w1, w2, b1, b2, _, _ = _grouped_mlp(E, H, F, R, dtype)
    grads = (torch.zeros(w.shape) for w in (w1, w2, b1, b2))
    return x.clone(), x, floats(E * R, 2 * F, dtype=dtype), rows, w1, w2, b1, True, *grads


def _gather_samples(D: int = 2, N: int = 1, S: int = 3, W: int = 4) -> Arguments:
    starts = torch.zeros(N + 1, 2, dtype=torch.int64)
    starts[1:, 1] = torch.arange(1, N + 1) * (W - 1) if W * N < 1 << 20 else 0
    return _i(4096, dtype=torch.uint8), _i(D), _int32(D) + 64, _int32(S), starts, [0] * N, 4, _i(N, W)


#: Types of weights, and the tokens from which whole products are taken.
_WAYS_OF_PRODUCTS = ((torch.float32, 1 << 62), (torch.bfloat16, 0), (torch.int8, 1 << 62))
_ONE_PART = [0], [16], [0], [16]
#: Well-formed calls, by their op; those of one op differ in their way through it. The letters are sizes.
CALLS: dict[str, tuple[Callable[..., Arguments], ...]] = {
    "instruction_set": (lambda: (),),
    "topk_gate": (lambda T=6, E=4, K=2, G=2: (floats(T, E), K, True, False, G, floats(T, E)),),
    "topk_gate_backward": (
        lambda T=6, E=4, K=2, G=2: (
            floats(T, E), floats(T), floats(T, K), _i(T, K), floats(T, K), floats(G, E), floats(), True, False, G,
        ),
        lambda T=6, E=4, K=2, G=2: (
            floats(T, E), floats(T), floats(T, K), _i(T, K), floats(T, K), floats(G, E), floats(), False, True, G,
        ),
    ),
    "make_permutation": (lambda T=3, K=2, E=4: (_i(T, K), E),),
    "permute": (lambda T=3, H=5, N=4, K=2: (floats(T, H), _i(N), K),),
    "unpermute": (lambda N=4, H=5, T=3, K=2: (floats(N, H), floats(T, K), _i(T, K)),),
    "unpermute_backward": (lambda N=4, H=5, T=3, K=2: (floats(T, H), floats(N, H), floats(T, K), _i(N), _i(T, K)),),
    "combine_banks": (
        lambda L=3, G=2, P=4, N=8: (floats(L, G, P), floats(P, G, N), floats(L, G, N)),
        lambda L=3, G=2, P=9, N=8: (floats(L, G, P), floats(P, G, N), floats(L, G, N, dtype=torch.bfloat16)),
    ),
    "combine_banks_backward": (lambda L=3, G=2, P=4, N=8: (floats(L, G, P), floats(P, G, N), floats(L, G, N), floats(P, G, N)),),
    "cross_entropy_parts": (lambda T=3, V=20: (floats(T, V), _i(T), 0),),
    "cross_entropy_backward": (lambda T=3, V=20: (floats(T, V), _i(T), 0, floats(T), floats(T)),),
    "grouped_mlp": (_grouped_mlp, lambda E=3, H=3, F=4, R=2: _grouped_mlp(E, H, F, R, torch.bfloat16)),
    "grouped_mlp_backward": (
        _grouped_mlp_backward, lambda E=3, H=3, F=4, R=2: _grouped_mlp_backward(E, H, F, R, torch.bfloat16),
    ),
    "swiglu": (lambda R=3, F=4: (floats(R, 2 * F),),),
    "swiglu_backward": (lambda R=3, F=4: (floats(R, F), floats(R, 2 * F)),),
    "adamw": (
        lambda N=5, runs=2: (
            [floats(N) for _ in range(runs)], [floats(N, dtype=torch.bfloat16) for _ in range(runs)],
            *([floats(N) for _ in range(runs)] for _ in range(3)), 0.1, 0.9, 0.95, 1e-8, 0.0, 1, 1.0,
        ),
    ),
    "decode_linear": tuple(
        lambda T=3, K=8, N=5, kind=kind, tokens=tokens: _decode_linear(T, K, N, kind, tokens)
        for kind, tokens in _WAYS_OF_PRODUCTS
    ),
    "decode_norm": (lambda T=3, H=8: (floats(T, H), *_norm(H), floats(T, H)),),
    "decode_attention_block": (_decode_attention_block,),
    "decode_experts": tuple(
        lambda T=3, K=2, H=8, F=6, E=2, kind=kind, tokens=tokens: _decode_experts(T, K, H, F, E, kind, tokens)
        for kind, tokens in _WAYS_OF_PRODUCTS
    ),
    "decode_route": (
        lambda T=3, H=8, E=4, K=2: (
            floats(T, H), *_norm(H), *_router(E, H), True, False, 2, 1, 1.0, floats(T, H), _i(T, K), floats(T, K), floats(T), floats(4096),
        ),
    ),
    "decode_moe_block": (
        lambda T=3, H=8, E=2, F=6, K=2: (
            floats(T, H), *_norm(H), floats(E, H), K, True, False, *_expert_stack(E, H, F), floats(4096),
        ),
    ),
    "decode_plan": (
        lambda T=2, H=8, V=5, P=16, R=4, N=1: (
            floats(V, H), None, floats(P, H), floats(V, H), None, *_norm(H), floats(P, R), floats(P, R), floats(T, H), floats(4096), N,
        ),
    ),
    "decode_plan_attention": (_decode_plan_attention,),
    "decode_plan_mlp": (_decode_plan_mlp,),
    "decode_plan_shared": (lambda E=1, F=6: (_plan_with_layer(), *_expert_stack(E, 8, F)),),
    "decode_plan_step": (
        lambda T=2, S=1, P=1, N=1: (
            _plan_with_layer(N=1), _i(T), _int32(T), _int32(T), _int32(S, P), _i(N), floats(N, 5),
        ),
    ),
    "decode_plan_close": (lambda: (_plan(),),),
    "combine_rows": (
        lambda N=3, K=8: ([floats(N, K) for _ in range(2)], [None] * 2, floats(2), floats(N, K), None),
        lambda N=3, K=8: (
            [floats(N, K, dtype=torch.int8) for _ in range(2)], [floats(N) for _ in range(2)], floats(2),
            floats(N, K, dtype=torch.int8), floats(N),
        ),
    ),
    "newton_schulz": (lambda B=2, M=3, N=5: (floats(B, M, N), 5, 3, 3.0, -4.0, 2.0, 1e-7, 1.0, floats(B, M, N)),),
    "has_bf16_product": (lambda: (),),
    "set_products": (lambda: ("fp32", 4, 4),),
    "build_sample_index": (lambda D=2, S=3, N=2: (_int32(D) + 9, _int32(S), 4, _i(N + 1, 2)),),
    "build_blending_index": (
        lambda D=2, N=5: (floats(D, dtype=torch.float64), _i(D) + 8, _i(N, dtype=torch.int16), _i(N)),
    ),
    "gather_samples": (_gather_samples,),
    "shuffle_legacy": (lambda N=9: (_i(N), _int32(624), 624),),
    "all_to_all_address": (lambda: (_communicator(),),),
    "all_to_all_connect": (lambda: (_communicator(), [""]), lambda: (_communicator(2), ["", "x"])),
    "all_to_all_start": (
        lambda N=4: (_communicator(), floats(N), floats(N), [], [4 * N], [], [4 * N], 1.0),
        lambda: (_communicator(), floats(4), floats(4), *_ONE_PART, 1.0),
        lambda: (_communicator(2), floats(8), floats(8), [], [16, 16], [], [16, 16], 0.1),
    ),
    "all_to_all_finish": (lambda: (_communicator(), 1, 0.1),),
    "all_to_all_abort": (lambda: (_communicator(), "so"),),
    "all_to_all_close": (lambda: (_communicator(),),),
    "shm_create": (lambda: (0, 1, 0, 1.0),),
    "shm_stage_rows": (lambda T=3, H=8, N=4: (_communicator(), floats(T, H), _i(N), 2, 1.0),),
    "nccl_problem": (lambda: (),),
    "nccl_library": (lambda: (),),
    "nccl_create": (lambda: (0, 1, torch.device("cpu"), 0, 1.0),),
    "nccl_start_even": (lambda N=4: (_communicator(), floats(N), floats(N)),),
    "nccl_start_hops": (
        lambda N=4: (_communicator(), floats(N), floats(N), floats(N), [0, 0, 0, 16], [0, 0, 0, 16], [0, 1, 0, 16], [0, 1, 0, 16]),
    ),
    "nccl_use_staging": (lambda N=4: (_communicator(), floats(N), 0.1),),
    "nccl_enqueue": (lambda: (_communicator(), 0.1),),
    "nccl_position": (lambda: (_communicator(),),),
}  # fmt: skip
