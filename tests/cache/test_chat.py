"""Conversations: what the template renders, what of it carries loss, and what is refused."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from cluster.config import SourceConfig, TokensConfig
from cluster.corpus.chat import ChatEncoder, tokens_within
from cluster.corpus.documents import Document
from cluster.corpus.files import SourceFile
from cluster.tokenizer import load_tokenizer
from logit_store.errors import CorpusError
from tests.toy import END, WINDOW

pytestmark = pytest.mark.usefixtures("own_memory")

FILE = SourceFile("c.jsonl", "c.jsonl", "json", "", 0)
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "<a>{% generation %}{{ message.content }}<|endoftext|>{% endgeneration %}"
    "{% else %}<{{ message.role }}>{{ message.content + '\n' }}{% endif %}{% endfor %}"
)
WORDS = ["print(x)", "why?", "because", "naïve", "🦀", "<a>", "\n\n", " ", "def f():", "1234567"]
SYSTEM = {"role": "system", "content": "be brief"}
CHAT = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]


@pytest.fixture
def template(tmp_path: Path) -> str:
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    return str(tmp_path / "template.jinja")


def conversations(count: int) -> list[list[dict[str, Any]]]:
    rng = random.Random(0)
    made = []
    for _ in range(count):
        roles = ["system"] * rng.randrange(2) + ["user", "assistant"] * rng.randrange(1, 6)
        made.append([{"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randrange(1, 12)))} for role in roles])
    return made


def by_hand(messages: list[dict[str, Any]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Ids and mask of a conversation, one character at a time: whose token is it, and who said it?"""
    text, said = "", []
    for message in messages:
        before, after = ("<a>", END) if message["role"] == "assistant" else (f"<{message['role']}>", "\n")
        text += before + message["content"] + after
        said += [False] * len(before)
        said += [message["role"] == "assistant"] * (len(message["content"]) + len(after))
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return out["input_ids"], [any(said[start:end]) for start, end in out["offset_mapping"]]


def test_what_the_assistant_says_carries_loss(
    tokenize_here: Callable[..., Any], template: str, tokenizer: Path
) -> None:
    made, loaded = conversations(60), load_tokenizer(str(tokenizer), None, trust_remote_code=False)
    store = tokenize_here([{"messages": m} for m in made], messages_column="messages", chat_template=template)
    expected = []
    for messages in made:
        ids, mask = by_hand(messages, loaded)
        for start in range(0, len(ids), WINDOW):
            window = ids[start : start + WINDOW]
            loss = [mask[start + t + 1] for t in range(len(window) - 1)]  # position t predicts token t + 1
            if any(loss):
                expected.append((window, loss))
    assert len(expected) > len(made)  # some are longer than a window
    rows = [store[i] for i in range(len(store))]
    assert [(row.input_ids_T.tolist(), row.carries_loss_P.tolist()) for row in rows] == expected
    corpus = store.manifest["corpus"]
    assert (corpus["messages_column"], corpus["loss_on"]) == ("messages", "assistant")
    saved = [data for name, data in store.files().items() if b"endgeneration" in data]
    assert saved  # the store's tokenizer renders as its rows were


def test_all_of_it_carries_loss_when_asked(tokenize_here: Callable[..., Any], template: str, tokenizer: Path) -> None:
    loaded = load_tokenizer(str(tokenizer), None, trust_remote_code=False)
    documents = [{"messages": CHAT}, {"messages": []}, {"messages": None}, {"messages": CHAT[:1]}]
    store = tokenize_here(documents, messages_column="messages", chat_template=template, loss_on="all")
    rows = [store[i] for i in range(len(store))]
    assert [row.input_ids_T.tolist() for row in rows] == [by_hand(m, loaded)[0] for m in (CHAT, CHAT[:1])]
    assert all(row.carries_loss_P.all() for row in rows)


def test_tables_and_lines_give_the_same_rows(tokenize_here: Callable[..., Any], template: str, tmp_path: Path) -> None:
    """A table has every field in every message; a line of JSON leaves out what is not there."""
    made = conversations(20)
    made[3][0]["name"] = "Ada"
    schema = pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "name": pa.string()}))
    pa.parquet.write_table(pa.table({"chat": pa.array(made, schema)}), tmp_path / "c.parquet")
    options = {"messages_column": "chat", "chat_template": template}
    lines = tokenize_here([{"chat": m} for m in made], **options)
    table = tokenize_here({"files": [str(tmp_path / "c.parquet")]}, path=str(tmp_path / "table"), **options)
    assert table.manifest["text_id"] == lines.manifest["text_id"]
    assert [table[i].document for i in range(len(table))] == [lines[i].document for i in range(len(lines))]


def test_tables_and_lines_give_the_same_calls_of_tools(tokenize_here: Callable[..., Any], tmp_path: Path) -> None:
    """A table gives each call the arguments that any call has."""
    made = []
    for name, arguments in (("f", {"a": 1}), ("g", {"b": "x"}), ("h", {})):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        made.append([CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}])
    template = TEMPLATE.replace("{{ message.content }}<|", "{{ message.content }}{{ message.tool_calls | tojson }}<|")
    (tmp_path / "t.jinja").write_text(template)
    options = {"messages_column": "chat", "chat_template": str(tmp_path / "t.jinja")}
    pa.parquet.write_table(pa.Table.from_pylist([{"chat": m} for m in made]), tmp_path / "c.parquet")
    lines = tokenize_here([{"chat": m} for m in made], **options)
    table = tokenize_here({"files": [str(tmp_path / "c.parquet")]}, path=str(tmp_path / "table"), **options)
    assert table.manifest["text_id"] == lines.manifest["text_id"]
    assert [table[i].document for i in range(len(table))] == [lines[i].document for i in range(len(lines))]


def test_a_character_of_several_tokens_is_marked_whole(tokenizer: Path) -> None:
    """Where transformers' mask, which asks for the token of a span's last character, is one of three bytes short."""
    loaded = load_tokenizer(str(tokenizer), None, trust_remote_code=False)
    open_ended = "<u>{{ messages[0].content }}{% generation %}{{ messages[1].content }}{% endgeneration %}"
    config = TokensConfig(path="", source=SourceConfig(files=["x"], messages_column="m"), tokenizer="")
    messages = [CHAT[0], {"role": "assistant", "content": "x 🦀"}]
    (encoded,) = ChatEncoder(config, loaded, open_ended)([Document({"m": messages}, FILE, 1)])
    assert encoded is not None
    assert encoded.carries_loss_T is not None
    assert loaded.decode(encoded.ids_T[encoded.carries_loss_T]) == "x 🦀"
    theirs = loaded.apply_chat_template(
        messages, chat_template=open_ended, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert theirs["input_ids"] == encoded.ids_T.tolist()
    assert sum(theirs["assistant_masks"]) < encoded.carries_loss_T.sum()


def test_tokens_within_spans() -> None:
    offsets = np.array([[0, 2], [2, 3], [3, 3], [3, 7], [7, 9]])
    assert tokens_within([(1, 3), (8, 9)], offsets).tolist() == [True, True, False, False, True]
    assert not tokens_within([(3, 3)], offsets).any()
    assert not tokens_within([], offsets).any()


@pytest.mark.parametrize(
    ("template", "changes", "message"),
    [
        (None, {}, "has no chat template to render conversations with: give one as tokens.chat_template"),
        (TEMPLATE.replace("generation", "raw"), {}, "does not mark what the assistant says"),
        ("{% generation %}{{ strftime_now('%d') }}{% endgeneration %}", {}, "writes today's date"),
        ("{% generation %}{% endgeneration %}{{ messages[0].content }}", {}, "line 1: the assistant speaks, but"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", {}, r"t\.jinja marks what the user says"),
        (TEMPLATE.replace("'assistant'", "'user'"), {}, "marks what the user says"),
        ("{% generation %}:{% endgeneration %}{{ messages[1].content }}", {}, "or leaves out what the assistant says"),
        ("{% generation %}{{ 1 // 0 }}{% endgeneration %}", {}, "line 1: the chat template refuses.*modulo by zero"),
        ("{% generation %}{% endgeneration %}{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", {}, "maximum recursion"),
        ("{% generation %}{% endgeneration %}{{ raise_exception('roles!') }}", {}, "the chat template refuses.*roles!"),
        ("{% generation %}{% endgeneration %}{{ oh no", {}, "line 1: the chat template refuses the conversation"),
        (TEMPLATE, {"chat_template": "/nowhere.jinja"}, "tokens.chat_template=/nowhere.jinja cannot be read"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_used(
    refused: Callable[..., str],
    template: str | None, changes: dict[str, Any], message: str, tmp_path: Path,
) -> None:  # fmt: skip
    import re

    if template is not None:
        (tmp_path / "t.jinja").write_text(template)
        changes = {"chat_template": str(tmp_path / "t.jinja")} | changes
    assert re.search(message, refused([{"messages": CHAT}], messages_column="messages", **changes))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "line 1: column 'messages' must hold a list of messages"),
        (["hello"], "line 1: column 'messages' must hold a list of messages"),
        ([{"content": "x"}], "line 1: column 'messages' must hold a list of messages"),
        (CHAT[:1], "no document of it has any tokens that carry loss"),
    ],
)
def test_conversations_that_are_none(
    refused: Callable[..., str], template: str, messages: Any, message: str
) -> None:  # fmt: skip
    assert message in refused([{"messages": messages}], messages_column="messages", chat_template=template)
    assert "Set tokens.source.messages_column" in refused([{"text": "x"}], messages_column="messages")


def test_another_template_is_another_store(tokenize_here: Callable[..., Any], template: str, tmp_path: Path) -> None:
    from logit_store.errors import IdentityError

    documents = [{"messages": CHAT}]
    tokenize_here(documents, messages_column="messages", chat_template=template, num_shards=1)
    (tmp_path / "other.jinja").write_text(TEMPLATE.replace("<a>", "<assistant>"))
    with pytest.raises(IdentityError, match=r"corpus\.\w+_sha256 is"):
        tokenize_here(documents, messages_column="messages", chat_template=f"{tmp_path}/other.jinja", num_shards=1)


def test_a_mask_of_everything_that_is_predicted_is_refused(tokenizer: Path) -> None:
    """Nothing predicts the first token: that it is not marked says nothing. The template renders no plain question."""
    loaded = load_tokenizer(str(tokenizer), None, trust_remote_code=False)
    everyone = END + (
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% generation %}{% for message in messages %}{{ message.content }}{% endfor %}{% endgeneration %}"
    )
    config = TokensConfig(path="", source=SourceConfig(files=["x"], messages_column="m"), tokenizer="")
    with pytest.raises(CorpusError, match="marks all of the conversation as the assistant's"):
        list(ChatEncoder(config, loaded, everyone)([Document({"m": [SYSTEM, *CHAT]}, FILE, 1)]))
