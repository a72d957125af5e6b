"""The picture of an answer: each token in the row of the pass that finalised it."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from fewstep.cli.main import main
from fewstep.measure.picture import BAND_CHARACTERS, decoding_svg
from fewstep.models.load import save_network
from fewstep.models.tiny import tiny_network

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[tuple[str, float, float]]:
    """Every text with its place, x and y."""
    return [(one.text or "", float(one.get("x", "")), float(one.get("y", ""))) for one in _root(svg).iter(f"{SVG}text")]


def _root(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def test_a_token_stands_in_the_row_of_its_pass_and_in_the_order_of_positions():
    places = {text: (x, y) for text, x, y in texts(decoding_svg(["a", "b", "c"], [2, 1, 2], title="t"))}
    assert places["a"][0] < places["b"][0] < places["c"][0]
    assert places["a"][1] == places["c"][1] == places["pass 2"][1]
    assert places["b"][1] == places["pass 1"][1] < places["pass 2"][1]


def test_tokens_of_equal_passes_have_equal_colours():
    svg = decoding_svg(["a", "b", "c"], [2, 1, 2], title="t")
    drawn = {one.get("x"): one.get("fill") for one in _root(svg).iter(f"{SVG}rect")}  # the last one at a place
    first, second, third = (colour for place, colour in drawn.items() if place is not None)
    assert first == third != second


def test_a_long_answer_has_bands_that_show_only_their_own_passes():
    half = "x" * (BAND_CHARACTERS // 2)
    labels = [text for text, _, _ in texts(decoding_svg([half, half, half], [1, 2, 3], title="t")) if "pass" in text]
    assert labels == ["pass 1", "pass 2", "pass 3"]
    wide = decoding_svg(["x" * 3 * BAND_CHARACTERS], [1], title="t")
    assert float(_root(wide).get("width", "")) > 3 * 7 * BAND_CHARACTERS


def test_what_xml_cannot_hold_is_drawn_as_a_dot():
    shown = {
        text for text, _, _ in texts(decoding_svg(["<&>", "\x00", "", "\n", " ", "\ud83d"], [1] * 6, title="\x01"))
    }
    assert {"<&>", "·", "↵"} <= shown


def test_an_answer_without_tokens_is_an_empty_picture():
    assert len(texts(decoding_svg([], [], title="t"))) == 1


def test_generate_draws_its_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_network(tiny_network("block_causal", head_scale=30.0), tmp_path / "student")
    picture = tmp_path / "answer.svg"

    def generate(*options: object) -> int:
        with pytest.raises(SystemExit) as stopped:
            main(["generate", "1+2", "--model", str(tmp_path / "student"), "--max-new-tokens", "8", *map(str, options)])
        return int(stopped.value.code or 0)

    assert generate("--picture", picture) == 0
    summary = capsys.readouterr().err
    title = texts(picture.read_text(encoding="utf-8"))[0][0]
    assert title.startswith("student, block: ")
    assert title.removeprefix("student, block: ") in summary
    for refused in ("-", tmp_path, tmp_path / "absent" / "answer.svg"):
        assert generate("--picture", refused) == 2
        assert "--picture" in capsys.readouterr().err
