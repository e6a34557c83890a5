"""PyTorch's side of the comparison, run by an interpreter that has it.

    python torch_worker.py WORKLOAD.npz CELL MAX_STEPS SOLVER DEVICE

Reads a request a line from the standard input, `[what, forward, backward]`, and answers
with a line. `forward`, `both` and `step` do the work once; `save` writes what it comes
to; `["threads", number]` sets how many there are.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]


def tanh_cell(z, params, x):
    return torch.tanh(z @ params[0].T + x)


def scaled_cell(z, params, x):
    return torch.tanh(x[:, :1] * (z @ params[0].T) + x[:, 1:])


def affine(z, params, x):
    weight, injection, bias = params[:3]
    return torch.tanh(z @ weight.T + x @ injection.T + bias)


def convolution(z, params, x):
    kernel, mixing = params
    image = F.conv2d(z.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1), padding=1)
    return torch.tanh(image.permute(0, 2, 3, 1) + x @ mixing)


def _normalise(z):
    return F.layer_norm(z, z.shape[-1:], eps=1e-5)


def transformer(z, params, x):
    down, key, output, query, up, value = params  # By name, as JAX flattens them.
    batch, length, width = z.shape
    split = lambda w: (z @ w).view(batch, length, 4, -1).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(
        split(query), split(key), split(value), is_causal=True
    )
    h = _normalise(x + mixed.transpose(1, 2).reshape(z.shape) @ output)
    return _normalise(h + torch.tanh(h @ up) @ down)


CELLS = {
    f.__name__: f for f in (tanh_cell, scaled_cell, convolution, transformer, affine)
}


def _two_loops(fn, z0, max_steps, forward, backward):
    """What people write: two loops and a hook."""

    def iterate(step, z, tolerance):
        for _ in range(max_steps):
            last, z = z, step(z)
            if torch.linalg.vector_norm(z - last) <= tolerance * z.norm():
                break
        return z

    with torch.no_grad():
        z = iterate(fn, z0, forward)
    if not torch.is_grad_enabled():
        return z
    start = z.detach().requires_grad_()
    image, value = fn(start), fn(z)

    def hook(ct):
        pull = lambda u: torch.autograd.grad(image, start, u, retain_graph=True)[0]
        return iterate(lambda u: pull(u) + ct, ct, backward)

    value.register_hook(hook)
    return value


class Worker:
    def __init__(self, path: str, cell: str, max_steps: str, solver: str, device: str):
        # Full precision, as the others have it.
        torch.backends.cudnn.allow_tf32 = False
        torch.set_default_device(device)
        self.path, self.cell, self.solver = Path(path), CELLS[cell], solver
        self.max_steps = int(max_steps)
        with np.load(path) as data:
            read = lambda name: torch.tensor(data[name], device=device)
            num = sum(name.startswith("param") for name in data.files)
            self.params = [read(f"param{i}").requires_grad_() for i in range(num)]
            self.xs, self.cts = read("xs").requires_grad_(), read("cts")
            self.labels = read("labels").long()
        # As the example has it.
        self.optimiser = torch.optim.AdamW(self.params, lr=1e-2, weight_decay=0.1)

    def _solve(self, forward: float, backward: float):
        fn = lambda z: self.cell(z, self.params, self.xs)
        z0 = torch.zeros_like(self.cts)
        if self.solver == "two loops":
            return _two_loops(fn, z0, self.max_steps, forward, backward)
        deq = importlib.import_module("torchdeq").get_deq(
            ift=True,
            f_solver=self.solver,
            b_solver=self.solver,
            f_max_iter=self.max_steps,
            b_max_iter=self.max_steps,
            f_tol=forward,
            b_tol=backward,
            f_stop_mode="rel",
            b_stop_mode="rel",
        )
        deq.train()
        return deq(fn, z0)[0][-1]

    def forward(self, forward, backward):
        with torch.no_grad():
            return self._solve(forward, backward)

    def _loss(self, zs):
        if len(self.labels) == 0:
            return (zs * self.cts).sum()
        weight, bias = self.params[3:]
        return F.cross_entropy(zs @ weight.T + bias, self.labels)

    def both(self, forward, backward):
        zs = self._solve(forward, backward)
        return zs, torch.autograd.grad(self._loss(zs), [*self.params, self.xs])

    def step(self, forward, backward):
        """Of the optimiser, then back to where the cell contracts, and undone."""
        before = [param.detach().clone() for param in self.params]
        loss = self._loss(self._solve(forward, backward))
        grads = torch.autograd.grad(loss, self.params)
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad
        self.optimiser.step()
        with torch.no_grad():
            norm = torch.linalg.matrix_norm(self.params[0], 2)
            self.params[0].mul_((0.95 / norm).clamp(max=1))
            for param, old in zip(self.params, before, strict=True):
                param.copy_(old)

    def answer(self, what, *numbers):
        if what == "version":
            return _versions()
        if what == "threads":
            torch.set_num_threads(int(numbers[0]))
        elif what == "save":
            zs, grads = self.both(*numbers)
            arrays = {f"grad{i}": g.cpu().numpy() for i, g in enumerate(grads)}
            path = self.path.with_name("result.npz")
            np.savez(path, zs=zs.detach().cpu().numpy(), **arrays)
        else:
            getattr(self, what)(*numbers)
        if self.xs.is_cuda:
            torch.cuda.synchronize()
        return None


def _versions() -> str:
    names = [n for n in ("torchdeq", "torch") if importlib.util.find_spec(n)]
    return ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names)


def main() -> None:
    worker = Worker(*sys.argv[1:])
    for line in sys.stdin:
        print(json.dumps(worker.answer(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
