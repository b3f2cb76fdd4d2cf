"""
The main job with another way to read the memory: the evidence for the default. Takes train.py's flags after the variant.

$ python tests/variants.py shared --out_dir=out-shared              # W_Q, W_K, W_V of the block's self-attention, no others
$ python tests/variants.py independent --out_dir=out-independent    # W_Q, W_K, W_V of its own, drawn independently
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import model  # noqa: E402
import train  # noqa: E402


class SharedRead(model.Memory):
    """The differences to the block's own matrices stay at zero."""

    def __init__(self, config):
        super().__init__(config)
        for linear in (self.d_q, self.d_k, self.d_v):
            linear.requires_grad_(False)


class IndependentRead(model.Memory):
    """What is a difference in the default is the whole matrix here."""

    def read(self, h, hq, M, attn):
        m = model.rms_norm(M).to(h.dtype)  # (B, N, C)
        q, k, v = self.d_q(h), self.d_k(m), self.d_v(m)
        E_mem = F.scaled_dot_product_attention(
            attn.heads(q, norm=True), attn.heads(k, norm=True), attn.heads(v), scale=attn.scale, enable_gqa=attn.grouped)
        E_mem = E_mem.transpose(1, 2).flatten(2)  # (B, T, C)
        return torch.sigmoid(self.w_out(E_mem)) * E_mem

    @staticmethod
    @torch.no_grad()
    def init(lm2):
        generator = torch.Generator().manual_seed(torch.initial_seed() + 1)
        for block in lm2.blocks:
            for linear in (block.memory.d_q, block.memory.d_k, block.memory.d_v):
                linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * linear.in_features**-0.5)


def use(variant):
    """Makes model.LM2 build its memories as `variant` says."""
    model.Memory = {"shared": SharedRead, "independent": IndependentRead}[variant]
    if variant == "independent":
        plain = model.LM2.init_weights
        model.LM2.init_weights = lambda self: (plain(self), IndependentRead.init(self))


if __name__ == "__main__":
    use(sys.argv[1])
    sys.exit(train.main(*train.parse_args(sys.argv[2:])))
