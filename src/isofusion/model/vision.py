"""The late-fusion image encoder: a ViT trained from scratch, made of the decoder's own block (arXiv 2504.07951, 2.3).

patches -> linear -> blocks, bidirectional inside each image -> norm. Every image has the same number of patches, so the
flat patch axis is I images of n patches and no loop over images is needed.

P patches (P = I * n), D encoder width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isofusion.config import ModelConfig
from isofusion.errors import InputError
from isofusion.model.attention import image_plan
from isofusion.model.block import Block, run_block
from isofusion.model.layers import Linear, RMSNorm


def normalise_patches(patches_u8: Tensor) -> Tensor:
    """uint8 [P, p*p*3] -> float32 (x / 255 - 0.5) / 0.25, about zero mean and unit variance for natural images."""
    return patches_u8.to(torch.float32).mul_(4.0 / 255.0).sub_(2.0)


class VisionEncoder(nn.Module):
    """uint8 patches [P, p*p*3] -> float features [P, D]. Runs on zero images too (a sharded model hangs otherwise)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        assert cfg.encoder_width is not None
        self.width, self.head_dim, self.theta = cfg.encoder_width, cfg.encoder_head, cfg.rope_theta
        self.patch = Linear(cfg.patch_dim, self.width)
        self.blocks = nn.ModuleList(Block(cfg, self.width, self.head_dim, False) for _ in range(cfg.encoder_layers))
        self.final_norm = RMSNorm(self.width, cfg.norm_eps)
        self.compiled = False

    def compile_blocks(self) -> None:
        """Compile every block in place and whole, for any number of images: that changes with every batch."""
        self.compiled = True
        for block in self.blocks:
            block.compile(fullgraph=True)

    def forward(self, patches_u8: Tensor, patches_per_image: int, recompute: int = 0) -> Tensor:
        """`recompute`: first blocks whose activations are computed twice, to save memory."""
        images = patches_u8.shape[0] // max(1, patches_per_image)
        if images * patches_per_image != patches_u8.shape[0]:
            raise InputError(f"{patches_u8.shape[0]} patches are not whole images of {patches_per_image} patches")
        heads = self.width // self.head_dim
        plan = image_plan(images, patches_per_image, self.head_dim, heads, self.theta, patches_u8.device)
        x_PD = self.patch(normalise_patches(patches_u8)).float()
        if self.compiled and images:
            torch._dynamo.maybe_mark_dynamic(x_PD, 0)
            torch._dynamo.maybe_mark_dynamic(plan.phase, 0)
        for i, block in enumerate(self.blocks):
            x_PD, _ = run_block(block, i < recompute, x_PD, plan)
        return self.final_norm(x_PD)
