"""The C++ of kernels/, compiled at first use and called on tensors: one pass where PyTorch needs five to fifteen.

Nothing has to be installed for it: where a C++ compiler is found (`$CXX`, c++, g++, clang++) they are compiled once
(about 10 s) for the processor at hand and kept in isofusion's cache; where there is none, PyTorch's operations compute
the same, slower. `ISOFUSION_KERNELS` is auto, torch (never), or native (an error where it cannot be had). Results of
the two agree to rounding, not to the bit, so env.json of a run says which ran.

T slots, D width, F feed-forward hidden, H heads, K head_dim, V vocabulary; tensors on the CPU, float32 or bf16
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, library

from isofusion.data import cache
from isofusion.errors import InputError
from isofusion.model.kernel_build import Unavailable, build

CHOICES = ("auto", "torch", "native")

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "rms_norm": (_P, _P, _P, _P, _L, _L, _F, _I),
    "rms_norm_backward": (_P, _P, _P, _P, _P, _P, _P, _L, _L, _I),
    "attention": (_P, _P, _P, _P, _P, _P, _P, _P, _L, _L, _L, _L, _F, _I),
    "attention_backward": (_P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _L, _L, _L, _L, _F, _I),
    "swiglu": (_P, _P, _L, _L, _I),
    "swiglu_backward": (_P, _P, _P, _L, _L, _I),
    "route": (_P, _P, _P, _L, _L, _L, _I),
    "route_backward": (_P, _P, _P, _P, _P, _P, _L, _L, _L, _I),
    "combine": (_P, _P, _P, _P, _L, _L, _L, _I),
    "combine_backward": (_P, _P, _P, _P, _P, _P, _L, _L, _L, _I),
    "collect": (_P, _P, _P, _L, _L, _L, _I),
    "head_loss": (_P, _P, _P, _L, _L, _I),
    "adamw": (_P, _P, _P, _P, _L, _F, _F, _F, _F, _F, _F, _F, _I),
    **dict.fromkeys(("product", "product_transposed", "product_of_rows"), (_P, _P, _P, _P, _L, _L, _L, _I)),
    "product_transposed_plus": (_P, _P, _P, _P, _P, _L, _L, _L, _I),
}
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
PRODUCTS = ("product", "product_transposed", "product_transposed_plus", "product_of_rows")
"""On processors with avx512_bf16 alone."""
BF16_ONLY = ("head_loss", *PRODUCTS)
F32_ONLY = ("adamw",)


def load(folder: Path) -> ctypes.CDLL:
    """The kernels, built where needed. Raises Unavailable."""
    path = build(folder)
    try:
        kernels = ctypes.CDLL(str(path))
    except OSError:  # empty or cut short: what a power cut leaves of a file
        try:
            path.unlink(missing_ok=True)
            kernels = ctypes.CDLL(str(build(folder)))
        except OSError as error:
            raise Unavailable(f"{folder}: {error}") from None
    for name, arguments in SIGNATURES.items():
        if name in PRODUCTS and not hasattr(kernels, "has_products"):
            continue
        for suffix in ("bf16",) if name in BF16_ONLY else ("f32",) if name in F32_ONLY else SUFFIX.values():
            function = getattr(kernels, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, None
    kernels.sort_choices_i64.argtypes, kernels.sort_choices_i64.restype = (_P,) * 7 + (_L,) * 3, None
    kernels.sum_of_squares.argtypes, kernels.sum_of_squares.restype = (_P, _L, _I), ctypes.c_double
    return kernels


@lru_cache(maxsize=1)
def _found() -> tuple[ctypes.CDLL | None, str]:
    """The kernels, or None and why not."""
    asked = os.environ.get("ISOFUSION_KERNELS") or "auto"
    if asked not in CHOICES:
        raise InputError(f"ISOFUSION_KERNELS={asked}: must be one of {', '.join(CHOICES)}")
    if asked == "torch":
        return None, "ISOFUSION_KERNELS=torch"
    try:
        return load(cache.root() / "kernels"), ""
    except (Unavailable, RuntimeError) as error:  # RuntimeError: there is no home folder
        if asked == "native":
            raise InputError(f"ISOFUSION_KERNELS=native, but {error}; mend that, or set it to auto") from None
        return None, str(error)


def describe() -> str:
    """For env.json: "native", or "torch" and why."""
    kernels, why = _found()
    return "native" if kernels is not None else f"torch ({why})"


@torch.compiler.assume_constant_result
def available() -> bool:
    return _found()[0] is not None


@torch.compiler.assume_constant_result
def multiplies() -> bool:
    """Whether products of bf16 rows with float32 weights are native too; with AMX a library is faster."""
    return available() and hasattr(_found()[0], "has_products") and not torch.cpu._is_amx_tile_supported()


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels can take these tensors: plain ones on the CPU, float32 or bf16."""
    return all(_plain(x) and x.dtype in SUFFIX for x in tensors) and available()


def _plain(x: Tensor) -> bool:
    return x.device.type == "cpu" and (torch.compiler.is_compiling() or type(x) in (Tensor, torch.nn.Parameter))


def _call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    values = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    getattr(_found()[0], f"{name}_{SUFFIX[dtype]}")(*values, torch.get_num_threads())


_OPERATORS = library.Library("isofusion", "DEF")


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Call the function as it is, and under torch.compile as an operator that is not looked into. `fake`: its result's
    shape and precision from those of its inputs.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        _OPERATORS.define(name + schema)
        _OPERATORS.impl(name, function, "CPU")
        library.register_fake(f"isofusion::{name}", fake, lib=_OPERATORS)

        @wraps(function)
        def call(*arguments: Any) -> Any:
            chosen = getattr(torch.ops.isofusion, name) if torch.compiler.is_compiling() else function
            return chosen(*arguments)

        return call

    return decorate


@_operator(
    "(Tensor x, Tensor gain, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    lambda x, gain, eps, dtype: (torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[0])),
)
def rms_norm(x_TD: Tensor, gain_D: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float32 x -> normalised in `dtype`, and the scale of each slot, float32 [T]."""
    x_TD = x_TD.contiguous()
    slots, width = x_TD.shape
    out, scale = torch.empty(slots, width, dtype=dtype), torch.empty(slots, dtype=torch.float32)
    _call("rms_norm", dtype, x_TD, gain_D, out, scale, slots, width, eps)
    return out, scale


@_operator(
    "(Tensor grad, Tensor x, Tensor gain, Tensor scale, Tensor? plus=None) -> (Tensor, Tensor)",
    lambda grad, x, gain, scale, plus=None: (torch.empty_like(x), torch.empty_like(gain)),
)
def rms_norm_backward(
    grad_TD: Tensor, x_TD: Tensor, gain_D: Tensor, scale_T: Tensor, plus_TD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """-> gradients of x, with `plus_TD` (float32) added to it, and of the gain, float32."""
    grad_TD, x_TD = grad_TD.contiguous(), x_TD.contiguous()
    plus = plus_TD.contiguous() if plus_TD is not None else 0
    to_x, to_gain = torch.empty(x_TD.shape, dtype=torch.float32), torch.empty(gain_D.shape, dtype=torch.float32)
    _call("rms_norm_backward", grad_TD.dtype, grad_TD, x_TD, gain_D, scale_T, plus, to_x, to_gain, *x_TD.shape)
    return to_x, to_gain


@_operator(
    "(Tensor x, Tensor weight) -> Tensor",
    lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]),
)
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`: bf16 [T, in], float32 [out, in], rounded to bf16 on the way -> bf16 [T, out]. in is even."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    _product("product_transposed", x, weight.unsqueeze(0), out, _whole(x.shape[0]))
    return out


@_operator(
    "(Tensor x, Tensor weight, Tensor plus) -> Tensor",
    lambda x, weight, plus: torch.empty_like(plus),
)
def linear_plus(x: Tensor, weight: Tensor, plus: Tensor) -> Tensor:
    """`plus + x @ weight.T`, float32 [T, out]: as `linear`, but not rounded to bf16 before it is added."""
    plus = plus.contiguous()
    out = torch.empty(plus.shape, dtype=torch.float32)
    inputs = (x.contiguous(), weight.contiguous(), _whole(x.shape[0]), plus)
    _call("product_transposed_plus", x.dtype, *inputs, out, 1, *weight.shape)
    return out


@_operator(
    "(Tensor grad, Tensor x, Tensor weight, bool of_x) -> (Tensor, Tensor)",
    lambda grad, x, weight, of_x: (torch.empty_like(x) if of_x else x.new_empty(0), torch.empty_like(weight)),
)
def linear_backward(grad: Tensor, x: Tensor, weight: Tensor, of_x: bool) -> tuple[Tensor, Tensor]:
    """-> gradients of x (bf16; empty unless `of_x`) and of the weight (float32). in and out are even."""
    grad, x = grad.contiguous(), x.contiguous()
    to_x, to_weight = torch.empty_like(x) if of_x else x.new_empty(0), torch.empty(weight.shape, dtype=torch.float32)
    if of_x:
        _product("product", grad, weight.unsqueeze(0), to_x, _whole(x.shape[0]))
    _call("product_of_rows", x.dtype, grad, x, _whole(x.shape[0]), to_weight, 1, *weight.shape)
    return to_x, to_weight


@lru_cache(maxsize=256)
def _whole(rows: int) -> Tensor:
    """The edges of one group of rows; made once, for a step asks dozens of times."""
    return torch.tensor([0, rows])


def _product(name: str, x: Tensor, weight: Tensor, out: Tensor, edges: Tensor) -> None:
    _call(name, x.dtype, x.contiguous(), weight.contiguous(), edges, out, *weight.shape)


def grouped(x_GD: Tensor, weight_EDF: Tensor, edges: Tensor) -> Tensor:
    """bf16 rows, those of [edges[e], edges[e + 1]) times float32 weight e -> bf16 [G, F]. D and F are even."""
    out_GF = torch.empty(x_GD.shape[0], weight_EDF.shape[2], dtype=x_GD.dtype)
    _product("product", x_GD, weight_EDF, out_GF, edges)
    return out_GF


def grouped_backward(grad_GF: Tensor, x_GD: Tensor, weight_EDF: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """-> gradients of the rows (bf16) and of the weights (float32)."""
    grad_GF, x_GD = grad_GF.contiguous(), x_GD.contiguous()
    to_x, to_weight = torch.empty_like(x_GD), torch.empty(weight_EDF.shape, dtype=torch.float32)
    _product("product_transposed", grad_GF, weight_EDF, to_x, edges)
    _call("product_of_rows", x_GD.dtype, x_GD, grad_GF, edges, to_weight, *weight_EDF.shape)
    return to_x, to_weight


@_operator(
    "(Tensor qkv, Tensor gain_q, Tensor gain_k, Tensor phase, Tensor edges, Tensor last, float eps)"
    " -> (Tensor, Tensor)",
    lambda qkv, gain_q, *rest: (
        qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3),
        qkv.new_empty(qkv.shape[0], qkv.shape[1] // (3 * gain_q.shape[0]), dtype=torch.float32),
    ),
)
def attention(
    qkv: Tensor, gain_q: Tensor, gain_k: Tensor, phase: Tensor, edges: Tensor, last: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """QK-norm, RoPE and softmax(q k) v of a projection [T, 3D] -> [T, D], and the logsumexp of each score row, float32
    [T, H]. Documents are [edges[n], edges[n + 1]), i64; slot t sees its own up to last[t], i32. phase: complex64
    [T, 1, K/2].
    """
    qkv, head = qkv.contiguous(), gain_q.shape[0]
    slots, heads = qkv.shape[0], qkv.shape[1] // (3 * head)
    out, logsumexp = torch.empty(slots, heads * head, dtype=qkv.dtype), torch.empty(slots, heads, dtype=torch.float32)
    plan = (gain_q.contiguous(), gain_k.contiguous(), phase, edges, last)
    sizes = (edges.shape[0] - 1, heads, head, 2 * phase.stride(0))
    _call("attention", qkv.dtype, qkv, *plan, out, logsumexp, *sizes, eps)
    return out, logsumexp


@_operator(
    "(Tensor grad, Tensor qkv, Tensor gain_q, Tensor gain_k, Tensor phase, Tensor edges, Tensor last,"
    " Tensor logsumexp, float eps) -> (Tensor, Tensor, Tensor)",
    lambda grad, qkv, gain_q, *rest: (torch.empty_like(qkv), torch.empty_like(gain_q), torch.empty_like(gain_q)),
)
def attention_backward(
    grad: Tensor,
    qkv: Tensor,
    gain_q: Tensor,
    gain_k: Tensor,
    phase: Tensor,
    edges: Tensor,
    last: Tensor,
    logsumexp: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of the projection and, float32, of both gains."""
    qkv, grad, head = qkv.contiguous(), grad.contiguous(), gain_q.shape[0]
    plan = (gain_q.contiguous(), gain_k.contiguous(), phase, edges, last, logsumexp)
    out = torch.empty_like(qkv), torch.empty(head, dtype=torch.float32), torch.empty(head, dtype=torch.float32)
    sizes = (edges.shape[0] - 1, qkv.shape[1] // (3 * head), head, 2 * phase.stride(0))
    _call("attention_backward", qkv.dtype, grad, qkv, *plan, *out, *sizes, eps)
    return out


@_operator(
    "(Tensor gate_up) -> Tensor",
    lambda gate_up: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
)
def swiglu(gate_up_TF: Tensor) -> Tensor:
    gate_up_TF = gate_up_TF.contiguous()
    slots, hidden = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    out = torch.empty(slots, hidden, dtype=gate_up_TF.dtype)
    _call("swiglu", out.dtype, gate_up_TF, out, slots, hidden)
    return out


@_operator(
    "(Tensor grad, Tensor gate_up) -> Tensor",
    lambda grad, gate_up: torch.empty_like(gate_up),
)
def swiglu_backward(grad_TF: Tensor, gate_up_TF: Tensor) -> Tensor:
    grad_TF, gate_up_TF = grad_TF.contiguous(), gate_up_TF.contiguous()
    out = torch.empty_like(gate_up_TF)
    _call("swiglu_backward", out.dtype, grad_TF, gate_up_TF, out, *grad_TF.shape)
    return out


def head_loss_(logits_nV: Tensor, targets_n: Tensor, nll_n: Tensor) -> None:
    """bf16 logits become the gradient of the sum of their losses; fills `nll_n`, float32. Targets i64; the loss of one
    that is no word is NaN.
    """
    assert targets_n.dtype == torch.int64
    _call("head_loss", logits_nV.dtype, logits_nV, targets_n, nll_n, *logits_nV.shape)


def route(x_TD: Tensor, router_ED: Tensor) -> Tensor:
    """Softmax over experts of `x @ router.T`, float32 [T, E]; the router is float32."""
    share = torch.empty(x_TD.shape[0], router_ED.shape[0], dtype=torch.float32)
    _call("route", x_TD.dtype, x_TD.contiguous(), router_ED.contiguous(), share, *x_TD.shape, router_ED.shape[0])
    return share


def route_backward(grad_TE: Tensor, x_TD: Tensor, router_ED: Tensor, share_TE: Tensor) -> tuple[Tensor, Tensor]:
    """-> gradients of x (in its precision) and of the router (float32)."""
    x_TD = x_TD.contiguous()
    out = torch.empty_like(x_TD), torch.empty(router_ED.shape, dtype=torch.float32)
    inputs = (grad_TE.contiguous(), x_TD, router_ED.contiguous(), share_TE)
    _call("route_backward", x_TD.dtype, *inputs, *out, *x_TD.shape, router_ED.shape[0])
    return out


def sort_choices(
    expert_TK: Tensor, real_T: Tensor, modality_T: Tensor, experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choices of real slots, sorted by expert and then by slot; all i64 but bool `real_T`.

    -> counts [2, E] by modality, edges [E+1] of the experts' rows, the choice (slot * K + k) of each row, and the row
    of each choice [T, K], -1 for those of padding.
    """
    slots, choices = expert_TK.shape
    counts, edges = torch.empty(2, experts, dtype=torch.int64), torch.empty(experts + 1, dtype=torch.int64)
    order, place = torch.empty(slots * choices, dtype=torch.int64), torch.empty_like(expert_TK)
    tensors = (expert_TK.contiguous(), real_T, modality_T, counts, edges, order, place)
    kernels = _found()[0]
    assert kernels is not None
    kernels.sort_choices_i64(*(x.data_ptr() for x in tensors), slots, choices, experts)
    return counts, edges, order[: int(edges[-1])], place


def combine(rows_GD: Tensor, gate_TK: Tensor, place_TK: Tensor) -> Tensor:
    """`sum over k of gate[t, k] * rows[place[t, k]]`, float32 [T, D]; place i64, -1: no row. A row is one slot's."""
    slots, choices = gate_TK.shape
    out = torch.empty(slots, rows_GD.shape[1], dtype=torch.float32)
    inputs = (rows_GD.contiguous(), gate_TK.contiguous(), place_TK)
    _call("combine", rows_GD.dtype, *inputs, out, slots, choices, rows_GD.shape[1])
    return out


def combine_backward(grad_TD: Tensor, rows_GD: Tensor, gate_TK: Tensor, place_TK: Tensor) -> tuple[Tensor, Tensor]:
    """-> gradients of the rows (0 where no slot names one) and of the gates."""
    rows_GD = rows_GD.contiguous()
    out = torch.zeros_like(rows_GD), torch.empty(gate_TK.shape, dtype=torch.float32)
    inputs = (grad_TD.contiguous(), rows_GD, gate_TK.contiguous(), place_TK)
    _call("combine_backward", rows_GD.dtype, *inputs, *out, *gate_TK.shape, rows_GD.shape[1])
    return out


def collect(rows_GD: Tensor, place_TK: Tensor) -> Tensor:
    """`sum over k of rows[place[t, k]]` [T, D], in the precision of the rows."""
    out = torch.empty(place_TK.shape[0], rows_GD.shape[1], dtype=rows_GD.dtype)
    _call("collect", rows_GD.dtype, rows_GD.contiguous(), place_TK, out, *place_TK.shape, rows_GD.shape[1])
    return out


def norm(tensors: Sequence[Tensor]) -> float:
    """Square root of the sum of squares of float32 tensors: float32 in pieces of 65,536, these added in float64."""
    total, kernels, threads = 0.0, _found()[0], torch.get_num_threads()
    assert kernels is not None
    for x in tensors:
        x = x.contiguous()
        total += kernels.sum_of_squares(x.data_ptr(), x.numel(), threads)
    return math.sqrt(total)


def adamw_(
    weight: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: float = 1.0,
) -> None:
    """Update number `step` (from 1) of AdamW, in place, with `scale` times the gradient. All float32 and contiguous."""
    beta1, beta2 = betas
    rate, root = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    constants = (scale, 1 - lr * weight_decay, 1 - beta1, 1 - beta2, rate, root, eps)
    _call("adamw", weight.dtype, weight, grad.contiguous(), mean, square, weight.numel(), *constants)
