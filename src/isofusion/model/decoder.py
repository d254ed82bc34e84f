"""The model every arm shares: one decoder, with an early or a late image front end (docs/models.md).

Early fusion: patches -> one linear layer -> their slots. Late: patches -> ViT -> linear connector -> their slots.
Loss is next-token prediction on text only, so the head runs only at slots that have a target (arXiv 2504.07951, 2.3).

T slots, D width, V vocabulary, P patches, n slots with a target
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from isofusion.config import ModelConfig
from isofusion.data.batch import PackedBatch
from isofusion.errors import InputError
from isofusion.model.attention import WITHOUT_PADDING, choose_execution, make_plan
from isofusion.model.block import Block, run_block
from isofusion.model.experts import SlotPlan
from isofusion.model.fused import by_onednn, compute_dtype, exactly
from isofusion.model.head_loss import head_loss
from isofusion.model.layers import Embedding, Linear, RMSNorm
from isofusion.model.memory import HEAD_CHUNK, HEAD_CHUNK_GPU, HEAD_KEPT_GPU, ROUND
from isofusion.model.vision import VisionEncoder, normalise_patches

_COMPILED: list[ModelConfig] = []
"""What the compiled code of this process is for, if anything."""


@dataclass(frozen=True)
class ModelOutput:
    """`hidden_TD` after the final norm; `balance_loss` float32 scalar, mean over expert layers (0 for dense models);
    `routing` i64 [depth, 2, E]: (token, choice) pairs each expert got, text then image, padding excluded (None: dense).
    `place_T` i64: the row of `hidden_TD` that is a slot's, -1 for padding that was left out (None: row i is slot i).
    """

    hidden_TD: Tensor
    balance_loss: Tensor
    routing: Tensor | None
    probability: Tensor | None  # [depth, E], differentiable: see Experts.balance (None: dense)
    place_T: Tensor | None = None


class Decoder(nn.Module):
    """Reads a torch PackedBatch. `attention` is "auto", "dense", "native", "sdpa" or "flex" (see
    attention.py).

    Parameters are NaN until `init_weights` or a checkpoint sets them.
    """

    def __init__(self, cfg: ModelConfig, attention: str = "auto") -> None:
        super().__init__()
        self.cfg = cfg
        self.execution = attention
        self.embed = Embedding(cfg.vocab_size, cfg.width)
        self.patch: Linear | None = None
        self.encoder: VisionEncoder | None = None
        self.connector: Linear | None = None
        if cfg.fusion == "late":
            assert cfg.encoder_width is not None
            self.encoder = VisionEncoder(cfg)
            self.connector = Linear(cfg.encoder_width, cfg.width)
        else:
            self.patch = Linear(cfg.patch_dim, cfg.width)
        self.blocks = nn.ModuleList(Block(cfg, cfg.width, cfg.head_dim, cfg.n_experts > 0) for _ in range(cfg.depth))
        self.final_norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.head = Linear(cfg.width, cfg.vocab_size)
        self.compiled = False
        self.recompute = 0  # first blocks, the encoder's before the decoder's, whose activations are computed twice
        self.logit_scale = cfg.base_width / cfg.width if cfg.base_width else 1.0  # muP's output multiplier

    def see(self, batch: PackedBatch) -> Tensor:
        """uint8 patches -> float32 [P, D], what their slots hold."""
        if batch.patches.shape[0] and batch.patches.shape[1] != self.cfg.patch_dim:
            raise InputError(
                f"patches have {batch.patches.shape[1]} values; "
                f"patch_size {self.cfg.patch_size} needs {self.cfg.patch_dim}"
            )
        patches = batch.patches.reshape(batch.patches.shape[0], self.cfg.patch_dim)
        if self.encoder is not None and self.connector is not None:
            return self.connector(self.encoder(patches, batch.patches_per_image, self.recompute)).float()
        assert self.patch is not None
        return self.patch(normalise_patches(patches)).float()

    def forward(self, batch: PackedBatch) -> ModelOutput:
        cfg, place_T = self.cfg, None
        execution = choose_execution(self.execution, batch.doc_id.device, cfg.head_dim)
        on_cpu = batch.doc_id.device.type == "cpu"  # on a GPU shapes that never change matter more
        if on_cpu and execution in WITHOUT_PADDING:
            batch, place_T = batch.without_padding(ROUND)
        plan = make_plan(execution, batch, cfg.head_dim, cfg.n_heads, cfg.rope_theta)
        slots = SlotPlan.of(batch) if cfg.n_experts else None
        x_TD = self.embed(batch.token_ids).index_copy(0, batch.patch_slot, self.see(batch))
        counts, sums = [], []
        again = self.recompute - (self.cfg.encoder_layers if self.encoder is not None else 0)
        for i, block in enumerate(self.blocks):
            x_TD, routed = run_block(block, i < again, x_TD, plan, slots)
            if routed is not None:
                counts.append(routed.counts_ME)
                sums.append(routed.probability_E)
        hidden_TD = self.final_norm(x_TD)
        if not counts:
            return ModelOutput(hidden_TD, x_TD.new_zeros(()), None, None, place_T)
        routing, probability = torch.stack(counts), torch.stack(sums)
        return ModelOutput(hidden_TD, self._balance(probability, routing), routing, probability, place_T)

    def _balance(self, probability_LE: Tensor, routing_LME: Tensor) -> Tensor:
        """Mean over layers, all of one kind."""
        experts: Any = self.blocks[0].experts
        balance: Tensor = experts.balance(probability_LE, routing_LME)
        return balance.mean()

    def compile_blocks(self) -> None:
        """Compile every block in place, whole: blocks of one kind share one compilation, and names do not change.

        Unless padding is left out the decoder sees one shape, and its code is for that one: kernels for sizes that may
        vary are slower. What was compiled for a model of another configuration is dropped, or every call would look
        through it first.
        """
        if _COMPILED and _COMPILED[-1] != self.cfg:
            torch._dynamo.reset()
        _COMPILED[:] = [self.cfg]
        self.compiled = True
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        execution = choose_execution(self.execution, self.final_norm.gain.device, self.cfg.head_dim)
        varies = None if execution in WITHOUT_PADDING else False
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=varies)
        if self.encoder is not None:
            self.encoder.compile_blocks()

    def balance_loss(self, output: ModelOutput, routing: Tensor) -> Tensor:
        """The balance loss with shares from `routing` i64 [depth, 2, E], the counts of a whole step.

        `output` belongs to one micro-batch (or rank) of that step: the values of all of them add up to the step's.
        """
        assert output.probability is not None
        return self._balance(output.probability, routing)

    def logits(self, hidden_nD: Tensor) -> Tensor:
        """[n, D] -> float32 [n, V]. On a CPU the product is float32, whatever autocast says (training: see `_nll`)."""
        if hidden_nD.device.type != "cpu":
            return self.head(hidden_nD * self.logit_scale).float()
        with exactly(hidden_nD.device):
            return self.head(hidden_nD.float() * self.logit_scale)

    def token_losses(self, batch: PackedBatch) -> tuple[Tensor, ModelOutput]:
        """Negative log-likelihood of each slot's target in nats, float32 [T], 0 where there is none."""
        output = self(batch)
        at_n = batch.target_slot if batch.target_slot is not None else (batch.targets >= 0).nonzero().squeeze(1)
        row_n = at_n if output.place_T is None else output.place_T.index_select(0, at_n)
        hidden_nD = output.hidden_TD.index_select(0, row_n)
        nll_n = self._nll(hidden_nD, batch.targets.index_select(0, at_n))
        nll_T = torch.zeros(batch.targets.shape, device=nll_n.device).index_copy(0, at_n, nll_n)
        return nll_T, output

    def _nll(self, hidden_nD: Tensor, targets_n: Tensor) -> Tensor:
        low = compute_dtype(hidden_nD.device) == torch.bfloat16 and torch.is_grad_enabled()
        cpu = hidden_nD.device.type == "cpu"
        chunk = HEAD_CHUNK if cpu else HEAD_KEPT_GPU if low else HEAD_CHUNK_GPU
        step = max(1, chunk // self.cfg.vocab_size)

        def piece(hidden: Tensor, targets: Tensor) -> Tensor:
            if low:
                return head_loss(hidden * self.logit_scale, self.head.weight, targets, self.compiled and not cpu)
            n = hidden.shape[0]
            if cpu and by_onednn(torch.float32) and (filler := -n % ROUND):
                hidden, targets = F.pad(hidden, (0, 0, 0, filler)), F.pad(targets, (0, filler))
            return F.cross_entropy(self.logits(hidden), targets, reduction="none")[:n]

        if hidden_nD.shape[0] <= step:
            return piece(hidden_nD, targets_n)
        # logits of one chunk live at a time; the backward pass computes them again
        pieces = zip(hidden_nD.split(step), targets_n.split(step), strict=True)
        return torch.cat([checkpoint(piece, h, t, use_reentrant=False) for h, t in pieces])
