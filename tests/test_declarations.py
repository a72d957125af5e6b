"""Settings are declared once: what decoders and policies declare is what Python, the command line and docs know."""

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module, reload
from pathlib import Path
from typing import Annotated, Any

import option_tables
import pytest
import torch
from golden_tokens import tiny
from helpers.command import Run
from helpers.networks import mixed, network, requests, same
from helpers.toys import Echo, LogitGap, settled_twice
from test_no_waiting import OnFakes

import fewstep.cli.main
from fewstep.cli.decoding import declared_everywhere, read_setting
from fewstep.decode.admission import positions_needed
from fewstep.decode.block import Block
from fewstep.decode.declarations import Declared, _from_source, _read, _source
from fewstep.decode.decoder import Decoder
from fewstep.decode.diffusion import Diffusion
from fewstep.decode.loop import Loop, decode
from fewstep.decode.own_policies import OwnPolicy, PreviousPass, as_policy
from fewstep.decode.policies import EntropyBelow, EvenSplit, Factor, FixedCount, Margin, Origin, Threshold
from fewstep.decode.registry import DECODERS, POLICIES
from fewstep.engine.language_model import LanguageModel
from fewstep.engine.settings import GenerationSettings
from fewstep.errors import FewstepError
from fewstep.models.load import save_network
from fewstep.values import described

SHARED = "fewstep.engine.settings:GenerationSettings"
TOYS = [f"helpers.toys:{name}" for name in ("Echo", "settled_twice", "LogitGap")]
PLACES = [*DECODERS.values(), *POLICIES.values(), SHARED, *TOYS]


def told(declared: Declared) -> tuple[Any, ...]:
    return declared.name, declared.field, described(declared.type), declared.default, declared.help, declared.details


@pytest.mark.parametrize("place", PLACES)
def test_what_is_read_from_the_source_is_what_the_class_declares(place: str) -> None:
    module, _, name = place.partition(":")
    from_source = [told(one) for one in _source(module).declared(name)]
    assert from_source == [told(one) for one in _read(getattr(import_module(module), name)).values()]


@pytest.mark.parametrize(
    ("source", "is_readable"),
    [
        ("class Odd:\n    size: Annotated[int, 'Its size.'] = 3", True),
        ("class Odd:\n    size: 'Annotated[int | None, \"Its size.\"]' = 3", True),
        ("@dataclass\nclass Odd:\n    size: Annotated[int, 'Its size.'] = field(default=3)", True),
        ("class Odd(Protocol):\n    size: Annotated[int, 'Its size.'] = 3", True),
        ("class Odd(Generic[T]):\n    size: Annotated[int, 'Its size.'] = 3", True),
        ("SIZE = 3\nSize = Annotated[int, 'Its size.']\n\nclass Odd:\n    size: Size = SIZE", True),
        ("def Odd(*, size: Annotated[int, 'Its size.'] = 3): ...", True),
        ("class Odd:\n    size: typing.Annotated[int, 'Its size.'] = 3", False),
        ("SIZE = int(torch.tensor(3))\n\nclass Odd:\n    size: Annotated[int, 'Its size.'] = SIZE", False),
        ("class Odd(torch.nn.Module):\n    size: Annotated[int, 'Its size.'] = 3", False),
        ("from helpers.toys import Echo\n\nclass Odd(Echo):\n    size: Annotated[int, 'Its size.'] = 3", False),
    ],
)
def test_a_source_that_does_not_say_it_all_is_imported(
    source: str, is_readable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imports = (
        "import typing\nfrom dataclasses import dataclass, field\nfrom typing import Annotated, Generic, Protocol, "
        "TypeVar\n\nimport torch\n\nT = TypeVar('T')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = f"odd_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(imports + source)
    declared = _from_source(f"{name}:Odd")["size"]
    assert (declared.default, declared.help) == (3, "Its size.")
    assert (name in sys.modules) != is_readable


def test_every_setting_has_a_help_that_is_a_sentence_and_one_kind_of_value() -> None:
    for name, found in declared_everywhere().items():
        assert all(one.help.endswith(".") for one in found.values()), name
        assert len({one.details.aliases for one in found.values()}) == 1, name
        assert len({described(one.type) for one in found.values()}) == 1, name


# A newcomer


@pytest.fixture
def newcomers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A line of each registry for a decoder and two policies; the command line is set up with them."""
    monkeypatch.setitem(DECODERS, "echo", "helpers.toys:Echo")
    monkeypatch.setitem(POLICIES, "twice", "helpers.toys:settled_twice")
    monkeypatch.setitem(POLICIES, "logit-gap", "helpers.toys:LogitGap")
    reload(fewstep.cli.main)
    yield
    monkeypatch.undo()
    reload(fewstep.cli.main)


def test_a_decoder_is_one_file_and_one_line(newcomers: None, run: Run, tmp_path: Path) -> None:
    lm = tiny("autoregressive")
    expected = lm.generate("what is 2+2?", decoder="autoregressive", max_new_tokens=12)
    output = lm.generate("what is 2+2?", decoder="echo", echoes=3, max_new_tokens=12)
    assert output.token_ids == expected.token_ids
    assert lm.decoder(decoder="echo", repeats=3) == Echo(role=lm.role, repeats=3)
    with pytest.raises(FewstepError, match=r"^the jacobi decoder takes no repeats; only echo can$"):
        lm.decoder(decoder="jacobi", repeats=3)
    with pytest.raises(FewstepError, match=r"^repeats must be at least 1, got 0$"):
        lm.decoder(decoder="echo", repeats=0)
    with pytest.raises(FewstepError, match=r"^echoes is another name of repeats"):
        lm.decoder(decoder="echo", repeats=1, echoes=1)

    save_network(lm.network, tmp_path / "causal")
    base = ("generate", "what is 2+2?", "--model", tmp_path / "causal", "--max-new-tokens", 12)
    assert run(*base, "--decoder", "echo", "--echoes", 3).out == f"{expected.text}\n"
    assert "--repeats must be at least 1, got 0" in run(*base, "--decoder", "echo", "--repeats", 0).err
    for command in ("generate", "eval", "collect"):
        shown = run(command, "--help").out
        assert re.search(r"--repeats,--echoes +<int> +How often the last token is guessed again \(echo: 2\)\.", shown)
        assert "prompt-lookup, medusa, echo." in shown
        assert re.search(r"--ngram .*\(lookahead: 4\)\. Nothing that matters \(echo: 7\)\.", shown)
    assert read_setting("repeats", "4") == 4


def test_a_policy_is_a_function_and_one_line(newcomers: None, run: Run, tmp_path: Path) -> None:
    lm = tiny("block_causal")
    for name, settings, policy in (
        ("twice", {"trust": 0.3}, OwnPolicy(rule=settled_twice, settings={"trust": 0.3})),
        ("logit-gap", {"logit_gap": 1.5}, OwnPolicy(rule=LogitGap(logit_gap=1.5))),
    ):
        expected = lm.generate("what is 2+2?", policy=policy, max_new_tokens=12)
        same(lm.generate("what is 2+2?", policy=name, **settings, max_new_tokens=12), expected)
        same(lm.generate("what is 2+2?", **settings, max_new_tokens=12), expected)
        save_network(lm.network, tmp_path / name)
        options = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", value)]
        base = ("generate", "what is 2+2?", "--model", tmp_path / name, "--max-new-tokens", 12, "--dtype", "float32")
        assert run(*base, "--policy", name, *options).out == f"{expected.text}\n"
        assert f"the policy {name} takes no gaps" in run(*base, *options, "--gaps", 2).err
    assert "Enough at once (policy twice: 0.9)." in run("infill", "--help").out


@pytest.mark.parametrize("name", ["output", "json"])  # of a parameter, and of an option alone
def test_a_setting_named_like_another_option_of_a_command_is_told_of(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clashing(masked: torch.Tensor, **settings: Any) -> torch.Tensor:
        return masked

    clashing.__annotations__[name] = Annotated[float, "Whatever it is."]
    setting = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=0.5)
    vars(clashing)["__signature__"] = inspect.Signature([setting])
    monkeypatch.setitem(POLICIES, "clashing", clashing)
    with pytest.raises(FewstepError, match=rf"would have (--)?{name} twice: .* give that setting another name$"):
        reload(fewstep.cli.main)
    monkeypatch.undo()
    reload(fewstep.cli.main)


# Policies by name


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({"policy": "margin"}, Margin()),
        ({"policy": "margin", "margin": 0.5}, Margin(at_least=0.5)),
        ({"margin": 0.5}, Margin(at_least=0.5)),
        ({"policy": "factor", "factor": 2.0}, Factor(factor=2.0)),
        ({"entropy": 0.2}, EntropyBelow(nats=0.2)),
        ({"policy": "threshold"}, Threshold(at_least=0.8, gaps=2)),
        ({"policy": "threshold", "gaps": 1}, Threshold(at_least=0.8, gaps=1)),
        ({"policy": "fixed", "tokens_per_pass": 3, "order": "margin"}, FixedCount(num_tokens=3, order="margin")),
        ({"decoder": "diffusion", "policy": "even", "steps": 9}, EvenSplit()),
        ({"decoder": "diffusion", "policy": "origin"}, Origin()),
        ({"decoder": "diffusion", "policy": "fixed", "remasking": "random"}, FixedCount(order="random")),
    ],
)
def test_a_policy_is_named_or_implied_by_its_own_setting(settings: dict[str, Any], policy: Any) -> None:
    role = replace(network().role, threshold=0.8, gaps=2)
    assert GenerationSettings.of(**settings).decoder_for(role).policy == policy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "margn"}, "^unknown policy 'margn'; did you mean 'margin'?"),
        ({"policy": 7}, "^7 is no policy; it must be one, or a function$"),
        ({"policy": Margin}, r"is no policy; build it: Margin\(...\)$"),
        ({"policy": "margin", "threshold": 0.5}, "^the policy margin takes no threshold; set one or the other$"),
        ({"margin": 0.5, "entropy": 0.5}, "^margin sets the policy margin, and entropy the policy entropy; set one"),
        ({"margin": 2.0}, "^the margin is a difference of probabilities"),
        ({"policy": "even"}, "^the block decoder takes no step schedule"),
        ({"order": "random"}, "^order belongs to the policies fixed and even; set policy with it$"),
        ({"decoder": "diffusion", "tokens_per_pass": 2, "steps": 4}, "^tokens_per_pass replaces steps: the policy "),
    ],
)
def test_policies_that_contradict_their_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FewstepError, match=message):
        GenerationSettings.of(**settings).decoder_for(network().role)


def test_an_evaluation_tells_of_a_policy_that_was_set(run: Run, tmp_path: Path) -> None:
    lm = tiny("block_causal")
    save_network(lm.network, tmp_path / "student")
    (tmp_path / "sums.jsonl").write_text('{"question": "1 + 2 =", "answer": 3}\n')
    base = ("eval", "--model", tmp_path / "student", "--data", tmp_path / "sums.jsonl", "--max-new-tokens", 4)
    for options, policy in ((("--margin", 0.5), "Margin(at_least=0.5)"), (("--threshold", 0.5), None)):
        shown = run(*base, *options, "--json", tmp_path / "report.json").out
        report = json.loads((tmp_path / "report.json").read_text())
        assert report.get("policy") == policy
        assert (f"block {policy}" in shown) == (policy is not None)


# A user's own policy


def by_logits(logits: torch.Tensor, masked_RB: torch.Tensor, at_least: float = 0.3) -> torch.Tensor:
    return masked_RB & (logits.softmax(-1).amax(-1) >= at_least)


def of(net: Any, policy: Any) -> Decoder:
    return Block(role=net.role, policy=policy)


def test_a_function_that_names_logits_decodes_as_the_policy_that_it_spells_out() -> None:
    net = network()
    for asked, expected in zip(
        decode(net, requests(6), of(net, by_logits)),
        decode(net, requests(6), of(net, Threshold(at_least=0.3))),
        strict=True,
    ):
        same(asked, expected)


def test_numbers_of_a_function_are_each_requests_own() -> None:
    net = network()
    own = [OwnPolicy(rule=by_logits, settings={"at_least": share}) for share in (0.2, 0.5, 0.9)]
    asked = mixed([None, *own], [requests(1)[0].sampling])
    together = decode(net, asked, of(net, by_logits), batch_size=3)
    for request, output in zip(asked, together, strict=True):
        same(output, decode(net, [request], of(net, by_logits))[0])
    assert len({output.num_forwards for output in together}) > 3
    with pytest.raises(FewstepError, match="requests of one batch share a kind of policy"):
        decode(net, requests(1, policy=OwnPolicy(rule=settled_twice)), of(net, by_logits))


def test_settings_of_a_function_are_given_by_name_as_if_it_were_registered() -> None:
    lm, prompt = tiny("block_causal"), "what is 2+2?"
    for rule, name, settings in (
        (by_logits, "at_least", {"at_least": 0.6}),
        (settled_twice, "trust", {"trust": 0.3}),
        (partial(settled_twice, trust=0.8), "trust", {"trust": 0.3}),
    ):
        function = getattr(rule, "func", rule)
        expected = lm.generate(prompt, policy=OwnPolicy(rule=function, settings=settings), max_new_tokens=12)
        same(lm.generate(prompt, policy=rule, **settings, max_new_tokens=12), expected)
        with pytest.raises(FewstepError, match=f"^unknown setting '{name}s'; did you mean '{name}'"):
            lm.generate(prompt, policy=rule, **{f"{name}s": 0.5})
    assert GenerationSettings.of(policy=by_logits, at_least=0.6).described["policy"] == "by_logits(at_least=0.6)"
    with pytest.raises(FewstepError, match=r"^trust must be a number, got 'much'$"):
        lm.generate(prompt, policy=settled_twice, trust="much")
    with pytest.raises(FewstepError, match=r"^unknown setting 'confidence'"):
        lm.generate(prompt, policy=settled_twice, confidence=0.5)


def test_one_token_is_finalised_where_a_policy_chooses_none_and_none_that_is_not_masked() -> None:
    net = network()
    for never in (lambda masked: masked & False, lambda masked: ~masked):
        output = decode(net, requests(3)[2:], of(net, never))[0]
        same(output, decode(net, requests(3)[2:], of(net, FixedCount()))[0])


def test_the_previous_pass_is_what_was_drawn_at_the_same_positions() -> None:
    net, seen = network(), []

    def watch(tokens: torch.Tensor, confidence: torch.Tensor, previous: PreviousPass) -> torch.Tensor:
        seen.append((tokens.clone(), confidence.clone(), previous))
        return confidence < 0  # none: the most certain one is taken

    decode(net, requests(2)[1:], of(net, watch))
    block = net.role.block_size
    assert len(seen) > 2 * block
    for i, (_, _, previous) in enumerate(seen):
        if i % block == 0:  # a new block
            assert (previous.tokens == -1).all()
            assert (previous.confidence == 0).all()
        else:
            assert torch.equal(previous.tokens, seen[i - 1][0])
            was_open = seen[i - 1][1] > 0
            assert torch.equal(previous.confidence[was_open], seen[i - 1][1][was_open])


def test_a_state_keeps_the_previous_pass_only_for_a_policy_that_reads_it() -> None:
    net = network()
    for policy, kept in ((Threshold(), False), (by_logits, False), (settled_twice, True)):
        loop = Loop(net, of(net, policy), num_slots=1, length=40)
        assert (loop.state.previous is not None) == kept


@pytest.mark.parametrize("policy", [by_logits, settled_twice, LogitGap()])
def test_a_pass_with_a_policy_of_ones_own_waits_for_nothing(policy: Any) -> None:
    net = network()
    decoder, checked = of(net, policy), OnFakes()
    asked = requests(3)
    length = max(positions_needed(decoder, request) for request in asked)
    loop = Loop(net, decoder, num_slots=3, length=length, run_pass=checked)
    for request in asked:
        loop.submit(request)
    while loop.busy:
        loop.step()
    assert checked.seen


def test_requests_of_a_policy_that_reads_the_previous_pass_do_not_depend_on_their_company() -> None:
    net = network()
    together = decode(net, requests(8), of(net, settled_twice), batch_size=3)
    for request, output in zip(requests(8), together, strict=True):
        same(output, decode(net, [request], of(net, settled_twice))[0])


def test_own_policies_that_cannot_be_are_refused_in_one_sentence() -> None:
    def of_hidden(hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def of_numbers(masked: torch.Tensor) -> torch.Tensor:
        return masked.float()

    with pytest.raises(FewstepError, match="wants 'hidden', which no pass has; it may name certainty, masked, tokens"):
        as_policy(of_hidden)
    net = network()
    with pytest.raises(FewstepError, match=r"of_numbers must return what it chooses as a boolean tensor of the shape"):
        decode(net, requests(1), of(net, of_numbers))
    with pytest.raises(FewstepError, match="a policy replaces threshold, gaps, steps and order; leave out threshold"):
        LanguageModel(net).decoder(policy=by_logits, threshold=0.5)


class Whole:
    """A policy with all attributes of one, which returns what it is told to."""

    order: Any = "low_confidence"
    temperature: Any = 0.0

    def __init__(self, rule: Callable[[torch.Tensor], Any], *, paced: bool = False, **attributes: Any) -> None:
        self.rule, self.paced, self.numbers = rule, paced, ()
        vars(self).update(attributes)

    def __call__(self, certainty_RB: torch.Tensor, masked_RB: torch.Tensor) -> Any:
        return self.rule(masked_RB)


@pytest.mark.parametrize("rule", [lambda masked: None, torch.Tensor.float, lambda masked: masked[:, :1]])
def test_a_policy_with_all_attributes_is_refused_for_what_it_returns_as_a_function_is(rule: Any) -> None:
    net = network()
    with pytest.raises(FewstepError, match="must return what it chooses as a boolean tensor of the shape of masked"):
        decode(net, requests(1), of(net, Whole(rule)))


@pytest.mark.parametrize("paced", [False, True])
def test_a_policy_that_never_chooses_comes_to_an_end(paced: bool) -> None:
    """It finalises the most certain position, as a function that chooses none does; a paced one in its last step."""
    net = network()
    decoder = Diffusion(role=net.role, policy=Whole(torch.zeros_like, paced=paced), block_size=4)
    (output,) = decode(net, [replace(requests(1)[0], max_new_tokens=8, early_stop=False)], decoder)
    assert (output.step_G > 0).all()


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (torch.ge, "arguments of the policy .*ge cannot be read"),
        (max, "arguments of the policy max cannot be read"),
        (partial(by_logits, nothing=1), "arguments of the policy by_logits cannot be read"),
        (Whole(torch.ones_like, order="best"), "has the order 'best'; choose one of low_confidence, random"),
        (Whole(torch.ones_like, temperature="hot"), "has the temperature 'hot'; it must be a number of at least 0"),
        (Whole(torch.ones_like, temperature=float("nan")), "has the temperature nan"),
        (Whole(torch.ones_like, temperature=-1.0), "has the temperature -1.0"),
        (Whole(torch.ones_like, numbers=("many",)), r"numbers of the policy .* must be numbers, got \('many',\)"),
    ],
)
def test_a_policy_whose_arguments_or_attributes_mean_nothing_is_refused(rule: Any, sentence: str) -> None:
    with pytest.raises(FewstepError, match=sentence):
        as_policy(rule)


def test_a_misspelt_setting_of_a_function_is_refused() -> None:
    for rule in (by_logits, partial(by_logits, at_least=0.5)):
        with pytest.raises(
            FewstepError, match=r"^'at_lest' is no setting of the policy by_logits; did you mean 'at_le"
        ):
            as_policy(rule, {"at_lest": 0.3})
    with pytest.raises(FewstepError, match=r"^'threshold' is no setting of the policy .*<lambda>; it has none$"):
        as_policy(lambda masked: masked, {"threshold": 0.3})


def test_an_object_that_is_called_may_name_itself_as_it_likes() -> None:
    class Mine:
        def __call__(this, masked: torch.Tensor, at_least: float = 0.5) -> torch.Tensor:  # noqa: N805
            return masked

    class Static:
        @staticmethod
        def __call__(masked: torch.Tensor) -> torch.Tensor:
            return masked

    class OfClass:
        @classmethod
        def __call__(cls, masked: torch.Tensor) -> torch.Tensor:
            return masked

    net = network()
    expected = decode(net, requests(2), of(net, lambda masked: masked))
    for rule in (Mine(), Static(), OfClass(), Mine().__call__):
        for one, other in zip(decode(net, requests(2), of(net, rule)), expected, strict=True):
            same(one, other)
    with pytest.raises(FewstepError, match="wants 'self', which no pass has"):
        as_policy(lambda self, masked: masked)


def test_answers_are_kept_under_what_an_own_policy_says_and_no_address() -> None:
    assert repr(OwnPolicy(rule=by_logits)) == "by_logits(at_least=0.3)"
    assert repr(OwnPolicy(rule=LogitGap(logit_gap=1.0))) == "LogitGap(logit_gap=1.0)"
    assert GenerationSettings.of(policy=by_logits).described["policy"] == "by_logits(at_least=0.3)"


def test_results_kept_before_settings_were_declared_by_decoders_go_on() -> None:
    """Their guard names these settings, set or not, with these values; one that came later only if it was set."""
    assert GenerationSettings().described == {
        **dict.fromkeys(("decoder", "threshold", "gaps", "steps", "block_size", "canvas_length", "top_k", "top_p")),
        **dict.fromkeys(("alg", "eps", "alg_temp", "draft", "heads", "window", "ngram", "typical")),
        "max_new_tokens": 256,
        "order": "low_confidence",
        "early_stop": True,
        "temperature": 0.0,
        "seed": 0,
        "cfg_scale": 0.0,
        "fixed_windows": False,
        "stop": (),
    }
    given = GenerationSettings.of(decoder="jacobi", window=4, margin=0.5, gen_length=9).described
    assert (given["decoder"], given["window"], given["margin"], given["max_new_tokens"]) == ("jacobi", 4, 0.5, 9)


# The documentation


def test_the_tables_of_the_documentation_are_those_of_the_declarations() -> None:
    assert option_tables.PAGE.read_text() == option_tables.written(), "rewrite them: python tests/option_tables.py"
