"""The code that the paper's authors released, run as it stands; none of it is kept here.

    git clone https://github.com/sonho4ng/Teacher-Anchor-KD
    pip install pytorch-optimizer==4.1.0 editdistance==0.8.1 pandas==3.1.1

Two things in it need the network and are replaced: its tokenizer, that of bert-base-uncased by
name, becomes the student's own; its evaluation module becomes an empty one. The sentences and
targets are those of one of our caches; in place of the teacher, which it would load and drop, it
loads the student. All else is its own.
"""

from support.encoder import save_encoder
from support.files import write_json
from support.loading import load_encoder

import statistics
import sys
import tempfile
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoTokenizer

from cache_teacher import load_cache


def distiller(folder, student, cache, work, **settings):
    """Its KnowledgeDistiller for a student's directory or Hub id and the dict of a cache.

    folder: its code; work: an empty folder for its inputs; settings: of its TALASConfig.
    """
    import pandas

    csv, targets = Path(work, "sentences.csv"), Path(work, "targets.pt")
    pandas.DataFrame({"text": cache["sentences"]}).to_csv(csv, index=False)
    torch.save(F.normalize(cache["embeddings"].float(), dim=1), targets)  # as its own cache is
    paths = {"train_data_path": str(csv), "cache_path": str(targets), "save_dir": None}
    models = {"student_model_name": student, "teacher_model_name": student}
    about = paths | models | {"teacher_dtype": "float32"} | settings
    sys.modules["src.evaluation.evaluation_automodel"] = mock.MagicMock()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, once a step
    from config import TALASConfig
    from distiller import KnowledgeDistiller

    tokenizer = AutoTokenizer.from_pretrained(student)
    with mock.patch.object(AutoTokenizer, "from_pretrained", return_value=tokenizer):
        return KnowledgeDistiller(TALASConfig(**about))


def train(folder, s):
    """Train with it by talas.Settings, as far as it has them; leaves what talas.py would leave.

    It is not resumable, has [CLS] pooling, and takes its own device: a GPU if there is one, with
    float16 autocast. Its time of a step leaves out the tokenizer, which has processes of its own.
    """
    cache, out = load_cache(s.teacher), Path(s.output)
    settings = {"seed": s.seed, "epochs": s.epochs, "batch_size": s.batch_size}
    settings |= {"max_length": s.max_length, "learning_rate": s.lr, "rho": s.rho}
    settings |= {"temperature": s.temperature, "warmup_ratio": s.warmup_ratio}
    settings |= {"w_task": s.lambda1, "w_kd": s.lambda2, "w_struct": s.lambda3}
    with tempfile.TemporaryDirectory() as work:
        code = distiller(folder, s.student, cache, work, **settings)
    code.model_student.float()  # its loss scale can't train weights stored as float16
    code.train()
    encoder = load_encoder(s.student, "cls", s.max_length)
    save_encoder(out, replace(encoder, model=code.model_student))
    times = code.step_times  # without its first ten
    cost = {"ms_per_step": 1000 * statistics.median(times)} if times else {}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    about = {"settings": asdict(s), "teacher": cache["teacher"], "corpus": cache["fingerprint"]}
    write_json(out / "talas.json", about | {"cost": cost, "versions": versions})
