"""What the recipe says about data -> training groups, held-out groups, and a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from prefopt.data.counting import source_report
from prefopt.data.formats import COLUMNS, JUDGED
from prefopt.data.grouping import TokenRows, group_rows, token_rows
from prefopt.data.groups import GroupDataset
from prefopt.data.report import DataReport, Dropped, SetReport, example_of
from prefopt.data.settings import DataSettings
from prefopt.data.sources import Role, Source, find_sources
from prefopt.data.tokenized import TokenizedSource, Tokenizing, tokenized_source
from prefopt.data.tokenizer import special_ids
from prefopt.errors import DataError, Problem, suggest


@dataclass(frozen=True)
class LoadedData:
    """The data of a run."""

    train: GroupDataset
    eval: GroupDataset | None
    """None where the recipe holds nothing out."""
    report: DataReport


def load_data(settings: DataSettings, tokenizer: Any, *, seed: int, quiet: bool = False) -> LoadedData:
    """Read, tokenize (or take from the cache), weigh, hold out and group the data of a recipe.

    Args:
        settings: the section `data` of a recipe.
        tokenizer: a transformers tokenizer.
        seed: decides which rows a weight below 1 takes; which prompts are held out, `data.held_out_seed` does.
        quiet: no progress bars.

    Returns:
        Both sets and the report. The same rows, tokenizer, settings and seed give the same groups.

    Raises:
        DataError: everything that is wrong with the data, at once.
        ModelError: the tokenizer has no EOS and `data.eos` wants one.
    """
    how = Tokenizing.of(settings, tokenizer, special_ids(tokenizer, settings.eos), quiet=quiet)
    with _progress_bars(shown=not quiet):
        train, held = _tokenized(_sources(settings), how)
    _refuse_mixed(train + held)
    paired = any(each.kind in ("paired", "ranked") for each in train)
    known = token_rows([each.table for each in train])
    rows = _weighted(train, known, seed)
    _refuse_empty("data.train", train, rows, settings)
    # Before anything is held out: texts that are all unknown tokens look like one prompt.
    used = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, None)  # GPT-2's is its EOS
    everything = _dataset(train, known, rows, paired, by_prompt=False)
    unknown = 0.0 if tokenizer.unk_token_id in used else everything.share_of(tokenizer.unk_token_id)
    _refuse_unknown_text(unknown, tokenizer)
    if held:
        held_known = token_rows([each.table for each in held])
        held_rows = _weighted(held, held_known, settings.held_out_seed)
        _refuse_empty("data.eval", held, held_rows, settings)
        eval_set = _dataset(held, held_known, held_rows, paired, by_prompt=True)
    elif settings.eval_fraction > 0:
        is_held = _held_out(known.prompt_hashes[rows], settings.eval_fraction, settings.held_out_seed)
        eval_set = _dataset(train, known, rows[is_held], paired, by_prompt=True)
        rows = rows[~is_held]
    else:
        eval_set = None
    train_set = _dataset(train, known, rows, paired, by_prompt=settings.group_by_prompt)
    report = DataReport(
        sources=tuple(source_report(each) for each in train + held),
        train=SetReport.of(train_set),
        eval=None if eval_set is None else SetReport.of(eval_set),
        shared_prompts=0 if eval_set is None else _shared_prompts(train_set, eval_set),
        unknown_tokens=unknown,
        unused_template=_leaves_template_unused(settings, tokenizer, train),
        example=example_of(train_set[0], tokenizer),
    )
    return LoadedData(train_set, eval_set, report)


def _sources(settings: DataSettings) -> list[Source]:
    """Find the sources of both sets; problems of both at once."""
    found: list[Source] = []
    problems = [
        Problem(
            f"data.columns.{role}",
            f"one of: {', '.join(COLUMNS)}",
            role,
            suggest(role, COLUMNS) or _DIRECTION,
        )
        for role in settings.columns
        if role not in COLUMNS
    ]
    for role, column in settings.columns.items():
        if role in COLUMNS and column in JUDGED and column != role and column not in settings.columns:
            fix = f"say where {column} comes from too, or map only columns of other names"
            given = f"{column}, a role itself"
            problems.append(Problem(f"data.columns.{role}", "a column that has one role", given, fix))
    twice = [column for column, count in Counter(settings.columns.values()).items() if count > 1]
    problems += [
        Problem("data.columns", "each column in one role", f"{column} in several", "give each role its own column")
        for column in twice
    ]
    roles: tuple[Role, ...] = ("train", "eval")
    for role in roles:
        try:
            found += find_sources(settings, role)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return found


_DIRECTION = "write data.columns: {chosen: <your column>}: the name used here first, your name second"


def _tokenized(sources: Sequence[Source], how: Tokenizing) -> tuple[list[TokenizedSource], list[TokenizedSource]]:
    """Tokenize every source; problems of all of them at once."""
    done: dict[Role, list[TokenizedSource]] = {"train": [], "eval": []}
    problems: dict[Problem, None] = {}
    for source in sources:
        try:
            done[source.role].append(tokenized_source(source, how))
        except DataError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise DataError(list(problems))
    return done["train"], done["eval"]


def _refuse_mixed(sources: Sequence[TokenizedSource]) -> None:
    problems = []
    if len({each.kind for each in sources} - {None}) > 1:
        kinds = "; ".join(f"{each.source.name}: {each.kind}" for each in sources)
        expected = "sources of one kind: pairs, completions with labels, or lists"
        problems.append(Problem("data", expected, kinds, "train on one kind"))
    if len({each.models for each in sources} - {0}) > 1:
        models = "; ".join(f"{each.source.name}: {each.models}" for each in sources)
        expected = "scores of the same number of reward models in every source"
        problems.append(Problem("data", expected, models, "leave some out, or name one column in data.columns"))
    if len({each.order for each in sources if each.kind == "ranked"}) > 1:
        orders = "; ".join(f"{each.source.name}: {each.order or 'best first'}" for each in sources)
        expected = "lists of all sources ordered in one way: by ranks, by scores, or the best first"
        problems.append(Problem("data", expected, orders, "give all of them scores, or all of them ranks"))
    if problems:
        raise DataError(problems)


def _weighted(sources: Sequence[TokenizedSource], known: TokenRows, seed: int) -> np.ndarray:
    """Return the used rows: each as often as the weight's whole part, plus a random share for the rest."""
    chosen: list[np.ndarray] = []
    start = 0
    for number, each in enumerate(sources):
        end = start + len(each.table)
        used = start + np.flatnonzero(known.used[start:end])
        whole, share = divmod(each.source.weight, 1)
        generator = np.random.default_rng([seed, number])
        extra = generator.permutation(used)[: round(share * len(used))]
        chosen.append(np.sort(np.concatenate([np.repeat(used, int(whole)), extra])))
        start = end
    return np.concatenate(chosen)


def _refuse_empty(key: str, sources: Sequence[TokenizedSource], rows: np.ndarray, settings: DataSettings) -> None:
    """Say why no row is left."""
    if len(rows):
        return
    dropped: dict[str, int] = {}
    prompts: list[int] = []
    for each in sources:
        for reason, count in source_report(each).dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
        tokens = each.table.with_format("arrow")[:].column("prompt_tokens").to_numpy()
        prompts += tokens[tokens > 0].tolist()
    reasons = "; ".join(f"{count:,}: {reason}" for reason, count in dropped.items()) or "all weights round to none"
    too_long = {Dropped.PROMPT_TOO_LONG.value, Dropped.TOO_LONG.value}
    fix = "see the reasons"
    if prompts and too_long & set(dropped):
        fix = (
            f"raise data.max_length ({settings.max_length}; the shortest prompt has {min(prompts):,} tokens) "
            "or set data.truncation: prompt"
        )
    elif Dropped.NO_SHARED_PROMPT.value in dropped:
        fix = "name the column of the prompt: data.columns: {prompt: <column>}"
    raise DataError(Problem(key, "at least one row that can be used", reasons or "the weights leave none", fix))


def _held_out(prompt_hashes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return (rows,) whether a row's prompt is held out; all rows of a prompt go the same way.

    The prompts are ranked by a hash of content and seed, so that few change sides when rows are added.

    Raises:
        DataError: there is only one prompt.
    """
    prompts = np.unique(prompt_hashes)
    if len(prompts) < 2:
        raise DataError(
            Problem(
                "data.eval_fraction",
                "at least 2 different prompts, one to hold out",
                "1",
                "set data.eval_fraction: 0, or give data.eval",
            )
        )
    count = min(max(round(fraction * len(prompts)), 1), len(prompts) - 1)
    ranked = prompts[np.argsort(_mixed(prompts, seed), kind="stable")]
    return np.isin(prompt_hashes, ranked[:count])


def _mixed(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Mix 64-bit hashes with a seed (the finalizer of splitmix64)."""
    step = np.random.default_rng(seed).integers(0, 2**64, dtype=np.uint64)
    z = hashes.astype(np.int64).view(np.uint64) + step
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _dataset(
    sources: Sequence[TokenizedSource],
    known: TokenRows,
    rows: np.ndarray,
    paired: bool,
    *,
    by_prompt: bool,
) -> GroupDataset:
    """Make groups of rows; held-out rows are always grouped, for their order is nobody's business."""
    table = datasets.concatenate_datasets([each.table for each in sources])
    layout = group_rows(known, rows, by_prompt=by_prompt)
    return GroupDataset(table, layout, paired=paired)


MOST_UNKNOWN = 0.5
"""Share of unknown tokens at which a tokenizer cannot be the one for these texts."""


def _refuse_unknown_text(share: float, tokenizer: Any) -> None:
    if share > MOST_UNKNOWN:
        raise DataError(
            Problem("data.train", "text that the model's tokenizer knows", f"{share:.0%} of the tokens are "
                    f"{tokenizer.unk_token}", "use a model that was made for this language and alphabet")
        )  # fmt: skip


def _leaves_template_unused(settings: DataSettings, tokenizer: Any, sources: Sequence[TokenizedSource]) -> bool:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    return has_template and settings.chat_template == "auto" and not any(each.conversational for each in sources)


def _shared_prompts(train: GroupDataset, held: GroupDataset) -> int:
    return len(np.intersect1d(train.layout.prompt_hashes, held.layout.prompt_hashes))


@contextmanager
def _progress_bars(*, shown: bool) -> Iterator[None]:
    """Show or hide the bars of `datasets`, then leave them as they were."""
    hidden_before = datasets.are_progress_bars_disabled()
    if shown == hidden_before:
        (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        if shown == hidden_before:
            (datasets.disable_progress_bars if hidden_before else datasets.enable_progress_bars)()
