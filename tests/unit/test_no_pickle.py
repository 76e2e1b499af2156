"""Nothing that comes over the network or from a disk can be executed: no such word is in the tree.

A word that is harmless where it stands is listed with its reason; a reason whose word has gone is
an error too, so the list stays true.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("psq", "proto/psq_proto", "server/psq_server", "worker/psq_worker")
MODULES = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve",
                     "yaml", "jsonpickle"})  # fmt: skip
CALLS = frozenset({"eval", "exec", "compile", "__import__"})
METHODS = frozenset({
    ("torch", "load"), ("torch", "save"), ("yaml", "load"), ("np", "load"), ("numpy", "load"),
    ("os", "system"), ("os", "popen"), ("codecs", "decode"),
})  # fmt: skip
KEYWORDS = frozenset({"allow_pickle", "shell"})
# Those that are known and do no harm: (file, word) -> why.
HARMLESS: dict[tuple[str, str], str] = {}


def files():
    found = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(found) > 100
    return found


def words_of(tree):
    """(line, word) of everything in a module that could run what it reads."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, a.name) for a in names if a.name.split(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in MODULES:
                yield node.lineno, module
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                yield node.lineno, name
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if (owner, name) in METHODS:
                yield node.lineno, f"{owner}.{name}"
            case ast.keyword(arg=str(name), value=value) if name in KEYWORDS:
                if not (isinstance(value, ast.Constant) and value.value is False):
                    yield value.lineno, name


def test_no_module_can_execute_what_it_reads():
    found = {
        (str(path.relative_to(ROOT)), word): line
        for path in files()
        for line, word in words_of(ast.parse(path.read_text()))
    }
    wrong = {f"{file}:{line}: {word}" for (file, word), line in found.items()} - {
        f"{file}:{found[file, word]}: {word}" for file, word in HARMLESS if (file, word) in found
    }
    assert not wrong
    assert not [each for each in HARMLESS if each not in found]


@pytest.mark.parametrize("word", ["pickle", "marshal", "shelve", "torch.load", "yaml.load"])
def test_the_word_is_not_even_in_a_text_that_could_be_run(word):
    """Such a text would escape the other test: importlib.import_module("pickle"), say."""
    quoted = {f'"{word}"', f"'{word}'"}
    assert not [
        str(path.relative_to(ROOT)) for path in files() for one in quoted if one in path.read_text()
    ]


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import yaml.loader", "yaml.loader"),
        ("eval('1')", "eval"),
        ("exec(text)", "exec"),
        ("torch.load(path)", "torch.load"),
        ("load = torch.load", "torch.load"),
        ("np.load(path)", "np.load"),
        ("open(np, allow_pickle=True)", "allow_pickle"),
        ("run(words, shell=wanted)", "shell"),
        ("os.system(words)", "os.system"),
    ],
)
def test_the_search_finds_what_it_is_for(source, word):
    assert word in [found for _, found in words_of(ast.parse(source))]


@pytest.mark.parametrize(
    "source", ["re.compile(x)", "model.eval()", "np.load_txt", "f(shell=False)"]
)
def test_the_search_leaves_alone_what_is_harmless(source):
    assert not list(words_of(ast.parse(source)))
