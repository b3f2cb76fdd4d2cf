"""
The main job with another rule for the memory: the evidence for the default. The rule's name comes
first, then train.py's flags:  $ python tests/variants.py queries --out_dir=out-queries

mean, always    every chunk is written, as its plain mean, or as its mean weighted by salience
queries         no queue: each slot attends to the tokens, and is updated in its place
routed          no queue: each token attends to the slots, a slot takes the mean of what it is sent
ageless         slots have no place before the segment, and the younger does not count more
offsets         W_K and W_V are the self-attention's plus a difference that starts at zero
own             every block claims for its own bank, also after block 2
unpulled        claims that are all but certain are not pulled back
noise           nor are they here: logistic noise from the first step on keeps all in play
uniform         they are pulled back, and uniform noise, -1.5 to 1.5, is there from the first step on
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import model  # noqa: E402


def with_log_odds(s, change):
    """Saliences s (B, S, J, w) whose claims have other log-odds: change of those of s."""
    log_odds = s.logsumexp(dim=-1, keepdim=True)
    return s + change(log_odds) - log_odds


class Own(model.Memory):
    def __init__(self, config, claims):
        super().__init__(config)


class Unpulled(model.Memory):
    def write(self, h, M, s=None):
        banks, M, s = super().write(h, M, s)
        # what the loss sees: nothing beyond 6
        return banks, M, with_log_odds(s, lambda odds: odds.clamp(-6, 6))


class Always(Unpulled):
    def pool(self, h, s):
        c, s = super().pool(h, s)
        return c, with_log_odds(s, lambda odds: torch.full_like(odds, 100.0))  # a claim of 1


class Mean(Always):
    def pool(self, h, s):
        return h.unflatten(2, (-1, self.chunk_size)).mean(dim=3), super().pool(h, s)[1]


class Noise(Unpulled):
    def pool(self, h, s):
        self.noise = 0.0
        c, s = super().pool(h, s)
        noise = torch.rand_like(s[..., :1]).logit(eps=1e-6)  # u -> log u - log(1 - u)
        return c, s + noise if self.training and self.salience is not None else s


class Uniform(model.Memory):
    def pool(self, h, s):
        self.noise = 1.5
        return super().pool(h, s)


class Ageless(model.Memory):
    def __init__(self, *config):
        super().__init__(*config)
        self.rope[0].fill_(1.0), self.rope[1].zero_(), self.recency.zero_()


class Offsets(model.Memory):
    def __init__(self, *config):
        super().__init__(*config)
        # the differences: LM2 draws with a deviation of in_features ** -0.5, here 0
        self.wk.in_features = self.wv.in_features = math.inf

    def forward(self, q, M, attn):
        return super().read(q, M, attn)

    def read(self, q, M, attn):
        W = {n + ".weight": getattr(attn, n).weight + getattr(self, n).weight for n in ("wk", "wv")}
        return torch.func.functional_call(self, W, (q, M, attn))


class Queries(Ageless):
    def __init__(self, *config):
        super().__init__(*config)
        self.w_slot, self.w_token = (nn.Linear(*self.w_cand.weight.shape, bias=False) for _ in "MT")

    def share(self, scores):
        return scores.softmax(dim=2)  # (B, N, T)

    def write(self, h, M, s=None):
        banks = []
        for part in h.unbind(1):  # (B, T, C)
            banks.append(M)
            m = model.rms_norm(M, 1e-20)
            slot, token = model.rms_norm(self.w_slot(m)), model.rms_norm(self.w_token(part))
            c = self.share(2 * M.size(2) ** -0.5 * slot @ token.mT) @ part  # (B, N, C)
            g_in = torch.sigmoid(self.w_in(c) + self.u_in(m))
            g_forget = torch.sigmoid(self.w_forget(c) + self.u_forget(m))
            M = g_in * self.w_cand(c).tanh() + g_forget * M  # (B, N, C)
        s = h.new_full((*h.shape[:2], h.size(2) // self.chunk_size, 1), 6.0)  # all is "written"
        return torch.stack(banks, dim=1), M, s


class Routed(Queries):
    def share(self, scores):
        sent = scores.softmax(dim=1)
        return sent / sent.sum(dim=2, keepdim=True)


RULES = {rule.__name__.lower(): rule
         for rule in (Mean, Always, Queries, Routed, Ageless, Offsets, Own, Unpulled, Noise, Uniform)}

if __name__ == "__main__":
    import train
    if sys.argv[1:2] == [] or sys.argv[1] not in RULES:
        sys.exit(f"variants.py: error: the first argument names a rule: {', '.join(RULES)}")
    model.Memory = RULES[sys.argv[1]]  # model.LM2 builds its blocks with it
    args, checkpoint = train.parse_args(sys.argv[2:])
    args.rule = sys.argv[1]  # for results.json
    try:
        sys.exit(train.main(args, checkpoint))
    except (ValueError, OSError) as e:
        sys.exit(f"variants.py: error: {e}")
