"""One name for one operation, whatever tracer wrote it: "Conv" is conv2d, ConvolutionBackward0, aten.convolution."""

from __future__ import annotations

import re

# Common name -> the forms that normalised names of it take.
ALIASES: dict[str, tuple[str, ...]] = {
    "conv": ("conv", "convolution", "mkldnnconvolution", "cudnnconvolution", "thnnconv", "slowconv", "sequentialconv"),
    "convtranspose": ("convtranspose", "convtransposed"),
    "batchnorm": ("batchnorm", "batchnormalization", "cudnnbatchnorm", "miopenbatchnorm", "bn"),
    "layernorm": ("layernorm", "layernormalization"),
    "groupnorm": ("groupnorm", "groupnormalization"),
    "linear": ("linear", "addmm", "gemm", "dense", "mkldnnlinear"),
    "matmul": ("matmul", "mm", "bmm", "mv", "dot"),
    "relu": ("relu", "threshold"),
    "add": ("add", "iadd", "radd"),
    "sub": ("sub", "rsub", "isub", "subtract"),
    "mul": ("mul", "imul", "rmul", "multiply"),
    "div": ("div", "truediv", "rtruediv", "itruediv", "divide"),
    "maxpool": ("maxpool", "maxpoolwithindices", "maxpoolindices"),
    "avgpool": ("avgpool", "averagepool"),
    "globalavgpool": ("adaptiveavgpool", "globalaveragepool", "globalavgpool"),
    "flatten": ("flatten", "reshape", "view", "unsafeview", "reshapealias"),
    "transpose": ("transpose", "t", "permute", "numpyt"),
    "attention": ("attention", "scaleddotproductattention", "scaleddotproductflashattention"),
    "cat": ("cat", "concat", "concatenate"),
    "getitem": ("getitem", "index", "select", "slice"),
}
_COMMON = {form: name for name, forms in ALIASES.items() for form in forms}
# What build_graph writes, as hiddenlayer did.
TITLES = {
    "batchnorm": "BatchNormalization",
    "maxpool": "MaxPool",
    "avgpool": "AveragePool",
    "globalavgpool": "GlobalAveragePool",
    "convtranspose": "ConvTranspose",
}


def common(label: str) -> str:
    """The common name behind a label: "aten.conv2d.default", "Conv2d" and "ConvolutionBackward0" are all "conv".

    Lower case without "_", dimensions ("2d"), namespaces, "Backward", "native" and the mark of writing in place; then
    `ALIASES`.
    """
    text = label.strip()
    parts = [p for p in re.split(r"::|\.", text) if p]
    if len(parts) > 1 and parts[0] in ("aten", "torch", "prims", "onnx", "operator", "F", "nn"):
        parts = parts[1:]
        text = parts[-2] if len(parts) > 1 and parts[-1] in ("default", "Tensor", "Scalar", "dim", "out") else parts[-1]
    text = re.sub(r"Backward\d*$", "", text)
    text = text.strip("_").lower().replace("_", "")
    text = text.removeprefix("native").replace("withindices", "")
    if text not in _COMMON:
        text = re.sub(r"(?<=[a-z])[123]d(?=$)", "", text)
    return _COMMON.get(text, text)
