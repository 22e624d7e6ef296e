"""Value and gradient against TRL's own trainers, run on CPU on the batches they collate themselves.

TRL's side is the real `compute_loss` of a real trainer: policy and reference forward, masks, sums and loss.
Our side scores the same batch with plain logits and `token_logps_from_logits`, and calls the loss.
"""

import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from prefopt_losses import LogProbs, get_loss, loss_from_config, token_logps_from_logits

WORDS = [f"w{index}" for index in range(40)]


def make_tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {word: 4 + i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_model(seed):
    """A random Llama whose weights are large enough that policy and reference disagree by several nats."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=44,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def make_pairs(rows=6):
    choose = random.Random(0)

    def text(low, high):
        return " ".join(choose.choices(WORDS, k=choose.randint(low, high)))

    columns = {
        "prompt": [text(3, 6) for _ in range(rows)],
        "chosen": [" " + text(2, 9) for _ in range(rows)],
        "rejected": [" " + text(4, 12) for _ in range(rows)],
    }
    return Dataset.from_dict(columns)


def settings(folder):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 6,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "max_length": 64,
    }


def scored(model, input_ids, attention_mask, scored_tokens):
    """Return log-probs summed over the scored tokens, and their number, each (rows,)."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
    mask = scored_tokens[:, 1:]
    return (token_logps_from_logits(logits, input_ids[:, 1:]) * mask).sum(-1), mask.sum(-1)


def gradient(value, model):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    slopes = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat([slope.flatten() for slope in slopes if slope is not None])


def assert_same(theirs, ours, model):
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    expected, given = gradient(theirs, model), gradient(ours, model)
    assert expected.norm() > 0
    assert (given - expected).norm() <= 2e-5 * expected.norm()


@pytest.fixture(scope="module")
def dpo(tmp_path_factory):
    trainer = DPOTrainer(
        model=make_model(0),
        ref_model=make_model(1),
        args=DPOConfig(**settings(tmp_path_factory.mktemp("dpo"))),
        train_dataset=make_pairs(),
        processing_class=make_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))

    def record():
        columns = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
        (chosen, rejected), (n_chosen, n_rejected) = (each.chunk(2) for each in scored(trainer.model, *columns))
        with torch.no_grad():
            ref_chosen, ref_rejected = scored(trainer.ref_model, *columns)[0].chunk(2)
        return LogProbs(chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected)

    def theirs(loss_types, weights=None, beta=0.1, label_smoothing=0.0):
        trainer.loss_types, trainer.loss_weights = loss_types, weights or [1.0] * len(loss_types)
        trainer.beta, trainer.label_smoothing = beta, label_smoothing
        return trainer.compute_loss(trainer.model, batch)

    return SimpleNamespace(trainer=trainer, record=record, theirs=theirs)


def test_the_batch_can_tell_losses_apart(dpo):
    """Completions differ in length and the policy is nats away from its reference: nothing hides here."""
    record = dpo.record()
    assert len(set(record.chosen_lengths.tolist() + record.rejected_lengths.tolist())) > 3
    assert get_loss("dpo", beta=1.0).margin(record).abs().min() > 0.5


@pytest.mark.parametrize(
    ("name", "loss_type"),
    [
        ("dpo", "sigmoid"),
        ("hinge", "hinge"),
        ("ipo", "ipo"),
        ("bco_pair", "bco_pair"),
        ("nca_pair", "nca_pair"),
        ("sppo_hard", "sppo_hard"),
        ("apo_zero", "apo_zero"),
        ("apo_down", "apo_down"),
    ],
)
@pytest.mark.parametrize("beta", [0.03, 0.1, 0.7])
def test_it_trains_as_trl_does(dpo, name, loss_type, beta):
    theirs = dpo.theirs([loss_type], beta=beta)
    assert_same(theirs, get_loss(name, beta=beta)(dpo.record()).mean(), dpo.trainer.model)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
def test_robust_dpo_trains_as_trls_robust(dpo, label_smoothing):
    theirs = dpo.theirs(["robust"], label_smoothing=label_smoothing)
    ours = get_loss("robust_dpo", label_smoothing=label_smoothing)(dpo.record()).mean()
    assert_same(theirs, ours, dpo.trainer.model)


def test_sft_is_trls_token_mean(dpo):
    assert_same(dpo.theirs(["sft"]), get_loss("sft")(dpo.record()).mean(), dpo.trainer.model)


@pytest.mark.parametrize(
    ("loss_types", "weights", "config"),
    [
        (["sigmoid", "sft"], [1.0, 0.5], ["dpo", {"name": "sft", "weight": 0.5}]),
        (
            ["sigmoid", "bco_pair", "sft"],
            [0.8, 0.2, 1.0],
            [{"name": "dpo", "weight": 0.8}, {"name": "bco_pair", "weight": 0.2}, "sft"],
        ),
        (["ipo", "apo_zero"], [0.01, 1.0], [{"name": "ipo", "weight": 0.01}, "apo_zero"]),
    ],
    ids=["dpo+sft", "mpo", "ipo+apo_zero"],
)
def test_mixtures_train_as_trls_lists(dpo, loss_types, weights, config):
    theirs = dpo.theirs(loss_types, weights)
    assert_same(theirs, loss_from_config(config)(dpo.record()).mean(), dpo.trainer.model)


def test_where_we_differ_on_purpose(dpo):
    """Controls: the comparison is not blind, and these differences are ours by decision."""
    record = dpo.record()
    smoothed = dpo.theirs(["sigmoid"], label_smoothing=0.3)
    assert torch.equal(smoothed, dpo.theirs(["sigmoid"]))  # TRL accepts label_smoothing here and ignores it
    assert not torch.isclose(smoothed, get_loss("cdpo", label_smoothing=0.3)(record).mean())
    assert not torch.isclose(dpo.theirs(["ipo"]), get_loss("ipo", normalize="sum")(record).mean())
    assert not torch.isclose(dpo.theirs(["sft"]), get_loss("sft", normalize="sequence")(record).mean())


def reference_free(trainer, chosen_labels, rejected_labels, batch):
    sides = {}
    for side, labels in (("chosen", chosen_labels), ("rejected", rejected_labels)):
        ids, attention = batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"]
        sides[side] = scored(trainer.model, ids, attention, labels != -100)
    (chosen, n_chosen), (rejected, n_rejected) = sides["chosen"], sides["rejected"]
    return LogProbs(chosen, rejected, chosen_lengths=n_chosen, rejected_lengths=n_rejected)


def make_reference_free_trainer(kind, folder):
    """Build a trainer of trl.experimental, which moves between versions; skip where it is not there."""
    module = pytest.importorskip(f"trl.experimental.{kind.lower()}", exc_type=ImportError)
    options = settings(folder) | {"remove_unused_columns": False}
    trainer = getattr(module, f"{kind}Trainer")(
        model=make_model(0),
        args=getattr(module, f"{kind}Config")(**options),
        train_dataset=make_pairs(),
        processing_class=make_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer, batch


@pytest.fixture(scope="module")
def cpo(tmp_path_factory):
    return make_reference_free_trainer("CPO", tmp_path_factory.mktemp("cpo"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "ours"),
    [
        ({"loss_type": "sigmoid", "cpo_alpha": 1.0}, get_loss("cpo")),
        ({"loss_type": "sigmoid", "cpo_alpha": 0.3, "beta": 0.5}, get_loss("cpo", alpha=0.3, beta=0.5)),
        (
            {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5},
            get_loss("simpo", beta=2.0, gamma_beta_ratio=0.25),
        ),
        (
            {"loss_type": "simpo", "cpo_alpha": 0.7, "beta": 2.0, "simpo_gamma": 1.0},
            get_loss("simpo", gamma_beta_ratio=0.5) + 0.7 * get_loss("sft"),
        ),
        (
            {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 0.1, "simpo_gamma": 0.5},
            get_loss("simpo", beta=0.1, gamma_beta_ratio=5.0),
        ),
    ],
    ids=["cpo", "cpo-0.3", "simpo", "simpo+sft", "simpo-trl-defaults"],
)
def test_cpo_and_simpo_train_as_trls_cpo_trainer(cpo, settings, ours):
    trainer, batch = cpo
    for key, value in ({"beta": 0.1} | settings).items():
        setattr(trainer, key, value)
    record = reference_free(trainer, batch["chosen_labels"], batch["rejected_labels"], batch)
    assert_same(trainer.compute_loss(trainer.model, batch), ours(record).mean(), trainer.model)


@pytest.mark.filterwarnings("ignore")
def test_orpo_trains_as_trls_but_for_the_prompt_in_its_nll(tmp_path):
    """TRL's NLL runs over prompt and completion, ours over the completion; the odds ratio is the same."""
    trainer, batch = make_reference_free_trainer("ORPO", tmp_path)
    record = reference_free(trainer, batch["chosen_labels"], batch["rejected_labels"], batch)
    completion_nll = get_loss("sft")(record).mean()
    attention = batch["chosen_attention_mask"]
    logps, tokens = scored(trainer.model, batch["chosen_input_ids"], attention, attention == 1)
    whole_nll = -logps.sum() / tokens.sum()
    ours = get_loss("orpo", lambda_coef=trainer.beta)(record).mean()
    theirs = trainer.compute_loss(trainer.model, batch)
    assert not torch.isclose(theirs, ours)
    assert_same(theirs, ours - completion_nll + whole_nll, trainer.model)
