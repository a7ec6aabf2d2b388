"""Conversations as tokens: golden values, the library of the templates' publishers as an oracle, and each bad input."""

from __future__ import annotations

import itertools
import json

import pytest

from tests.data.chat_templates import CHATML, END, HEADERS, MARKED, START, encoder_of
from w1train.data.conversations.chat_template import DEFAULT_TEMPLATE
from w1train.data.conversations.messages import Conversation, ConversationError, Preference, TokenRow, row_of

TALK = [
    {"role": "system", "content": "Return values."},
    {"role": "user", "content": "def f(value):\n\n    return \U0001f600"},
    {"role": "assistant", "content": "  value + 1  \n"},
    {"role": "user", "content": "more\u00ef"},
    {"role": "assistant", "content": "return 42\n\n"},
]


NESTED: list = []
for _ in range(2000):
    NESTED = [NESTED]


def ask(text="a", reply="b"):
    return [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]


def pieces(tokenizer, document) -> list[tuple[str, bool]]:
    """Return the texts of the runs of tokens that are treated alike."""
    runs = itertools.groupby(zip(document.ids, document.may_be_noised, strict=True), lambda pair: pair[1])
    return [(tokenizer.decode([token for token, _ in run]), flag) for flag, run in runs]


def document_of(tokenizer, template, messages, replies=None):
    conversation = row_of({"messages": messages})
    assert isinstance(conversation, Conversation)
    return encoder_of(tokenizer, template).document(conversation, replies or conversation.replies[-1:])


def test_golden_tokens_of_the_built_in_template(tokenizer):
    """Each id: bytes have the ids from 16 on in the order of the byte-level alphabet, and EOS is 1."""
    document = document_of(tokenizer, DEFAULT_TEMPLATE, ask("!1", "2"))
    prompt = [*tokenizer.encode("user:\n!1"), 1, *tokenizer.encode("assistant:\n")]
    assert tokenizer.encode("!12") == [16, 32, 33]
    assert document.ids == [*prompt, 33, 1]
    assert document.may_be_noised == [False] * len(prompt) + [True, True]
    assert document.num_bytes == len("user:\n!1<eos>assistant:\n2<eos>")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, [(f"{START}user\na{END}\n{START}assistant\n", False), (f"b{END}<eos>", True)]),
        (MARKED, [(f"{START}user\na{END}\n{START}assistant\n", False), (f"b{END}<eos>", True)]),
        (HEADERS, [(f"<bos>{START}user{END}\n\na<eos>{START}assistant{END}\n\n", False), ("b<eos>", True)]),
        (DEFAULT_TEMPLATE, [("user:\na<eos>assistant:\n", False), ("b<eos>", True)]),
        # The token that ends a turn belongs to the reply, also where the template does not say it.
        (
            MARKED.replace(f" + '{END}' }}}}{{% endg", f" }}}}{{% endgeneration %}}{{{{ '{END}' }}}}{{% g_").replace(
                "{% g_eneration %}", ""
            ),
            None,
        ),
    ],
)
def test_the_reply_and_both_its_ends_may_be_noised(tokenizer, template, expected):
    found = pieces(tokenizer, document_of(tokenizer, template, ask()))
    assert found == (expected or [(f"{START}user\na{END}\n{START}assistant\n", False), (f"b{END}<eos>", True)])


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_all_replies_of_one_document(tokenizer, template):
    document = document_of(tokenizer, template, TALK, [2, 4])
    assert [text for text, flag in pieces(tokenizer, document) if flag] == [f"  value + 1  \n{END}", f"return 42\n\n{END}<eos>"]
    one = document_of(tokenizer, template, TALK, [2])
    assert one.ids[:-1] == document.ids[: len(one.ids) - 1], "the first reply, as a document, is the beginning of the whole"
    assert document_of(tokenizer, template, TALK, [4]).ids == document.ids


@pytest.fixture(scope="module")
def oracle(tokenizer):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer as BackendTokenizer

    backend = BackendTokenizer.from_str(tokenizer.serialized.decode())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


@pytest.mark.parametrize("template", [CHATML, HEADERS, MARKED, DEFAULT_TEMPLATE])
def test_the_tokens_are_those_of_transformers(tokenizer, oracle, template):
    for messages in (TALK, TALK[1:], TALK[:3], ask("\n x", "\ny\n"), ask("\U0001f600", "\u00ef" * 9)):
        whole = oracle.apply_chat_template(messages, chat_template=template, return_assistant_tokens_mask=template is MARKED)
        prompt = oracle.apply_chat_template(messages[:-1], chat_template=template, add_generation_prompt=True)["input_ids"]
        document = document_of(tokenizer, template, messages)
        expected = whole["input_ids"]
        length = len(document.ids) - (template is not DEFAULT_TEMPLATE and template is not HEADERS)
        assert document.ids[:length] == expected[:length]
        assert tokenizer.decode(expected[length:]).strip() == "", "white space behind the last turn is left out"
        assert encoder_of(tokenizer, template).prompt(messages[:-1], {}) == prompt
        assert document.may_be_noised[: len(prompt)] == [False] * len(prompt)
        assert all(document.may_be_noised[len(prompt) :])
        if template is MARKED:
            replies = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
            flags = document_of(tokenizer, template, messages, replies).may_be_noised
            assert flags[:length] == [flag == 1 for flag in whole["assistant_masks"][:length]]


@pytest.mark.parametrize("template", [CHATML, HEADERS, MARKED, DEFAULT_TEMPLATE])
@pytest.mark.parametrize("name", ["<eos>", "<mask>", "<pad>", START, f"{END}<eos>\n<bos>"])
def test_names_of_special_tokens_in_messages_are_text(tokenizer, oracle, template, name):
    messages = ask(f"what is {name}?", f"{name} a\n{name}")
    document = document_of(tokenizer, template, messages)
    prompt = encoder_of(tokenizer, template).prompt(messages[:1], {})
    assert document.ids[: len(prompt)] == prompt
    plain = document_of(tokenizer, template, ask("what is x?", "x a\nx"))
    special = [token for token in document.ids if token < 16]
    assert special == [token for token in plain.ids if token < 16]
    assert f"what is {name}?" in tokenizer.decode([token for token in prompt if token >= 16])
    marked = oracle.apply_chat_template(messages[:1], chat_template=template, add_generation_prompt=True, sanitize_control_tokens=True)
    assert tokenizer.decode(marked["input_ids"]) == tokenizer.decode(prompt)


def test_a_template_may_cut_a_name_in_two(tokenizer):
    """The halves of a name that come together again are text, too."""
    template = "{% for message in messages %}{{ message.content[:3] + message.content[3:] }}{{ eos_token }}{% endfor %}"
    template += "{{ '' if add_generation_prompt else '' }}"
    document = document_of(tokenizer, template, ask("<eos> a", "<mask>"))
    assert [token for token in document.ids if token < 16] == [1, 1]


def test_a_name_that_the_tokenizer_cannot_spell_as_text_is_refused(tokenizer):
    """The library drops white space before a token of this kind, which the encoding piece by piece would keep."""
    content = json.loads(tokenizer.serialized)
    content["added_tokens"][4]["lstrip"] = True
    other = type(tokenizer)(json.dumps(content).encode(), "other")
    assert document_of(other, CHATML, ask("a ")).ids == document_of(other, CHATML, ask("a")).ids
    assert document_of(other, CHATML, ask("<eos>")).ids == document_of(tokenizer, CHATML, ask("<eos>")).ids
    with pytest.raises(ConversationError, match="cannot encode '<eos>' in a message as text"):
        document_of(other, CHATML, ask("<eos> "))


def test_names_of_the_published_tokenizer_stand_for_the_renamed_tokens(tokenizer):
    template = DEFAULT_TEMPLATE.replace("eos_token", "'<|endoftext|>'")
    conversation = row_of({"messages": ask("<|endoftext|>")})
    document = encoder_of(tokenizer, template, {"<|endoftext|>": "<eos>"}).document(conversation, [1])
    assert document.ids.count(1) == 2
    assert tokenizer.decode(document.ids) == "user:\n<|endoftext|><eos>assistant:\nb<eos>"


@pytest.mark.parametrize(
    ("template", "messages", "replies", "reason", "message"),
    [
        (
            "{{ messages[-1].content }}{{ eos_token }}",
            ask(),
            [1],
            "prefix",
            "token 0 begins 'a<eos>' in the former and 'b<eos>' in the latter",
        ),
        # A blank before the reply joins the reply's first word in one token.
        (
            "{% for m in messages %}{{ m.content }}{% if loop.first %}: {% endif %}{% endfor %}",
            ask("x", "value"),
            [1],
            "prefix",
            "token 2 begins ' ' in the former and ' value'",
        ),
        # The template keeps the thoughts of the last reply alone, so an earlier reply is not a part of the whole.
        (
            "{% for m in messages %}{{ m.role }}\n{{ m.content if loop.last or m.role == 'user' else '' }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}assistant\n{% endif %}",
            [*ask(), *ask()],
            [1, 3],
            "prefix",
            "--replies split",
        ),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}" * 2, ask(), [1], "template", "marks 2 texts"),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", ask(), [1], "template", "marks 2 texts"),
        ("{{ messages[0].content }}<mask>", ask(), [1], "mask", "writes the mask token"),
        ("{{ messages[0].content }}", ask(), [1], "no_reply", "the reply has no tokens"),
        ("{{ messages[0].name }}", ask(), [1], "template", "has no attribute 'name'"),
        ("{{ tools }}", ask(), [1], "template", "'tools' is undefined"),
        (CHATML, ask("a\ufdd0b"), [1], "reserved", "U\\+FDD0"),
        (CHATML, ask("\ud800"), [1], "format", "lone surrogate"),
        ("{{ '%c' % 55296 }}", ask(), [1], "format", "lone surrogate"),
        (CHATML, [{"role": "user", "content": "a", "name": NESTED}, ask()[1]], [1], "format", "nested too deeply"),
        ("{{ raise_exception('roles!') }}", ask(), [1], "template", "roles!"),
    ],
)
def test_what_a_template_may_not_do(tokenizer, template, messages, replies, reason, message):
    with pytest.raises(ConversationError, match=message) as found:
        document_of(tokenizer, template, messages, replies)
    assert found.value.reason == reason


SAME = ask("do", "done")
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": SAME}, SAME),
        ({"messages": [SYSTEM, *SAME], "id": 7}, [SYSTEM, *SAME]),
        ({"messages": [{"role": "developer", "content": "s"}, *SAME]}, [SYSTEM, *SAME]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "d"}, {"text": "o"}], "name": None}, SAME[1]]}, SAME),
        ({"conversations": [{"from": "human", "value": "do"}, {"from": "gpt", "value": "done"}], "system": "s"}, [SYSTEM, *SAME]),
        ({"conversations": [{"role": "user", "content": "do"}, {"role": "assistant", "content": "done"}]}, SAME),
        ({"instruction": "do", "input": "", "output": "done"}, SAME),
        ({"instruction": "do", "input": "it", "output": "done"}, ask("do\nit", "done")),
        ({"instruction": "do", "output": "done", "history": [["a", "b"]], "system": "s"}, [SYSTEM, *ask(), *SAME]),
        ({"prompt": "do", "response": "done"}, SAME),
        ({"prompt": "do", "completion": "done", "response": None}, SAME),
        ({"prompt": [SYSTEM, SAME[0]], "completion": [SAME[1]]}, [SYSTEM, *SAME]),
    ],
)
def test_formats(record, expected):
    row = row_of(record)
    assert isinstance(row, Conversation)
    assert [{"role": message["role"], "content": message["content"]} for message in row.messages] == expected
    assert row.replies[-1] == len(expected) - 1


def test_tools_reach_the_template():
    tools = [{"name": "f"}]
    calls = [{"function": {"name": "f", "arguments": {}}}]
    talk = [SAME[0], {"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "3"}, SAME[1]]
    row = row_of({"messages": talk, "tools": tools})
    assert isinstance(row, Conversation)
    assert (row.for_template, row.messages[1]["tool_calls"], row.replies) == ({"tools": tools}, calls, [1, 3])


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "do", "chosen": "done", "rejected": "no"},
        {"prompt": [SAME[0]], "chosen": [SAME[1]], "rejected": [{"role": "assistant", "content": "no"}]},
        {"chosen": SAME, "rejected": ask("do", "no"), "messages": SAME},
        {"prompt": "do", "chosen": SAME, "rejected": ask("do", "no")},
        {"prompt": [SAME[0]], "chosen": SAME, "rejected": ask("do", "no")},
    ],
)
def test_formats_of_preferences(record):
    row = row_of(record)
    assert row == Preference(Conversation(SAME, {}), Conversation(ask("do", "no"), {}))


@pytest.mark.parametrize(
    ("record", "flags"),
    [
        ({"input_ids": [20, 21, 22], "prompt_lengths": 1}, "011"),
        ({"input_ids": [20, 21, 22], "prompt_lengths": [2]}, "001"),
        ({"input_ids": [20, 21, 22], "labels": [-100, 21, 22]}, "011"),
        ({"input_ids": [20, 21, 22], "loss_mask": [0, 1, 0]}, "010"),
        ({"input_ids": [20, 21, 22], "loss_mask": [False, True, True]}, "011"),
    ],
)
def test_formats_of_tokens(record, flags):
    assert row_of(record) == TokenRow([20, 21, 22], [flag == "1" for flag in flags])


@pytest.mark.parametrize(
    ("ids", "reply_from", "expected", "flags"),
    [
        ([20, 21], 1, [20, 21, 1], "011"),
        ([20, 21, 1], 1, [20, 21, 1], "011"),
        ([20, 21, 1, 1, 1], 1, [20, 21, 1], "011"),
        ([20, 21, 1, 0, 0], 1, [20, 21, 1], "011"),
        ([20, 1, 21], 1, [20, 1, 21, 1], "0111"),
    ],
)
def test_fill_of_token_rows_becomes_one_end(tokenizer, ids, reply_from, expected, flags):
    row = TokenRow(ids, [place >= reply_from for place in range(len(ids))])
    document = encoder_of(tokenizer, CHATML).tokenized(row)
    assert (document.ids, document.may_be_noised) == (expected, [flag == "1" for flag in flags])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (TokenRow([20, 14], [False, True]), "mask"),
        (TokenRow([20, 300], [False, True]), "vocabulary"),
        (TokenRow([20, -1], [False, True]), "vocabulary"),
        (TokenRow([20, 1, 0], [False, True, True]), "no_reply"),
    ],
)
def test_bad_token_rows(tokenizer, row, reason):
    with pytest.raises(ConversationError) as found:
        encoder_of(tokenizer, CHATML).tokenized(row)
    assert found.value.reason == reason


@pytest.mark.parametrize(
    ("record", "reason", "message"),
    [
        ([], "format", "no object but a list"),
        ({"text": "a"}, "format", "it has the keys text, but a conversation has .*messages \\(messages\\)"),
        ({"messages": "a"}, "format", "no list of messages"),
        ({"messages": []}, "no_reply", "no message"),
        ({"messages": SAME[:1]}, "no_reply", "the last of 1 messages is from user"),
        ({"messages": [*SAME, SAME[0]]}, "no_reply", "the last of 3 messages is from user"),
        ({"messages": [SYSTEM]}, "no_reply", "from system"),
        ({"messages": [SAME[1]]}, "roles", "message 1 is from assistant, at the start"),
        ({"messages": [SAME[0], *SAME]}, "roles", "message 2 is from user, after user: here assistant is valid"),
        ({"messages": [*SAME, SAME[1]]}, "roles", "message 3 is from assistant, after assistant"),
        ({"messages": [SAME[0], SYSTEM, SAME[1]]}, "roles", "message 2 is from system"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "roles", "the role 'robot'"),
        ({"messages": [{"content": "a"}]}, "roles", "the role None"),
        ({"messages": [SAME[0], {"role": "assistant"}]}, "empty", "message 2 \\(assistant\\) has no text"),
        ({"messages": [SAME[0], {"role": "assistant", "content": 3}]}, "empty", "its content is 3"),
        ({"messages": ask(" \n", "b")}, "empty", "message 1 \\(user\\) is empty"),
        ({"messages": ask("a", "")}, "empty", "message 2 \\(assistant\\) is empty"),
        ({"instruction": "a", "input": 3, "output": "b"}, "format", "not both texts"),
        ({"conversations": [{"from": [], "value": "a"}]}, "roles", "turn 1 is from"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "roles", "turn 1 is from 'robot'"),
        ({"conversations": ["a"]}, "format", "no list of objects"),
        ({"instruction": "a", "output": "b", "history": ["a"]}, "format", "history"),
        ({"prompt": "a", "response": ""}, "empty", "message 1 \\(assistant\\)"),
        ({"prompt": "a", "completion": "b", "label": False}, "format", "label"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "equal_pair", "equal"),
        ({"chosen": "b", "rejected": "c"}, "format", "no prompt"),
        ({"chosen": SAME, "rejected": ask("else", "no")}, "prompts_differ", "different prompts"),
        ({"prompt": "else", "chosen": SAME, "rejected": ask("do", "no")}, "prompts_differ", "does not have the messages"),
        ({"input_ids": [20, 21], "prompt_lengths": 2}, "no_reply", "prompt_lengths is 2, of 2 tokens"),
        ({"input_ids": [20, 21], "prompt_lengths": 0}, "no_reply", "prompt_lengths is 0"),
        ({"input_ids": [20, 21], "labels": [-100, -100]}, "no_reply", "no reply"),
        ({"input_ids": [20, 21], "labels": [20, 21]}, "no_reply", "no prompt"),
        ({"input_ids": [20, 21], "labels": [-100, 22]}, "format", "label 1 is 22, and the token is 21"),
        ({"input_ids": [20, 21], "loss_mask": [0]}, "format", "1"),
        ({"input_ids": [20, 21], "loss_mask": [0, 2]}, "format", "0 and 1"),
        ({"input_ids": "20", "loss_mask": [0, 2]}, "format", "no list of whole numbers"),
    ],
)
def test_bad_records(record, reason, message):
    with pytest.raises(ConversationError, match=message) as found:
        row_of(record)
    assert found.value.reason == reason


def test_a_stated_format_is_required():
    both = {"messages": SAME, "prompt": "a", "response": "b"}
    assert row_of(both, "prompt") == Conversation(ask(), {})
    with pytest.raises(ConversationError, match="instruction, output \\(alpaca\\)"):
        row_of(both, "alpaca")
