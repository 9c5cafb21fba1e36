"""PyTorch, eager: its layers in float32 parameters, and gradients by autograd. Channels
last is its `channels_last` memory format."""

import os
import warnings

import cases
import models
import numpy as np
from floor import cores

# Else its idle threads spin after each call and take a core from whatever runs next.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read at the import

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from peers import Peer, Problem, Program  # noqa: E402

torch.set_num_threads(cores())
# It has no fused RMS norm for bfloat16 with float32 parameters, and says so.
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")


def as_tensor(array, case):
    tensor = torch.from_numpy(array).to(getattr(torch, case.dtype))
    if case.layout == "last" and tensor.ndim > 2:
        return tensor.movedim(-1, 1)  # in memory, channels stay last
    return tensor


def as_array(tensor, case):
    array = tensor.detach().double().numpy()
    last = case.layout == "last" and array.ndim > 2
    return np.moveaxis(array, 1, -1) if last else array


def program(layer, problem: Problem) -> Program:
    case = problem.case
    x, dy = (as_tensor(v, case) for v in (problem.x, problem.dy))
    x.requires_grad_()
    params = dict(zip(case.features, layer.parameters(), strict=True))
    stats = {
        name.removeprefix("running_"): buffer
        for name, buffer in layer.named_buffers()
        if name.startswith("running_")
    }

    def reset():
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(torch.from_numpy(problem.params[name]))
            for name, buffer in stats.items():
                buffer.copy_(torch.from_numpy(problem.stats[name]))

    def forward():
        with torch.no_grad():
            return layer(x)

    def gradient():
        y = layer(x)
        return y, torch.autograd.grad(y, (x, *params.values()), dy)

    def results():
        reset()
        y_forward = forward()
        reset()
        y, (dx, *dparams) = gradient()
        found = {"y": y_forward, "y with gradient": y, "gradient of x": dx}
        found = {k: as_array(v, case) for k, v in found.items()}
        for name, value in zip(params, dparams, strict=True):
            found[f"gradient of {name}"] = value.double().numpy()
        for name, buffer in stats.items():
            found[f"running {name}"] = buffer.double().numpy()
        if "var" in stats and layer.training:
            found["running var"] = biased(found["running var"], problem)
        return found

    reset()
    calls = {"forward": forward, "forward and gradient": gradient}
    return Program(calls, results, {"residual_bytes": residual_bytes(layer, x)})


def biased(running_var, problem):
    """The running variance as it were if the last batch's had been biased."""
    n = problem.x.size // problem.case.channels
    old = cases.MOMENTUM * problem.stats["var"]
    return old + (running_var - old) * (n - 1) / n


def residual_bytes(layer, x) -> int:
    """What autograd keeps of a forward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


def batch_norm(case):
    cls = nn.BatchNorm1d if len(case.shape) == 2 else nn.BatchNorm2d
    return cls(case.channels, cases.EPSILON, momentum=1 - cases.MOMENTUM)


def evaluation(case):
    return batch_norm(case).eval()


def layer_norm(case):
    return nn.LayerNorm(case.channels, cases.EPSILON)


def rms_norm(case):
    return nn.RMSNorm(case.channels, cases.EPSILON)


def group_norm(case):
    return nn.GroupNorm(cases.GROUPS, case.channels, cases.EPSILON)


def instance_norm(case):
    return nn.InstanceNorm2d(case.channels, cases.EPSILON, affine=True)


def linear(kernel, bias=False):
    layer = nn.Linear(*kernel.shape, bias=bias)
    layer.weight = nn.Parameter(torch.from_numpy(kernel.T.copy()))
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class ResNet(nn.Module):
    def __init__(self, case):
        super().__init__()
        kernels, head = models.resnet_weights(case)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for size, weights in zip(
            models.convolutions(case.channels), kernels, strict=True
        ):
            inputs, outputs, kernel, stride = size
            options = {"padding": kernel // 2, "bias": False}
            conv = nn.Conv2d(inputs, outputs, kernel, stride, **options)
            weights = np.ascontiguousarray(weights.transpose(3, 2, 0, 1))
            conv.weight = nn.Parameter(torch.from_numpy(weights))
            self.convs.append(conv)
            self.norms.append(nn.BatchNorm2d(outputs, momentum=1 - cases.MOMENTUM))
        self.head = linear(head, bias=True)

    def forward(self, x):
        layers = iter(zip(self.convs, self.norms, strict=True))

        def conv_norm(x):
            conv, norm = next(layers)
            return norm(conv(x))

        return self.head(models.resnet_forward(x, conv_norm, F.relu).mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self, case):
        super().__init__()
        kernels = models.transformer_weights(case)
        self.qkv, self.out = linear(kernels["qkv"]), linear(kernels["out"])
        self.up, self.down = linear(kernels["up"]), linear(kernels["down"])
        self.norms = nn.ModuleList(nn.LayerNorm(case.channels, 1e-6) for _ in range(2))

    def forward(self, x):
        batch, length, features = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, length, 3, models.HEADS, -1)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        y = F.gelu(self.up(self.norms[1](x)), approximate="tanh")
        return x + self.down(y)


def resnet(case) -> Program:
    images, labels = models.resnet_batch(case)
    batch = as_tensor(images, case), torch.from_numpy(labels)

    def make():
        return ResNet(case).to(memory_format=torch.channels_last)  # pyright: ignore

    return train(make, batch, F.cross_entropy)


def transformer(case) -> Program:
    batch = map(torch.from_numpy, models.transformer_batch(case))
    return train(lambda: Transformer(case), batch, models.squared_error)


def train(make, batch, loss) -> Program:
    inputs, targets = batch

    def start():
        model = make()
        optimizer = torch.optim.SGD(
            model.parameters(), models.RATE, models.SGD_MOMENTUM
        )

        def call():
            optimizer.zero_grad()
            value = loss(model(inputs), targets)
            value.backward()
            optimizer.step()
            return value.detach()

        return call

    return models.training(start)


PEER = Peer(
    "torch",
    "torch",
    "import torch",
    {
        cases.BATCH: batch_norm,
        cases.EVALUATION: evaluation,
        cases.SYNCED: "needs a process for each device",
        cases.LAYER: layer_norm,
        cases.RMS: rms_norm,
        cases.GROUP: group_norm,
        cases.INSTANCE: instance_norm,
    },
    program,
    {cases.RESNET: resnet, cases.TRANSFORMER: transformer},
)
