"""A trainer of somebody else's, OpenRLHF style, given a loss of prefopt: torch only.

    python openrlhf_loop.py

What to copy is one line: `loss_fn=PreferenceLoss("gpo_exponential", beta=0.1, reduction="mean")`. In OpenRLHF
itself it is `trainer.loss_fn = PreferenceLoss(...)` after the trainer is made; `reduction="mean"` because its
trainer calls `backward` on what the loss returns.
"""

import copy

import torch
from torch import nn

from prefopt_losses import PreferenceLoss

WORDS, PROMPT = 20, 4


class SomebodysTrainer:
    """Knows how a loss of four tensors is called, and nothing of prefopt."""

    def __init__(self, model, ref_model, optimizer, loss_fn):
        self.model, self.ref_model, self.optimizer, self.loss_fn = model, ref_model, optimizer, loss_fn

    def fit(self, batches):
        """Train on every batch once; return (loss, accuracy) of each."""
        self.model.train()
        history = []
        for chosen_ids, rejected_ids in batches:
            chosen_logps, rejected_logps = self.concatenated_forward(self.model, chosen_ids, rejected_ids)
            with torch.no_grad():
                reference = self.concatenated_forward(self.ref_model, chosen_ids, rejected_ids)
            loss, chosen_reward, rejected_reward = self.loss_fn(chosen_logps, rejected_logps, *reference)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            history.append((loss.item(), (chosen_reward > rejected_reward).float().mean().item()))
        return history

    def concatenated_forward(self, model, chosen_ids, rejected_ids):
        """Score both completions in one forward; return summed log-probs of each side, (batch,)."""
        ids = torch.cat([chosen_ids, rejected_ids])
        logps = model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return logps[:, PROMPT - 1 :].sum(-1).chunk(2)


class ToyLM(nn.Module):
    """Next-token logits from a small recurrent network."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 32)
        self.gru = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, WORDS)

    def forward(self, tokens):
        """Token ids (batch, tokens) -> logits (batch, tokens, words)."""
        return self.head(self.gru(self.embedding(tokens))[0])


def make_batch(pairs=16):
    """Prompts of 4 tokens; the chosen completion spells the prompt backwards, the rejected one is noise."""
    prompts = torch.randint(1, WORDS, (pairs, PROMPT))
    noise = torch.randint(1, WORDS, (pairs, PROMPT))
    return torch.cat([prompts, prompts.flip(1)], dim=1), torch.cat([prompts, noise], dim=1)


def main():
    """Train, and say what became of the loss."""
    torch.manual_seed(0)
    model = ToyLM()
    loss_fn = PreferenceLoss("gpo_exponential", beta=0.1, reduction="mean")
    print(loss_fn)
    trainer = SomebodysTrainer(
        model=model,
        ref_model=copy.deepcopy(model).requires_grad_(False),
        optimizer=torch.optim.AdamW(model.parameters(), lr=3e-3),
        loss_fn=loss_fn,
    )
    batches = [make_batch() for _ in range(4)]
    history = trainer.fit(batches * 15)
    (first, start), (last, end) = history[0], history[-1]
    print(f"loss {first:.4f} -> {last:.4f}, accuracy {start:.2f} -> {end:.2f}")


if __name__ == "__main__":
    main()
