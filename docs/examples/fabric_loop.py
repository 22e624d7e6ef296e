"""Lightning Fabric with a sum of two losses of prefopt: DPO, held up by a little NLL on the chosen completions.

    pip install prefopt lightning-fabric transformers
    python fabric_loop.py

What to copy: `score` and the loop. Fabric brings devices, precision and processes; the loss is a function of tensors
and needs no setting up. `loss_metrics` gives what is worth logging, one value per example.
"""

import copy

import torch
from lightning_fabric import Fabric
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from prefopt_losses import LogProbs, get_loss, loss_metrics, token_logps_from_logits

WORDS, PROMPT = 32, 4


def make_model():
    """A tiny random Llama; in earnest: AutoModelForCausalLM.from_pretrained(...)."""
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def make_pairs(count=64):
    """Prompts of 4 tokens; the chosen completion spells the prompt backwards, the rejected one is noise."""
    prompts = torch.randint(3, WORDS, (count, PROMPT))
    noise = torch.randint(3, WORDS, (count, PROMPT))
    return TensorDataset(torch.cat([prompts, prompts.flip(1)], dim=1), torch.cat([prompts, noise], dim=1))


def score(model, tokens):
    """Return summed log-probs of the completions, (batch,), nats, and their lengths in tokens."""
    logps = token_logps_from_logits(model(input_ids=tokens).logits[:, :-1], tokens[:, 1:])[:, PROMPT - 1 :]
    return logps.sum(-1), torch.full((len(tokens),), logps.shape[1], device=tokens.device)


def main():
    """Train, and say what became of the loss."""
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.seed_everything(0, verbose=False)
    loss = get_loss("dpo", beta=0.1) + 0.1 * get_loss("sft")
    policy = make_model()
    reference = fabric.setup(copy.deepcopy(policy).requires_grad_(False).eval())
    policy, optimizer = fabric.setup(policy, torch.optim.AdamW(policy.parameters(), lr=3e-3))
    loader = fabric.setup_dataloaders(DataLoader(make_pairs(), batch_size=16, shuffle=True))
    history = []
    for epoch in range(10):
        for chosen, rejected in loader:
            (chosen_logps, chosen_lengths), (rejected_logps, rejected_lengths) = (
                score(policy, chosen),
                score(policy, rejected),
            )
            with torch.no_grad():
                ref_chosen_logps, ref_rejected_logps = score(reference, chosen)[0], score(reference, rejected)[0]
            record = LogProbs(
                chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths
            )
            value = loss(record).mean()
            optimizer.zero_grad()
            fabric.backward(value)
            optimizer.step()
            metrics = {name: each.mean().item() for name, each in loss_metrics(loss, record).items()}
            history.append((value.item(), metrics["rewards/accuracies"]))
        print(f"epoch {epoch}  loss {history[-1][0]:.4f}  logratios/chosen {metrics['logratios/chosen']:.3f}")
    (first, start), (last, end) = history[0], history[-1]
    print(f"loss {first:.4f} -> {last:.4f}, accuracy {start:.2f} -> {end:.2f}")


if __name__ == "__main__":
    main()
