"""The demo's student, `--student tiny`: a small BERT with random weights, nothing to download."""

from support.encoder import Encoder

import torch
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertModel, BertTokenizer

# What a student from scratch needs: the paper's settings move a pretrained student a little.
SETTINGS = {"lr": 5e-3, "epochs": 1}
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "attention_probs_dropout_prob": 0.0,
}
VOCABULARY = 4000


def tiny_student(sentences, seed, pooling="auto", max_length=256, device="cpu"):
    """An Encoder of random weights, with a WordPiece vocabulary of the sentences' own."""
    wordpiece = BertWordPieceTokenizer()
    letters = sorted(set(wordpiece.normalize("".join(sentences))) - {" "})
    # naming the "##" letters fixes the trainer's order, which otherwise changes from run to run
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"##{letter}" for letter in letters)]
    wordpiece.train_from_iterator(
        sentences, VOCABULARY, special_tokens=special, show_progress=False
    )
    tokenizer = BertTokenizer(vocab=wordpiece.get_vocab(), model_max_length=512)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES))
    pooling, limit = "cls" if pooling == "auto" else pooling, min(max_length, 512)
    widths = (SIZES["hidden_size"],) * SIZES["num_hidden_layers"]
    return Encoder(model.to(device), tokenizer, pooling, limit, widths)
