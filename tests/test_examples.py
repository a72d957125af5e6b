"""Training rows: the three forms, what is wrong with the others, and the flat tables they become."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fewstep.errors import FewstepError
from fewstep.models.rows import id_key, id_text, split_prompt_row, split_row
from fewstep.models.tiny import tiny_tokenizer
from fewstep.train.examples import Examples, encode_rows, numbered_training_rows

TOKENIZER = tiny_tokenizer()
BOS, ANSWER, EOS = 3, 4, 1


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def prompt_of(examples: Examples, i: int) -> list[int]:
    return examples.prompt_ids[examples.prompt_offsets[i] : examples.prompt_offsets[i + 1]].tolist()


def completion_of(examples: Examples, i: int) -> list[int]:
    return examples.completion_ids[examples.completion_offsets[i] : examples.completion_offsets[i + 1]].tolist()


def test_the_three_forms_of_a_row():
    rows = [
        {"prompt": "1+1", "completion": "2"},
        {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]},
        {"text": "abc"},
    ]
    examples = encode_rows(enumerate(rows, start=1), TOKENIZER)
    assert prompt_of(examples, 0) == prompt_of(examples, 1) == [BOS, *ids("1+1"), ANSWER]
    assert completion_of(examples, 0) == completion_of(examples, 1) == [*ids("2"), EOS]
    assert prompt_of(examples, 2) == [BOS]
    assert completion_of(examples, 2) == [*ids("abc"), EOS]
    assert examples.lengths().tolist() == [[5, 2], [5, 2], [1, 4]]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "a"}, "rows.jsonl line 2: a training row needs prompt and completion, messages, or text"),
        ({}, "its fields are: none"),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 2: messages must end with one of the assistant"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}, "needs role and content"),
        ({"prompt": "a", "completion": 5}, "line 2: what is to be learnt must be text, got int"),
        ({"text": None}, "line 2: a training row needs prompt and completion, messages, or text; its fields are: none"),
        ({"messages": None, "prompt": "a"}, "its fields are: 'prompt'"),
        ({"messages": "a"}, "line 2: messages must be a list, got str"),
        ({"messages": []}, "line 2: messages is empty"),
        ({"prompt": "a", "completion": [{"role": "user", "content": "b"}]}, "must be one message, of the assistant"),
        ({"messages": [{"role": "user", "content": [1]}] * 2}, "the content of a message must be text, got list"),
        ({"prompt": 5, "completion": "a"}, "line 2: the prompt must be text or a list of messages, got int"),
        ({"prompt": ["a"], "completion": "a"}, "line 2: every message needs role and content"),
    ],
)
def test_a_row_that_lacks_something_is_named_by_file_and_line(row, sentence, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(FewstepError, match=sentence):
        encode_rows(numbered_training_rows(path), TOKENIZER, source="rows.jsonl")


def test_blank_lines_count(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n\n\n{"text": 5}\n')
    with pytest.raises(FewstepError, match="line 4: what is to be learnt"):
        encode_rows(numbered_training_rows(path), TOKENIZER)


def test_what_the_chat_template_refuses_is_one_sentence():
    tokenizer = tiny_tokenizer()
    rows = [(3, {"prompt": [{"role": "user", "content": "a"}], "completion": "b"})]
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(FewstepError, match=r"rows line 3: the model's chat template refuses .*: roles must alternate"):
        encode_rows(rows, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(FewstepError, match="rows line 3: this model has no chat template"):
        encode_rows(rows, tokenizer)


def test_long_rows_are_left_out_and_an_empty_rest_is_an_error():
    rows = [(line, {"prompt": "a" * n, "completion": "b" * m}) for line, (n, m) in enumerate(((2, 2), (9, 2), (2, 9)))]
    assert len(encode_rows(rows, TOKENIZER, max_prompt=8, max_completion=8)) == 1
    with pytest.raises(FewstepError, match="rows holds no training row within 1 prompt and 1 completion tokens"):
        encode_rows(rows, TOKENIZER, max_prompt=1, max_completion=1)
    with pytest.raises(FewstepError, match=r"rows holds no training row within 0 prompt tokens$"):
        encode_rows(rows, TOKENIZER, max_prompt=0)
    with pytest.raises(FewstepError, match=r"rows holds no training row$"):
        encode_rows([], TOKENIZER)


def test_parquet_rows_are_as_jsonl_rows(tmp_path):
    rows = [{"prompt": "1+1", "completion": "2"}, {"prompt": "2+2", "completion": "4"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = (
        encode_rows(numbered_training_rows(tmp_path / f"rows.{kind}"), TOKENIZER) for kind in ("parquet", "jsonl")
    )
    assert one.fingerprint() == two.fingerprint()


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.parquet"])
def test_a_file_that_cannot_be_read_is_named(name, tmp_path):
    with pytest.raises(FewstepError, match=rf"could not read .*{name}"):
        list(numbered_training_rows(tmp_path / name))
    (tmp_path / "damaged.parquet").write_text("no parquet")
    with pytest.raises(FewstepError, match=r"could not read .*damaged"):
        numbered_training_rows(tmp_path / "damaged.parquet")


def test_fingerprints_tell_data_apart():
    one = Examples.from_ids([[1, 2], [3]], [[4], [5, 6]])
    assert one.fingerprint() == Examples.from_ids([[1, 2], [3]], [[4], [5, 6]]).fingerprint()
    assert one.fingerprint() != Examples.from_ids([[1], [2, 3]], [[4], [5, 6]]).fingerprint()
    assert one.fingerprint() != Examples.from_ids([[1, 2], [3]], [[4], [5, 7]]).fingerprint()
    assert one.head(len(one)).fingerprint() == one.fingerprint()
    assert one.head(1).lengths().tolist() == one.lengths()[:1].tolist()


def test_no_examples_or_unequal_numbers_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        Examples.from_ids([], [])
    with pytest.raises(ValueError, match="as many completions as prompts"):
        Examples.from_ids([[1]], [])


def test_a_prompt_is_split_from_the_last_answer():
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user", "assistant")]
    assert split_row({"messages": turns}, "here") == (turns[:3], "a")


def test_null_fields_are_absent_and_a_completion_may_be_a_message():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert split_row({"prompt": "a", "completion": "b", "messages": None}, "here") == ("a", "b")
    assert split_row({"prompt": None, "completion": None, "messages": turns}, "here") == (turns[:1], "b")
    assert split_row({"prompt": None, "text": "ab"}, "here") == ("", "ab")
    assert split_row({"prompt": turns[:1], "completion": turns[1:]}, "here") == (turns[:1], "b")
    assert split_row({"messages": [{**turn, "name": None} for turn in turns]}, "here") == (turns[:1], "b")
    assert split_prompt_row({"prompt": "a", "completion": None}, "here") == ("a", None)
    assert split_prompt_row({"messages": turns}, "here") == (turns[:1], "b")
    assert split_prompt_row({"messages": turns[:1]}, "here") == (turns[:1], None)


def test_ids_of_any_type_are_told_apart():
    ids = ["1", 1, 1.5, True, None, [1], {"a": 1}, "true"]
    assert len({id_key(one) for one in ids}) == len(ids)
    assert [id_text(one) for one in ids] == ["1", "1", "1.5", "true", "null", "[1]", '{"a": 1}', "true"]


def test_an_example_is_named_by_its_file_and_line_also_behind_those_left_out_and_joined():
    rows = [(3, {"prompt": "1", "completion": "2"}), (5, {"text": "abcdef"}), (9, {"prompt": "1", "completion": "2"})]
    first = encode_rows(rows, TOKENIZER, source="a.jsonl", max_completion=3)
    joined = Examples.joined([first, encode_rows(rows, TOKENIZER, source="b.jsonl")])
    names = ["a.jsonl line 3", "a.jsonl line 9", "b.jsonl line 3", "b.jsonl line 5", "b.jsonl line 9"]
    assert [joined.name(index) for index in range(5)] == names
    assert first.head(1).name(0) == "a.jsonl line 3"
    unknown = Examples.joined([Examples.from_ids([[1]], [[2]]), first])
    assert unknown.name(2) == "example 3"


def test_a_token_that_the_network_does_not_have_is_named_by_its_row():
    examples = encode_rows([(1, {"text": "a"}), (4, {"prompt": "1", "completion": "2b"})], TOKENIZER, source="a.jsonl")
    largest = int(examples.completion_ids.max())
    examples.check_tokens(largest + 1)
    with pytest.raises(
        FewstepError, match=f"a.jsonl line 4 holds the token id {largest}, and the network has {largest}"
    ):
        examples.check_tokens(largest)
