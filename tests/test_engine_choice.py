"""Which engine runs the passes, and what is told of it."""

import pytest
from helpers.networks import lively

from fewstep.decode.loop import run_pass
from fewstep.engine.language_model import LanguageModel
from fewstep.engine.loops import Loops
from fewstep.errors import FewstepError


def test_engine_off_is_the_plain_path_and_gives_no_reason():
    lm = LanguageModel(lively("block_causal"))
    choice = lm.choice(engine="off")
    assert (choice.engine, choice.network, choice.run_pass, choice.note) == ("off", lm.network, run_pass, None)
    assert choice.dtype == "float32"


def test_a_function_of_ones_own_runs_the_passes_whatever_the_setting():
    def own(*arguments):
        return run_pass(*arguments)

    network = lively("block_causal")
    for setting in ("auto", "off"):
        choice = LanguageModel(network, Loops(network, own)).choice(engine=setting)
        assert (choice.engine, choice.run_pass, choice.note) == ("off", own, "a function of your own runs the passes")


def test_an_engine_that_there_is_not_is_refused():
    lm = LanguageModel(lively("block_causal"))
    with pytest.raises(FewstepError, match="unknown engine 'fast'; choose auto, compiled or off"):
        lm.generate("a", engine="fast")
