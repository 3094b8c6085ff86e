"""A tiny text classifier on disk, for the tests of recipes and of the experiment."""

from __future__ import annotations

import pytest

WORDS = ["good", "bad", "fine", "poor", "film", "plot", "the", "a"]


def text_model(folder, kind):
    """A small encoder of this architecture with a tokenizer of whole words."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = tokenizers.models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="[UNK]")
    raw = tokenizers.Tokenizer(words)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fields = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **fields).save_pretrained(folder)
    sizes = dict(
        vocab_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=0, type_vocab_size=1,
    )  # fmt: skip
    if kind == "DebertaV2":
        sizes |= dict(relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=8)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    getattr(transformers, f"{kind}ForSequenceClassification")(config).save_pretrained(folder)
    return folder
