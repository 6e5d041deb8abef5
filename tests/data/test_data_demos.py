"""Demonstrations: each form read exactly, every unusable record named with its line and reason."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import simple
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.data import demos
from tutelage.data.forms import parse_record, raw_items, raw_members
from tutelage.data.quarantine import Quarantine
from tutelage.data.store import TrajectoryWriter
from tutelage.errors import ConfigError, DataError

ASK = {"role": "user", "content": "2+2?"}
SAY = {"role": "assistant", "content": "4"}
GOOD = {"messages": [ASK, SAY]}


def lines(path: Path, *records) -> Path:
    """Records as JSONL; bytes and text go in as they are."""
    raw = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in records]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def only(tmp_path, record, **kwargs):
    loaded = demos.load(lines(tmp_path / "d.jsonl", record), **kwargs)
    assert (len(loaded.demos), loaded.problems) == (1, [])
    return loaded.demos[0]


def reason(tmp_path, record):
    loaded = demos.load(lines(tmp_path / "d.jsonl", record, GOOD))
    assert len(loaded.demos) == 1
    (problem,) = loaded.problems
    assert problem.origin == "d.jsonl:1"
    return problem.reason


# -- forms ---------------------------------------------------------------------------------------


def test_openai_messages_with_tools(tmp_path):
    call = {"id": "c1", "type": "function", "function": {"name": "run", "arguments": '{ "cmd":  "ls\\u00e9" '}}
    tool = {"type": "function", "function": {"name": "run", "parameters": {"type": "object"}}}
    record = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {**ASK, "name": "ann"},
            {"role": "assistant", "content": None, "reasoning_content": "think", "tool_calls": [call]},
            {"role": "tool", "content": "", "tool_call_id": "c1"},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "id": 7},
        ],
        "tools": [tool, {"name": "bare", "parameters": {}}],
        "source": "web",
        "empty": None,
    }
    demo = only(tmp_path, record)
    assert demo.messages == (
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "2+2?", "name": "ann"},
        {"role": "assistant", "content": None, "reasoning_content": "think", "tool_calls": [call]},
        {"role": "tool", "content": "", "tool_call_id": "c1"},
        {"role": "assistant", "content": "ab"},
    )
    assert demo.tools == (tool, {"type": "function", "function": {"name": "bare", "parameters": {}}})
    assert demo.extra == {"record": {"source": "web"}, "message_fields": {"4": {"id": 7}}}
    assert (demo.origin, demo.train) == ("d.jsonl:1", (False, False, True, False, True))


def test_object_arguments_become_text_and_are_counted(tmp_path):
    call = {"name": "run", "arguments": {"b": 1.0, "a": "é"}}
    demo = only(tmp_path, {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}]})
    (got,) = demo.messages[1]["tool_calls"]
    assert got == {"type": "function", "function": {"name": "run", "arguments": '{"b": 1.0, "a": "é"}'}}
    assert demo.extra == {"reserialised_arguments": 1}


def test_openai_function_call_of_old(tmp_path):
    said = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    demo = only(tmp_path, {"messages": [ASK, said, {"role": "function", "name": "f", "content": "x"}, SAY]})
    assert demo.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    assert demo.messages[2] == {"role": "tool", "content": "x", "name": "f"}


@pytest.mark.parametrize(
    ("flags", "train"),
    [
        ({"trainable": False}, (False, False, False, True)),
        ({"weight": 0}, (False, False, False, True)),
        ({"loss": True, "train": 1.0}, (False, True, False, True)),
        ({"loss": None}, (False, True, False, True)),
    ],
)
def test_a_record_says_what_is_learned(tmp_path, flags, train):
    demo = only(tmp_path, {"messages": [ASK, {**SAY, **flags}, {**ASK, "weight": 0}, SAY]})
    assert demo.train == train
    assert ("trainable" in demo.messages[1]) == any(v is not None for v in flags.values())
    assert "trainable" not in demo.messages[2]


def test_prompt_and_completion(tmp_path):
    demo = only(tmp_path, {"prompt": "Hi", "completion": "Ho", "system": "S"})
    assert demo.messages == (
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
    )
    demo = only(tmp_path, {"prompt": [ASK, SAY, {"role": "user", "content": "3?"}], "completion": [SAY]})
    assert demo.train == (False, False, False, True)
    assert demo.messages[1] == {**SAY, "trainable": False}
    text = '[{"role": "user"}]'
    assert only(tmp_path, {"prompt": text, "completion": "x"}).messages[0]["content"] == text


def test_question_and_answer_as_they_stand(tmp_path):
    answer = "48/2 = <<48/2=24>>24\n#### 24"
    demo = only(tmp_path, {"question": " Q? ", "answer": answer, "id": 3})
    assert demo.messages == ({"role": "user", "content": " Q? "}, {"role": "assistant", "content": answer})
    assert demo.extra == {"record": {"id": 3}}


def test_alpaca(tmp_path):
    demo = only(tmp_path, {"instruction": "Add", "input": "1 2", "output": "3", "history": [["a", "b"]]})
    said = [(m["role"], m["content"]) for m in demo.messages]
    assert said == [("user", "a"), ("assistant", "b"), ("user", "Add\n\n1 2"), ("assistant", "3")]
    assert only(tmp_path, {"instruction": "Add", "input": "", "output": "3"}).messages[0]["content"] == "Add"


def test_sharegpt_with_tools(tmp_path):
    record = {
        "system": "S",
        "tools": json.dumps([{"name": "run", "parameters": {}}]),
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello", "loss": False, "score": 2},
            {"from": "function_call", "value": ' {"name": "run", "arguments": {"x":1.0 ,"y":"\\u00e9"}}'},
            {"from": "observation", "value": "ok"},
            {"from": "function_call", "value": '[{"arguments": "{bad", "name": "f"}, {"name":"g","arguments":{} }]'},
            {"from": "observation", "value": "ok"},
            {"role": "assistant", "content": "done"},
        ],
    }
    demo = only(tmp_path, record)
    assert demo.messages[0] == {"role": "system", "content": "S"}
    assert demo.messages[2] == {"role": "assistant", "content": "Hello", "trainable": False}
    assert demo.extra == {"message_fields": {"2": {"score": 2}}}
    calls = [[c["function"] for c in m["tool_calls"]] for m in demo.messages if m.get("tool_calls")]
    assert calls == [
        [{"name": "run", "arguments": '{"x":1.0 ,"y":"\\u00e9"}'}],
        [{"name": "f", "arguments": "{bad"}, {"name": "g", "arguments": "{}"}],
    ]
    assert demo.messages[4] == {"role": "tool", "content": "ok"}
    assert demo.tools == ({"type": "function", "function": {"name": "run", "parameters": {}}},)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(value=st.dictionaries(st.text(max_size=4), JSON, max_size=4), spaces=st.sampled_from([None, 1, "\t"]))
@settings(max_examples=80, deadline=None)
def test_raw_members_are_the_text_of_their_values(value, spaces):
    text = json.dumps(value, indent=spaces)
    members = raw_members(text)
    assert {k: json.loads(v) for k, v in members.items()} == value
    assert all(v in text and v == v.strip() for v in members.values())
    items = raw_items(json.dumps(list(value.values()), indent=spaces))
    assert [json.loads(i) for i in items] == list(value.values())


def test_the_form_is_forced_or_found(tmp_path):
    both = {"question": "Q", "answer": "A", "messages": [ASK, SAY]}
    assert only(tmp_path, both).messages == (ASK, SAY)
    assert only(tmp_path, both, format="question-answer").messages[0]["content"] == "Q"
    with pytest.raises(DataError, match='field "conversations" is needed; the record has "question", "answer"'):
        only(tmp_path, both, format="sharegpt")
    with pytest.raises(ConfigError, match=r"got 'sharegtp' \(did you mean 'sharegpt'\?\)"):
        only(tmp_path, both, format="sharegtp")
    with pytest.raises(ConfigError, match="on_bad_record must be"):
        only(tmp_path, both, on_bad_record="skip")
    with pytest.raises(ConfigError, match="limit must be at least 1 or None, got 0"):
        only(tmp_path, both, limit=0)


# -- records that cannot be used --------------------------------------------------------------------

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ('{"messages": [', "not JSON: Expecting value at column 15"),
        ('{"messages": [{"role": "user", "role": "assistant"}]}', 'the key "role" is there twice'),
        ('{"messages": [], "x": NaN}', "NaN is no JSON"),
        ('{"messages": [], "x": -Infinity}', "-Infinity is no JSON"),
        ('{"x": ' + "9" * 5000 + "}", "an integer of 5000 digits; at most 4300 can be read"),
        ('{"x": 1e999}', "the number 1e999 is beyond a double's range"),
        (DEEP, "nested too deeply"),
        (b'{"question": "\xff\xfe", "answer": "x"}', "not UTF-8: invalid start byte at byte 14"),
        ("[1, 2]", "a record must be a JSON object, this is of type list"),
        ("null", "a record must be a JSON object, this is of type null"),
        ({"text": "x"}, 'no known form: a record needs "messages"; "conversations"; "prompt" and "completion"; '),
        ({"text": "x"}, 'this one has "text"'),
        ({}, "this one has no fields"),
        ({"messages": []}, 'field "messages" is empty'),
        ({"messages": "x"}, 'field "messages" is text and must then be a JSON list'),
        ({"messages": {"role": "user"}}, 'field "messages" must be a list, got an object'),
        ({"messages": [ASK]}, 'field "messages" must end with an assistant turn, ends with "user"'),
        ({"messages": [ASK, SAY, {"role": "tool", "content": "x"}]}, 'ends with "tool"'),
        ({"messages": ["hi"]}, 'field "messages[0]" must be an object, got text'),
        ({"messages": [{"content": "x"}]}, 'field "messages[0].role" is missing; the message has "content"'),
        ({"messages": [{"role": "robot", "content": "x"}]}, "must be one of system, developer, user, assistant, tool"),
        ({"messages": [{"role": "user", "content": None}, SAY]}, 'field "messages[0].content" is null'),
        ({"messages": [ASK, {"role": "assistant"}]}, 'field "messages[1].content" is missing'),
        ({"messages": [ASK, {"role": "assistant", "content": 4}]}, "must be text, null or a list of parts, got the nu"),
        ({"messages": [ASK, {"role": "assistant", "content": " \n"}]}, "the last assistant turn is empty"),
        ({"messages": [{**ASK, "content": [{"type": "image_url"}]}, SAY]}, "must be a text part, got image_url"),
        ({"messages": [{**ASK, "content": "\ud800"}, SAY]}, "half a surrogate pair (U+D800)"),
        ({"messages": [ASK, {**SAY, "weight": 0.5}]}, "must be 0, 1, true or false, got 0.5"),
        ({"messages": [ASK, {**SAY, "loss": "yes"}]}, "got 'yes'"),
        ({"messages": [ASK, {**SAY, "loss": 0, "train": 1}]}, "train and loss contradict each other"),
        ({"messages": [{**ASK, "train": True}, SAY]}, 'only assistant turns are learned, this is "user"'),
        ({"messages": [ASK, {**SAY, "weight": 0}]}, "every assistant turn is marked as not to be learned"),
        ({"messages": [ASK, {**SAY, "train_detail": [{}]}]}, "learning parts of a turn is not supported"),
        ({"messages": [{**ASK, "tool_calls": [{"name": "f", "arguments": "{}"}]}, SAY]}, "only the assistant calls to"),
        ({"messages": [ASK, {**SAY, "tool_calls": "x"}]}, 'messages[1].tool_calls" must be a list, got text'),
        ({"messages": [ASK, {**SAY, "tool_calls": [{"function": {"arguments": "{}"}}]}]}, "must be the name of a tool"),
        ({"messages": [ASK, {**SAY, "tool_calls": [{"name": "f"}]}]}, "must be JSON text or an object, got null"),
        ({"messages": [ASK, SAY], "tools": [3]}, 'field "tools[0]" must be a tool definition with a name'),
        ({"messages": [ASK, SAY], "tools": 3}, 'field "tools" must be a list, got the number 3'),
        ({"prompt": "a", "completion": ""}, 'field "completion" is empty'),
        ({"prompt": [], "completion": "x"}, 'field "prompt" is empty'),
        ({"prompt": 3, "completion": "x"}, 'field "prompt" must be text or a list of messages, got the number 3'),
        ({"prompt": "a", "completion": None}, "no known form"),
        ({"question": "a", "answer": 5}, 'field "answer" must be text, got the number 5'),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, 'field "history[0]" must be [question, answer]'),
        (
            {"conversations": [{"from": "human", "value": None}]},
            'field "conversations[0].value" must be text, got null',
        ),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "got 'alien'"),
        ({"conversations": [{"from": "function_call", "value": "run()"}]}, 'must be JSON with "name" and "arguments'),
        ({"conversations": [{"from": "function_call", "value": '{"name": "f"}'}]}, "must be JSON with"),
    ],
)
def test_unusable_records_are_named_with_their_reason(tmp_path, record, said):
    assert said in reason(tmp_path, record)


def test_bom_crlf_blank_lines_and_nul_are_fine(tmp_path):
    record = json.dumps({"messages": [{**ASK, "content": "a\u0000\x1b[31mb\u2028c"}, SAY]}, ensure_ascii=False)
    path = lines(tmp_path / "d.jsonl", b"\xef\xbb\xbf" + record.encode() + b"\r", b"\r", b"  ", json.dumps(GOOD) + "\r")
    loaded = demos.load(path)
    assert loaded.problems == []
    assert [d.origin for d in loaded.demos] == ["d.jsonl:1", "d.jsonl:4"]
    assert loaded.demos[0].messages[0]["content"] == "a\u0000\x1b[31mb\u2028c"


def test_utf16_is_recognised(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(GOOD).encode("utf-16"))
    with pytest.raises(DataError, match="looks like UTF-16: save it as UTF-8"):
        demos.load(path)


def test_nothing_is_lost_and_the_quarantine_has_it_all(tmp_path):
    path = lines(tmp_path / "d.jsonl", GOOD, "{", "", {"messages": []}, GOOD)
    kept = Quarantine(tmp_path / "run" / "quarantine.jsonl")
    for _ in range(2):  # a resumed run reads again
        assert [d.origin for d in demos.read(path, quarantine=kept)] == ["d.jsonl:1", "d.jsonl:5"]
    entries = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [(e["file"], e["line"], e["raw"]) for e in entries] == [
        ("d.jsonl", 2, "{"),
        ("d.jsonl", 4, '{"messages": []}'),
    ]
    assert entries[1]["reason"] == 'field "messages" is empty'


def test_on_bad_record_error_stops_at_the_first(tmp_path):
    path = lines(tmp_path / "d.jsonl", GOOD, {"messages": [ASK]}, "{")
    with pytest.raises(DataError, match=r'^d.jsonl:2: field "messages" must end with an assistant turn, ends with "us'):
        demos.load(path, on_bad_record="error")


def test_nothing_readable_names_counts_and_reasons(tmp_path):
    path = lines(tmp_path / "d.jsonl", *["{"] * 4, {"a": 1})
    with pytest.raises(DataError, match=r"none of its 5 records can be used") as caught:
        demos.load(path)
    assert str(caught.value).count("\n  d.jsonl:") == 3
    assert "d.jsonl:1: not JSON: Expecting property name" in str(caught.value)
    with pytest.raises(DataError, match="must hold demonstrations, and it is empty"):
        demos.load(lines(tmp_path / "empty.jsonl", "", " "))


def test_missing_files_name_the_nearest(tmp_path):
    lines(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(DataError, match=r"trian.jsonl, which does not exist.*it holds train.jsonl"):
        demos.load(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"nearest folder is .*; it holds train.jsonl"):
        demos.load(tmp_path / "no" / "such" / "x.jsonl")
    (tmp_path / "d.txt").write_text("x")
    with pytest.raises(DataError, match=r"d.txt must end in one of .jsonl"):
        demos.load(tmp_path / "d.txt")
    (tmp_path / "sub").mkdir()
    with pytest.raises(DataError, match=r"holds no file ending in .*; it holds nothing"):
        demos.load(tmp_path / "sub")


def test_limit_stops_reading(tmp_path):
    loaded = demos.load(lines(tmp_path / "d.jsonl", "{", GOOD, GOOD, "{"), limit=2)
    assert (len(loaded.demos), len(loaded.problems)) == (2, 1)


# -- files ---------------------------------------------------------------------------------------


def test_json_arrays_keep_their_lines(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(
        "[\n" + json.dumps(GOOD) + ",\n\n" + '{"a": 1, "a": 2}' + ",\n" + json.dumps(GOOD, indent=1) + "\n]"
    )
    loaded = demos.load(path)
    assert [d.origin for d in loaded.demos] == ["d.json:2", "d.json:5"]
    assert [(p.origin, p.reason) for p in loaded.problems] == [("d.json:4", 'the key "a" is there twice')]


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        (', {"messages": ', "not JSON: Expecting value at line 2"),
        (", ", "the array is not closed"),
        (" {}]", "Expecting ',' or ']'"),
        ("]\nxyz", "3 characters after the end of the array"),
    ],
)
def test_a_broken_array_gives_what_is_before_the_break(tmp_path, tail, said):
    path = tmp_path / "d.json"
    path.write_text("[\n" + json.dumps(GOOD) + (tail if tail != " {}]" else ", " + json.dumps(GOOD) + tail))
    loaded = demos.load(path)
    assert len(loaded.demos) == 1
    assert said in loaded.problems[0].reason


def test_json_files_with_one_record_or_one_a_line(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps(GOOD, indent=2))
    assert demos.load(path).demos[0].origin == "d.json:1"
    lines(path, GOOD, "{", GOOD)
    loaded = demos.load(path)
    assert [d.origin for d in loaded.demos] == ["d.json:1", "d.json:3"]
    assert loaded.problems[0].origin == "d.json:2"
    path.write_bytes(b"[\n\xff]")
    with pytest.raises(DataError, match=r"d.json:2: not UTF-8: invalid start byte at byte 2 of the file"):
        demos.load(path)


def test_folders_and_gzip(tmp_path):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    lines(folder / "b.jsonl", GOOD)
    with gzip.open(folder / "sub" / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps(GOOD))
    (folder / "README.md").write_text("x")
    assert [d.origin for d in demos.read(folder)] == ["b.jsonl:1", "sub/a.jsonl.gz:1"]
    (folder / "sub" / "a.jsonl.gz").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"a.jsonl.gz cannot be read: Not a gzipped file"):
        list(demos.read(folder))


def test_parquet_rows(tmp_path):
    rows = [
        {"messages": [{**ASK, "name": None}, {**SAY, "name": "m"}], "messages_text": None, "day": None},
        {"messages": [], "messages_text": None, "day": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    loaded = demos.load(tmp_path / "d.parquet")
    assert loaded.demos[0].messages == (ASK, {**SAY, "name": "m"})
    assert loaded.problems[0].origin == "d.parquet:2"
    text = [{"messages": json.dumps([ASK, SAY]), "day": __import__("datetime").date(2020, 1, 2)}]
    pq.write_table(pa.Table.from_pylist(text), tmp_path / "t.parquet")
    (demo,) = demos.load(tmp_path / "t.parquet").demos
    assert (demo.messages, demo.extra) == ((ASK, SAY), {"record": {"day": "2020-01-02"}})
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"bad.parquet cannot be read as Parquet"):
        demos.load(tmp_path / "bad.parquet")


def test_a_trajectory_store_is_not_demonstrations(tmp_path):
    with TrajectoryWriter(tmp_path / "s") as writer:
        writer.write(simple(0))
    with pytest.raises(DataError, match="is a shard of a trajectory store"):
        demos.load(tmp_path / "s" / "shard-000000.parquet")


@given(
    record=st.dictionaries(st.sampled_from(["messages", "tools", "prompt", "completion", "system"]), JSON, max_size=4)
)
@settings(max_examples=150, deadline=None)
def test_any_record_is_a_conversation_or_a_reason(record):
    try:
        conversation = parse_record(record)
    except ValueError as error:
        assert str(error)
    else:
        assert conversation.messages[-1]["role"] == "assistant"


SHARED = Path(os.environ.get("TUTELAGE_SHARED_DATA", "../shared/data"))


@pytest.mark.shared_data
@pytest.mark.skipif(not (SHARED / "gsm8k").exists(), reason="needs gsm8k of the shared data")
def test_gsm8k_reads_whole():
    loaded = demos.load(SHARED / "gsm8k" / "train.jsonl")
    assert (len(loaded.demos), loaded.problems) == (7473, [])
    assert loaded.demos[0].messages[1]["content"].endswith("#### 72")
