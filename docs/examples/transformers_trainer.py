"""The plain transformers `Trainer` with SimPO of prefopt: no reference model, lengths from the completion mask.

    pip install prefopt transformers accelerate
    python transformers_trainer.py

What to copy: `PairTrainer` and `collate`. Any loss of pairs that decomposes goes in its place; one with a reference
also needs the reference's sums, from a second model or from columns computed beforehand (see trl_trainer.py for both).
"""

import random
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from prefopt_losses import LogProbs, get_loss, token_logps_from_logits

PAD, EOS, WORDS = 0, 1, 32


class PairTrainer(Trainer):
    """A Trainer whose batches hold the chosen completions first and the rejected ones after them."""

    def __init__(self, *args, loss, **kwargs):
        super().__init__(*args, **kwargs)
        self.preference_loss = loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Score both halves of the batch, and return the mean of our loss."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        mask = inputs["completion_mask"][:, 1:]
        logps = token_logps_from_logits(outputs.logits[:, :-1], inputs["input_ids"][:, 1:])
        chosen_logps, rejected_logps = (logps * mask).sum(-1).chunk(2)
        chosen_lengths, rejected_lengths = mask.sum(-1).chunk(2)
        record = LogProbs(
            chosen_logps, rejected_logps, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths
        )
        loss = self.preference_loss(record).mean()
        self.last_accuracy = (self.preference_loss.margin(record) > 0).float().mean().item()
        return (loss, outputs) if return_outputs else loss


def collate(pairs):
    """Pad prompt + completion to a rectangle; mark real tokens, and those of completions."""
    rows = [(pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in pairs]
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    batch = {name: torch.zeros(len(rows), width, dtype=torch.long) for name in ("attention_mask", "completion_mask")}
    batch["input_ids"] = torch.full((len(rows), width), PAD)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        batch["input_ids"][row, :end] = torch.tensor(prompt + completion)
        batch["attention_mask"][row, :end] = 1
        batch["completion_mask"][row, len(prompt) : end] = 1
    return batch


def make_pairs(count=48):
    """Prompts of 4 tokens; the chosen completion spells the prompt backwards, the rejected one is noise."""

    def words(low, high):
        return random.choices(range(2, WORDS), k=random.randint(low, high))

    prompts = [words(4, 4) for _ in range(count)]
    return [{"prompt": each, "chosen": [*each[::-1], EOS], "rejected": [*words(2, 7), EOS]} for each in prompts]


def main():
    """Train, and say what became of the loss."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=PAD,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = PairTrainer(
            model=LlamaForCausalLM(config),  # in earnest: AutoModelForCausalLM.from_pretrained(...)
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=16,
                max_steps=30,
                learning_rate=3e-3,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                remove_unused_columns=False,  # `collate` wants prompt, chosen and rejected
            ),
            data_collator=collate,
            train_dataset=make_pairs(),
            loss=get_loss("simpo", beta=2.0, gamma_beta_ratio=0.25),
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, accuracy in the last batch {trainer.last_accuracy:.2f}")


if __name__ == "__main__":
    main()
