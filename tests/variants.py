"""
The main job with another rule for writing or reading the memory: the evidence for the default. Takes train.py's flags after
the rule's name.

$ python tests/variants.py shared --out_dir=out-shared      # reads with W_K and W_V of the block's self-attention alone
$ python tests/variants.py independent                      # reads with W_K and W_V of its own, drawn independently
$ python tests/variants.py unplaced                         # reads slots as if they had no place before the segment
$ python tests/variants.py timeless                         # reads whatever matches, of whatever age
$ python tests/variants.py positional                       # writes chunk i into slot i, not into the oldest
$ python tests/variants.py whole                            # trains with the whole bank, not with a part of it
$ python tests/variants.py undrawn                          # claims may saturate
$ python tests/variants.py forgetful                        # forgets in every slot, claimed or not, as (5) and (6) are printed
$ python tests/variants.py clock                            # counts a slot's age in chunks read, not in chunks written
$ python tests/variants.py always                           # writes a salient mean of every chunk, never "nothing here"
$ python tests/variants.py blunt                            # the salience without its factor of 8
$ python tests/variants.py mean                             # writes the plain mean of every chunk (the released code's pooling)
$ python tests/variants.py queries                          # writes what the slots ask for: attention over the segment
$ python tests/variants.py routed                           # writes tokens into the slots that they attend to
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import model  # noqa: E402
import train  # noqa: E402


class SharedRead(model.Memory):
    """The differences to the block's own matrices stay at zero."""

    def __init__(self, config):
        super().__init__(config)
        for linear in (self.d_k, self.d_v):
            linear.requires_grad_(False)


class IndependentRead(model.Memory):
    """What is a difference in the default is the whole matrix here."""

    drawn = ("d_k", "d_v")

    def project(self, m, attn):
        return attn.heads(self.d_k(m), norm=True), attn.heads(self.d_v(m))


class UnplacedRead(model.Memory):
    """Keys of slots are not rotated, as if slots had no place before the segment."""

    def __init__(self, config):
        super().__init__(config)
        self.cos.fill_(1.0)
        self.sin.zero_()


class TimelessRead(UnplacedRead):
    """The age of a slot makes no difference."""

    def __init__(self, config):
        super().__init__(config)
        self.recency = 0.0


class PositionalWrite(model.Memory):
    """Chunk i is offered to slot i: a later fact in the same chunk takes its place."""

    def assign(self, claimed, age):
        return torch.arange(claimed.size(1), device=age.device).expand_as(claimed)


class WholeBank(model.Memory):
    """Training texts have the whole bank."""

    def write(self, h, M, usable=None):
        return super().write(h, M)


class UndrawnWrite(model.Memory):
    """Nothing draws the logits of claims back."""

    def __init__(self, config):
        super().__init__(config)
        self.limit = math.inf


class ForgetfulWrite(model.Memory):
    """The forget gate works on every slot in every segment."""

    def gates(self, h, M, usable=None):
        c, claimed, g_in, _, slot = super().gates(h, M, usable)
        m = model.rms_norm(M[..., :-1], 1e-20).to(h.dtype).gather(1, slot[..., None].expand_as(c))
        return c, claimed, g_in, torch.sigmoid((self.w_forget(c) + self.u_forget(m)).float()), slot


class ClockAge(model.Memory):
    """Slots grow older with every segment, whether anything is written or not."""

    def grow(self, age, claimed, slot):
        J = claimed.size(1)
        later = J - 1 - torch.arange(J, device=age.device)  # chunks of this segment behind each
        age = age + J
        return age.scatter(1, slot, claimed * later + (1 - claimed) * age.gather(1, slot))


class AlwaysWrite(model.Memory):
    """The tokens of a chunk share the whole weight, whatever they are."""

    def gather(self, h, m):
        c, claimed = super().gather(h, m)
        return c / claimed.clamp(min=1e-6)[..., None], torch.ones_like(claimed)


class BluntWrite(model.Memory):
    """The salience without its factor of 8: slots learn more slowly what to leave out."""

    def __init__(self, config):
        super().__init__(config)
        self.sharpness = 1.0


class MeanWrite(AlwaysWrite):
    """The salience stays at zero: every token of a chunk counts the same."""

    def __init__(self, config):
        super().__init__(config)
        self.salience.requires_grad_(False)


class Addressed(TimelessRead, PositionalWrite):
    """Slots and tokens find each other by content, with matrices of their own; every slot is written in every segment."""

    drawn = ("w_slot", "w_token")

    def __init__(self, config):
        super().__init__(config)
        self.w_slot, self.w_token = (nn.Linear(config.n_embd, config.n_embd, bias=False) for _ in range(2))

    def gather(self, h, m):
        slot, token = (model.rms_norm(w(x).float()) for w, x in ((self.w_slot, m), (self.w_token, h)))
        claim = self.share(2 * slot.size(-1) ** -0.5 * slot @ token.mT)  # (B, N, T)
        return claim.to(h.dtype) @ h, torch.ones_like(m[..., 0])


class SlotsAsQueries(Addressed):
    """As in the relational memory core: each slot attends over the tokens."""

    @staticmethod
    def share(scores):
        return scores.softmax(dim=2)


class RoutedWrite(Addressed):
    """Each token attends over the slots; a slot takes the mean of what is sent to it."""

    @staticmethod
    def share(scores):
        sent = scores.softmax(dim=1)
        return sent / sent.sum(dim=2, keepdim=True)


RULES = {"shared": SharedRead, "independent": IndependentRead, "unplaced": UnplacedRead,
         "timeless": TimelessRead, "positional": PositionalWrite, "whole": WholeBank, "undrawn": UndrawnWrite,
         "forgetful": ForgetfulWrite, "clock": ClockAge, "always": AlwaysWrite, "blunt": BluntWrite, "mean": MeanWrite,
         "queries": SlotsAsQueries, "routed": RoutedWrite}


def use(rule):
    """Makes model.LM2 build its memories as `rule` says."""
    model.Memory, plain = RULES[rule], model.LM2.init_weights

    @torch.no_grad()
    def init_weights(lm2):
        plain(lm2)
        generator = torch.Generator().manual_seed(torch.initial_seed() + 1)
        for block in lm2.blocks:
            for name in getattr(block.memory, "drawn", ()):
                weight = getattr(block.memory, name).weight
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.size(1) ** -0.5)

    model.LM2.init_weights = init_weights


if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in RULES:
        sys.exit(f"variants.py: error: the first argument names a rule: {', '.join(RULES)}")
    use(sys.argv[1])
    args, checkpoint = train.parse_args(sys.argv[2:])
    args.rule = sys.argv[1]  # for results.json
    sys.exit(train.main(args, checkpoint))
