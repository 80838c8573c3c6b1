"""Small random models of many families, built from their configurations; nothing is downloaded."""

import functools

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 131
WINDOW = 7
_WIDE = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, max_position_embeddings=128)
_GROUPED = _WIDE | dict(intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)

CONFIGS = {
    "llama": ("llama", _GROUPED),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", _GROUPED | dict(head_dim=8)),
    "mistral": ("mistral", _GROUPED | dict(sliding_window=WINDOW)),
    "gemma2": (
        "gemma2",
        _GROUPED
        | dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW, attn_logit_softcapping=3.0)
        | dict(final_logit_softcapping=5.0),
    ),
    "phi3": ("phi3", _GROUPED | dict(pad_token_id=0, sliding_window=WINDOW)),
    "gpt_neox": ("gpt_neox", _WIDE | dict(intermediate_size=48, num_attention_heads=4)),
    "gpt2": ("gpt2", dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
    "olmo2": ("olmo2", _GROUPED),
    "mixtral": ("mixtral", _GROUPED | dict(num_local_experts=4)),
    "qwen2_moe": (
        "qwen2_moe",
        _GROUPED | dict(num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24),
    ),
    "opt": ("opt", _WIDE | dict(ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32)),
    "bloom": ("bloom", dict(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)),
    "mamba": ("mamba", dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)),
}
PACKABLE = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "phi3",
    "gpt_neox",
    "gpt2",
    "olmo2",
    "mixtral",
    "qwen2_moe",
)
UNPACKABLE = ("opt", "bloom", "mamba")


def random_model(family: str, seed: int = 0):
    "A model whose weights are wide enough that every token changes every later answer"
    torch.manual_seed(seed)
    kind, values = CONFIGS[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values), dtype=torch.float32).eval()
    for name, p in model.named_parameters():
        with torch.no_grad():
            if p.dim() > 1 and "A_log" not in name and "conv" not in name:
                p.normal_(0, 1.5 / p.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                p.normal_(0, 0.1)
    return model


def byte_tokenizer():
    "A tokenizer of single characters"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB - 2]
    t = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(["<s>", "</s>", *alphabet])}, merges=[], unk_token="<s>")
    )
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>")


def save(folder, family: str = "llama", seed: int = 0):
    "A whole checkpoint of a family in `folder`"
    random_model(family, seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def open_family(family: str, seed: int = 0):
    "A family's model behind the one door"
    import tempfile

    from llm_analysis.lm.model import load

    with tempfile.TemporaryDirectory() as folder:
        return load(save(folder, family, seed), device="cpu")


def sequences(seed: int = 0, longest: int = 32, count: int = 18):
    "Random sequences; lengths 1 and `longest` and some equal ones are among them"
    rng = np.random.default_rng(seed)
    lengths = [1, longest, longest, 2, *rng.integers(1, longest, count - 6), 9, 9]
    return [rng.integers(0, VOCAB, n) for n in lengths]
