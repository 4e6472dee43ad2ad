"""The code that the paper's authors released, run as it stands; none of it is kept here.

    git clone https://github.com/sonho4ng/Teacher-Anchor-KD
    pip install pytorch-optimizer==4.1.0 editdistance==0.8.1 pandas==3.1.1

What needs the network is replaced: its tokenizer by the student's own, its evaluation by nothing,
the teacher, which it would load and drop, by the student. Sentences and targets are a cache's.
"""

import statistics
import sys
import tempfile
import types
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoTokenizer

from cache_teacher import load_cache
from support import attempt
from support.encoder import save_encoder
from support.files import write_json
from support.loading import load_encoder

EVALUATION = "eval_classification_task eval_pair_task eval_sts_task test_cls_tasks test_pair_tasks"
EVALUATION += " test_sts_tasks STSDataset ClasssifyDataset PairDataset"


def distiller(folder, student, cache, work, **settings):
    """Its KnowledgeDistiller; work: a folder for its inputs; settings: of its TALASConfig."""
    import pandas

    csv, targets = f"{work}/sentences.csv", f"{work}/targets.pt"
    pandas.DataFrame({"text": cache["sentences"]}).to_csv(csv, index=False)
    torch.save(F.normalize(cache["embeddings"].float(), dim=1), targets)  # as its own cache is
    settings |= {"student_model_name": student, "teacher_model_name": student}
    settings |= {"train_data_path": csv, "cache_path": targets, "save_dir": None}
    nothing = dict.fromkeys(EVALUATION.split(), lambda *given: None)
    sys.modules["src.evaluation.evaluation_automodel"] = types.SimpleNamespace(**nothing)
    sys.path.insert(0, str(folder))
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, once a step
    with attempt(f"import the released code from {folder}", ImportError):
        from config import TALASConfig
        from distiller import KnowledgeDistiller
    own, original = AutoTokenizer.from_pretrained(student), vars(AutoTokenizer)["from_pretrained"]
    AutoTokenizer.from_pretrained = lambda *name, **how: own
    try:
        return KnowledgeDistiller(TALASConfig(**settings, teacher_dtype="float32"))
    finally:
        AutoTokenizer.from_pretrained = original


def train(folder, s):
    """Train with it by talas.Settings, as far as it has them; leaves what talas.py would leave.

    It can't resume, takes [CLS], and a GPU if there is one; its time leaves out the tokenizer.
    """
    cache, out = load_cache(s.teacher), Path(s.output)
    same = ("seed", "epochs", "batch_size", "max_length", "rho", "temperature", "warmup_ratio")
    settings = {name: getattr(s, name) for name in same} | {"learning_rate": s.lr}
    settings |= {"w_task": s.lambda1, "w_kd": s.lambda2, "w_struct": s.lambda3}
    with tempfile.TemporaryDirectory() as work:
        code = distiller(folder, s.student, cache, work, **settings)
    code.model_student.float()  # its loss scale can't train weights stored as float16
    code.train()
    encoder = load_encoder(s.student, "cls", s.max_length)
    save_encoder(out, replace(encoder, model=code.model_student))
    times = code.step_times  # without its first ten
    cost = {"ms_per_step": 1000 * statistics.median(times)} if times else {}
    about = {"settings": asdict(s), "teacher": cache["teacher"], "corpus": cache["fingerprint"]}
    about["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    write_json(out / "talas.json", about | {"cost": cost})
