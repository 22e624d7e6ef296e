"""What a loss asks of whoever calls it: tensors, other examples of its batch, numbers carried between steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prefopt_losses.list_terms import ListTerm
from prefopt_losses.score import TokenWeights
from prefopt_losses.tensors import LIST_TENSORS, PAIR_TENSORS
from prefopt_losses.terms import FromRecord, Term


@dataclass(frozen=True)
class Needs:
    """What a loss reads, and what it cannot do without."""

    tensors: tuple[str, ...]
    """Fields of its record that must be there: of `LogProbs`, or with `lists` of `ListLogProbs`."""
    pairs: bool
    """True: it contrasts chosen with rejected and cannot be used on unpaired feedback."""
    step_tokens: bool
    """True: it holds a token mean, which decomposes over micro-batches only with `tokens_per_example`."""
    lists: bool = False
    """True: it reads all completions of a prompt at once."""
    batch: tuple[str, ...] = ()
    """What is taken over the examples of a whole optimizer step: with any, the mean over micro-batches is another
    loss than the mean over the step. Empty: it decomposes."""
    state: tuple[str, ...] = ()
    """Names of the numbers it carries from step to step."""
    minimum_batch: int = 1
    """Examples a batch must hold."""
    learns: tuple[str, ...] = ()
    """Tensors that need not come with the data: they may be learned beside the policy."""
    draws: bool = False
    """True: it samples tokens, anew for every `draw` of the record."""

    @property
    def reference(self) -> bool:
        """Whether reference log-probs are needed."""
        return any(name.startswith("ref_") for name in self.tensors) or self.sequential_kl

    @property
    def chosen(self) -> bool:
        """Whether chosen completions are needed."""
        return self.lists or any(name.startswith(("chosen_logps", "chosen_token")) for name in self.tensors)

    @property
    def rejected(self) -> bool:
        """Whether rejected completions are needed."""
        return self.lists or any(name.startswith(("rejected_logps", "rejected_token")) for name in self.tensors)

    @property
    def lengths(self) -> bool:
        """Whether completion lengths are needed, of any side."""
        return any(name.endswith("lengths") for name in self.tensors)

    @property
    def preference_probability(self) -> bool:
        """Whether soft labels are needed."""
        return "preference_probability" in self.tensors

    @property
    def scores(self) -> bool:
        """Whether the data must bring a score for each completion."""
        return any(name.endswith("_scores") for name in self.tensors)

    @property
    def values(self) -> bool:
        """Whether the data must bring the expected score of each prompt."""
        return "values" in self.tensors

    @property
    def gold(self) -> bool:
        """Whether a third, gold completion is needed."""
        return "gold_logps" in self.tensors

    @property
    def tokens(self) -> bool:
        """Whether per-token log-probs are needed."""
        return any("token_logps" in name for name in self.tensors)

    @property
    def relative(self) -> bool:
        """Whether the policy's whole distribution is needed, for log sum_v p(v)^2 (without gradient)."""
        return any("relative_logps" in name for name in self.tensors)

    @property
    def sequential_kl(self) -> bool:
        """Whether both models' whole distributions are needed, for KL(reference || policy) at every position."""
        return any("sequential_kl" in name for name in self.tensors)

    @property
    def mismatched(self) -> bool:
        """Whether completions of other prompts must be scored, without gradient."""
        return "mismatched_logps" in self.tensors


def needs_of(terms: Sequence[Term | ListTerm]) -> Needs:
    """Return what the terms of one loss need together."""
    reads = frozenset().union(*(term.reads for term in terms))
    lists = any(isinstance(term, ListTerm) for term in terms)
    return Needs(
        tensors=tuple(name for name in (LIST_TENSORS if lists else PAIR_TENSORS) if name in reads),
        pairs=not lists and any(all(term.contrast) for term in terms),
        step_tokens=any(term.unit == "token" for term in terms),
        lists=lists,
        batch=tuple(dict.fromkeys(name for term in terms for name in term.batch)),
        state=tuple(dict.fromkeys(number.name for term in terms for number in term.running)),
        minimum_batch=max(term.minimum_batch for term in terms),
        learns=tuple(dict.fromkeys(name for term in terms for each in _from_record(term) for name in each.learns)),
        draws=any(isinstance(term.score.aggregate, TokenWeights) and term.score.aggregate.draws for term in terms),
    )


def _from_record(term: Term | ListTerm) -> tuple[FromRecord, ...]:
    return () if isinstance(term, ListTerm) else term.from_record
