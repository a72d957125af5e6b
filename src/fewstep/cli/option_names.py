"""Errors about settings in the words of the command line: `--max-new-tokens`, where Python says `max_new_tokens`."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fewstep.errors import FewstepError


def option_name(setting: str) -> str:
    """The option of a setting that names no other."""
    return "--" + setting.replace("_", "-")


@contextmanager
def naming_options(options: Mapping[str, str]) -> Iterator[None]:
    """Let a FewstepError name settings as they were typed; `options`: setting -> option.

    A name with an underscore is no English word and is replaced wherever it stands, unless quoted or a part of a path
    or a key; any other, such as `temperature`, only where the sentence begins with it and says what it must be or is.
    """
    try:
        yield
    except FewstepError as error:
        told = _in_options(str(error), options)
        if told == str(error):
            raise
        raise FewstepError(told) from error


def _in_options(sentence: str, options: Mapping[str, str]) -> str:
    sentence = re.sub(
        r"^(?:the )?(\w+)(?= (?:must|is|lies?) )", lambda match: options.get(match[1], match[0]), sentence
    )
    name = r"""(?<![\w./\\,'"-])[a-z]+(?:_[a-z]+)+(?![\w/\\'"-]|\.\w)"""
    return re.sub(name, lambda match: options.get(match[0], match[0]), sentence)
