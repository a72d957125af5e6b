"""Tiny random networks: every room is tested and rehearsed on them, without weights or a network connection."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fewstep.models.embedding_denoiser import to_embedding_space
from fewstep.models.network import Network
from fewstep.models.noise_conditioning import conditioning_of
from fewstep.models.roles import ContextAttention, Role, RoleName

_SPECIAL = ["<pad>", "<eos>", "<mask>", "<bos>", "<answer>"]
_CHARACTERS = "\n 0123456789abcdefghijklmnopqrstuvwxyz.,?!+-*/=#$%:()'"
_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<bos>{{ message['content'] }}<answer>"
    "{% else %}{{ message['content'] }}<eos>{% endif %}{% endfor %}"
)


def tiny_tokenizer(vocab_size: int = 64) -> PreTrainedTokenizerFast:
    """One token a character: 5 special tokens, 54 characters (others are dropped), and filler up to `vocab_size`."""
    words = _SPECIAL + list(_CHARACTERS)
    words += [f"<unused{i}>" for i in range(vocab_size - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        mask_token="<mask>",
        bos_token="<bos>",
        additional_special_tokens=["<answer>"],
        chat_template=_TEMPLATE,
    )


def tiny_network(
    role: RoleName = "block_causal",
    *,
    vocab_size: int = 64,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 2,
    block_size: int = 4,
    context_attention: ContextAttention = "bidirectional",
    right_shift_logits: bool = False,
    max_positions: int = 256,
    head_scale: float = 1.0,
    seed: int = 0,
) -> Network:
    """A random Llama in float32. `head_scale` sharpens its distributions: 1 is nearly uniform, 50 is confident.

    In the role `embedding` its conditioning is random too, where a fresh one would have no effect.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=max_positions,
                tie_word_embeddings=False,
                pad_token_id=0,
                eos_token_id=1,
                bos_token_id=3,
            )
        )
    module.generation_config.eos_token_id = None  # the tokenizer alone says what ends an answer
    with torch.no_grad():
        module.get_output_embeddings().weight.mul_(head_scale)
    mask_token_id = None if role == "autoregressive" else 2
    spec = Role(
        name="bidirectional" if role == "embedding" else role,
        block_size=block_size,
        mask_token_id=mask_token_id,
        right_shift_logits=right_shift_logits,
        context_attention=context_attention,
    )
    network = Network(module, spec, tiny_tokenizer(vocab_size), name=f"tiny-{role}")
    return network if role != "embedding" else _in_embedding_space(network, seed)


def _in_embedding_space(network: Network, seed: int) -> Network:
    network = to_embedding_space(network, self_conditioned=True, most_steps=32, guided=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in conditioning_of(network.module).parameters():
            parameter.normal_(0, 0.2 / network.module.config.hidden_size**0.5, generator=generator)
    return network
