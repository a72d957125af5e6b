"""Contenders that answered the same problems, beside one of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.engine.language_model import LanguageModel
from fewstep.measure.contenders import Contender
from fewstep.measure.evaluate import Report
from fewstep.measure.metrics import paired_interval
from fewstep.measure.timing import Timing


def extra_parameters(lm: LanguageModel, settings: Mapping[str, Any], baseline: LanguageModel) -> int:
    """What a contender keeps in memory beyond the baseline's weights: heads, a draft, or a larger network."""
    decoder: Any = lm.decoder(**settings)
    beside = 0
    if decoder.name == "medusa":
        beside = sum(parameter.numel() for parameter in decoder.heads.parameters())
    elif decoder.name == "speculative":
        beside = decoder.draft.num_parameters
    return lm.network.num_parameters + beside - baseline.network.num_parameters


def rows_beside(
    baseline: str,
    contenders: Sequence[Contender],
    models: Mapping[str, LanguageModel],
    reports: Mapping[str, Report],
    timings: Mapping[str, Timing],
) -> list[dict[str, Any]]:
    """For each contender its report's figures, with what is compared: the difference of accuracies with its interval,
    the share of answers that are the baseline's, times at batch 1 with their ratio, and `extra_parameters`.

    `reports` need the texts of the answers; reports and timings are of the same problems for all.
    """
    report, timing = reports[baseline], timings[baseline]
    rows = []
    for one in contenders:
        mine, alone = reports[one.name], timings[one.name]
        right, right_baseline = ([record.correct for record in of.records] for of in (mine, report))
        difference = paired_interval(right, right_baseline)
        same = [a.text == b.text for a, b in zip(mine.records, report.records, strict=True)]
        rows.append({
            "contender": one.name,
            **mine.to_json(),
            "accuracy_difference": difference.estimate,
            "accuracy_difference_ci95": [difference.low, difference.high],
            "same_answers": sum(same) / len(same),
            "batch_1": alone.to_json(),
            "speed_ratio": sum(timing.seconds) / sum(alone.seconds),
            "extra_parameters": extra_parameters(models[one.name], one.settings, models[baseline]),
        })  # fmt: skip
    return rows
