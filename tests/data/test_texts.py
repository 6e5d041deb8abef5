"""Plain text as trajectories: every document's tokens once, in pieces, and nothing dropped silently."""

import json

import pytest

from tutelage.data.texts import load_texts
from tutelage.errors import DataError
from tutelage.testing.tiny import tiny_tokenizer


def ids(groups):
    return [t.token_ids for g in groups for t in g.trajectories]


def test_documents_are_cut_into_pieces_that_add_up_to_them(tmp_path):
    tokenizer = tiny_tokenizer()
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "abcdefghij"}) + "\n\n" + json.dumps({"text": "xyz"}) + "\n")
    groups = load_texts(path, tokenizer, max_length=4).groups
    pieces = ids(groups)
    end = tokenizer.get_vocab()["<|endoftext|>"]
    assert [len(p) for p in pieces] == [4, 4, 3, 4]
    assert tokenizer.decode([i for p in pieces for i in p if i != end]) == "abcdefghijxyz"
    assert pieces[2][-1] == end == pieces[3][-1]
    assert {g.task.name for g in groups} == {"pretraining"} and len({g.trajectories[0].id for g in groups}) == 4
    assert all(t.num_targets == len(t.token_ids) - 1 for g in groups for t in g.trajectories)


def test_paragraphs_of_a_text_file_are_documents_and_a_lone_token_is_left_out(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\n\n\ntwo words\n\n")
    assert len(load_texts(path, tiny_tokenizer()).groups) == 2
    path.write_text("abcd")
    assert [len(p) for p in ids(load_texts(path, tiny_tokenizer(), max_length=4).groups)] == [4]  # the end alone


def test_unusable_records_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\nnot json\n{"text": 3}\n{"other": "x"}\n')
    loaded = load_texts(path, tiny_tokenizer())
    assert len(loaded.groups) == 1
    assert [p.origin for p in loaded.problems] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4"]
    path.write_text('{"other": "x"}\n')
    with pytest.raises(DataError, match=r"no usable text; first problem: a.jsonl:1"):
        load_texts(path, tiny_tokenizer())
    with pytest.raises(DataError, match="no such file"):
        load_texts(tmp_path / "b.txt", tiny_tokenizer())
