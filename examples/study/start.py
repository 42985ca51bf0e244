"""A random little Llama with a tokenizer of the study's words, as a Hugging Face directory."""

import shutil
from pathlib import Path

import corpus

# Only to be rendered where a chat is asked for; the study's rows are verbatim text.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ bos_token + message['content'] if message['role'] == 'user' else "
    "' ' + message['content'] + eos_token }}"
    "{% endfor %}"
)


def tokenizer():
    """One token a word; a text begins with BOS, as the rows of training do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(corpus.vocabulary())}
    backend = Tokenizer(models.WordLevel(ids, unk_token=corpus.PAD))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{corpus.BOS} $A", special_tokens=[(corpus.BOS, ids[corpus.BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=corpus.PAD,
        bos_token=corpus.BOS,
        eos_token=corpus.EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def write(directory: Path, hidden_size: int, layers: int) -> None:
    """A new random model in `directory`; one that is whole is kept."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if directory.exists():
        return
    words = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    partial = directory.with_name(directory.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    LlamaForCausalLM(config).float().save_pretrained(partial)
    words.save_pretrained(partial)
    partial.rename(directory)
