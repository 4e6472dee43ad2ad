"""Plausible mistakes get one line, files are whole or absent, and no input is overwritten."""

import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SENTENCES, random_rows, write_files
from safetensors.torch import load_file, save_file

import cache_teacher
import eval as evaluation
import talas
from support import attempt
from support.files import save, write_json

SCRIPTS = {  # with flags that a mistake's own flags override
    "cache": (cache_teacher.main, ["--corpus", "corpus.jsonl", "--output", "new.pt"]),
    "talas": (talas.main, ["--teacher", "teacher.pt", "--output", "new", "--batch_size", "16"]),
    "eval": (evaluation.main, ["--data", "data", "--json", "new.json"]),
}
PAIR = {"sentence1": "a", "sentence2": "b"}
OTHER_PAIR = {"sentence1": "c", "sentence2": "d"}
A_TEXT = {"text": "a", "label": 0}
B_TEXT = {"text": "b", "label": 1}
STS = [PAIR | {"sentence2": text, "score": i} for i, text in enumerate(SENTENCES)]
FILES = {
    # corpora
    "no-text.csv": "txt,source\na,b\n",
    "few-fields.csv": "text,source\na,b\nc\n",
    "comma.csv": "text,source\na, b,c\n",
    "quotation.tsv": 'text\na\n"b\nc" d\n',
    "cut.jsonl": '{"text": "a"}\n{"text": "b',
    "utf-16.txt": "a dog".encode("utf-16"),
    "three.txt": "a dog\na cat\na bird\n",
    # other files
    "README.md": "# Mine\n",
    "lfs.npy": "version https://git-lfs.github.com/spec/v1",
    "e.npz": b"PK",
    # runs
    "done/metrics.jsonl": "",
    "done/talas.json": "{}",
    "killed/metrics.jsonl": "",
    "killed/checkpoint.pt": "",
    # tasks
    "data/sts/test.jsonl": STS,
    "no-column/mine/test.jsonl": [PAIR | {"labels": 1}],
    "label-2/mine/test.jsonl": [PAIR | {"label": 1}, OTHER_PAIR | {"label": 2}],
    "one-score/mine/test.jsonl": [PAIR | {"score": 2}, OTHER_PAIR | {"score": 2}],
    "same/mine/test.jsonl": [PAIR | {"sentence2": "a", "score": i} for i in range(3)],
    "no-test/mine/tests.jsonl": STS,
    "no-train/mine/test.jsonl": [A_TEXT, B_TEXT],
    "no-label/mine/test.jsonl": [A_TEXT, B_TEXT],
    "no-label/mine/train.jsonl": [A_TEXT, {"text": "b", "label": ""}],
    "new-label/mine/test.jsonl": [A_TEXT, B_TEXT],
    "new-label/mine/train.jsonl": [A_TEXT, A_TEXT],
    "misspelled/sts/test.jsonl": STS,
    "misspelled/tasks.json": {"in_domain": ["stsb"]},
}


def write_arrays_and_caches():
    """Right ones, e.npy and teacher.pt, changed in one way each."""
    array = random_rows(48, 4, dtype=torch.float32)
    np.save("e.npy", array)
    torch.save(array.clone(), "array.pt")
    np.save("47-rows.npy", array[1:])
    np.save("49-rows.npy", array[[0, *range(48)]])
    np.save("small.npy", 2e-7 * array)
    array[13, 2] = float("nan")
    np.save("one-nan.npy", array)

    cache = torch.load("teacher.pt")
    torch.save(cache | {"version": 9}, "version-9.pt")
    torch.save({"model": array}, "model.pt")
    torch.save(cache | {"sentences": SENTENCES[::-1]}, "order.pt")
    torch.save(cache | {"sources": ["a"]}, "one-source.pt")
    torch.save(cache | {"embeddings": array}, "one-nan.pt")
    torch.save(cache | {"teacher": Path("code")}, "code.pt")  # unpickling it would run code


@pytest.fixture
def work(here):
    """The current folder, with corpus.jsonl, teacher.pt, bert and the files of the mistakes."""
    write_files(here, FILES)
    write_arrays_and_caches()
    weights = load_file("bert/model.safetensors")
    weights["embeddings.LayerNorm.bias"][:] = float("nan")
    shutil.copytree("bert", "nan-bert")
    save_file(weights, "nan-bert/model.safetensors", metadata={"format": "pt"})
    return here


def run(script, *flags):
    main, defaults = SCRIPTS[script]
    main([*defaults, *flags])


def content_of(folder):
    """{path: bytes} of the files below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "command, words",
    [
        # the corpus
        ("cache --corpus nowhere.txt", "nowhere.txt as UTF-8 text: No such file"),
        ("cache --corpus e.npz", ".txt, .jsonl, .csv and .tsv"),
        ("cache --corpus no-text.csv", "a column named text"),
        ("cache --corpus few-fields.csv", "few-fields.csv, row 2"),
        ("cache --corpus comma.csv", "comma.csv, row 1"),
        ("cache --corpus quotation.tsv", "quotation.tsv (is a quotation mark not closed?)"),
        ("cache --corpus cut.jsonl", "cut.jsonl, line 2"),
        ("cache --corpus utf-16.txt", "cannot read utf-16.txt as UTF-8"),
        ("cache --corpus three.txt", "3 sentences with 4 different words are too small"),
        # the teacher
        (
            "cache --teacher nowhere.npy",
            "that numpy.save wrote: No such file",
        ),
        ("cache --teacher e.npz", "give a .npy or .pt array; a model is a folder"),
        ("cache --teacher 47-rows.npy", "(47, 4); the corpus needs an array (48, dimensions)"),
        ("cache --teacher 49-rows.npy", "(49, 4); the corpus needs an array (48, dimensions)"),
        ("cache --teacher lfs.npy", "cannot read lfs.npy"),
        ("cache --teacher teacher.pt", "teacher.pt holds a dict"),
        ("cache --teacher one-nan.npy", "1 embeddings are not finite"),
        ("cache --teacher small.npy --dtype float16", "too large or too small"),
        ("cache --teacher bert --device cuda", "cannot use --device cuda"),
        ("cache --teacher bert --max_length 2", "--max_length 2: 2 special tokens"),
        # the cache
        ("cache --output teacher.pt", "something else, by random"),
        ("cache --output bert", "bert is not a file"),
        ("cache --output model.pt", "model.pt is not a teacher cache"),
        ("cache --output corpus.jsonl --overwrite", "the name of a cache ends with .pt"),
        ("cache --teacher array.pt --output array.pt --overwrite", "is the --teacher itself"),
        ("talas --teacher nowhere.pt", "make it: python cache_teacher.py --output nowhere.pt"),
        ("talas --teacher e.npy", "e.npy is not a teacher cache"),
        ("talas --teacher version-9.pt", "version-9.pt has format 9"),
        ("talas --teacher order.pt", "the sentences are not those that were embedded"),
        ("talas --teacher one-source.pt", "differ in number: (48, 1, 48)"),
        ("talas --teacher one-nan.pt", "one-nan.pt is damaged"),
        ("talas --teacher code.pt", "not a file of tensors and plain values"),
        # the student
        ("talas --eta -0.1", "--eta -0.1: it must be at least 0"),
        ("talas --temperature nan", "--temperature nan: it must be above 0"),
        ("talas --projection_lr_scale 0", "--projection_lr_scale 0.0: it must be above 0"),
        ("talas --warmup_ratio 2", "--warmup_ratio 2.0: it is a fraction"),
        ("talas --lambda1 0 --lambda2 0 --lambda3 0", "all 0"),
        ("talas --batch_size 1", "--batch_size 1: Eqs. 5 and 6"),
        ("talas --batch_size 49", "the corpus has only 48"),
        ("talas --anchored_layers 4", "--anchored_layers 4: tiny has 3 layers"),
        ("talas --lasd_layers 1", "--lasd_layers 1: Eq. 5 chains two"),
        ("talas --resume", "--resume: new holds no interrupted run"),
        ("talas --output done --resume", "done holds no interrupted run"),
        ("talas --output done", "done holds a run; --resume"),
        ("talas --output killed", "killed holds a run; --resume"),
        ("talas --output teacher.pt --overwrite", "--output teacher.pt holds"),
        ("talas --student bert --output ./bert --overwrite", "is the --student itself"),
        ("talas --output data --overwrite", "--output data holds"),
        # the scores
        ("eval bert --json README.md", "README.md"),
        ("eval bert --tasks stsb", "no task stsb in data"),
        ("eval bert --data nowhere", "--data nowhere"),
        ("eval bert --data no-column", "sentence1,sentence2,labels"),
        ("eval bert --data label-2", "0 or 1"),
        ("eval bert --data one-score", "same score"),
        ("eval bert --data same", "same cosine"),
        ("eval bert --data no-test", "mine/test.csv as UTF-8 text: No such file"),
        ("eval bert --data no-train", "mine/train.csv as UTF-8 text: No such file"),
        ("eval bert --data no-label", "row 2 of mine, train"),
        ("eval bert --data new-label", "train lacks"),
        ("eval bert --data misspelled", "tasks.json"),
        ("eval nan-bert", "not finite"),
    ],
)
def test_a_plausible_mistake_is_one_line_and_changes_nothing(
    command, words, work, ends_with_one_line
):
    before = content_of(work)
    ends_with_one_line(lambda: run(*command.split()), words)
    assert content_of(work) == before


@pytest.mark.parametrize(
    "command, module, next_step",
    [
        ("cache --output nowhere/new.pt", cache_teacher, "unique_corpus"),
        ("eval bert --json nowhere/new.json", evaluation, "load_tasks"),
    ],
)
def test_an_output_that_cannot_be_written_is_found_before_the_work(
    command, module, next_step, here, monkeypatch, ends_with_one_line
):
    monkeypatch.setattr(module, next_step, None)
    ends_with_one_line(lambda: run(*command.split()), "cannot write", "nowhere/new", "No such file")


@pytest.mark.parametrize(
    "module, name, command",
    [
        (cache_teacher, "fit_lsa", ["cache"]),
        (talas, "train", ["talas"]),
        (evaluation, "score", ["eval", "bert"]),
    ],
)
def test_a_bug_keeps_its_traceback(module, name, command, work, monkeypatch):
    def bug(*arguments, **options):
        raise KeyError("our bug")

    monkeypatch.setattr(module, name, bug)
    with pytest.raises(KeyError, match="our bug"):
        run(*command)


def test_attempt_lets_other_errors_pass():
    with pytest.raises(AttributeError), attempt("read it"):
        raise AttributeError


@pytest.mark.parametrize(
    "write, content", [(save, torch.zeros(200_000)), (write_json, 600_000 * "x")]
)
def test_a_full_disk_is_named_and_leaves_the_earlier_file(write, content, here, ends_with_one_line):
    write_files(here, {"file": "earlier"})
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))  # bytes of a file
    try:
        ends_with_one_line(lambda: write("file", content), "cannot write file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert Path("file").read_text() == "earlier"
    assert not Path("file.partial").exists()


def test_no_input_is_overwritten(work):
    before = content_of(work)
    run("cache", "--teacher", "bert")
    run("cache", "--teacher", "e.npy", "--overwrite")
    run("talas", "--teacher", "new.pt", "--student", "bert", "--epochs", "1")
    run("eval", "bert", "new")
    evaluation.main(["bert", "--data", "data"])  # no --json, no file
    after = content_of(work)
    for path, content in before.items():
        assert after[path] == content
    created = {path.relative_to(work).parts[0] for path in after.keys() - before.keys()}
    assert created == {"new.pt", "new", "new.json"}
