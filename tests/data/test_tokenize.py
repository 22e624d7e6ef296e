"""Token ids: the boundary, EOS, BOS, the chat template, the cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from prefopt.data.tokenize import TokenRules, tokenize_rows
from prefopt.data.tokenizer import special_ids, tokenizer_hash
from prefopt.errors import DataError, ModelError

USER = {"role": "user", "content": "What color is the sky?"}
GOOD = {"role": "assistant", "content": "It is blue."}
BAD = {"role": "assistant", "content": "It is green."}
TALK = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# The boundary


def test_prompt_and_completion_are_tokenized_apart(load, plain, pair):
    group = load([pair]).train[0]
    assert group.prompt.dtype == np.int64
    assert group.prompt.tolist() == ids(plain, pair["prompt"])
    assert group.completions[0].tolist() == [*ids(plain, pair["chosen"]), plain.eos_token_id]
    assert group.completions[1].tolist() == [*ids(plain, pair["rejected"]), plain.eos_token_id]


def test_a_row_whose_boundary_would_merge_is_kept_and_counted(load, plain):
    rows = [
        {"prompt": "The sk", "chosen": "y is blue.", "rejected": "i"},
        {"prompt": "The sky", "chosen": " is blue.", "rejected": " no"},
    ]
    assert ids(plain, "The sky is blue.")[: len(ids(plain, "The sk"))] != ids(plain, "The sk")
    data = load(rows)
    assert len(data.train) == 2
    assert data.report.boundary_merges == 1
    assert data.train[0].prompt.tolist() == ids(plain, "The sk")


def test_a_long_completion_that_does_not_merge_is_not_counted(load):
    rows = [{"prompt": "The sky", "chosen": " is blue." * 99, "rejected": " is" + " wrong" * 200}]
    assert load(rows, max_length=4000).report.boundary_merges == 0


# The chat template


def test_a_conversation_is_the_whole_template_split_after_the_generation_prompt(load, chat):
    group = load([TALK], chat).train[0]
    for side, message in zip(group.completions, (GOOD, BAD), strict=True):
        whole = chat.apply_chat_template([USER, message], tokenize=True, return_dict=False)
        assert [*group.prompt, *side] == whole
    opened = chat.apply_chat_template([USER], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert group.prompt.tolist() == opened


def test_every_spelling_of_a_conversation_gives_the_same_ids(load, chat):
    spellings = [
        TALK,
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": GOOD["content"], "rejected": BAD["content"]},
    ]
    assert len({load([row], chat).train.fingerprint for row in spellings}) == 1


def test_always_wraps_plain_text_into_user_and_assistant(load, chat):
    row = {"prompt": USER["content"], "chosen": GOOD["content"], "rejected": BAD["content"]}
    assert load([row], chat, chat_template="always").train.fingerprint == load([TALK], chat).train.fingerprint
    assert load([row], chat, chat_template="auto").train[0].prompt.tolist() == ids(chat, USER["content"])


def test_never_refuses_conversations(load, chat):
    with pytest.raises(DataError, match=r"line 1: plain text, for data\.chat_template is never"):
        load([TALK], chat, chat_template="never")


@pytest.mark.parametrize("choice", ["auto", "always"])
def test_a_tokenizer_without_template_is_said_before_anything_is_tokenized(choice, load, plain, pair):
    with pytest.raises(DataError, match="a tokenizer with a chat template"):
        load([TALK if choice == "auto" else pair], plain, chat_template=choice)


def test_a_row_that_the_template_refuses_is_named(load, make_tokenizer):
    picky = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}{{ messages }}"
    rows = [TALK, {**TALK, "prompt": [{"role": "system", "content": "S"}, USER]}]
    with pytest.raises(DataError, match=r"row 2: messages that the chat template accepts\n.*begin with the user"):
        load(rows, make_tokenizer(chat_template=picky))


def test_a_template_that_rewrites_the_prompt_is_split_where_the_ids_part(load, make_tokenizer, shown):
    thinking = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>one two{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=thinking, eos_token="<|end|>")
    data = load([TALK], tokenizer)
    prompt, completions = shown(data.train[0], tokenizer)
    assert prompt == "<|user|>What color is the sky?<|end|><|assistant|>"
    assert completions == ["It is blue.<|end|>", "It is green.<|end|>"]
    assert data.report.template_mismatches == 1


def test_a_prompt_that_ends_with_the_assistant_opens_no_new_turn(load, chat, shown):
    asked = {"role": "user", "content": "one"}
    row = {"prompt": [USER, GOOD], "chosen": [asked, GOOD], "rejected": [asked, BAD]}
    data = load([row], chat)
    prompt, completions = shown(data.train[0], chat)
    assert data.report.template_mismatches == 0
    assert prompt.endswith("It is blue.<|end|>\n")
    assert completions[0].startswith("<|user|>\none")


def test_tools_and_template_variables_reach_the_template(load, make_tokenizer, shown):
    template = "{{ tone }}{{ tools[0].name }}{% for m in messages %}{{ m.content }}{% endfor %}"
    row = {**TALK, "tools": [{"name": "fruit"}], "chat_template_kwargs": {"tone": "maybe "}}
    tokenizer = make_tokenizer(chat_template=template)
    assert shown(load([row], tokenizer).train[0], tokenizer)[0] == "maybe fruitWhat color is the sky?"


# EOS


def test_auto_ends_plain_text_with_one_eos(load, plain):
    row = {"prompt": "Q", "chosen": " a", "rejected": " b</s>"}
    group = load([row]).train[0]
    assert [side.tolist().count(plain.eos_token_id) for side in group.completions] == [1, 1]
    assert [side[-1] for side in group.completions] == [plain.eos_token_id] * 2


def test_auto_adds_nothing_where_the_template_closes_the_turn(load, chat, make_tokenizer):
    group = load([TALK], chat).train[0]
    assert chat.decode(group.completions[0]) == "It is blue.<|end|>\n"
    other = make_tokenizer(chat_template=chat.chat_template, eos_token="</s>")
    assert other.decode(load([TALK], other).train[0].completions[0]) == "It is blue.<|end|>\n"


def test_auto_ends_a_turn_that_the_template_leaves_open(load, make_tokenizer):
    bare = make_tokenizer(chat_template="{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert bare.decode(load([TALK], bare).train[0].completions[0]) == "It is blue.\n</s>"


def test_always_and_never_do_what_they_say(load, chat, plain, pair):
    assert chat.decode(load([TALK], chat, eos="always").train[0].completions[0]).endswith("<|end|>\n<|end|>")
    assert load([pair], eos="never").train[0].completions[0].tolist() == ids(plain, pair["chosen"])
    ended = load([{**pair, "chosen": pair["chosen"] + "</s>"}], eos="always").train
    assert ended[0].completions[0].tolist() == [*ids(plain, pair["chosen"]), plain.eos_token_id]


def test_a_cut_completion_has_no_eos(load, plain, pair):
    whole = load([pair]).train[0]
    room = len(whole.completions[1]) - 1
    cut = load([pair], max_length=len(whole.prompt) + room).train[0]
    assert cut.completions[1].tolist() == whole.completions[1][:room].tolist()
    assert cut.completions[1][-1] != plain.eos_token_id


def test_a_tokenizer_without_eos_is_an_error_unless_none_is_wanted(load, make_tokenizer, pair):
    tokenizer = make_tokenizer(eos_token=None)
    with pytest.raises(ModelError, match=r"data\.eos: never"):
        load([pair], tokenizer)
    assert len(load([pair], tokenizer, eos="never").train) == 1


# BOS


def test_plain_prompts_get_the_bos_that_the_tokenizer_adds_and_completions_get_none(load, make_tokenizer, pair):
    tokenizer = make_tokenizer(bos=True)
    group = load([pair], tokenizer).train[0]
    assert group.prompt.tolist() == [1, *ids(tokenizer, pair["prompt"])]
    assert 1 not in group.completions[0]


def test_an_eos_that_the_tokenizer_adds_stays_out_of_the_prompt(load, make_tokenizer, pair):
    both = make_tokenizer(bos=True, eos=True)
    assert load([pair], both).train[0].prompt.tolist() == [1, *ids(both, pair["prompt"])]
    only = make_tokenizer(eos=True)
    assert load([pair], only).train[0].prompt.tolist() == ids(only, pair["prompt"])


def test_bos_is_never_doubled(load, make_tokenizer, pair):
    template = "<s>{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    tokenizer = make_tokenizer(bos=True, chat_template=template)
    for row in (TALK, {**pair, "prompt": "<s>" + pair["prompt"]}):
        assert load([row], tokenizer).train[0].prompt.tolist().count(1) == 1


def test_an_empty_prompt_is_used_if_bos_stands_for_it_and_dropped_if_nothing_does(load, make_tokenizer, plain, pair):
    rows = [{**pair, "prompt": ""}, pair]
    assert load(rows, make_tokenizer(bos=True)).train[0].prompt.tolist() == [1]
    data = load(rows, plain)
    assert data.report.dropped == {"prompt is empty": 1}


# The cut


def test_cutting_the_prompt_keeps_bos_and_the_end(load, make_tokenizer, pair):
    tokenizer = make_tokenizer(bos=True)
    whole = load([pair], tokenizer).train[0]
    longest = max(map(len, whole.completions))
    data = load([pair], tokenizer, truncation="prompt", max_length=longest + 3)
    assert data.train[0].prompt.tolist() == [1, *whole.prompt[-2:]]
    assert [len(side) for side in data.train[0].completions] == [len(side) for side in whole.completions]
    assert data.report.cut == {"start of the prompt cut to data.max_length": 1}


def test_answers_that_differ_only_beyond_the_cut_are_dropped(load, pair, pairs):
    rows = [{**pair, "chosen": " one two" * 20 + " yes", "rejected": " one two" * 20 + " no"}, *pairs(1)]
    data = load(rows, max_length=30)
    assert data.report.dropped == {"chosen and rejected are identical after the cut to data.max_length": 1}


def test_texts_with_equal_ids_are_dropped_under_their_own_reason(load, pair, pairs):
    # "</s>" is what EOS adds anyway.
    rows = [{**pair, "chosen": " yes", "rejected": " yes</s>"}, *pairs(1)]
    assert load(rows).report.dropped == {"chosen and rejected differ as text and have the same token ids": 1}


TEXT = st.text(st.sampled_from("abc <s>/\n好"), max_size=30)


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=4),
    max_length=st.integers(2, 24),
    truncation=st.sampled_from(["completion", "prompt", "drop"]),
    bos=st.booleans(),
)
def test_whatever_the_text_a_kept_row_fits_and_no_part_of_it_is_empty(
    rows, max_length, truncation, bos, make_tokenizer
):
    tokenizer = make_tokenizer(bos=bos)
    batch = {
        "prompt": [row[0] for row in rows],
        "completions": [row[1:] for row in rows],
        "ranked": [False] * len(rows),
        "conversational": [False] * len(rows),
        "template_arguments": [""] * len(rows),
        "preference_probability": [None] * len(rows),
        "scores": [[]] * len(rows),
        "list_scores": [[]] * len(rows),
        "value": [None] * len(rows),
        "dropped": [""] * len(rows),
        "row": list(range(len(rows))),
    }
    rules = TokenRules(max_length, truncation, "auto", "auto")
    out = tokenize_rows(batch, tokenizer=tokenizer, special=special_ids(tokenizer, "auto"), rules=rules)
    for number in range(len(rows)):
        prompt, sides = out["prompt"][number], out["completions"][number]
        if out["dropped"][number]:
            assert not prompt
            continue
        assert prompt
        assert all(sides)
        assert sides[0] != sides[1]
        assert len(prompt) + max(map(len, sides)) <= max_length
        assert prompt[:2] != [1, 1]


# The hash


def test_the_hash_of_a_tokenizer_follows_what_changes_ids_and_nothing_else(make_tokenizer, chat):
    tokenizer = make_tokenizer()
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "b b b"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == before == tokenizer_hash(make_tokenizer())
    others = [make_tokenizer(bos=True), make_tokenizer(eos_token="<|end|>"), make_tokenizer(chat_template="x"), chat]
    assert len({before, *map(tokenizer_hash, others)}) == 5
    tokenizer.add_tokens(["sky"])
    assert tokenizer_hash(tokenizer) != before
