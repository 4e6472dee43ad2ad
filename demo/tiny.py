"""The demo's student, `--student tiny`: a small BERT with random weights, nothing to download."""

import torch
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertModel, BertTokenizer

from support.encoder import Encoder

# What a student from scratch needs: the paper's settings move a pretrained student a little.
SETTINGS = {"lr": 5e-3, "epochs": 1}
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "attention_probs_dropout_prob": 0.0,
}
SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
VOCABULARY = 4000  # word pieces
POSITIONS = 512  # tokens, BERT's own limit


def tiny_student(sentences, seed, pooling="auto", max_length=256, device="cpu"):
    """An Encoder of random weights, with a WordPiece vocabulary of the sentences' own."""
    wordpiece = BertWordPieceTokenizer()
    letters = sorted(set(wordpiece.normalize("".join(sentences))) - {" "})
    # naming the "##" letters fixes the trainer's order, which otherwise changes from run to run
    first = [*SPECIAL_TOKENS.values(), *(f"##{letter}" for letter in letters)]
    wordpiece.train_from_iterator(sentences, VOCABULARY, special_tokens=first, show_progress=False)
    vocabulary = wordpiece.get_vocab()
    tokenizer = BertTokenizer(vocab=vocabulary).backend_tokenizer
    max_length = min(max_length, POSITIONS)
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(BertConfig(vocab_size=len(vocabulary), **SIZES))
    return Encoder(
        model=model.to(device),
        tokenizer=tokenizer,
        special_tokens=SPECIAL_TOKENS,
        pooling="cls" if pooling == "auto" else pooling,
        max_length=max_length,
        layers=SIZES["num_hidden_layers"],
        dimensions=SIZES["hidden_size"],
    )
