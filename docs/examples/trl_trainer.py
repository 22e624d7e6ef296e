"""TRL's `DPOTrainer` with a loss that TRL does not have: GPO's exponential loss.

    pip install "prefopt[train]"
    python trl_trainer.py

What to copy: the import of `PreferenceTrainer` in the place of `DPOTrainer`, and `loss=...`. Data, reference,
precomputed reference columns, adapters and logs stay TRL's.
"""

import random
import tempfile

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import DPOConfig

from prefopt.integrations.trl import PreferenceTrainer

LOSS = {"name": "gpo_exponential", "beta": 0.1}
WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "sun", "moon", "sea", "sky"]
SPECIAL = ["<pad>", "</s>", "<unk>"]


def make_tokenizer():
    """A tokenizer of whole words; in earnest: AutoTokenizer.from_pretrained(...)."""
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_model(tokenizer):
    """A tiny random Llama; in earnest: the name of a model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def make_pairs(count=32):
    """Four words to say backwards; the chosen completion does, the rejected one babbles."""
    prompts = [random.choices(WORDS, k=4) for _ in range(count)]
    return Dataset.from_dict(
        {
            "prompt": [" ".join(words) for words in prompts],
            "chosen": [" " + " ".join(words[::-1]) for words in prompts],
            "rejected": [" " + " ".join(random.choices(WORDS, k=random.randint(2, 6))) for _ in prompts],
        }
    )


def main():
    """Train, and say what became of the loss."""
    set_seed(0)
    tokenizer = make_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        trainer = PreferenceTrainer(
            model=make_model(tokenizer),
            args=DPOConfig(
                output_dir=folder,
                precompute_ref_log_probs=True,  # the reference is the model as it is now: scored once, not kept
                per_device_train_batch_size=16,
                max_steps=20,
                learning_rate=3e-3,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
            ),
            train_dataset=make_pairs(),
            processing_class=tokenizer,
            loss=LOSS,
        )
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    first, last = history[0], history[-1]
    accuracies = f"{first['rewards/accuracies']:.2f} -> {last['rewards/accuracies']:.2f}"
    print(f"loss {first['loss']:.4f} -> {last['loss']:.4f}, accuracy {accuracies}")
    print(f"logratios/chosen {last['logratios/chosen']:.3f}, logratios/rejected {last['logratios/rejected']:.3f}")


if __name__ == "__main__":
    main()
