"""`fewstep.load` and what it returns: text in, text out."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, overload

from fewstep.decode.decoder import Decoder
from fewstep.decode.embedding_generator import EmbeddingSampler
from fewstep.decode.generator import Generator, answer, rounds
from fewstep.decode.loop import Listener, Loop
from fewstep.decode.requests import Event, Output, Record, Request
from fewstep.engine.choice import Choice, EngineSetting
from fewstep.engine.loops import Loops
from fewstep.engine.manner import Manner, Telling
from fewstep.engine.samplers import Samplers
from fewstep.engine.settings import GenerationSettings
from fewstep.errors import FewstepError
from fewstep.models.load import load_network
from fewstep.models.network import Network
from fewstep.models.quantize import quantize as quantize_weights
from fewstep.models.roles import Role, RoleName
from fewstep.models.switch import with_adapter
from fewstep.models.text import (
    AnswerText,
    Message,
    before_stop,
    check_text,
    decode_text,
    encode_plain,
    encode_prompt,
    num_ids_to_stop,
)
from fewstep.values import Count, fitted, shown

Prompt = str | Sequence[Message]
"""A text, or a conversation: messages of `role` and `content`."""

Prompts = Sequence[str] | Sequence[Sequence[Message]] | Sequence[str | list[Message]]


def load(
    name: str | Path,
    role: RoleName | None = None,
    dtype: str = "auto",
    device: str = "auto",
    *,
    block_size: int | None = None,
    quantize: str | None = None,
) -> "LanguageModel":
    """Load a bundled name, a folder or a hub id; see `models.load.load_network`.

    `quantize` rounds the weights of the layers to 8 bits, "int8" on a CPU, "fp8" on a GPU: see `models.quantize`.
    """
    network = load_network(name, role=role, dtype=dtype, device=device, block_size=block_size)
    if quantize is not None:
        quantize_weights(network, quantize)
    return LanguageModel(network)


class GeneratorFor(Protocol):
    """Makes what answers requests with the settings that they were made from; `Loops` makes loops.

    FewstepError if the settings or a request have no meaning for it, before anything is allocated. `kept`: the
    generator of an earlier call, which is idle; returned in place of a new one if it can stand for that.
    """

    def __call__(
        self,
        settings: GenerationSettings,
        requests: Sequence[Request],
        *,
        batch_size: int = ...,
        record: Record | None = ...,
        listeners: Sequence[Listener] = ...,
        kept: Generator | None = ...,
    ) -> Generator: ...


class LanguageModel:
    """A network with its tokenizer, and what generates with it: text in, text out.

    By default that is the loop, with the decoder that the network's role says unless a setting names another; for a
    network in embedding space it is the sampler.

    Settings are those of `GenerationSettings`, by keyword; FewstepError for one that is unknown or that the decoder
    does not take.
    """

    def __init__(self, network: Network, generator_for: GeneratorFor | None = None) -> None:
        self.network = network
        self._generator_for = generator_for or (
            Loops(network) if network.role.embedding_space is None else Samplers(network)
        )
        self._kept: Generator | None = None

    def __repr__(self) -> str:
        return f"LanguageModel({self.network.name!r}, role={self.role.name!r}, device={str(self.network.device)!r})"

    @property
    def role(self) -> Role:
        return self.network.role

    def with_adapter(self, name: str | Path | None) -> "LanguageModel":
        """The same weights in another role: the model, or its base if it has an adapter already, with the adapter of a
        bundled name, a folder or a hub id; the base alone for None.

        Nothing of the base is copied or changed: all models made from one share its parameters, and answer in turn.
        FewstepError if `name` is no adapter, or one of a model with other weights.
        """
        base = self.network.base or self.network
        return LanguageModel(base if name is None else with_adapter(base, name))

    def decoder(self, **settings: Any) -> Decoder:
        """The decoder that these settings make for this model. FewstepError if its generator runs none."""
        return self._loops.decoder(GenerationSettings.of(**settings))

    def choice(self, **settings: Any) -> Choice:
        """Which engine runs the passes with these settings, in which numbers, and why the plain path does if that is
        so. FewstepError if its generator runs no decoder.
        """
        return self._loops.choice(GenerationSettings.of(**settings))

    def manner(self, **settings: Any) -> Manner:
        """How it answers with these settings, as reports tell it. FewstepError if its generator does not tell."""
        return self._telling.manner(GenerationSettings.of(**settings))

    def checker(self, **settings: Any) -> Callable[[Request], object]:
        """What raises FewstepError for a request that cannot be answered with these settings. FewstepError as
        `manner`.
        """
        return self._telling.checker(GenerationSettings.of(**settings))

    @property
    def _telling(self) -> Telling:
        if not isinstance(self._generator_for, Telling):
            raise FewstepError(
                f"{self.network.name} answers without a decoder, and what makes its generators does not tell how; give "
                "that the methods manner and checker"
            )
        return self._generator_for

    def loop(self, decoder: Decoder, engine: EngineSetting = "auto", **options: Any) -> Loop:
        """A loop of its own for requests to come, which runs this decoder by the engine; `options` as for `Loop`.

        FewstepError as `decoder`.
        """
        return self._loops.with_slots(decoder, engine, **options)

    def generator(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int = 32,
        listeners: Sequence[Listener] = (),
        kept: Generator | None = None,
        **settings: Any,
    ) -> Generator:
        """What answers these requests, and others no longer than they are, with these settings; for those who drive it
        round by round. `kept`: an idle one, which is returned if it fits.
        """
        chosen = GenerationSettings.of(**settings)
        options: dict[str, Any] = {"batch_size": batch_size, "record": None, "listeners": listeners, "kept": kept}
        return self._generator_for(chosen, requests, **options)

    @property
    def _loops(self) -> Loops:
        if self.role.embedding_space is not None:
            raise FewstepError(
                f"{self.network.name} makes whole texts from noise and answers without a decoder, which is needed "
                "here; use generate, infill, stream, eval or correct"
            )
        if not isinstance(self._generator_for, Loops):
            raise FewstepError(
                f"{self.network.name} answers without a decoder, which is needed here; use generate, infill or stream"
            )
        return self._generator_for

    @overload
    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        raw: bool = ...,
        batch_size: int = ...,
        record: Record | None = ...,
        listeners: Sequence[Listener] = ...,
        on_output: Callable[[int, Output], None] | None = ...,
        **settings: Any,
    ) -> Output: ...
    @overload
    def generate(
        self,
        prompt: Prompts,
        *,
        raw: bool = ...,
        batch_size: int = ...,
        record: Record | None = ...,
        listeners: Sequence[Listener] = ...,
        on_output: Callable[[int, Output], None] | None = ...,
        **settings: Any,
    ) -> list[Output]: ...
    def generate(
        self,
        prompt: Prompt | Prompts,
        *,
        raw: bool = False,
        batch_size: int = 32,
        record: Record | None = None,
        listeners: Sequence[Listener] = (),
        on_output: Callable[[int, Output], None] | None = None,
        **settings: Any,
    ) -> Output | list[Output]:
        """Answer one prompt, or each of a list, `batch_size` at a time; outputs in the given order.

        The chat template is applied unless `raw`. `on_output(index, output)` is called as each completes, `listeners`
        are called after each round with the state of all slots.
        """
        chosen = GenerationSettings.of(**settings)
        if not isinstance(prompt, str | Sequence):
            raise FewstepError(f"a prompt is a text or a list of messages, got {type(prompt).__name__}")
        if not (on_output is None or callable(on_output)):
            raise FewstepError(f"on_output must be a function of an index and an output, got {shown(on_output)}")
        # A conversation is a list too, and its items are messages.
        single = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], dict))
        prompts: Any = [prompt] if single else prompt
        requests = [chosen.request(self.encode(one, raw=raw)) for one in prompts]
        texts = [self.answer_text(chosen.stop) for _ in requests] if chosen.stop else []

        def watch(index: int, event: Event) -> bool:
            texts[index].add(event.position, event.token_id)
            return texts[index].stopped

        def announce(index: int, output: Output) -> None:
            assert on_output is not None
            on_output(index, self.with_text(output, chosen.stop))

        with self._generator(chosen, requests, batch_size=batch_size, record=record, listeners=listeners) as generator:
            told = None if on_output is None else announce
            outputs = answer(generator, requests, on_output=told, watch=watch if chosen.stop else None)
        answers = [self.with_text(output, chosen.stop) for output in outputs]
        return answers[0] if single else answers

    def stream(self, prompt: Prompt, *, raw: bool = False, **settings: Any) -> "Stream":
        """Decode one prompt and yield its tokens as they are finalised; see `Stream`."""
        chosen = GenerationSettings.of(**settings)
        return Stream(self, chosen, chosen.request(self.encode(prompt, raw=raw)))

    @contextmanager
    def _generator(
        self, chosen: GenerationSettings, requests: Sequence[Request], **options: Any
    ) -> Iterator[Generator]:
        """What answers these requests, the one of the last call if it fits; no other call has it meanwhile.

        It is kept once they are answered; one that failed or was left half-way is not.
        """
        kept, self._kept = self._kept, None
        generator = self._generator_for(chosen, requests, kept=kept, **options)
        yield generator
        if not generator.busy:
            self._kept = generator

    def infill(
        self,
        prefix: str = "",
        suffix: str = "",
        *,
        num_tokens: int | None = None,
        text: str | None = None,
        prompt: Prompt | None = None,
        raw: bool = False,
        **settings: Any,
    ) -> Output:
        """Fill a gap of `num_tokens` between `prefix` and `suffix`, or every mask token inside `text`.

        `prompt` is the prompt that the text answers; the chat template is applied unless `raw`. The output's `text` is
        the whole text filled in, its `token_ids` the canvas from the first mask on (with a prompt, the whole text), of
        which `num_tokens` are new. Settings are those of the diffusion decoder, except `max_new_tokens`,
        `canvas_length`, `early_stop` and `alg`.
        """
        for name, value in {"prefix": prefix, "suffix": suffix, "text": text}.items():
            fitted(value, str if name != "text" else str | None, name)
        fitted(num_tokens, Count | None, "num_tokens")
        for name in ("max_new_tokens", "canvas_length", "early_stop", "stop"):
            if name in settings:
                raise FewstepError(
                    f"infilling takes no {name}: the gap or the mask tokens say which positions are filled"
                )
        if "alg" in settings or settings.get("policy") == "dream":
            raise FewstepError("infilling takes no alg, whose schedule is that of an empty canvas; set an order")
        chosen = GenerationSettings.of(**settings)
        if self.role.name not in ("bidirectional", "embedding"):
            raise FewstepError(
                f"{self.network.name} has the role {self.role.name}, which cannot infill; load a bidirectional model"
            )
        context_ids = [] if prompt is None else self.encode(prompt, raw=raw)
        if text is None:
            canvas = self._gap(prefix, suffix, num_tokens)
        elif prefix or suffix or num_tokens is not None:
            raise FewstepError("infill takes either a text with mask tokens, or prefix, suffix and num_tokens")
        else:
            canvas = self._masks_in(text)
        lead_ids = [] if context_ids else canvas[: canvas.index(self._mask_token_id())]
        canvas = canvas[len(lead_ids) :]
        context_ids = context_ids or lead_ids
        if not context_ids and self.role.name == "embedding":
            context_ids = [self._begin_token_id()]
        request = chosen.request(context_ids, canvas=canvas)
        with self._generator(chosen, [request]) as generator:
            output = answer(generator, [request])[0]
        return replace(output, text=decode_text(self.network.tokenizer, [*lead_ids, *output.token_ids]))

    def encode(self, prompt: Prompt, *, raw: bool = False, literal: Collection[int] = ()) -> list[int]:
        """Token ids of a prompt. FewstepError if it is empty. `literal`: ids of special tokens whose names in it are
        text like any other.
        """
        empty = not prompt if raw or not isinstance(prompt, str) else not prompt.strip()
        network = self.network
        ends = network.stop_token_ids
        ids = [] if empty else encode_prompt(network.tokenizer, prompt, raw=raw, stop_token_ids=ends, literal=literal)
        if not ids:
            raise FewstepError("the prompt is empty; give some text")
        return ids

    def encode_part(self, text: str, *, literal: Collection[int] = ()) -> list[int]:
        """Token ids of a text that stands behind another, which may be none; `literal` as for `encode`."""
        check_text(text)
        return encode_plain(self.network.tokenizer, text, literal) if text else []

    def _gap(self, prefix: str, suffix: str, num_tokens: int | None) -> list[int]:
        if num_tokens is None:
            raise FewstepError("a gap between a prefix and a suffix needs num_tokens of at least 1; set it")
        mask_token_id = self._mask_token_id()
        return [*self.encode_part(prefix), *[mask_token_id] * num_tokens, *self.encode_part(suffix)]

    def _masks_in(self, text: str) -> list[int]:
        ids = self.encode_part(text)
        if self._mask_token_id() not in ids:
            mask_token = self.network.tokenizer.convert_ids_to_tokens(self._mask_token_id())
            raise FewstepError(f"there is nothing to fill in: the text holds no mask token, which is {mask_token!r}")
        return ids

    def _begin_token_id(self) -> int:
        """What stands before a text without a prompt, as in training."""
        begin = self.network.tokenizer.bos_token_id
        return self.network.eos_token_id if begin is None else begin

    def _mask_token_id(self) -> int:
        assert self.role.mask_token_id is not None
        return self.role.mask_token_id

    def answer_text(self, stop: Sequence[str] = ()) -> AnswerText:
        """What assembles the text of an answer of this model."""
        return AnswerText(self.network.tokenizer, ends=self.network.stop_token_ids, stop=stop)

    def with_text(self, output: Output, stop: Sequence[str] = ()) -> Output:
        """With its text; one that has a stop text ends with the step that completed it, whatever was run beyond."""
        tokenizer, ids = self.network.tokenizer, output.token_ids
        count = num_ids_to_stop(tokenizer, ids, stop) if stop else None
        if count is None:
            return replace(output, text=decode_text(tokenizer, ids))
        return replace(
            output,
            token_ids=ids[:count],
            num_tokens=count,
            num_forwards=int(output.step_G[:count].max()),
            finish_reason="stop",
            text=before_stop(decode_text(tokenizer, ids[:count]), stop),
        )


class Stream:
    """Iterate over the events of one request as they happen; `output` is its Output once they are exhausted.

    An event's `text` is that of its token alone. `answer_text()` is the text of all tokens before the first open
    position, up to an end-of-text: it only grows, so it can be printed as it comes.

    A model that makes whole texts from noise changes all tokens in every pass. Before the last pass its events are not
    `final`, and `provisional_text()` is the text as it stands.
    """

    def __init__(self, model: LanguageModel, chosen: GenerationSettings, request: Request) -> None:
        self.output: Output | None = None
        self._model = model
        self._answer = model.answer_text(chosen.stop)
        self._provisional: str | None = None
        self._events = self._run(chosen, request)

    def __iter__(self) -> Iterator[Event]:
        return self._events

    def answer_text(self) -> str:
        """Text of the contiguous final tokens; what may change is held back until the answer is complete."""
        return self._answer.text if self.output is None else self.output.text

    def provisional_text(self) -> str:
        """The text as the last pass left it, with tokens that may still change; what `answer_text` says otherwise."""
        return self.answer_text() if self._provisional is None or self.output is not None else self._provisional

    def _with_text(self, event: Event) -> Event:
        return replace(event, text=str(self._model.network.tokenizer.decode([event.token_id])))

    def _run(self, chosen: GenerationSettings, request: Request) -> Iterator[Event]:
        ahead, told = self._model.answer_text(chosen.stop), list[Event]()

        def watch(_: int, event: Event) -> bool:
            told.append(event)
            ahead.add(event.position, event.token_id)
            return ahead.stopped

        with self._model._generator(chosen, [request], batch_size=1) as generator:
            for completed in rounds(generator, [request], watch):
                if told:
                    self._provisional = None
                for event in told:
                    self._answer.add(event.position, event.token_id)
                    yield self._with_text(event)
                told.clear()
                if isinstance(generator, EmbeddingSampler):
                    for _, events in generator.provisional():
                        ids = [event.token_id for event in events]
                        self._provisional = decode_text(self._model.network.tokenizer, ids)
                        yield from map(self._with_text, events)
                for _, output in completed:
                    self.output = self._model.with_text(output, chosen.stop)
