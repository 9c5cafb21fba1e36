# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false
"""Writes examples/08_from_pytorch.safetensors: a small network that torch has trained.

Run it once, on a CPU, in an environment of its own. The file in the repository is from
Python 3.11 and

    pip install torch==2.13.0 safetensors==0.8.0 scikit-learn==1.9.1 numpy==2.4.6
    python tests/golden/torch_digits.py

Beside the state dict it holds "expected_logits": what the network returns for the
images that it was not trained on.
"""

from pathlib import Path

import numpy as np
from sklearn import datasets

# Only where the script is run: pytest imports this file as well, to look for doctests,
# and the tests need none of these.
if __name__ == "__main__":
    import torch
    from safetensors.torch import save_file
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs, features, stride):
            super().__init__()
            self.conv = nn.Conv2d(inputs, features, 3, stride, padding=1, bias=False)
            self.bn = nn.BatchNorm2d(features)

        def forward(self, x):
            return torch.relu(self.bn(self.conv(x)))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(1, 12, 1), Block(12, 24, 2)])
            self.fc = nn.Linear(24, 10)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.fc(x.mean((2, 3)))


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    images, digits = datasets.load_digits(return_X_y=True)
    order = rng.permutation(len(digits))
    x = torch.tensor(images[order].reshape(-1, 1, 8, 8) / 16, dtype=torch.float32)
    y = torch.tensor(digits[order])
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(300):
        rows = torch.as_tensor(rng.choice(len(y) - 360, 128, replace=False))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        arrays = model.state_dict() | {"expected_logits": model(x[-360:])}
    path = Path(__file__).parents[2] / "examples" / "08_from_pytorch.safetensors"
    save_file(arrays, path)


if __name__ == "__main__":
    main()
