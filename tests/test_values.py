"""Values of settings: the declared type and range, wherever a value comes from."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from annotated_types import Ge, Interval, Le, Lt

from fewstep.cli.run_settings import build_settings
from fewstep.cli.training import Canvas, Data, Watch
from fewstep.decode.jacobi import Jacobi
from fewstep.decode.lookahead import Lookahead
from fewstep.decode.policies import DreamSchedule, EntropyBelow, EvenSplit, Factor, FixedCount, Margin, Threshold
from fewstep.decode.prompt_lookup import PromptLookup
from fewstep.decode.sampling import Sampling
from fewstep.decode.tree import MOST_GUESSES, ROOT, Tree
from fewstep.engine.settings import GenerationSettings
from fewstep.errors import FewstepError
from fewstep.models.roles import Role
from fewstep.models.tiny import tiny_network
from fewstep.train.cdlm import CDLMSettings
from fewstep.train.cllm import CLLMSettings
from fewstep.train.corruption import Corruption
from fewstep.train.documents import CanvasLengths
from fewstep.train.lora import LoRASettings
from fewstep.train.medusa import MedusaSettings
from fewstep.train.monitor import CollapseLimits
from fewstep.train.settings import TrainSettings
from fewstep.values import check_fields, fitted, shown

ROLE = Role(name="autoregressive")
SETTINGS: list[tuple[type, dict[str, Any]]] = [
    (GenerationSettings, {}),
    (TrainSettings, {"max_steps": 1}),
    (LoRASettings, {}),
    (CDLMSettings, {}),
    (CLLMSettings, {}),
    (Corruption, {}),
    (CanvasLengths, {}),
    (MedusaSettings, {}),
    (CollapseLimits, {}),
    (Sampling, {}),
    (Threshold, {}),
    (Margin, {}),
    (EntropyBelow, {}),
    (Factor, {}),
    (FixedCount, {}),
    (EvenSplit, {}),
    (DreamSchedule, {"num_steps": 4}),
    (Jacobi, {"role": ROLE}),
    (Lookahead, {"role": ROLE}),
    (PromptLookup, {"role": ROLE}),
    (Role, {"name": "autoregressive"}),
    (Canvas, {}),
    (Data, {"data": "rows.jsonl"}),
    (Watch, {}),
]
STRANGE = [
    True,
    "x",
    "4",
    4.0,
    float("nan"),
    float("inf"),
    -float("inf"),
    -1,
    -(1 << 80),
    1 << 80,
    10**400,
    10**5000,
    1e308,
    1e-320,
    [],
    [float("nan")],
    (1 << 80,),
    ["x"],
    {},
    b"x",
    1j,
    object(),
    np.float64("nan"),
    torch.tensor(1.0),
]


@pytest.mark.parametrize(("group", "needed"), SETTINGS, ids=[group.__name__ for group, _ in SETTINGS])
def test_every_value_of_every_setting_is_taken_or_refused_in_one_sentence(group: type, needed: dict[str, Any]) -> None:
    for field in (field for field in fields(group) if field.init and field.name not in ("role", "sampling")):
        for value in STRANGE:
            built, sentence = None, ""
            try:
                built = group(**{**needed, field.name: value})
            except FewstepError as error:
                sentence = str(error)
            assert "\n" not in sentence
            assert len(sentence) < 300
            kept = getattr(built, field.name, None)
            assert not isinstance(kept, float) or math.isfinite(kept)
            assert not isinstance(kept, bool) or isinstance(field.default, bool)


@dataclass(frozen=True, kw_only=True)
class Example:
    count: Annotated[int, Ge(1), Le(9), "How many."] = 1
    share: Annotated[float, Interval(ge=0, lt=1)] = 0.5
    limit: Annotated[int, Lt(5)] | None = None
    kind: Literal["a", "b"] = "a"
    pair: tuple[Annotated[float, Ge(0)], float] = (1.0, 2.0)
    place: Path = Path()
    wanted: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"count": 10}, "count must be at most 9, got 10"),
        ({"count": 2.0}, "count must be an integer, got 2.0"),
        ({"count": True}, "count must be an integer, got True"),
        ({"count": None}, "count must be an integer, got None"),
        ({"count": 10**5000}, "count must be at most 9, got a number of thousands of digits"),
        ({"share": 1}, "share must be below 1, got 1"),
        ({"share": float("nan")}, "share must be a finite number, got nan"),
        ({"share": "0.5"}, "share must be a number, got '0.5'"),
        ({"limit": 5}, "limit must be below 5, got 5"),
        ({"kind": "c"}, "unknown kind 'c'; choose a or b"),
        ({"pair": [1.0]}, "pair must be 2 values, got [1.0]"),
        ({"pair": [-1.0, 1]}, "every value of pair must be at least 0, got -1.0"),
        ({"pair": "12"}, "pair must be list of number, got '12'"),
        ({"place": 3}, "place must be a path, got 3"),
        ({"wanted": 1}, "wanted must be true|false, got 1"),
    ],
)
def test_a_value_of_another_type_or_range_is_named(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FewstepError) as refused:
        Example(**given)
    assert str(refused.value) == sentence


def test_values_become_plain_ones_of_their_type() -> None:
    built = Example(count=np.int64(3), share=np.float32(0.25), pair=[1, 2], place="x")  # type: ignore[arg-type]
    assert (built.count, built.share, built.pair, built.place) == (3, 0.25, (1, 2), Path("x"))
    assert type(built.count) is int
    assert type(built.share) is float
    assert fitted(None, int | None, "x") is None


def test_a_value_in_a_sentence_is_short() -> None:
    nested: list[Any] = []
    for _ in range(2000):
        nested = [nested]
    assert max(len(shown(value)) for value in ("x" * 10**6, list(range(10**5)), 10**4000, 10**5000, nested)) < 100


@pytest.mark.parametrize(
    "text",
    [
        "0x_",
        "0b_",
        "!!float x",
        "!!timestamp x",
        "2024-13-45",
        "1" * 5000,
        "[" * 500,
        "!!int ''",
        "&a [*a]",
        ".nan",
        "yes",
    ],
)
def test_no_yaml_ends_in_an_error_of_python(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"count: {text}\n")
    for config, given in ((tmp_path / "run.yaml", {}), (None, {"count": text}), (None, {"pair": text})):
        with pytest.raises(FewstepError):
            build_settings({Example: ""}, config, given)


def test_a_text_that_spells_a_number_is_one_in_yaml(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("share: 1e-3\npair: [1e-1, 5]\ncount: 2\n")
    built = build_settings({Example: ""}, tmp_path / "run.yaml", {})[Example]
    assert (built.share, built.pair, built.count) == (0.001, (0.1, 5), 2)
    assert build_settings({Example: ""}, None, {"share": "1e-3"})[Example].share == 0.001


def test_a_tree_too_large_to_verify_is_refused_before_it_is_made() -> None:
    with pytest.raises(FewstepError, match=f"tree of 6000 guesses in every pass; .* at most {MOST_GUESSES}"):
        Lookahead(role=ROLE, window=1000, ngram=4)


def test_a_tree_may_be_as_deep_as_it_is_large() -> None:
    chain = Tree(tuple(range(ROOT, 1200)))
    assert chain.depth == 1200
    layout = chain.on(torch.device("cpu"))
    assert torch.equal(layout.ancestors_TT, torch.ones(1200, 1200).tril().bool())


def test_python_settings_of_another_type_are_refused_in_one_sentence() -> None:
    from fewstep.engine.language_model import LanguageModel

    lm = LanguageModel(tiny_network("autoregressive"))
    for settings in ({"max_new_tokens": 4.0}, {"seed": None}, {"policy": "threshold"}, {"temperature": 1e308}):
        with pytest.raises(FewstepError, match=next(iter(settings))):
            lm.generate("2", **settings)
    assert lm.generate("2", max_new_tokens=np.int64(3), seed=np.int64(1)).num_tokens <= 3
