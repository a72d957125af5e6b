"""The page of the server in a real headless Chromium, through what a person does, on tiny random networks."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.serving import running, slow

from fewstep.engine.language_model import LanguageModel
from fewstep.models.tiny import tiny_network
from fewstep.serve.catalogue import Entry

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

KEY = "a secret key"
SECONDS_PER_PASS = 0.15
PATIENCE_MS = 10_000
MAX_POSITIONS = 96
"""Few, so that answers are short."""


def tiny(role: Any) -> LanguageModel:
    return LanguageModel(tiny_network(role, head_scale=30.0, max_positions=MAX_POSITIONS))


@contextmanager
def served(**settings: Any) -> Iterator[str]:
    """The address of a server with three models, one of which is so slow that an answer is seen forming."""
    student = tiny("block_causal")
    models = {"student": student, "teacher": tiny("bidirectional"), "slow": slow(student.network, SECONDS_PER_PASS)}
    with running(models, **settings) as server:
        yield f"{server.url}/"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served() as at:
        yield at


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as program:
        opened = program.chromium.launch(executable_path=CHROMIUM)
        yield opened
        opened.close()


def fulfil(body: str | Callable[[Any], str], route: Any) -> None:
    route.fulfill(body=body if isinstance(body, str) else body(route.request))


@contextmanager
def visit(browser: Any, address: str, **options: Any) -> Iterator[Any]:
    """The page in a window of its own. Nothing may go wrong in it, and nothing may be asked of another server.

    `fulfilled`: answers that it gets in place of the server's by path, or what makes them of a request.
    """
    hash, fulfilled = options.pop("hash", ""), options.pop("fulfilled", {})
    context = browser.new_context(viewport=options.pop("viewport", {"width": 1100, "height": 800}), **options)
    context.set_default_timeout(PATIENCE_MS)
    page, wrong, asked = context.new_page(), list[str](), list[str]()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    for path, body in fulfilled.items():
        page.route(f"{address}{path}", partial(fulfil, body))
    page.goto(f"{address}{hash}")
    yield page
    context.close()
    assert [one for one in asked if not one.startswith((address, f"blob:{address}"))] == []
    assert [one for one in wrong if "Failed to load resource" not in one] == []  # a refusal, which the page shows


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    with visit(browser, address) as opened:
        opened.wait_for_selector("body.ready")
        yield opened


def bodies(page: Any) -> list[Any]:
    """What the page sends from now on."""
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    return sent


def ask(page: Any, question: str) -> None:
    page.fill("#chat-question", question)
    page.press("#chat-question", "Enter")


def answered(page: Any, count: int = 1) -> Any:
    """The last of so many answers, once it is complete."""
    page.wait_for_function(
        "count => document.querySelectorAll('#chat-log .answer[aria-busy=false]').length === count", arg=count
    )
    return page.locator("#chat-log .answer").last


def alert(page: Any) -> str:
    page.wait_for_selector("#alert:not([hidden])")
    return str(page.inner_text("#alert"))


def reply(*chunks: dict[str, Any]) -> str:
    """A stream of chat chunks."""
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


# Chat


def test_an_answer_is_shown_with_each_token_in_the_colour_of_its_pass(page: Any) -> None:
    ask(page, "what is one and one?")
    shown = answered(page)
    lm, told = tiny("block_causal"), [{"role": "user", "content": "what is one and one?"}]
    expected = lm.generate(told, max_new_tokens=MAX_POSITIONS - len(lm.encode(told)))
    assert shown.locator(".canvas").text_content() == expected.text
    steps = [
        int(title.removeprefix("pass "))
        for title in shown.locator(".canvas .pass").evaluate_all("all => all.map(one => one.title)")
    ]
    assert steps == expected.step_G[: len(steps)].tolist()
    assert len({step % 12 for step in steps}) == len(
        set(shown.locator(".canvas .pass").evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)"))
    )
    figures = shown.locator(".figures").inner_text()
    assert figures.startswith(f"{expected.num_forwards} passes · {expected.num_tokens} tokens · ")
    assert re.search(r"per pass · \d+ tokens/s · \d+\.\d\d s", figures)
    page.uncheck("#colours")
    assert (
        shown.locator(".canvas .pass").first.evaluate("one => getComputedStyle(one).backgroundColor")
        == "rgba(0, 0, 0, 0)"
    )


def test_the_earlier_turns_go_with_a_question_unless_told_otherwise(page: Any) -> None:
    sent = bodies(page)
    page.click("#chat .settings summary")
    page.fill("#chat-max_tokens", "10")
    ask(page, "one?")
    first = answered(page).locator(".canvas").text_content()
    ask(page, "two?")
    answered(page, 2)
    page.uncheck("#chat-remember")
    ask(page, "three?")
    answered(page, 3)
    told = [[message["content"] for message in body["messages"]] for body in sent]
    assert told == [["one?"], ["one?", first, "two?"], ["three?"]]
    page.click("#chat-clear")
    assert page.locator("#chat-log .answer").count() == 0


def test_the_oldest_turns_are_left_out_where_the_model_has_no_room(page: Any) -> None:
    sent = bodies(page)
    page.click("#chat .settings summary")
    page.fill("#chat-max_tokens", "20")
    for count, question in enumerate(("first question?", "second question?", "third question?"), start=1):
        ask(page, question)
        answered(page, count)
    assert page.is_hidden("#alert")
    assert [message["content"] for message in sent[-1]["messages"]][::2] == ["second question?", "third question?"]
    assert page.locator("#chat-log .question").count() == 3


def test_a_block_is_seen_forming_and_stop_keeps_what_is_there(page: Any) -> None:
    page.select_option("#chat-model", "slow")
    ask(page, "what?")
    page.wait_for_selector("#chat-log .answer[aria-busy=true] .pass")
    assert page.locator("#chat-log .figures").inner_text().split(" ")[1] in ("pass", "passes")
    if page.locator("#chat-log .provisional").count():
        assert page.locator("#chat-log .provisional").first.get_attribute("title") == "still open"
    page.keyboard.press("Escape")
    shown = answered(page)
    assert "stopped" in shown.locator(".figures").inner_text()
    page.select_option("#chat-model", "student")
    ask(page, "and now?")
    answered(page, 2)


def test_an_answer_that_forms_out_of_order_has_grey_places(page: Any) -> None:
    tokens = [
        {"text": "one", "step": 1, "provisional": False},
        {"text": "\u2591", "step": None, "provisional": True},
        {"text": " three", "step": 1, "provisional": False},
    ]
    state = {"step": 1, "tokens": tokens, "num_forwards": 1, "num_tokens": 2, "seconds": 0.5}
    chunk = {"choices": [{"index": 0, "delta": {"content": "one"}, "finish_reason": None}], "fewstep": state}
    page.evaluate(
        """async chunk => {
            const { Answer } = await import("/page/answer.js");
            const answer = new Answer();
            document.body.append(answer.root);
            answer.follow((async function* () { yield chunk; await new Promise(() => {}); })());
        }""",
        chunk,
    )
    provisional = page.locator("body > .answer .provisional")
    provisional.wait_for()
    assert page.locator("body > .answer .canvas").text_content() == "one\u2591 three"
    grey = provisional.evaluate("one => getComputedStyle(one).color")
    assert grey == "rgb(139, 143, 152)"
    assert page.locator("body > .answer .legend li").all_inner_texts() == ["1: 2"]


def test_markup_in_a_prompt_is_text(page: Any) -> None:
    text = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
    ask(page, text)
    answered(page)
    assert page.locator("#chat-log .question").inner_text() == text
    assert page.locator("#chat-log img, #chat-log script").count() == 0
    assert page.title() == "fewstep"


def test_settings_are_sent_and_a_refusal_gives_the_question_back(page: Any) -> None:
    sent = bodies(page)
    page.click("#chat .settings summary")
    page.fill("#chat-max_tokens", "5")
    page.fill("#chat-threshold", "0.5")
    page.fill("#chat-others", "gaps=1\n")
    ask(page, "what?")
    assert "cut off" in answered(page).locator(".figures").inner_text()
    assert {name: sent[0][name] for name in ("model", "max_tokens", "threshold", "gaps")} == {
        "model": "student",
        "max_tokens": 5,
        "threshold": 0.5,
        "gaps": 1,
    }
    assert page.inner_text("#chat .settings summary") == "Settings: max_tokens 5, threshold 0.5, gaps 1"
    page.fill("#chat-others", "gasp=1")
    ask(page, "and this?")
    assert "gasp" in alert(page)
    assert page.input_value("#chat-question") == "and this?"
    assert page.locator("#chat-log .answer").count() == 1


def test_a_server_that_goes_away_is_told_and_the_question_stays(browser: Any, address: str) -> None:
    begun = reply({"choices": [{"index": 0, "delta": {"content": "half an"}, "finish_reason": None}]})
    refused = reply({"error": {"message": "the pass failed", "code": "pass_failed", "param": None}})
    for body, told in ((begun.removesuffix("data: [DONE]\n\n"), "connection ended"), (refused, "The pass failed.")):
        with visit(browser, address, fulfilled={"v1/chat/completions": body}) as page:
            page.wait_for_selector("body.ready")
            ask(page, "what?")
            assert told in alert(page)
            assert page.input_value("#chat-question") == "what?"
            page.click("#alert button")
            assert page.is_hidden("#alert")
            page.route(f"{address}v1/chat/completions", lambda route: route.abort())
            page.press("#chat-question", "Enter")
            assert "cannot be reached" in alert(page)


def test_ask_again_replaces_the_last_answer(page: Any) -> None:
    ask(page, "what?")
    answered(page)
    page.click("#chat-again")
    page.wait_for_selector("#chat-again:not([disabled])")
    assert page.locator("#chat-log .question").all_inner_texts() == ["what?"]


def test_a_model_without_chat_template_continues_a_text(browser: Any, address: str) -> None:
    model = {"id": "plain", "fewstep": {"role": "autoregressive", "abilities": []}}
    told = {"choices": [{"index": 0, "text": " and so on", "finish_reason": "stop"}]}
    answers = {"v1/models": json.dumps({"data": [model]}), "v1/completions": reply(told)}
    with visit(browser, address, fulfilled=answers) as page:
        page.wait_for_selector("body.ready")
        sent = bodies(page)
        ask(page, "once")
        assert answered(page).locator(".canvas").text_content() == " and so on"
        assert (sent[0]["prompt"], sent[0]["model"]) == ("once", "plain")


# Infill, correction


def test_a_gap_is_filled_by_keyboard_alone(page: Any) -> None:
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-infill"
    while page.evaluate("document.activeElement.id") != "infill-text":
        page.keyboard.press("Tab")
    page.keyboard.type("one and ___ is two")
    while page.evaluate("document.activeElement.id") != "infill-gap":
        page.keyboard.press("Tab")
    page.keyboard.type("3")
    while page.evaluate("document.activeElement.className") != "gap":
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#infill-undo:not([disabled])")
    text = page.input_value("#infill-text")
    assert text.startswith("one and ")
    assert text.endswith(" is two")
    assert "___" not in text
    assert page.inner_text("#infill-view mark") in text
    assert page.evaluate("document.activeElement.id") == "infill-text"
    page.click("#infill-undo")
    assert page.input_value("#infill-text") == "one and ___ is two"


def test_a_passage_is_written_anew_with_a_length_that_the_model_chooses(page: Any) -> None:
    sent = bodies(page)
    page.click("#tab-infill")
    page.fill("#infill-text", "one and one is two")
    assert page.is_disabled("#infill-selected")
    page.evaluate("document.querySelector('#infill-text').setSelectionRange(8, 11)")
    page.dispatch_event("#infill-text", "keyup")
    page.click("#infill-selected")
    page.wait_for_selector("#infill-undo:not([disabled])")
    assert (sent[0]["prompt"], sent[0]["suffix"]) == ("one and ", " is two")
    assert "lengths" in page.inner_text("#infill-figures")


def test_a_text_is_corrected_sentence_by_sentence_where_a_model_corrects(page: Any, browser: Any, address: str) -> None:
    assert page.is_hidden("#tab-correct")
    model = {"id": "corrector", "fewstep": {"role": "bidirectional", "abilities": ["correct"]}}
    asked: list[str] = []

    def corrected(request: Any) -> str:
        sentence = request.post_data_json["messages"][0]["content"]
        asked.append(sentence)
        text, ends = sentence.replace("teh", "the"), "length" if "endless" in sentence else "stop"
        text = "1234567890" if sentence == "It is all right." else text
        state = {"step": 2, "tokens": [{"text": text, "step": 1, "provisional": False}]}
        state |= {"num_forwards": 2, "num_tokens": 5, "seconds": 0.1}
        return reply({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": ends}], "fewstep": state})

    answers = {"v1/models": json.dumps({"data": [model]}), "v1/chat/completions": corrected}
    text = "See teh <b>cat</b>  there. Oh teh!\n\nAn endless teh is no answer.  It is all right."
    with visit(browser, address, hash="#correct", fulfilled=answers) as other:
        other.wait_for_selector("#correct:not([hidden])")
        assert [other.is_hidden(f"#tab-{tab}") for tab in ("chat", "infill", "compare")] == [True] * 3
        other.fill("#correct-text", text)
        other.click("#correct button[type=submit]")
        other.wait_for_selector("#correct-changes[aria-busy=false]")
        assert sorted(asked) == ["An endless teh is no answer.", "It is all right.", "See teh <b>cat</b> there."]
        assert other.locator("#correct-changes del").all_inner_texts() == ["teh"]
        assert other.locator("#correct-changes ins").all_inner_texts() == ["the"]
        assert other.locator("#correct-changes b").count() == 0
        assert other.inner_text("#correct-figures").startswith("3 of 3 sentences · 15 tokens · 2.5 per pass")
        other.click("#correct-take")
        assert other.input_value("#correct-text") == text.replace("See teh", "See the")


# Compare


def test_two_models_are_compared_blindly_by_keyboard_alone(page: Any) -> None:
    sent = bodies(page)
    page.focus("#tab-chat")
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.id") == "tab-compare"
    while page.evaluate("document.activeElement.id") != "compare-prompt":
        page.keyboard.press("Tab")
    page.keyboard.type("which?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#compare-vote:not([hidden])")
    assert page.locator("#compare-answers h2").all_inner_texts() == ["Left", "Right"]
    clocks = page.locator("#compare-answers .clock").all_inner_texts()
    assert all(re.fullmatch(r"\d+\.\d\d s", clock) for clock in clocks)
    assert page.evaluate("document.activeElement.dataset.vote") == "left"
    page.keyboard.press("Enter")
    page.wait_for_selector("#compare-tally td")
    names = page.locator("#compare-answers h2").all_inner_texts()
    assert sorted(names) == ["student", "teacher"]
    vote = sent[-1]
    assert vote == {"a": "student", "b": "teacher", "winner": "ab"[names[0] == "teacher"], "prompt": "which?"}
    row = page.locator("#compare-tally tbody td").all_inner_texts()
    assert row[:2] == ["student", "teacher"]
    assert sum(map(int, row[2:5])) == 1
    with page.expect_download() as download:
        page.click("#compare-csv")
    lines = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    assert ",student,teacher," in lines[1]


def test_clocks_run_while_answers_form_and_two_settings_are_compared(page: Any) -> None:
    page.click("#tab-compare")
    for side, threshold in (("a", "0.3"), ("b", "1")):
        page.select_option(f"#compare-{side}-model", "slow")
        page.click(f"[data-setup=compare-{side}] summary")
        page.fill(f"#compare-{side}-threshold", threshold)
        page.fill(f"#compare-{side}-max_tokens", "8")
    page.uncheck("#compare-blind")
    page.fill("#compare-prompt", "which?")
    page.click("text=Run both")
    assert page.locator("#compare-answers h2").all_inner_texts() == [
        "slow max_tokens=8 threshold=0.3",
        "slow max_tokens=8 threshold=1",
    ]
    page.wait_for_selector("#compare-answers .forming .pass")
    clock = page.locator("#compare-answers .clock").first
    early = float(clock.inner_text().split()[0])
    page.wait_for_timeout(200)
    assert float(clock.inner_text().split()[0]) > early
    page.wait_for_selector("#compare-vote:not([hidden])")
    page.click("[data-vote=tie]")
    page.wait_for_selector("#compare-said:has-text('a tie')")


def test_what_is_the_same_is_not_compared(page: Any) -> None:
    page.click("#tab-compare")
    page.select_option("#compare-b-model", "student")
    page.fill("#compare-prompt", "which?")
    page.click("text=Run both")
    assert "A and B are the same" in alert(page)


def test_examples_are_those_of_bundled_models_under_any_name(browser: Any) -> None:
    lm = tiny("bidirectional")
    entries = [Entry(name=name, lm=lm, settings={}, created=1, bundled=name == "mine") for name in ("gsm-own", "mine")]
    with running({}, entries=entries) as server, visit(browser, f"{server.url}/") as page:
        page.wait_for_selector("body.ready")
        for name in ("gsm-own", "mine"):
            page.click("#tab-chat")
            page.select_option("#chat-model", name)
            assert page.locator("#chat-examples button").count() == (2 if name == "mine" else 0)
            assert page.is_checked("#chat-remember") == (name == "gsm-own")
            page.click("#tab-infill")
            page.select_option("#infill-model", name)
            assert page.is_visible("#infill-example") == (name == "mine")


# The key, looks, names


def test_the_key_is_asked_for_and_kept_for_this_tab_alone(browser: Any) -> None:
    with served(api_key=KEY) as address, visit(browser, address) as page:
        page.wait_for_selector("#key[open]")
        assert "key" in alert(page).lower()
        page.fill("#key-field", KEY)
        page.press("#key-field", "Enter")
        page.wait_for_selector("body.ready")
        assert page.is_hidden("#alert")
        ask(page, "what?")
        answered(page)
        assert page.evaluate("Object.values(sessionStorage)") == [KEY]
        assert page.evaluate("Object.values(localStorage)") == []
        assert KEY not in page.content()
        page.reload()
        page.wait_for_selector("body.ready")


def test_it_fits_a_phone_and_follows_the_dark_mode(browser: Any, address: str) -> None:
    with visit(browser, address, viewport={"width": 320, "height": 640}, color_scheme="dark") as page:
        page.wait_for_selector("body.ready")
        ask(page, "a" * 60 + " and so on")
        answered(page)
        for tab in ("chat", "infill", "compare"):
            page.click(f"#tab-{tab}")
            page.click(f"#{tab} .settings summary")
            assert page.evaluate("document.documentElement.scrollWidth") <= 320, tab
        assert page.evaluate(CONTRASTS) == []


CONTRASTS = """() => {
    const colour = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
    const light = (rgb) => rgb
        .map((part) => part / 255)
        .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
        .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
    const back = light(colour(getComputedStyle(document.body).backgroundColor));
    const found = [];
    const texts = ".question, .hint, .figures, label, summary, h1, h2, [role=tab]:not([aria-selected=true])";
    for (const one of document.querySelectorAll(texts)) {
        const text = light(colour(getComputedStyle(one).color));
        const ratio = (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05);
        if (ratio < 4.5) found.push(`${one.tagName} ${one.className} ${ratio}`);
    }
    return found;
}"""


def test_everything_that_takes_input_has_a_name_and_text_is_readable(page: Any) -> None:
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, summary, [role=tab]")]
            .filter((one) => !(one.getAttribute("aria-label") || one.labels?.length || one.textContent.trim()))
            .map((one) => one.outerHTML)"""
    )
    assert nameless == []
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.evaluate(CONTRASTS) == []
    assert page.locator("[role=log]").get_attribute("aria-label") == "Conversation"
