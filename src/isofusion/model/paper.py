"""The models of arXiv 2504.07951, by name, and the parameter counts published for them or derived from it.

Widths and learning rates: Table 6. Depth 24 in both towers, patch 14. Vocabulary 50,432 and the hidden size rule: the
only ones that reproduce every published size. Head shapes are not published; ours divide the widths. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

from isofusion.config import ModelConfig


@dataclass(frozen=True)
class PaperSize:
    """One row of Table 6. Counts in parameters: `label` as printed, the others derived from the published widths."""

    name: str
    lr: float
    label: float
    formula_total: float  # early: 24 (4 d^2 + 3 d h) + 2 V d; late: N_v + N_t; experts: active
    formula_encoder: float | None = None
    formula_decoder: float | None = None


# width, head size, label, derived N, learning rate
_EARLY = {
    "275m": (800, 80, 275e6, 274.8e6, 1.5e-3),
    "468m": (1088, 64, 468e6, 464.0e6, 1.5e-3),
    "932m": (1632, 96, 932e6, 931.7e6, 5e-4),
    "1.63b": (2208, 96, 1.63e9, 1626.8e6, 4.2e-4),
    "2.28b": (2624, 64, 2.28e9, 2279.9e6, 4e-4),
    "3.35b": (3232, 32, 3.35e9, 3354.2e6, 3.5e-4),
}
# encoder width and head size, decoder width and head size, label, derived N_v, N_t and N_v + N_t, learning rate
_LATE = {
    "289m": (384, 64, 768, 64, 289e6, 42.8e6, 247.3e6, 290.1e6, 1.5e-3),
    "494m": (512, 64, 1024, 64, 494e6, 82.2e6, 411.6e6, 493.8e6, 1.5e-3),
    "1b": (768, 64, 1536, 64, 1e9, 170.5e6, 834.4e6, 1004.9e6, 5e-4),
    "1.75b": (1024, 64, 2048, 64, 1.75e9, 309.1e6, 1439.7e6, 1748.8e6, 4.2e-4),
    "2.43b": (1184, 32, 2464, 112, 2.43e9, 419.3e6, 2012.2e6, 2431.5e6, 3.8e-4),
    "3.7b": (1536, 64, 3072, 128, 3.7e9, 680.8e6, 3027.8e6, 3708.5e6, 3.3e-4),
}

PAPER_MODELS: dict[str, ModelConfig] = {}
"""early-275m ... early-3.35b, early-8b (the held-out one), late-289m ... late-3.7b, moe-275m ... moe-3.35b."""

PAPER_SIZES: dict[str, PaperSize] = {}
"""Published label, derived counts and learning rate of each of PAPER_MODELS."""

for _size, (_d, _head, _label, _n, _lr) in _EARLY.items():
    for _kind, _experts in (("early", 0), ("moe", 8)):
        _name = f"{_kind}-{_size}"
        PAPER_MODELS[_name] = ModelConfig(width=_d, head_dim=_head, n_experts=_experts)
        PAPER_SIZES[_name] = PaperSize(_name, _lr, _label, _n)
PAPER_MODELS["early-8b"] = ModelConfig(width=5120, head_dim=128)
PAPER_SIZES["early-8b"] = PaperSize("early-8b", 2.4e-4, 8.13e9, 8129.1e6)
for _size, (_dv, _hv, _d, _head, _label, _nv, _nt, _n, _lr) in _LATE.items():
    _name = f"late-{_size}"
    PAPER_MODELS[_name] = ModelConfig(fusion="late", width=_d, head_dim=_head, encoder_width=_dv, encoder_head_dim=_hv)
    PAPER_SIZES[_name] = PaperSize(_name, _lr, _label, _n, _nv, _nt)
PAPER_MODELS = dict(sorted(PAPER_MODELS.items(), key=lambda item: (item[0].split("-")[0], PAPER_SIZES[item[0]].label)))

PAPER_LR = {name: size.lr for name, size in PAPER_SIZES.items()}
"""Peak learning rates of Table 6 (the 8B model's from arXiv 2507.09404, Table 6)."""
