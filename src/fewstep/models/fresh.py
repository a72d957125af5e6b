"""A fresh tokenizer and a fresh causal network to train from scratch."""

from collections.abc import Iterable, Sequence

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fewstep.models.network import Network
from fewstep.models.roles import Role

SPECIAL_TOKENS = ("<pad>", "<eos>", "<mask>", "<bos>", "<answer>")
"""Of a fresh tokenizer, with the ids 0 to 4. `<answer>` stands between a prompt and its answer."""

_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<bos>' + CONTENT + '<answer>' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ CONTENT + '<eos>' }}"
    "{%- else -%}{{ raise_exception('Only the roles user and assistant are known.') }}{%- endif -%}"
    "{%- endfor -%}"
)


def chat_template(*, trims: bool = False) -> str:
    """`<bos>question<answer>answer<eos>`, turn after turn. `trims`: without white space at the ends of a message."""
    return _CHAT_TEMPLATE.replace("CONTENT", "message['content'] | trim" if trims else "message['content']")


def fresh_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    pieces: str | None = None,
    whole: Sequence[str] = (),
    normalises: bool = False,
    trims: bool = False,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`, of up to `vocab_size` tokens.

    Ids 0 to 4 are SPECIAL_TOKENS, the 256 bytes follow, then what is frequent. `pieces`: a regular expression whose
    matches are never joined, by default GPT-2's. `whole`: texts that are one token each. With `normalises` texts are
    brought to Unicode's form NFC; without, each comes back exactly. `trims`: see `chat_template`. The same texts give
    the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    if normalises:
        tokenizer.normalizer = normalizers.NFC()
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pieces is None)
    if pieces is None:
        tokenizer.pre_tokenizer = to_bytes
    else:
        in_pieces = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([in_pieces, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(whole),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in whole])
    pad, eos, mask, bos, answer = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=eos,
        mask_token=mask,
        bos_token=bos,
        additional_special_tokens=[answer],
        chat_template=chat_template(trims=trims),
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def fresh_network(
    tokenizer: PreTrainedTokenizerBase,
    *,
    width: int,
    layers: int,
    head_width: int = 32,
    inner_width: int | None = None,
    vocab_size: int | None = None,
    max_positions: int = 512,
    block_size: int = 32,
    device: str = "cpu",
    name: str = "fresh",
    seed: int = 0,
) -> Network:
    """A causal Llama in float32 with random weights, whose embedding is its head too.

    `inner_width`: of the feed-forward layers, by default about 2.7 times the width in steps of 16. `vocab_size`: by
    default that of the tokenizer. `max_positions`: the longest sequence, in tokens. The random state of torch is left
    as after `torch.manual_seed(seed)` and the drawing of the weights.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer) if vocab_size is None else vocab_size,
        hidden_size=width,
        intermediate_size=27 * width // 10 // 16 * 16 if inner_width is None else inner_width,
        num_hidden_layers=layers,
        num_attention_heads=width // head_width,
        num_key_value_heads=width // head_width,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    module = LlamaForCausalLM(config).to(device)
    return Network(module, Role(name="autoregressive", block_size=block_size), tokenizer, name=name)
