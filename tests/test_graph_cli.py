"""`pullback graph`: what it draws, and what it says of mistakes."""

import re
import sys

import pytest

from pullback.cli.main import main

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.fc = nn.Linear(width * 36, 2)

    def forward(self, x):
        return self.fc(self.body(x).flatten(1))

class Sized(nn.Module):
    def __init__(self, width):
        super().__init__()

net = Net()
w = torch.ones(3, requires_grad=True)
loss = (w.exp() * w).sum()

def square(x):
    return (x**2).sum()

def factory(width=2):
    return Net(width)

def made():
    return (w * 2).sum()

def embed(i):
    return torch.ones(10, 2)[i]

def fails(x):
    raise ValueError("no luck")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "sample_model.py").write_text(MODEL)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("sample_model", "broken"):
        sys.modules.pop(name, None)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["graph", *arguments])
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


IMAGE = ("--input", "2x1x8x8")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("sample_model:net", *IMAGE), "forward"),
        (("sample_model.py:net", *IMAGE), "forward"),
        (("sample_model:Net", *IMAGE), "forward"),
        (("sample_model:factory", *IMAGE), "forward"),
        (("sample_model:net.body", *IMAGE), "forward"),
        (("sample_model:net", *IMAGE, "--kind", "autograd"), "autograd"),
        (("sample_model:square", "--input", "4:float64", "--kind", "autograd"), "autograd"),
        (("sample_model:square", "--input", "4", "--kind", "joint"), "fx"),
        (("sample_model:net", "--kind", "fx"), "fx"),
        (("sample_model:embed", "--input", "5:int64"), "forward"),
        (("sample_model:square", "--input", "scalar"), "forward"),
        (("sample_model:loss",), "autograd"),
        (("sample_model:made",), "autograd"),
    ],
)
def test_draws(folder, capsys, arguments, words):
    code, out, err = run(capsys, *arguments, "--out", "g.dot")
    assert (code, err) == (0, "")
    assert f"Graph ({words})" in out
    assert "wrote g.dot" in out
    assert (folder / "g.dot").read_text().startswith("digraph")


def test_default_name_theme_and_picture(folder, capsys):
    assert run(capsys, "sample_model:net.body", *IMAGE, "--theme", "dark")[0] == 0
    assert "#14181d" in (folder / "body.svg").read_text()


def test_passes(folder, capsys):
    def labels(*arguments):
        code, out, err = run(capsys, "sample_model:net", *IMAGE, "--out", "g.dot", *arguments)
        assert (code, err) == (0, ""), out
        return (folder / "g.dot").read_text()

    assert "<B>fc</B>" in labels("--collapse", "1")
    assert "<B>body</B>" in labels("--collapse", "bo*")
    folded = labels("--fold", "Conv > BatchNorm=ConvBn", "--fold", "ConvBn > Relu=Block", "--prune", "parameter")
    assert "<B>Block</B>" in folded
    assert "fc.weight" not in folded
    assert "<B>relu</B>" not in labels("--hide", "relu")
    assert "<B>batch_norm</B>" in labels("--fold", "Conv[1x1] > BatchNorm=None")
    assert "penwidth" in labels("--gradients")
    assert 'style="dotted"' in labels("--kind", "autograd", "--saved")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("sample_model",), "module:name or file.py:name"),
        (("sample_model:nothing", *IMAGE), "has no 'nothing'; it has .*Net"),
        (("no_such_module:net",), "no module 'no_such_module'"),
        (("no_such.py:net",), "there is no file no_such.py"),
        (("broken:net",), "nothing_of_this_name"),
        (("sample_model:net",), "needs example inputs: --input"),
        (("sample_model:Sized", *IMAGE), "needs the arguments width"),
        (("sample_model:fails", "--input", "3"), r"raised ValueError at .*sample_model.py:\d+: no luck"),
        (("sample_model:net", "--input", "3x"), "must be a shape such as"),
        (("sample_model:net", "--input", "3:float17"), "must be a shape such as"),
        (("sample_model:net", *IMAGE, "--kind", "backward"), "--kind must be one of"),
        (("sample_model:net", *IMAGE, "--theme", "pink"), "theme must be one of"),
        (("sample_model:net", *IMAGE, "--fold", "Conv"), "PATTERN=LABEL"),
        (("sample_model:net", *IMAGE, "--fold", "Conv[stride=2]"), "PATTERN=LABEL"),
        (("sample_model:net", *IMAGE, "--fold", "Conv >=X"), "pattern 'Conv >'"),
        (("sample_model:net", *IMAGE, "--out", "g.bmp"), "must end in"),
        (("sample_model:net", *IMAGE, "--out", "none/g.svg"), "does not exist"),
        (("sample_model:net", *IMAGE, "--collapse", "0"), "depth of at least 1"),
        (("sample_model:net", "--input", "2x3x8x8"), "RuntimeError"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    assert code == 2, out
    assert re.search(words, err), err
    assert err.count("\n") == 1
    assert not list(folder.glob("*.svg"))
