"""A bare PyTorch loop with a loss of prefopt: torch only, no trainer at all.

    python pytorch_loop.py

What to copy: `completion_logps`, and the four lines of the loop that call it and the loss.
"""

import copy

import torch
from torch import nn

from prefopt_losses import gpo_exponential_loss, token_logps_from_logits

WORDS = 20


class ToyLM(nn.Module):
    """Next-token logits from a small recurrent network; any language model will do."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 32)
        self.gru = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, WORDS)

    def forward(self, tokens):
        """Token ids (batch, tokens) -> logits (batch, tokens, words)."""
        return self.head(self.gru(self.embedding(tokens))[0])


def make_pairs(count=32):
    """Prompts of 4 tokens; the chosen completion spells the prompt backwards, the rejected one is noise."""
    prompts = torch.randint(1, WORDS, (count, 4))
    noise = torch.randint(1, WORDS, (count, 6))
    return completed(prompts, prompts.flip(1)), completed(prompts, noise)


def completed(prompts, completions):
    """Return token ids, and the mask of the tokens to score: those of the completion, never the prompt's."""
    tokens = torch.cat([prompts, completions], dim=1)
    mask = torch.zeros_like(tokens)
    mask[:, prompts.shape[1] :] = 1
    return tokens, mask


def completion_logps(model, tokens, mask):
    """Sum the log-probs of the completion tokens, (batch,), nats: logits at t score the token at t + 1."""
    logps = token_logps_from_logits(model(tokens)[:, :-1], tokens[:, 1:])
    return (logps * mask[:, 1:]).sum(-1)


def main():
    """Train, and say what became of the loss."""
    torch.manual_seed(0)
    policy = ToyLM()
    reference = copy.deepcopy(policy).requires_grad_(False)
    chosen, rejected = make_pairs()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    with torch.no_grad():  # the reference never moves: score it once
        ref_chosen, ref_rejected = completion_logps(reference, *chosen), completion_logps(reference, *rejected)
    history = []
    for step in range(40):
        policy_chosen, policy_rejected = completion_logps(policy, *chosen), completion_logps(policy, *rejected)
        losses = gpo_exponential_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        ahead = (policy_chosen - ref_chosen) > (policy_rejected - ref_rejected)
        history.append((losses.mean().item(), ahead.float().mean().item()))
        if step % 10 == 0:
            print(f"step {step:2d}  loss {history[-1][0]:.4f}  accuracy {history[-1][1]:.2f}")
    (first, start), (last, end) = history[0], history[-1]
    print(f"loss {first:.4f} -> {last:.4f}, accuracy {start:.2f} -> {end:.2f}")


if __name__ == "__main__":
    main()
