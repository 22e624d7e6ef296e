"""Records in which every field is filled, and the same numbers one example at a time."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import torch

from prefopt_losses import ListLogProbs, LogProbs

POLICY = (
    *("chosen_logps", "rejected_logps", "chosen_token_logps", "rejected_token_logps", "gold_logps"),
    *("chosen_sequential_kl", "rejected_sequential_kl"),
)
"""What the policy's gradient flows through; relative and mismatched log-probs are computed without one."""

COLUMNS = {
    "l_w": "chosen_logps",
    "l_l": "rejected_logps",
    "r_w": "ref_chosen_logps",
    "r_l": "ref_rejected_logps",
    "n_w": "chosen_lengths",
    "n_l": "rejected_lengths",
    "p": "preference_probability",
    "s_w": "chosen_scores",
    "s_l": "rejected_scores",
    "v": "values",
    "l_g": "gold_logps",
    "n_g": "gold_lengths",
    "a_w": "chosen_relative_logps",
    "a_l": "rejected_relative_logps",
    "k_w": "chosen_sequential_kl",
    "k_l": "rejected_sequential_kl",
    "m": "mismatched_logps",
    "rm": "ref_mismatched_logps",
}
TOKENS = {
    "t_w": ("chosen_token_logps", "chosen_lengths"),
    "t_l": ("rejected_token_logps", "rejected_lengths"),
    "tr_w": ("ref_chosen_token_logps", "chosen_lengths"),
    "tr_l": ("ref_rejected_token_logps", "rejected_lengths"),
}


def make_record(dtype=torch.float64, batch=7, seed=1):
    """A batch whose log-ratios have a spread of several nats and whose sums are the sums of its tokens."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(5, 25, (3, batch), generator=generator)
    tensors = {}
    for index, side in enumerate(("chosen", "rejected")):
        policy, reference = (_tokens(rand, lengths[index]) for _ in range(2))
        tensors |= {f"{side}_token_logps": policy, f"ref_{side}_token_logps": reference}
        tensors |= {f"{side}_logps": policy.sum(-1), f"ref_{side}_logps": reference.sum(-1)}
        tensors[f"{side}_relative_logps"] = 4 * rand(batch) - 3
        tensors[f"{side}_sequential_kl"] = 3 * rand(batch)
    rejected_scores = rand(batch)
    tensors |= {
        "preference_probability": rand(batch),
        "rejected_scores": rejected_scores,
        "chosen_scores": rejected_scores + 0.2 + rand(batch),
        "values": rand(batch),
        "gold_logps": _tokens(rand, lengths[2]).sum(-1),
        "mismatched_logps": -20 * rand(batch) - 20,
    }
    # Mean log-ratio 0.5 nats, of both signs: KTO's anchor is not clamped away.
    tensors["ref_mismatched_logps"] = tensors["mismatched_logps"] + 2 - 5 * rand(batch)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return LogProbs(chosen_lengths=lengths[0], rejected_lengths=lengths[1], gold_lengths=lengths[2], **tensors)


def make_lists(dtype=torch.float64, sizes=(2, 4, 3, 2, 5), seed=1):
    """Lists of several sizes, their completions with distinct scores in no particular order."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    lengths = torch.randint(5, 25, (count,), generator=generator)
    logps = -1.5 * torch.rand(2, count, generator=generator, dtype=torch.float64) * lengths - 0.5
    scores = torch.randperm(count, generator=generator).double() / 7
    lists = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    policy, reference = logps.to(dtype)
    return ListLogProbs(policy, lists, scores.to(dtype), reference, lengths)


def _tokens(rand, lengths):
    positions = torch.arange(int(lengths.max()))[None]
    return (-3 * rand(len(lengths), positions.shape[1])).masked_fill(positions >= lengths[:, None], 0)


def examples(record):
    """The record as one namespace of Python numbers per example."""
    columns = {key: getattr(record, name).tolist() for key, name in COLUMNS.items()}
    rows = [SimpleNamespace(**dict(zip(columns, row))) for row in zip(*columns.values())]
    tokens = record.chosen_lengths.double().mean().item()
    for index, row in enumerate(rows):
        row.tokens, row.batch = tokens, rows
        for key, (name, lengths) in TOKENS.items():
            setattr(row, key, getattr(record, name)[index, : getattr(record, lengths)[index]].tolist())
    return rows


def list_examples(record):
    """The lists as one namespace each, with `completions` in the order of the record."""
    ends = [0, *torch.bincount(record.lists).cumsum(0).tolist()]
    columns = [each.tolist() for each in (record.logps, record.ref_logps, record.lengths, record.scores)]
    rows = [SimpleNamespace(l=l, r=r, n=n, s=s) for l, r, n, s in zip(*columns)]  # noqa: E741
    return [SimpleNamespace(completions=rows[start:end]) for start, end in pairwise(ends)]


def with_gradients(record):
    """Return the policy's tensors as leaves, and the record that holds them."""
    names = ("logps",) if isinstance(record, ListLogProbs) else POLICY
    leaves = {name: getattr(record, name).detach().clone().requires_grad_() for name in names}
    return list(leaves.values()), replace(record, **leaves)


def at_reference(record):
    """The same batch of a policy that is its reference."""
    if isinstance(record, ListLogProbs):
        return replace(record, ref_logps=record.logps)
    return replace(
        record,
        ref_chosen_logps=record.chosen_logps,
        ref_rejected_logps=record.rejected_logps,
        ref_chosen_token_logps=record.chosen_token_logps,
        ref_rejected_token_logps=record.rejected_token_logps,
        chosen_sequential_kl=torch.zeros_like(record.chosen_sequential_kl),
        rejected_sequential_kl=torch.zeros_like(record.rejected_sequential_kl),
        ref_mismatched_logps=record.mismatched_logps,
    )


def alike(record):
    """The same batch with both completions of every pair alike to the policy, for losses without a reference."""
    sides = {f"rejected_{name}": getattr(record, f"chosen_{name}") for name in ("logps", "token_logps", "lengths")}
    return replace(record, **sides)


def split(record, sizes, **same):
    """Cut a record into micro-batches; `same` goes into each."""
    names = [name for name, value in vars(record).items() if isinstance(value, torch.Tensor)]
    columns = zip(*(getattr(record, name).split(sizes) for name in names))
    return [LogProbs(**dict(zip(names, column)), **same) for column in columns]
