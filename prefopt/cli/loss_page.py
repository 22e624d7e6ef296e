"""The page of one loss as Markdown: what the table of methods, the algebra and the profile say about it.

Everything but the paragraph between the markers is made from them, so a page cannot disagree with the code.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from inspect import Parameter
from typing import Any

from prefopt.cli.loss_page_profile import comparable, profile_lines
from prefopt.cli.losses import hyperparameter_meanings
from prefopt_losses import METHODS, Loss, Method, functional, get_loss
from prefopt_losses.hyperparameters import schema
from prefopt_losses.list_terms import ListTerm
from prefopt_losses.needs import Needs
from prefopt_losses.readme import also_reads, escaped, kind_of_data, number, score_in_words, source_link
from prefopt_losses.terms import Term

OPENING, CLOSING = "<!-- by hand -->", "<!-- /by hand -->"
EXAMPLES = {
    "chosen_logps": "[-40.0, -62.0]",
    "rejected_logps": "[-55.0, -60.0]",
    "ref_chosen_logps": "[-45.0, -61.0]",
    "ref_rejected_logps": "[-52.0, -61.0]",
    "chosen_token_logps": "[[-1.0, -0.5, -2.0], [-0.7, -1.1, 0.0]]",
    "rejected_token_logps": "[[-2.0, -1.5, 0.0], [-0.9, -1.4, -3.0]]",
    "ref_chosen_token_logps": "[[-1.2, -0.6, -2.1], [-0.8, -1.0, 0.0]]",
    "ref_rejected_token_logps": "[[-1.8, -1.4, 0.0], [-1.0, -1.3, -2.8]]",
    "chosen_lengths": "[20, 31]",
    "rejected_lengths": "[24, 27]",
    "preference_probability": "[0.9, 0.7]",
    "chosen_scores": "[1.2, 0.4]",
    "rejected_scores": "[0.3, -0.5]",
    "values": "[0.7, 0.1]",
    "gold_logps": "[-33.0, -48.0]",
    "gold_lengths": "[18, 25]",
    "chosen_relative_logps": "[-3.0, 1.5]",
    "rejected_relative_logps": "[-9.0, -2.0]",
    "chosen_sequential_kl": "[0.8, 1.1]",
    "rejected_sequential_kl": "[1.3, 0.9]",
    "mismatched_logps": "[-70.0, -66.0]",
    "ref_mismatched_logps": "[-71.0, -66.5]",
    "logps": "[-40.0, -55.0, -47.0, -62.0, -60.0]",
    "ref_logps": "[-45.0, -52.0, -46.0, -61.0, -61.0]",
    "lengths": "[20, 24, 22, 31, 27]",
    "scores": "[2.0, -1.0, 0.5, 1.0, 0.0]",
    "lists": "[0, 0, 0, 1, 1]",
}
"""Values for the code blocks: two pairs, or a list of three and one of two."""
OF_TOKENS = {"chosen_lengths": "[3, 2]", "rejected_lengths": "[2, 3]"}
COLUMNS = {
    "scores": "chosen_score, rejected_score",
    "values": "value",
    "gold": "gold",
}
"""Columns that the sandbox's pairs do not bring."""
USUAL: dict[str, object] = {"shift": 0.0, "q": 1.0, "coefficient": 1.0, "weight": 1.0}


def loss_page(name: str, paragraph: str) -> str:
    """Return the page of a method.

    Args:
        name: of the table of methods.
        paragraph: what stands between the markers, written by hand.
    """
    method, loss = METHODS[name], get_loss(name)
    sections = {
        "When to use it": [OPENING, paragraph, CLOSING],
        "Hyper-parameters": list(_hyperparameters(method)),
        "In the algebra": list(_coordinates(loss)),
        "What it asks for": list(_needs(loss)),
        "What its function does": list(profile_lines(loss)),
        "Elsewhere": list(_elsewhere(method)),
        "How to call it": list(_calls(name, loss)),
    }
    lines = [
        f"# {name}",
        "",
        escaped(method.summary),
        "",
        *_fenced("text", [method.formula]),
        f"[Notation](index.md#notation) · Source: {source_link(method)} · [All losses](index.md)",
        "",
    ]
    for title, content in sections.items():
        if content:
            lines += [f"## {title}", "", "\n".join(content).strip("\n"), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def paragraph_of(page: str) -> str:
    """Return what is written by hand in a page; empty where the markers are missing."""
    _, _, after = page.partition(OPENING)
    paragraph, closing, _ = after.partition(CLOSING)
    return paragraph.strip() if closing else ""


def _hyperparameters(method: Method) -> Iterator[str]:
    meanings = hyperparameter_meanings(method)
    accepted = schema(method.make)
    if not accepted:
        yield "None."
        return
    yield "| name | default | values | meaning and unit |"
    yield "|---|---|---|---|"
    for name, each in accepted.items():
        values = escaped(each.expected.removeprefix("a number ").replace("'", "`"))
        yield f"| `{name}` | `{_yaml(each.default)}` | {values} | {escaped(meanings.get(name, ''))} |"


def _coordinates(loss: Loss) -> Iterator[str]:
    """One row per term; columns in which every term has the usual value are left out."""
    pairs = [term for term in loss.terms if isinstance(term, Term)]
    lists = [term for term in loss.terms if isinstance(term, ListTerm)]
    if pairs:
        yield "Each term is `coefficient * weight * (q f(x) + (1 - q) f(-x))` with `x = beta * (a . s - shift)`."
        yield ""
        rest = ["beta", *(key for key, usual in USUAL.items() if any(getattr(t, key) != usual for t in pairs))]
        yield f"| f | score s | contrast a | {' | '.join(rest)} |"
        yield "|---" * (3 + len(rest)) + "|"
        for term in pairs:
            c = term.coordinates()
            cells = [f"`{c['f']}`", escaped(score_in_words(term)), _contrast(term)]
            yield f"| {' | '.join([*cells, *(escaped(number(c[key])) for key in rest)])} |"
    if lists:
        yield "Each term is `coefficient * reduction(x)` over the list, with `x = beta * s` of each completion."
        yield ""
        yield "| reduction | score s | beta | coefficient |"
        yield "|---|---|---|---|"
        for each in lists:
            reduction = each.coordinates()["reduce"]
            yield f"| `{reduction}` | {score_in_words(each)} | {each.beta:g} | {each.coefficient:g} |"


def _contrast(term: Term) -> str:
    if term.contrast == (0, 0):
        return "none: constant in both completions"
    return "({:g}, {:g})".format(*term.contrast) + (f", {term.sort} sorted over the step" if term.sort else "")


def _needs(loss: Loss) -> Iterator[str]:
    needs = loss.needs
    reads = [each for each in also_reads(needs) if each != "reference"]
    kind = kind_of_data(needs)
    if kind == "single completions":
        kind = "pairs, each side on its own"
        kind += "" if needs.preference_probability else "; or unpaired feedback (`Loss.unpaired`)"
    yield f"* **Data**: {kind}{', with ' + ', '.join(reads) if reads else ''}."
    yield f"* **Reference**: {_reference(needs)}."
    yield f"* **Micro-batches**: {_accumulation(needs)}."
    if needs.learns:
        yield f"* **Learned beside the policy**: {', '.join(needs.learns)}, unless the data bring them."
    if needs.draws:
        yield "* **Draws**: tokens are sampled anew for every `draw`; give it the number of the step."
    yield f"* **[Tensors](index.md#tensors)**: {', '.join(f'`{each}`' for each in needs.tensors)}."


def _reference(needs: Needs) -> str:
    if needs.sequential_kl:
        return "yes, and its whole distribution at every position: no cache can hold it"
    return "yes; its log-probs are cached" if needs.reference else "none"


def _accumulation(needs: Needs) -> str:
    if needs.batch:
        carried = f"; carries {', '.join(f'`{each}`' for each in needs.state)} from step to step" if needs.state else ""
        least = f"; at least {needs.minimum_batch} examples per step" if needs.minimum_batch > 1 else ""
        return (
            f"{', '.join(needs.batch)} is taken over the whole optimizer step, not over a micro-batch{least}{carried}"
        )
    if needs.step_tokens:
        return "they add up, given `tokens_per_example` of the step: the NLL is a mean over its tokens"
    return f"they add up; one value per {'list' if needs.lists else 'example'}, whatever the others are"


def _elsewhere(method: Method) -> Iterator[str]:
    if method.trl:
        yield f"* TRL 1.16: `{method.trl}`"
    if method.also:
        yield f"* Also called {', '.join(f'`{each}`' for each in method.also)}; accepted as a name."
    if method.note:
        yield f"* {escaped(method.note)}"
    for key, text in method.foreign.items():
        yield f"* Written `{key}` elsewhere: {escaped(text)}"


def _calls(name: str, loss: Loss) -> Iterator[str]:
    settings = {key: each.default for key, each in schema(METHODS[name].make).items()}
    yield "In a recipe:"
    yield ""
    block = ", ".join([f"name: {name}", *(f"{key}: {_yaml(value)}" for key, value in settings.items())])
    yield from _fenced("yaml", [f"loss: {{{block}}}" if settings else f"loss: {name}"])
    yield f"In Python, on torch alone (`help({name}_loss)` says all):"
    yield ""
    yield from _fenced("python", _function_call(name, loss, settings))
    yield "On the command line:"
    yield ""
    yield from _fenced("sh", _commands(name, loss, settings))


def _function_call(name: str, loss: Loss, settings: dict[str, Any]) -> Sequence[str]:
    signature = inspect.signature(getattr(functional, f"{name}_loss")).parameters
    tensors = [each for each in signature if each in loss.needs.tensors or each == "lists"]
    values = EXAMPLES | (OF_TOKENS if loss.needs.tokens else {})
    lines = ["import torch", f"from prefopt_losses import {name}_loss", "", f"losses = {name}_loss("]
    for each in tensors:
        keyword = f"{each}=" if signature[each].default is not Parameter.empty else ""
        aside = "" if keyword else f"  # {each}{_unit(each)}"
        lines.append(f"    {keyword}torch.tensor({values[each]}),{aside}")
    lines += [f"    {key}={value!r},".replace("'", '"') for key, value in settings.items()]
    return [*lines, ")"]


def _unit(tensor: str) -> str:
    if tensor == "lists":
        return ": the list of each completion"
    return ", nats" if "logps" in tensor or "kl" in tensor else ", tokens" if "lengths" in tensor else ""


def _commands(name: str, loss: Loss, settings: dict[str, Any]) -> Iterator[str]:
    yield f"prefopt losses {name}"
    if comparable(loss) and name != "dpo":
        yield f"prefopt losses {name} --match dpo:0.1"
    needs = loss.needs
    change = f" loss.beta={2 * settings['beta']:g}" if "beta" in settings else ""
    wanted = {"values": needs.values and not needs.learns, "gold": needs.gold, "scores": needs.scores}
    columns = [text for need, text in COLUMNS.items() if wanted[need] and not needs.lists]
    if columns:
        yield f"prefopt train dpo loss={name}{change} data.train=pairs.jsonl  # rows with {', '.join(columns)}"
    else:
        yield f"prefopt train quickstart loss={name}{change}"


def _fenced(language: str, lines: Iterator[str] | Sequence[str]) -> Iterator[str]:
    yield f"```{language}"
    yield from lines
    yield "```"
    yield ""


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
