"""Data: how files become examples, and examples tokens with targets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from weft.error import FormatError, PathError
from weft.learn.data import IGNORE, Chat, Encoded, Pair, Response, Text, encode, fingerprint
from weft.learn.read import read

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %} <end>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def put(folder: Path, name: str, text: str) -> Path:
    """Write a file."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(text.encode())
    return folder / name


def jsonl(*records: Any) -> str:
    """One record a line."""
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


RECORDS: dict[str, tuple[dict[str, Any], Any]] = {
    "text": ({"text": "a cat"}, Text("a cat")),
    "response": ({"prompt": "a", "response": "b"}, Response("a", "b")),
    "pair": ({"query": "a", "positive": "b"}, Pair("a", "b")),
    "chat": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        Chat((("user", "a"), ("assistant", "b"))),
    ),
}


def bare(example: Any) -> Any:
    """The example without the place it came from."""
    return type(example)(**{**vars(example), "name": ""})


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_records_become_examples(suffix: str, kind: str, tmp_path: Path) -> None:
    """Each kind of record, in both spellings of JSON; further fields do no harm."""
    record, want = RECORDS[kind]
    rows = [record, {**record, "id": 7}]
    path = put(tmp_path, f"data{suffix}", jsonl(*rows) if suffix == ".jsonl" else json.dumps(rows))
    assert [bare(e) for e in read(path)] == [want, want]


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    """With its line ends."""
    assert read(put(tmp_path, "data.txt", "a cat\n\nsat\n")) == [Text("a cat\n\nsat\n", "data.txt")]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("text\na cat\nsat\n", [Text("a cat"), Text("sat")]),
        ('prompt,response\n"a, b","c\nd"\n', [Response("a, b", "c\nd")]),
        ("query,positive,id\na,b,1\n", [Pair("a", "b")]),
        ("text\r\na cat\r\n", [Text("a cat")]),
    ],
)
def test_csv(text: str, want: list[Any], tmp_path: Path) -> None:
    """Quotes, commas, line ends within a field, further columns."""
    assert [bare(e) for e in read(put(tmp_path, "data.csv", text))] == want


@pytest.mark.parametrize(
    "text",
    ["prompt,response\na,yes, and no\n", 'prompt,response\na,"yes\n', 'prompt,response\na,"yes" no\n', "prompt,prompt,response\na,b,c\n"],
)  # fmt: skip
def test_a_table_that_would_be_cut_is_refused(text: str, tmp_path: Path) -> None:
    """A comma outside quotes, a quote that is open or ends too soon, a column twice."""
    with pytest.raises(FormatError) as e:
        read(put(tmp_path, "data.csv", text))
    assert e.value.where.startswith("data.csv")


def test_csv_with_a_byte_order_mark(tmp_path: Path) -> None:
    """As spreadsheets write it."""
    assert [bare(e) for e in read(put(tmp_path, "data.csv", "\ufefftext\na cat\n"))] == [Text("a cat")]


def test_csv_with_a_long_field(tmp_path: Path) -> None:
    """A document is longer than csv's usual limit of 128 KiB."""
    assert read(put(tmp_path, "data.csv", f"text\n{'a' * 200_000}\n"))[0] == Text("a" * 200_000, "data.csv row 1")


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c"])
def test_a_line_of_jsonl_ends_at_a_newline_only(char: str, tmp_path: Path) -> None:
    """Characters that JSON allows in a string do not cut the record."""
    path = put(tmp_path, "data.jsonl", '{"text": "a' + (char if ord(char) > 31 else f"\\u{ord(char):04x}") + 'b"}\n')
    assert [e.text for e in read(path)] == [f"a{char}b"]  # type: ignore[union-attr]


def test_a_folder_is_read_in_order(tmp_path: Path) -> None:
    """Every readable file below it, by path; others are left alone; blank lines too."""
    put(tmp_path, "d/b.jsonl", "\n" + jsonl({"text": "2"}) + "\n" + jsonl({"text": "3"}))
    put(tmp_path, "d/a/x.txt", "1")
    put(tmp_path, "d/readme.md", "no")
    assert [e.text for e in read(tmp_path / "d")] == ["1", "2", "3"]  # type: ignore[union-attr]


def test_names_tell_where_an_example_is(tmp_path: Path) -> None:
    """File and line."""
    path = put(tmp_path, "data.jsonl", "\n" + jsonl({"text": "a"}) + "\n" + jsonl({"text": "b"}))
    assert [e.name for e in read(path)] == ["data.jsonl line 2", "data.jsonl line 4"]


@pytest.mark.parametrize("name", ["absent.jsonl", "absent", "data.orc", "data.bin"])
def test_what_is_not_there_is_a_path_error(name: str, tmp_path: Path) -> None:
    """No such file, or none that can be read."""
    if name.startswith("data"):
        put(tmp_path, name, "x")
    with pytest.raises(PathError):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data.jsonl", jsonl({"text": "a"}, {"query": "a", "positive": "b"})),
        ("data.json", json.dumps([{"prompt": "a", "response": "b"}, {"text": "a"}])),
        ("data.json", '{"text": "a"}'),
        ("data.json", "[]"),
        ("data.json", "[1"),
        ("data.jsonl", ""),
        ("data.csv", "text\n"),
        ("data.csv", ""),
        ("data.csv", "a,b\n1,2\n"),
        ("data.csv", "a,b\n1,2,3\n"),
        ("data.csv", "prompt,response\nalone\n"),
        ("data.jsonl", '{"text": 7}'),
        ("data.jsonl", '{"text": "a", "text": "b"}'),
        ("data.jsonl", '{"text": NaN}'),
        ("data.jsonl", '{"messages": []}'),
        ("data.jsonl", '{"messages": [{"role": "user"}]}'),
        ("data.jsonl", '{"messages": ["hello"]}'),
        ("data.jsonl", '{"prompt": "a", "response": null}'),
        ("data.jsonl", "[1, 2]"),
        ("data.jsonl", '"text"'),
    ],
)
def test_bad_content_is_a_format_error(name: str, text: str, tmp_path: Path) -> None:
    """Kinds that are mixed, nothing at all, and records that cannot be used."""
    with pytest.raises(FormatError) as e:
        read(put(tmp_path, name, text))
    assert "data" in str(e.value.where)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".json"])
def test_a_file_that_is_no_text_is_a_format_error(suffix: str, tmp_path: Path) -> None:
    """Not UTF-8."""
    (tmp_path / f"data{suffix}").write_bytes(b"text\n\xff\xfe")
    with pytest.raises(FormatError):
        read(tmp_path / f"data{suffix}")


def test_bad_records_come_together(tmp_path: Path) -> None:
    """All of them, each with its line."""
    path = put(tmp_path, "data.jsonl", jsonl({"text": "a"}, {"txt": "a"}) + "{\n" + jsonl({"text": "b"}, 7))
    with pytest.raises(FormatError, match="3 problems") as e:
        read(path)
    assert all(f"data.jsonl line {i}" in e.value.what for i in (2, 3, 5)) and "line 4" not in e.value.what


def test_at_most_ten_bad_records_are_told(tmp_path: Path) -> None:
    """A file of another kind does not fill the screen."""
    with pytest.raises(FormatError, match="10 problems"):
        read(put(tmp_path, "data.jsonl", jsonl(*[{"no": i} for i in range(500)])))


def test_bad_files_of_a_folder_come_together(tmp_path: Path) -> None:
    """One look at a folder tells what is wrong in all of its files."""
    put(tmp_path, "d/a.jsonl", "{\n")
    put(tmp_path, "d/b.csv", "x\n1\n")
    with pytest.raises(FormatError) as e:
        read(tmp_path / "d")
    assert "a.jsonl line 1" in str(e.value) and "b.csv row 1" in str(e.value)


def test_a_folder_named_like_a_file_is_read_once(tmp_path: Path) -> None:
    """Its files count once."""
    put(tmp_path, "d/x.json/a.txt", "1")
    assert [e.name for e in read(tmp_path / "d")] == ["a.txt"]


def test_fingerprint_is_of_content_and_order() -> None:
    """Not of names; kinds with the same strings differ."""
    a, b = Text("a", "x"), Text("b", "y")
    assert fingerprint([a, b]) == fingerprint([Text("a", "other"), Text("b")])
    others = [[b, a], [a], [a, b, b], [Text("ab")], [Response("a", "b")], [Pair("a", "b")], [Chat((("a", "b"),))]]
    assert len({fingerprint(x) for x in [[a, b], *others]}) == len(others) + 1


def ids(words: Any, text: str) -> list[int]:
    """Token ids without special tokens."""
    return words(text, add_special_tokens=False)["input_ids"]


def test_every_token_of_a_text_is_a_target(words: Any) -> None:
    """And the end."""
    (e,) = encode([Text("the cat sat")], words, length=16)
    assert e == Encoded(e.input_ids, e.input_ids) and e.input_ids == [*ids(words, "the cat sat"), words.eos_token_id]


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 100])
def test_long_texts_are_cut_into_windows(length: int, words: Any) -> None:
    """No window is longer, none is empty of targets, and together they are the text."""
    text = "the cat sat on the mat . a dog ran"
    made = encode([Text(text)], words, length=length)
    whole = [*ids(words, text), words.eos_token_id]
    assert all(1 < len(e.input_ids) <= length for e in made)
    flat = [t for e in made for t in e.input_ids]
    assert flat == whole[: len(flat)] and len(whole) - len(flat) <= 1


def test_only_the_response_is_a_target(words: Any) -> None:
    """And the end token after it."""
    (e,) = encode([Response("question the cat ?", "answer yes .")], words, length=32)
    prompt, answer = ids(words, "question the cat ?"), [*ids(words, "answer yes ."), words.eos_token_id]
    assert e.input_ids == prompt + answer and e.labels == [IGNORE] * len(prompt) + answer


@pytest.mark.parametrize("length", [2, 3, 4, 5, 8, 13])
def test_a_long_prompt_loses_its_start(length: int, words: Any) -> None:
    """The response stays whole as long as it fits; the prompt's end stays before it."""
    prompt, answer = ids(words, "the old cat sat on the red mat ."), [*ids(words, "yes the cat"), words.eos_token_id]
    (e,) = encode([Response("the old cat sat on the red mat .", "yes the cat")], words, length=length)
    assert e.input_ids == (prompt + answer)[-length:] if length >= 4 else e.input_ids == answer[:length]
    assert [t for t in e.labels if t != IGNORE] == answer[:length] and len(e.input_ids) == len(e.labels) <= length


def test_without_an_end_token_there_is_none(words: Any) -> None:
    """A tokenizer that has no end token ends nothing."""
    import copy

    bare_ = copy.deepcopy(words)
    bare_.eos_token = None
    (e,) = encode([Response("a", "cat sat")], bare_, length=8)
    assert e.input_ids == ids(words, "a cat sat")


@pytest.mark.parametrize("examples", [[], [Text("")], [Response("the cat", "")], [Text(""), Response("a", "")]])
def test_no_target_is_an_error(examples: list[Any], words: Any) -> None:
    """Training on nothing is refused."""
    with pytest.raises(FormatError):
        encode(examples, words, length=8)


def test_examples_without_a_target_are_left_out(words: Any) -> None:
    """The others stay, in order."""
    made = encode([Response("a", ""), Response("a", "cat"), Text(""), Text("the dog")], words, length=8)
    assert [e.input_ids[:-1] for e in made] == [ids(words, "a cat"), ids(words, "the dog")]


def test_pairs_do_not_train_a_language_model(words: Any) -> None:
    """Refused by name."""
    with pytest.raises(FormatError) as e:
        encode([Pair("a", "b", "data.csv row 3")], words, length=8)
    assert e.value.where == "data.csv row 3"


@pytest.fixture
def chatty(words: Any) -> Any:
    """The word tokenizer with a chat template."""
    import copy

    made = copy.deepcopy(words)
    made.chat_template = TEMPLATE
    return made


TURNS = (("user", "the cat ?"), ("assistant", "yes ."), ("user", "a dog ?"), ("assistant", "no no ."))


def test_only_the_assistants_turns_are_targets(chatty: Any) -> None:
    """Every turn of the assistant with the end that the template gives it; no role marker."""
    (e,) = encode([Chat(TURNS)], chatty, length=64)
    text = "user : the cat ? assistant : yes . <end> user : a dog ? assistant : no no . <end>"
    assert e.input_ids == ids(chatty, text)
    runs = [[t for t in e.labels[a:b] if t != IGNORE] for a, b in ((0, 11), (11, 30))]
    assert [chatty.decode(r) for r in runs] == ["yes . <end>", "no no . <end>"]
    assert all(t in (IGNORE, i) for t, i in zip(e.labels, e.input_ids, strict=True))


@pytest.mark.parametrize("length", [4, 7, 12])
def test_a_long_chat_loses_its_start(length: int, chatty: Any) -> None:
    """The last turns stay."""
    (whole,), (e,) = encode([Chat(TURNS)], chatty, length=64), encode([Chat(TURNS)], chatty, length=length)
    assert e == Encoded(whole.input_ids[-length:], whole.labels[-length:])


def test_a_chat_without_an_assistant_has_no_target(chatty: Any) -> None:
    """Nothing to learn."""
    with pytest.raises(FormatError):
        encode([Chat(TURNS[:1])], chatty, length=64)


def test_where_a_template_rewrites_every_turn_is_learnt_as_it_was_written(chatty: Any) -> None:
    """Thought before the last answer alone: earlier ones stand without it before later ones."""
    chatty.chat_template = (
        "{% for m in messages %}{{ m['role'] }} : {% if loop.last and m['role'] == 'assistant' %}the {% endif %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %} <end>{% endif %} {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
    )
    first, second = encode([Chat(TURNS, task="a")], chatty, length=64)
    asked = "user : the cat ? assistant :"
    assert first.input_ids == ids(chatty, f"{asked} the yes . <end>")
    assert second.input_ids == ids(chatty, f"{asked} yes . <end> user : a dog ? assistant : the no no . <end>")
    for e, said in ((first, "the yes . <end>"), (second, "the no no . <end>")):
        targets = ids(chatty, said)
        assert e.labels == [IGNORE] * (len(e.input_ids) - len(targets)) + targets and e.task == "a"


@pytest.mark.parametrize("tag", ["{% generation %}", "{%- generation -%}"])
def test_what_a_template_marks_as_generated_is_the_target(tag: str, chatty: Any) -> None:
    """And nothing else, whatever it asks answers by."""
    end = tag.replace("generation", "endgeneration")
    chatty.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'answer ' }}"
        + tag
        + "{{ m['content'] }}"
        + end
        + "{{ ' <end> ' }}"
        "{% else %}question {{ m['content'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}dog{% endif %}"
    )
    (e,) = encode([Chat(TURNS)], chatty, length=64)
    assert e.input_ids == ids(chatty, "question the cat ? answer yes . <end> question a dog ? answer no no . <end>")
    marked = [i for i, label in enumerate(e.labels) if label != IGNORE]
    assert [e.labels[i] for i in marked] == [e.input_ids[i] for i in marked] == ids(chatty, "yes . no no .")
    (short,) = encode([Chat(TURNS)], chatty, length=5)
    assert short == Encoded(e.input_ids[-5:], e.labels[-5:])


TOOLED = (*TURNS[:1], ("assistant", ""), ("tool", "a dog"), ("assistant", "no ."))
CALL = {"tool_calls": [{"function": {"name": "cat", "arguments": {"on": "mat"}}}]}


def test_calls_of_tools_are_what_the_template_makes_of_them(chatty: Any) -> None:
    """A turn's calls are targets, the tools that there are stand before; a template that leaves them out is refused."""
    example = Chat(TOOLED, more=("", json.dumps(CALL), "", ""), tools=json.dumps([{"name": "cat"}]))
    with pytest.raises(FormatError, match="leaves tools out"):
        encode([example], chatty, length=64)
    chatty.chat_template = "{% for t in tools or [] %}question {{ t['name'] }} {% endfor %}" + TEMPLATE.replace(
        "{{ m['content'] }}",
        "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}{% set f = c['function'] %}{{ f['name'] }} on {{ f['arguments']['on'] }}"
        "{% endfor %}",
    )
    (e,) = encode([example], chatty, length=64)
    assert chatty.decode([t for t in e.labels if t != IGNORE]) == "cat on mat <end> no . <end>"
    assert e.input_ids[:2] == ids(chatty, "question cat")


SAID = (("user", "the cat ?"), ("assistant", "yes ."))
FORMS: dict[str, tuple[dict[str, Any], Chat]] = {
    "parts": (
        {"messages": [
            {"role": r, "content": [{"type": "text", "text": part} for part in c.split(maxsplit=1)]} for r, c in SAID
        ]},
        Chat(tuple((r, c.replace(" ", "", 1)) for r, c in SAID)),
    ),
    "sharegpt": ({"conversations": [{"from": "human", "value": "the cat ?"}, {"from": "gpt", "value": "yes ."}]}, Chat(SAID)),
    "tools as text": ({"messages": [{"role": r, "content": c} for r, c in SAID], "tools": "[]"}, Chat(SAID)),
    "calls": (
        {"messages": [{"role": "user", "content": "the cat ?"}, {"role": "assistant", "content": None, **CALL}],
         "tools": [{"name": "cat"}]},
        Chat((SAID[0], ("assistant", "")), more=("", json.dumps(CALL)), tools=json.dumps([{"name": "cat"}])),
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_conversations_in_other_forms(form: str, suffix: str, tmp_path: Path) -> None:
    """Parts of text, the names of ShareGPT, calls of tools; in tables too, where what a turn has not is there as nothing."""
    record, want = FORMS[form]
    if suffix == ".jsonl":
        path = put(tmp_path, "data.jsonl", jsonl(record))
    else:
        pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (it is in the test extra)")
        import pyarrow as pa

        pq.write_table(pa.Table.from_pylist([record]), path := tmp_path / "data.parquet")
    assert [bare(e) for e in read(path)] == [want]


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user", "content": [{"type": "image", "url": "x"}]}, {"role": "user", "content": 5}, {"content": "the"},
        {"role": "assistant", "content": "yes .", "weight": 0}, {"role": "user"}, {"role": "assistant", "content": None},
        {"from": ["user"], "value": "the"}, {"role": "", "content": "the"},
    ],
)  # fmt: skip
def test_turns_that_are_no_text_are_refused(turn: dict[str, Any], tmp_path: Path) -> None:
    """Images, a weight that no template says, nothing said."""
    with pytest.raises(FormatError) as e:
        read(put(tmp_path, "data.jsonl", jsonl({"messages": [turn, {"role": "assistant", "content": "no ."}]})))
    assert e.value.where == "data.jsonl line 1"


def test_a_template_that_asks_for_something_else_is_refused(chatty: Any) -> None:
    """Where a turn does not begin as it is asked for, targets cannot be told."""
    chatty.chat_template = TEMPLATE.replace("assistant : {% endif %}", "assistant : the {% endif %}")
    with pytest.raises(FormatError, match="the") as e:
        encode([Chat(TURNS, "data.jsonl line 1")], chatty, length=64)
    assert e.value.where == "data.jsonl line 1"


def test_a_tokenizer_without_a_template_is_a_format_error(words: Any) -> None:
    """Chats need one; the error says so."""
    with pytest.raises(FormatError):
        encode([Chat(TURNS)], words, length=64)


TABLES = (".parquet", ".stream.arrow", ".file.arrow")


def table(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """Write records as a table."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    made, path = pa.Table.from_pylist(rows), folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        pq.write_table(made, path)
    else:
        new = pa.ipc.new_stream if ".stream." in name else pa.ipc.new_file
        with new(path, made.schema) as f:
            f.write_table(made)
    return path


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("suffix", TABLES)
def test_tables_become_examples(suffix: str, kind: str, tmp_path: Path) -> None:
    """Each kind of record in columns; further columns do no harm, whatever they hold."""
    record, want = RECORDS[kind]
    path = table(tmp_path, f"data{suffix}", [{**record, "id": i, "other": [1.5]} for i in range(3)])
    assert [bare(e) for e in read(path)] == [want] * 3


@pytest.mark.parametrize("suffix", TABLES)
def test_a_broken_table_is_named(suffix: str, tmp_path: Path) -> None:
    """Cut short, or of other columns: a FormatError that says which file."""
    path = table(tmp_path, f"data{suffix}", [{"text": "a cat"}] * 50)
    path.write_bytes(path.read_bytes()[:-40] if suffix == ".parquet" else path.read_bytes()[:60])
    with pytest.raises(FormatError, match="data"):
        read(path)
    with pytest.raises(FormatError, match="row 1"):
        read(table(tmp_path, f"other{suffix}", [{"words": "a cat"}]))


def test_a_saved_data_set_is_read_without_its_notes(tmp_path: Path) -> None:
    """As the datasets library saves it."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": "a cat"}] * 2).save_to_disk(tmp_path / "one")
    assert [bare(e) for e in read(tmp_path / "one")] == [Text("a cat")] * 2
    both = {n: datasets.Dataset.from_list([{"text": n}]) for n in ("train", "test")}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "two")
    with pytest.raises(FormatError, match="splits"):
        read(tmp_path / "two")
    assert [bare(e) for e in read(tmp_path / "two" / "test")] == [Text("test")]


def test_of_several_splits_one_has_to_be_chosen(tmp_path: Path) -> None:
    """A hub folder's test set is not trained on in silence; a pattern chooses."""
    for name in (
        "data/train-00000-of-00002.jsonl",
        "data/train-00001-of-00002.jsonl",
        "data/test-00000-of-00001.jsonl",
    ):
        put(tmp_path, name, jsonl({"text": name}))
    with pytest.raises(FormatError, match="test, train"):
        read(tmp_path)
    assert [e.text for e in read(str(tmp_path / "data" / "train-*.jsonl"))] == [  # pyright: ignore
        "data/train-00000-of-00002.jsonl",
        "data/train-00001-of-00002.jsonl",
    ]
    with pytest.raises(PathError):
        read(str(tmp_path / "data" / "dev-*.jsonl"))


def test_completions_are_responses(tmp_path: Path) -> None:
    """As TRL calls them."""
    path = put(tmp_path, "a.jsonl", jsonl({"prompt": "a", "completion": "b"}))
    assert [bare(e) for e in read(path)] == [Response("a", "b")]


def test_a_reference_has_the_same_targets(tmp_path: Path, words: Any) -> None:
    """It is read with its record, encoded behind its own prompt, however long; an empty prompt beside one is refused."""
    place = tmp_path / "said.jsonl"
    rows = [
        {"prompt": "a cat", "response": "sat on", "reference": "the old cat"},
        {"prompt": "a dog", "response": "ran"},
    ]
    place.write_text("".join(json.dumps(r) + "\n" for r in rows))
    one, two = read(place)
    assert one == Response("a cat", "sat on", "said.jsonl line 1", reference="the old cat")
    assert fingerprint([one]) != fingerprint([replace(one, reference="")])
    for length in (32, 4, 3):
        (made,) = encode([one], words, length=length)
        assert made.reference is not None and len(made.reference.input_ids) <= length
        targets = [[t for t in e.labels[1:] if t >= 0] for e in (made, made.reference)]
        assert targets[0] == targets[1]
    assert encode([two], words, length=32)[0].reference is None
    with pytest.raises(FormatError, match="a prompt is empty, or its reference"):
        encode([replace(one, prompt="")], words, length=32)
