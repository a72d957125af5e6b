"""`fewstep infill`: fill a gap between two texts, or the mask tokens inside one."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewstep.cli.decoding import InfillingOptions
from fewstep.cli.generate import describe, summary
from fewstep.cli.model_names import check_model_name
from fewstep.cli.options import Json, TeacherOptions
from fewstep.cli.report import deliver, note
from fewstep.errors import FewstepError
from fewstep.values import Count

if TYPE_CHECKING:
    from fewstep.engine.language_model import LanguageModel


def infill(
    model: TeacherOptions,
    decoding: InfillingOptions,
    text: Annotated[
        str | None, typer.Argument(help="A text with the model's mask token wherever it is to be filled.")
    ] = None,
    prefix: Annotated[str | None, typer.Option(help="What stands before the gap.")] = None,
    suffix: Annotated[str | None, typer.Option(help="What stands after the gap.")] = None,
    num_tokens: Annotated[Count | None, typer.Option(help="Size of the gap between --prefix and --suffix.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What the text answers, through the model's template.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take --prompt as it is, without a template.")] = False,
    json: Json = None,
) -> None:
    """Fills the gap between --prefix and --suffix, or the mask tokens inside TEXT."""
    if (text is None) == (prefix is None and suffix is None):
        raise FewstepError("give either a text with mask tokens or --prefix and --suffix")
    if text is not None and num_tokens is not None:
        raise FewstepError("--num-tokens has no effect on a text, whose mask tokens are the gap; leave it out")
    if text is None and suffix is None:
        raise FewstepError("--suffix is missing: what stands after the gap? Give --suffix '' if nothing does")
    if text is None and num_tokens is None:
        raise FewstepError("--num-tokens is missing: how many tokens is the gap between --prefix and --suffix?")
    check_model_name(model.model)
    lm = model.load_model()
    shifted = lm.role.name == "bidirectional" and lm.role.right_shift_logits
    if shifted and prompt is None and _begins_open(lm, prefix, text):
        raise FewstepError(
            f"{lm.network.name} scores a token from the one before it, so the gap cannot come first; "
            "give --prefix or --prompt"
        )
    gap: dict[str, Any] = {"text": text} if text is not None else {"num_tokens": num_tokens}
    output = lm.infill(prefix or "", suffix or "", prompt=prompt, raw=raw, **gap, **decoding.given())
    report = summary(lm, [output], decoding.given())
    deliver(json, report, show=lambda: print(output.text))
    note(describe(report))


def _begins_open(lm: "LanguageModel", prefix: str | None, text: str | None) -> bool:
    """Whether nothing stands before the first token to be filled in."""
    if text is None or lm.role.mask_token_id is None:
        return not prefix
    return text.startswith(str(lm.network.tokenizer.convert_ids_to_tokens(lm.role.mask_token_id)))
