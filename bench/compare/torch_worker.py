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
import torch_cells


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
        self.path, self.solver = Path(path), solver
        self.cell = getattr(torch_cells, cell)
        self.max_steps = int(max_steps)
        with np.load(path) as data:
            read = lambda name: torch.tensor(data[name], device=device)
            num = sum(name.startswith("param") for name in data.files)
            self.params = [read(f"param{i}").requires_grad_() for i in range(num)]
            has_xs = "xs" in data.files
            self.xs = read("xs").requires_grad_() if has_xs else None
            self.start, self.cts = read("start"), read("cts")
            self.labels = read("labels").long()
        self.moving = [*self.params, *([self.xs] if has_xs else [])]
        # As the example has it.
        self.optimiser = torch.optim.AdamW(
            self.params or [self.start], lr=1e-2, weight_decay=0.1
        )

    def _solve(self, forward: float, backward: float):
        fn = lambda z: self.cell(z, self.params, self.xs)
        z0 = self.start
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
            return (zs * self.cts).real.sum()
        weight, bias = self.params[3:]
        return F.cross_entropy(zs @ weight.T + bias, self.labels)

    def both(self, forward, backward):
        zs = self._solve(forward, backward)
        return zs, torch.autograd.grad(self._loss(zs), self.moving)

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
            zs, grads = (
                self.both(*numbers) if self.moving else (self.forward(*numbers), ())
            )
            # PyTorch's gradient of complex numbers is the conjugate of JAX's.
            host = lambda x: x.detach().cpu().resolve_conj().numpy()
            arrays = {f"grad{i}": host(g.conj()) for i, g in enumerate(grads)}
            np.savez(self.path.with_name("result.npz"), zs=host(zs), **arrays)
        else:
            getattr(self, what)(*numbers)
        if self.cts.is_cuda:
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
