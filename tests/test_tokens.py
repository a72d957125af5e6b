"""Which tokens end an answer, which are never drawn, and how text becomes tokens and tokens text."""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.generators import Tables, streamed
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fewstep.decode.autoregressive import Autoregressive
from fewstep.decode.block import Block
from fewstep.decode.decoder import Decoder
from fewstep.decode.diffusion import Diffusion
from fewstep.decode.jacobi import Jacobi
from fewstep.decode.jacobi_windows import jacobi_trajectories
from fewstep.decode.lookahead import Lookahead
from fewstep.decode.loop import decode
from fewstep.decode.medusa import Medusa
from fewstep.decode.prompt_lookup import PromptLookup
from fewstep.decode.requests import Output, Record, Request
from fewstep.decode.sampling import Sampling
from fewstep.decode.speculative import Speculative
from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.models.importers.convert import import_checkpoint
from fewstep.models.load import load_network, save_network
from fewstep.models.medusa import MedusaHeads, load_heads, save_heads
from fewstep.models.network import Network
from fewstep.models.roles import Role, RoleName
from fewstep.models.text import GrowingText, TokenTexts, decode_text, encode_prompt
from fewstep.models.tiny import tiny_network, tiny_tokenizer
from fewstep.models.vocabulary import ids_without_token, set_end_tokens
from fewstep.train.collect import distribution_of
from fewstep.train.examples import encode_rows

ROLES: list[RoleName] = ["autoregressive", "bidirectional", "block_causal"]
PROMPT = [5, 9, 12, 9, 12]


def decoder_for(network: Network, **settings: Any) -> Decoder:
    kind: Any = {"autoregressive": Autoregressive, "bidirectional": Diffusion, "block_causal": Block}[network.role.name]
    sizes = {"block_size": 4} if kind is Diffusion else {}
    return kind(role=network.role, **sizes, **settings)


VERIFYING: dict[str, Callable[[Network], Decoder]] = {
    "jacobi": lambda net: Jacobi(role=net.role, window=6),
    "lookahead": lambda net: Lookahead(role=net.role, window=3, ngram=3),
    "speculative": lambda net: Speculative(role=net.role, draft=net, window=3),
    "prompt-lookup": lambda net: PromptLookup(role=net.role, window=4),
    "medusa": lambda net: Medusa(role=net.role, heads=MedusaHeads.of(net, 2), window=6),
}


def answer(network: Network, decoder: Decoder | None = None, **request: Any) -> Output:
    wanted = Request(**{"prompt_ids": PROMPT, "max_new_tokens": 24, **request})
    return decode(network, [wanted], decoder or decoder_for(network))[0]


def second_end(network: Network) -> int:
    """A token that the network answers with in the middle of its answer; from now on it ends an answer too."""
    free = answer(network).token_ids
    end = next(token for i, token in enumerate(free) if i >= 4 and token not in free[:i] and token > 4)
    set_end_tokens(network.module, [1, end])
    return end


# End tokens


@pytest.mark.parametrize("role", ROLES)
def test_an_answer_ends_at_the_first_of_several_end_tokens(role: RoleName) -> None:
    network = tiny_network(role, seed=7)
    free = answer(network)
    end = second_end(network)
    assert network.stop_token_ids == (1, end)
    output = answer(network)
    assert output.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert (output.finish_reason, output.num_tokens) == ("stop", len(output.token_ids))
    assert output.num_forwards < free.num_forwards
    late = answer(network, early_stop=False)
    assert (late.token_ids, late.finish_reason) == (output.token_ids, "stop")
    assert late.num_forwards == free.num_forwards
    both = decode(network, [Request(prompt_ids=p, max_new_tokens=24) for p in (PROMPT, [7, 8])], decoder_for(network))
    assert both[0].token_ids == output.token_ids


@pytest.mark.parametrize("name", VERIFYING)
def test_verified_guesses_end_at_any_end_token(name: str) -> None:
    network = tiny_network("autoregressive", seed=7)
    end = second_end(network)
    expected, output = answer(network), answer(network, VERIFYING[name](network))
    assert output.token_ids == expected.token_ids
    assert output.token_ids[-1] == end
    assert output.finish_reason == "stop"


@pytest.mark.parametrize("role", ROLES)
def test_a_stream_ends_at_any_end_token(role: RoleName) -> None:
    network = tiny_network(role, seed=7)
    second_end(network)
    output = answer(network)
    events = streamed(network, Request(prompt_ids=PROMPT, max_new_tokens=24), decoder_for(network))[0]
    assert {event.position: event.token_id for event in events if event.position < output.num_tokens} == dict(
        enumerate(output.token_ids)
    )


def test_jacobi_trajectories_end_at_any_end_token() -> None:
    network = tiny_network("autoregressive", seed=7)
    end = second_end(network)
    request = Request(prompt_ids=PROMPT, max_new_tokens=24)
    trajectory = jacobi_trajectories(network, [request], Jacobi(role=network.role, window=4))[0]
    assert trajectory.output.token_ids[-1] == end
    assert trajectory.windows[-1].states_PN[-1, -1] == end


def test_infilling_ends_the_text_with_no_end_token_before_something_given() -> None:
    network = tiny_network("bidirectional", seed=3)
    with torch.no_grad():
        # Their logits are 0 whatever the row, all others negative: only these two would be drawn.
        head = network.module.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.full((64,), -1000.0))
        head.bias[[1, 40]] = 1000.0
    set_end_tokens(network.module, [1, 40])
    output = answer(network, decoder_for(network), canvas=[2, 2, 9, 2])
    assert not {1, 40} & set(output.token_ids[:2])
    assert output.token_ids[3] in (1, 40)


def folder_with(tmp_path: Path, *, config: Any = 1, generation: Any = None, role: RoleName = "autoregressive") -> Path:
    """A saved tiny model whose files name these end tokens; no generation_config.json for None."""
    folder = tmp_path / "model"
    save_network(tiny_network(role, seed=7), folder)
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("eos_token_id", None)
    if config is not None:
        settings["eos_token_id"] = config
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (1, {"eos_token_id": [1, 7]}, (1, 7)),
        (1, {"eos_token_id": 7}, (1, 7)),
        ([7, 1], None, (1, 7)),
        ([8, 1], {"eos_token_id": [7]}, (1, 7, 8)),
        (None, None, (1,)),  # not the id that the class has by default
        (None, {"eos_token_id": None}, (1,)),
        (1, {"eos_token_id": [1, 9000]}, (1,)),
    ],
)
def test_load_reads_the_end_tokens_of_both_files(
    config: Any, generation: Any, expected: tuple[int, ...], tmp_path: Path
) -> None:
    folder = folder_with(tmp_path, config=config, generation=generation)
    network = load_network(folder, device="cpu")
    assert network.stop_token_ids == expected
    save_network(network, tmp_path / "saved")  # as training and merging do
    assert load_network(tmp_path / "saved", device="cpu").stop_token_ids == expected


@pytest.mark.parametrize("value", ["7", [[1]], [1, None], 1.0, True, {"a": 1}])
def test_an_end_token_that_is_no_id_is_one_sentence(value: Any, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, generation={"eos_token_id": value})
    with pytest.raises(FewstepError, match=r"generation_config\.json: eos_token_id must be a token's id or a list"):
        load_network(folder, device="cpu")


@pytest.mark.parametrize("text", ["[1, 2]", "{broken", ""])
def test_a_damaged_generation_config_is_one_sentence(text: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(FewstepError, match=r"generation_config\.json"):
        load_network(folder, device="cpu")


def test_an_import_carries_the_end_tokens(tmp_path: Path) -> None:
    source = folder_with(tmp_path, config=[1, 8], generation={"eos_token_id": [1, 7]})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "role"}))
    import_checkpoint(source, tmp_path / "imported")
    assert load_network(tmp_path / "imported", device="cpu").stop_token_ids == (1, 7, 8)


def test_a_completion_is_learnt_with_one_end() -> None:
    tokenizer = tiny_tokenizer()
    ends = {
        text: encode_rows([(1, {"prompt": "a", "completion": text})], tokenizer, stop_token_ids=[1, 4])
        .completion_ids[-2:]
        .tolist()
        for text in ("ab", "ab<eos>", "ab<answer>")
    }
    b = tokenizer.convert_tokens_to_ids("b")
    assert ends == {"ab": [b, 1], "ab<eos>": [b, 1], "ab<answer>": [b, 4]}


# Rows that no token has


def padded(role: RoleName = "autoregressive", *, tokens: int = 60, rows: int = 96, seed: int = 0) -> Network:
    """A network whose head has more rows than the tokenizer tokens, and these the largest logits."""
    network = tiny_network(role, vocab_size=rows, head_scale=5.0, seed=seed)
    with torch.no_grad():
        network.module.get_output_embeddings().weight[tokens:] *= 20
    return Network(network.module, network.role, tiny_tokenizer(tokens), name=f"padded-{role}")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("role", ROLES)
def test_rows_that_no_token_has_are_never_drawn(role: RoleName, temperature: float) -> None:
    network = padded(role)
    output = answer(network, seed=2, sampling=Sampling(temperature=temperature))
    assert max(output.token_ids) < 60
    assert 2 not in output.token_ids or role == "autoregressive"


@pytest.mark.parametrize("name", VERIFYING)
def test_no_guess_is_a_row_that_no_token_has(name: str) -> None:
    network = padded()
    seen: list[int] = []
    decoder = VERIFYING[name](network)

    def look(state: Any) -> None:
        seen.append(int(state.tokens_RL.max()))
        if hasattr(state, "guesses_RT"):
            seen.append(int(state.guesses_RT.max()))

    output = decode(network, [Request(prompt_ids=PROMPT, max_new_tokens=24)], decoder, listeners=[look])[0]
    assert output.token_ids == answer(network).token_ids
    assert max(seen) < 60


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("rows", "draft_rows"), [(96, 64), (64, 96)])
def test_a_draft_may_be_padded_otherwise(rows: int, draft_rows: int, temperature: float) -> None:
    network, draft = padded(rows=rows), padded(rows=draft_rows, seed=1)
    decoder = Speculative(role=network.role, draft=draft, window=3)
    output = answer(network, decoder, sampling=Sampling(temperature=temperature))
    assert max(output.token_ids) < 60
    if not temperature:
        assert output.token_ids == answer(network).token_ids


def test_a_draft_without_rows_for_some_tokens_is_refused() -> None:
    network, draft = padded(rows=96), tiny_network("autoregressive", vocab_size=59)
    draft = Network(draft.module, draft.role, network.tokenizer, name="small")
    with pytest.raises(FewstepError, match="small has rows for 59 only"):
        answer(network, Speculative(role=network.role, draft=draft))


def test_loaded_heads_guess_no_row_without_token(tmp_path: Path) -> None:
    network = padded()
    save_heads(MedusaHeads.of(network, 2), tmp_path / "heads", network)
    heads = load_heads(tmp_path / "heads", network)
    guesses = heads.score(torch.randn(3, heads.width)).topk(60, -1)
    assert guesses.indices.max() < 60
    assert heads.num_drawable == 60


@pytest.mark.parametrize("guided", [False, True])
def test_recorded_distributions_hold_no_row_without_token(guided: bool) -> None:
    network = padded("bidirectional")
    if guided:
        assert max(answer(network, decoder_for(network, cfg_scale=0.5)).token_ids) < 60
        return
    assert distribution_of(network, top_k=96).width == 59  # nor the mask token
    request = Request(prompt_ids=PROMPT, max_new_tokens=8)
    output = decode(network, [request], decoder_for(network), record=Record(top_k=96))[0]
    assert output.top_k is not None
    assert output.top_k.ids_GK.max() < 60
    assert output.top_k.log_probs_GK.isfinite().all()
    torch.testing.assert_close(output.top_k.tail_mass_G, torch.zeros(8), atol=1e-5, rtol=0)


def test_a_hole_in_the_vocabulary_is_no_token() -> None:
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<eos>": 4}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    assert ids_without_token(tokenizer, 6) == [2, 3, 5]


def test_two_ids_of_one_spelling_are_both_tokens() -> None:
    inner = Tokenizer(models.Unigram([("a", -1.0), ("b", -1.0), ("a", -2.0)], unk_id=0))
    assert ids_without_token(PreTrainedTokenizerFast(tokenizer_object=inner), 4) == [3]


# Prompts


def processed(template: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<bos>", 3), ("<eos>", 1), ("<answer>", 4)]
    )
    tokenizer.chat_template = chat_template
    return tokenizer


A, B = 17, 18  # of the letters a and b


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("<bos> $A <eos>", "ab", [3, A, B]),
        ("$A <eos>", "ab", [A, B]),
        ("$A <eos> <eos>", "ab", [A, B]),
        ("$A <answer>", "ab", [A, B]),  # generation_config.json calls it an end
        ("<bos> $A", "<bos>ab", [3, A, B]),
        ("<bos> $A <eos>", "<bos>ab", [3, A, B]),
        ("<bos> $A <eos>", "<bos>", [3]),
        ("<bos> $A <eos>", "ab<eos>", [3, A, B, 1]),  # the user's own
        ("<bos> $A <eos>", "a<bos>b", [3, A, 3, B]),
        ("$A", "ab", [A, B]),
    ],
)
def test_a_prompt_has_one_begin_and_no_end(template: str, text: str, expected: list[int]) -> None:
    tokenizer = processed(template)
    assert tokenizer.convert_tokens_to_ids(["a", "b"]) == [A, B]
    assert encode_prompt(tokenizer, text, stop_token_ids=[1, 4]) == expected
    chat = processed(template, chat_template="{{ messages[0]['content'] }}")
    assert encode_prompt(chat, text, raw=True, stop_token_ids=[1, 4]) == expected


def test_training_texts_have_one_begin() -> None:
    tokenizer = processed("<bos> $A <eos>")
    for text in ("ab", "<bos>ab"):
        examples = encode_rows([(1, {"text": text})], tokenizer)
        assert examples.prompt_ids.tolist() == [3]
        assert examples.completion_ids.tolist() == [A, B, 1]
    examples = encode_rows([(1, {"prompt": "a", "completion": "b"})], tokenizer)
    assert examples.prompt_ids.tolist() == [3, A]


# Text that arrives piece by piece


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: letters, and tokens of a byte for everything else."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for letter in "\u2581abcdefghijklmnopqrstuvwxyz":
        vocabulary[letter] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2's, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({"</s>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


BYTE_TOKENIZERS = {"byte fallback": byte_fallback_tokenizer, "byte level": byte_level_tokenizer}


def shown(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    growing, texts = GrowingText(tokenizer), []
    for one in ids:
        growing.ids.append(one)
        texts.append(growing.text)
    return texts


def only_grows(texts: Sequence[str]) -> bool:
    return all(later.startswith(earlier) for earlier, later in pairwise(texts))


@pytest.mark.parametrize("kind", BYTE_TOKENIZERS)
def test_characters_appear_when_their_bytes_have_arrived(kind: str) -> None:
    tokenizer, text = BYTE_TOKENIZERS[kind](), "ok \u00e9\U0001f600\u00e9 fin"
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = shown(tokenizer, ids)
    assert texts[-1] == decode_text(tokenizer, ids) == tokenizer.decode(ids) == text
    assert only_grows(texts)
    assert {"ok \u00e9", "ok \u00e9\U0001f600", "ok \u00e9\U0001f600\u00e9"} <= set(texts)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts)


@pytest.mark.parametrize("kind", BYTE_TOKENIZERS)
def test_the_texts_of_tokens_are_together_the_whole_text(kind: str) -> None:
    tokenizer, text = BYTE_TOKENIZERS[kind](), "ok \u00e9 \U0001f600\u00e9  fin"
    texts = TokenTexts(tokenizer)
    added = [texts.add(one) for one in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(added) == text
    assert {"\u00e9", "\U0001f600", "f"} <= set(added)


@pytest.mark.parametrize("kind", BYTE_TOKENIZERS)
def test_text_never_goes_back_whatever_the_bytes(kind: str) -> None:
    tokenizer, generator = BYTE_TOKENIZERS[kind](), torch.Generator().manual_seed(0)
    for _ in range(100):
        ids = torch.randint(len(tokenizer), (24,), generator=generator).tolist()
        texts = [*shown(tokenizer, ids), decode_text(tokenizer, ids)]
        assert only_grows(texts)


def test_both_kinds_of_byte_tokenizers_read_bytes_alike() -> None:
    fallback, level = byte_fallback_tokenizer(), byte_level_tokenizer()
    generator = torch.Generator().manual_seed(0)
    to_letter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for _ in range(100):
        spelt = bytes([97, *torch.randint(128, 256, (5,), generator=generator).tolist(), 97])
        in_fallback = [3 + byte for byte in spelt]
        assert decode_text(fallback, in_fallback) == spelt.decode(errors="replace")
    letters = to_letter.pre_tokenize_str("\u00e9")[0][0]
    assert decode_text(level, level.convert_tokens_to_ids([letters[0], "a"])) == "\N{REPLACEMENT CHARACTER}a"


def test_special_tokens_do_not_part_the_bytes_of_a_character() -> None:
    tokenizer = byte_fallback_tokenizer()
    first, second = (3 + byte for byte in "\u00e9".encode())
    assert decode_text(tokenizer, [first, 2, second]) == "\u00e9"


def test_names_of_bytes_that_a_tokenizer_does_not_join_stay_as_they_are() -> None:
    words = {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0x00>")))
    assert decode_text(tokenizer, [0xFF]) == "<0xFF>"


@pytest.mark.parametrize("temperature", [0.0, 3.0])
@pytest.mark.parametrize("role", ROLES)
def test_the_streamed_text_begins_the_answer(role: RoleName, temperature: float) -> None:
    tokenizer = byte_fallback_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    module = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=2, **sizes))
    mask = None if role == "autoregressive" else tokenizer.mask_token_id
    lm = LanguageModel(Network(module, Role(name=role, block_size=4, mask_token_id=mask), tokenizer))
    for seed in range(4):
        streamed = lm.stream("a b", max_new_tokens=24, temperature=temperature, seed=seed)
        texts = [streamed.answer_text() for _ in streamed]
        assert streamed.output is not None
        assert only_grows([*texts, streamed.output.text])


def test_what_was_final_behind_an_end_is_not_streamed() -> None:
    network = tiny_network("bidirectional")
    backwards = Tables(
        {tuple(LanguageModel(network).encode("a")): [A, A, 1, B]},
        ends=(1,),
        pass_of=lambda position, length: length - position,
    )
    streamed = LanguageModel(network, backwards).stream("a")
    texts = [streamed.answer_text() for _ in streamed]
    assert streamed.output is not None
    assert texts[-1] == streamed.output.text == "aa"
