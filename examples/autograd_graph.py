# %% [markdown]
# # What autograd really built
#
# $$f(x_1, x_2) = \frac{1 + \sin x_2}{x_2 + e^{x_1}} + x_1 x_2$$
#
# The gradient of one number, three times: by differences, by a tape that explains itself path by path, and from the
# graph that torch built. Then the graphs of networks, and three ways to cut a gradient. Every picture is saved.

# %%
import math
import time

import matplotlib.pyplot as plt
import torch
from torch import nn

import pullback as pb
from pullback.autodiff import Scalar, exp, sin

torch.manual_seed(0)
torch.set_num_threads(1)


def f(x1, x2):
    """The function, for numbers of any kind."""
    return (1 + sin(x2)) / (x2 + exp(x1)) + x1 * x2


# %% [markdown]
# ## By differences
#
# Richardson extrapolation comes with an error bar.

# %%
point = torch.tensor([1.5, 0.5], dtype=torch.float64)
numeric = pb.numeric_derivative(lambda x: f(x[0], x[1]), point)
print(f"by differences: {numeric.value.tolist()} +- {numeric.error.max():.0e}")

# %% [markdown]
# ## By a tape of scalars
#
# Three paths lead from the result to $x_2$; the gradient is their sum.

# %%
x1, x2 = Scalar(1.5, "x1"), Scalar(0.5, "x2")
y = f(x1, x2)
print(y)
tape = pb.explain(y, x2)
print(tape)
print(pb.explain(y, x1))
pb.graph(y, paths=tape.paths).save("function_tape.svg")
pb.graph(y, paths=tape.paths).save("function_tape.png")

# %% [markdown]
# ## From the graph of real tensors
#
# The same explanation works on what autograd recorded, and marks the same paths.

# %%
t1, t2 = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.5, 0.5))
out = f(t1, t2)
graph_paths = pb.explain(out, t2, params={"x1": t1, "x2": t2})
print(graph_paths)
picture = pb.graph(out, params={"x1": t1, "x2": t2}, paths=graph_paths.paths)
picture.save("function_autograd.svg")
picture.save("function_autograd.png")
grads = torch.autograd.grad(out, (t1, t2))

# %% [markdown]
# ## A residual network of 11,689,512 parameters
#
# ResNet-18, written out.


# %%
class Block(nn.Module):
    """x + two convolutions, each with its normalisation."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.downsample = None
        if stride != 1 or n_in != n_out:
            self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    """He, Zhang, Ren, Sun, 2016, doi 10.1109/CVPR.2016.90."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = [64, 64, 128, 256, 512]
        for i in range(1, 5):
            blocks = Block(widths[i - 1], widths[i], 1 if i == 1 else 2), Block(widths[i], widths[i], 1)
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


net = ResNet18().eval()
n_parameters = sum(p.numel() for p in net.parameters())
image = torch.randn(1, 3, 224, 224)

# %% [markdown]
# The graph that autograd built, node for node; the same, folded by module; and the operations of the forward pass.

# %%
logits = net(image)
start = time.perf_counter()
backward = pb.graph(logits, params=dict(net.named_parameters()), title="ResNet-18")
elapsed = time.perf_counter() - start
print(repr(backward), f"traced in {1e3 * elapsed:.1f} ms")
start = time.perf_counter()
backward.save("resnet18_autograd.svg")
print(f"drawn in {time.perf_counter() - start:.2f} s")
backward.save("resnet18_autograd.png")

by_module = pb.graph(net, image, kind="autograd", title="ResNet-18, backward")
by_module.save("resnet18_by_module.html")
by_module.apply(pb.graphs.Collapse(2)).save("resnet18_by_module.png")

forward = pb.graph(net, image, title="ResNet-18")
print(repr(forward))
forward.save("resnet18_forward.html")
folds = pb.graphs.Fold("Conv > BatchNorm > Relu", "ConvBnRelu"), pb.graphs.Fold("Conv > BatchNorm", "ConvBn")
held = pb.graphs.Prune("parameter"), pb.graphs.Prune("*.running_*")
tidy = forward.apply(*held, *folds)
tidy.save("resnet18_forward.png", theme="blue")
print(repr(tidy))

# %% [markdown]
# ## Three ways to cut a gradient
#
# `detach` and `no_grad` are safe; a write through `.data` is not seen by autograd and makes gradients silently wrong.


# %%
def cut(x, how):
    """x^2 + the square of x again, cut off."""
    if how == "detach":
        other = x.detach() ** 2
    elif how == "data":
        other = x.data**2
    elif how == "no_grad":
        with torch.no_grad():
            other = x**2
    else:
        other = x**2
    return (x**2 + other).sum()


reasons = {}
figure, axes = plt.subplots(1, 4, figsize=(11, 6), layout="constrained")
for axis, how in zip(axes, ("nothing", "detach", "data", "no_grad"), strict=True):
    g = pb.graph(lambda x, how=how: cut(x, how), torch.randn(3, requires_grad=True), title=how)
    axis.imshow(plt.imread(g.save(f"cut_by_{how}.png")))
    axis.set_axis_off()
    reasons[how] = [e.reason for e in g.edges if e.kind == "cut"]
figure.savefig("cuts.png", dpi=110)
print(reasons)

# %% [markdown]
# ## Shallow and deep


# %%
def network(depth: int) -> nn.Module:
    """A perceptron with `depth` layers."""
    layers: list[nn.Module] = []
    for k in range(depth):
        layers += [nn.Linear(4 if k else 2, 1 if k == depth - 1 else 4), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


for depth in (2, 3):
    pb.graph(network(depth), torch.randn(8, 2), kind="autograd").save(f"network_{depth}_layers.png")

# %%
by_hand = (math.cos(0.5) / (0.5 + math.exp(1.5))) - (1 + math.sin(0.5)) / (0.5 + math.exp(1.5)) ** 2 + 1.5
assert abs(tape.total - by_hand) < 1e-15 and abs(tape.total - 1.6165488003791766) < 1e-15
assert abs(float(grads[0]) - 0.2328337) < 1e-6
