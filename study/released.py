"""The code that the paper's authors released, run as it is; none of it is kept here.

    git clone https://github.com/sonho4ng/Teacher-Anchor-KD
    pip install pytorch-optimizer==4.1.0 editdistance==0.8.1 pandas==3.1.1

What needs the network is replaced: its tokenizer by the student's own, its evaluation by nothing,
the teacher, which it would load and drop, by the student. Sentences and targets are a cache's.
"""

import sys
import tempfile
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import MagicMock, patch

import torch
import transformers
from transformers import AutoTokenizer

from cache_teacher import load_cache
from support import attempt
from support.encoder import save_encoder
from support.files import write_json
from support.loading import load_encoder


def distiller(folder, student, cache, **settings):
    """Its KnowledgeDistiller for a cache; settings: those of its TALASConfig."""
    import pandas

    sys.modules["src.evaluation.evaluation_automodel"] = MagicMock()
    sys.path.insert(0, str(folder))
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, once a step
    with attempt(f"import the released code from {folder}", ImportError):
        from config import TALASConfig
        from distiller import KnowledgeDistiller
    tokenizer = AutoTokenizer.from_pretrained(student)
    with tempfile.TemporaryDirectory() as work:
        sentences = f"{work}/sentences.csv"
        targets = f"{work}/targets.pt"
        pandas.DataFrame({"text": cache["sentences"]}).to_csv(sentences, index=False)
        unit_vectors = torch.nn.functional.normalize(cache["embeddings"].float())
        torch.save(unit_vectors, targets)  # as its own cache is
        config = TALASConfig(
            student_model_name=student,
            teacher_model_name=student,
            teacher_dtype="float32",
            train_data_path=sentences,
            cache_path=targets,
            save_dir=None,
            **settings,
        )
        with patch.object(AutoTokenizer, "from_pretrained", return_value=tokenizer):
            return KnowledgeDistiller(config)


def train(folder, s):
    """Train with the released code by talas.Settings; leave the student and a talas.json.

    It can't resume, takes [CLS], and a GPU if there is one.
    """
    cache = load_cache(s.teacher)
    code = distiller(
        folder,
        s.student,
        cache,
        w_task=s.lambda1,
        w_kd=s.lambda2,
        w_struct=s.lambda3,
        temperature=s.temperature,
        rho=s.rho,
        learning_rate=s.lr,
        warmup_ratio=s.warmup_ratio,
        epochs=s.epochs,
        batch_size=s.batch_size,
        max_length=s.max_length,
        seed=s.seed,
    )
    code.model_student.float()  # its loss scale can't train weights stored as float16
    code.train()
    encoder = load_encoder(s.student, "cls", s.max_length)
    save_encoder(Path(s.output), replace(encoder, model=code.model_student))
    about = {
        "settings": asdict(s),
        "corpus": cache["fingerprint"],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_json(Path(s.output, "talas.json"), about)
