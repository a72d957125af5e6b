"""Sentences taken out of documents, and split by document."""

import gzip
from pathlib import Path

import pytest

from fewstep.errors import FewstepError
from fewstep.tasks.prose import Document, SentenceFolder, Split, html_paragraphs

PAGE = """<html><head><title>No prose here.</title><script>var x = 'The end of it is here.';</script></head><body>
<nav><ul><li>The way to the next page is here.</li></ul></nav>
<p>The <b>first</b> sentence of the page&#8217;s text is here. It&nbsp;is followed
by another one<br/>on the same page.</p>
<p>too short. And 1 = 2 + 3 - 4 * 5 is not for it.
<ul><li>The items of a list are read too.<li>Call <code>os.path.join(a, b)</code> with a[0] == b[1] and c.</ul>
<pre>The code of the page is not read.</pre>
<p>Les pages en d'autres langues ne servent pas ici.</p></body></html>
"""
FOUND = [
    "The first sentence of the page's text is here.",
    "It is followed by another one on the same page.",
    "The items of a list are read too.",
]


def test_prose_is_taken_out_of_a_page() -> None:
    assert list(Document("site/page", html_paragraphs(PAGE)).sentences()) == FOUND


def test_a_document_goes_into_a_part_by_its_name_and_the_shares_hold() -> None:
    split = Split(unseen=("late/", "site/9"), shares={"test": 0.2, "dev": 0.1})
    parts = [split.part(f"site/{i}") for i in range(900)]
    assert parts == [split.part(f"site/{i}") for i in range(900)]
    assert 140 < parts.count("test") < 220
    assert 60 < parts.count("dev") < 120
    assert split.part("late/1") == split.part("site/97") == "unseen"
    assert Split(shares={"test": 1.0}).part("late/1") == "test"


def test_a_sentence_stays_in_the_part_that_measures(tmp_path: Path) -> None:
    folder = SentenceFolder(tmp_path)
    pages = [("a/1", ["It has 3 of them.", "It is in one page."]), ("b/1", ["It has 57 of them."])]
    figures = folder.write(pages, Split(unseen=("b/",), shares={}))
    assert folder.read("unseen") == ["It has 57 of them."]
    assert folder.read("train") == ["It is in one page."]
    assert folder.read("test") == folder.read("train", documents="b/") == []
    assert figures["a"] == {"train": 1, "bytes": len("It is in one page.")}


def test_what_is_missing_or_damaged_is_told(tmp_path: Path) -> None:
    folder = SentenceFolder(tmp_path)
    with pytest.raises(FewstepError, match=r"dev\.jsonl\.gz is not there; gather the sentences first"):
        folder.read("dev")
    for damaged in (b"no gzip", gzip.compress(b'{"text": 1')):
        folder.path("dev").write_bytes(damaged)
        with pytest.raises(FewstepError, match=r"dev\.jsonl\.gz is damaged"):
            folder.read("dev")
