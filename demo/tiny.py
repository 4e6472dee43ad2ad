"""The demo's student, `--student tiny`: a small BERT with random weights, nothing to download."""

import json

import torch
from tokenizers import BertWordPieceTokenizer, Tokenizer
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
VOCABULARY, POSITIONS = 4000, 512


def tiny_student(sentences, seed, pooling="auto", max_length=256, device="cpu"):
    """An Encoder of random weights, with a WordPiece vocabulary of the sentences' own."""
    wordpiece = BertWordPieceTokenizer()
    letters = sorted(set(wordpiece.normalize("".join(sentences))) - {" "})
    # naming the "##" letters fixes the trainer's order, which otherwise changes from run to run
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"##{letter}" for letter in letters)]
    wordpiece.train_from_iterator(
        sentences, VOCABULARY, special_tokens=special, show_progress=False
    )
    vocabulary = wordpiece.get_vocab()
    tokenizer = BertTokenizer(vocab=vocabulary).backend_tokenizer.to_str()
    about = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    about |= {"model_max_length": POSITIONS, "pad_token": "[PAD]", "cls_token": "[CLS]"}
    about |= {"sep_token": "[SEP]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": json.dumps(about, indent=2)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(BertConfig(vocab_size=len(vocabulary), **SIZES))
    return Encoder(
        model=model.to(device),
        tokenizer=Tokenizer.from_str(tokenizer),
        files={name: text.encode() for name, text in files.items()},
        pooling="cls" if pooling == "auto" else pooling,
        max_length=min(max_length, POSITIONS),
        lower=False,
        widths=(SIZES["hidden_size"],) * SIZES["num_hidden_layers"],
    )
