"""TorchDEQ's part of `digits_methods`, in a process and an environment of its own.

    echo '{"method": "implicit", "seed": 0}' | PYTHON bench/papers/digits_torchdeq.py

where `PYTHON` has torch, torchdeq and scikit-learn. A line of JSON in is a training, a
line of JSON out what came of it. Nothing of JAX is imported.
"""

import importlib
import importlib.metadata
import json
import sys
import time
from typing import Any

import digits_split as split  # It is a script: its folder is where it looks first.


torch: Any = importlib.import_module("torch")
torchdeq: Any = importlib.import_module("torchdeq")
norms: Any = importlib.import_module("torchdeq.norm")
losses: Any = importlib.import_module("torchdeq.loss")
METHODS: dict[str, dict[str, Any]] = {
    "implicit": {"ift": True},
    "phantom": {"grad": split.TERMS, "tau": 1 - split.DAMP},
    "one step": {"grad": 1},
}
SOLVERS = {"plain": "fixed_point_iter", "Anderson": "anderson"}


class Classifier(torch.nn.Module):
    def __init__(self, method: str, solver: str):
        super().__init__()
        linear = torch.nn.Linear
        self.weight = linear(split.UNITS, split.UNITS, bias=False)
        self.injection = linear(64, split.UNITS)
        self.readout = linear(split.UNITS, split.CLASSES)
        scale = {"norm_no_scale": True, "norm_target_norm": split.NORM}
        norms.apply_norm(self.weight, "spectral_norm", args=scale)
        self.num_evals = 0
        self.deq = torchdeq.get_deq(
            f_solver=SOLVERS[solver],
            b_solver=SOLVERS[solver],
            f_max_iter=split.MAX_STEPS,
            b_max_iter=split.MAX_STEPS,
            f_tol=split.TOLERANCE,
            b_tol=split.TOLERANCE,
            f_stop_mode="rel",
            b_stop_mode="rel",
            **METHODS[method],
        )

    def forward(self, x: Any, penalty: float = 0.0) -> tuple[Any, Any]:
        """The logits, and the penalty on the Jacobian times its weight."""
        norms.reset_norm(self.weight)
        drive = self.injection(x)

        def fn(z):
            self.num_evals += 1
            return torch.relu(self.weight(z) + drive)

        ends, _ = self.deq(fn, torch.zeros(len(x), split.UNITS))
        z, extra = ends[-1], 0.0
        if penalty:
            at = z.detach().requires_grad_()
            extra = penalty * losses.jac_reg(fn(at), at)
        return self.readout(z), extra


def train(
    method: str,
    seed: int,
    solver: str = "plain",
    epochs: int = split.EPOCHS,
    penalty: float = 0.0,
    threads: int = 1,
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    images, held_out, labels, expected = map(torch.as_tensor, split.load())
    labels, expected = labels.long(), expected.long()
    model = Classifier(method, solver)
    optimiser = torch.optim.Adam(model.parameters(), split.RATE)
    start, cpu = time.perf_counter(), time.process_time()
    for epoch in range(epochs):
        for chosen in split.batches(len(labels), seed, epoch):
            logits, extra = model(images[chosen], penalty)
            loss = torch.nn.functional.cross_entropy(logits, labels[chosen]) + extra
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    found = {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
    }
    model.eval()
    model.num_evals = 0
    with torch.no_grad():
        logits, _ = model(held_out)
    is_right = logits.argmax(1) == expected
    accuracy = is_right.double().mean().item()
    return found | {"accuracy": accuracy, "evals": model.num_evals}


def main() -> None:
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "torchdeq")
    }
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        print(json.dumps(train(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
