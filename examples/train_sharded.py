"""Data-parallel training of an equilibrium classifier: devices, processes, machines.

    python examples/train_sharded.py --devices 8

Each device solves for the equilibria of its own images and waits for nobody; the
gradient is summed over all devices once a step. The model is that of `digits.py`. The
same script runs on one device, on those of one process, and on those of many:
`docs/sharding_processes.md` has job scripts for SLURM, Kubernetes and Cloud TPU.
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import orbax.checkpoint as ocp
import sharded_checkpoint as checkpoints
from checkpoint import CheckpointError, replace_file, serialise
from command_line import integer, progress_bar, run_resumable
from digits_data import load_data, NUM_TRAIN
from digits_model import LARGEST_NORM, LEARNING_RATE, TOLERANCE, WEIGHT_DECAY
from jax.sharding import Mesh
from sharded_data import local_batch
from sharded_model import assess, start, State, train_step
from sharded_processes import (
    describe,
    global_batch,
    join,
    local_rows,
    make_mesh,
    replicated,
)
from sharded_report import draw, open_metrics, read_rows, table, write_row


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on many devices.")
    add = parser.add_argument
    many, seeds, sizes = integer(1, 9999), integer(0, 2**31 - 1), integer(1, NUM_TRAIN)
    add("--seed", type=seeds, default=0, help="of all that is random [0]")
    add("--steps", type=many, default=400, help="of training [400]")
    add("--batch-size", type=sizes, default=64, help="images a step, of all [64]")
    add("--features", type=many, default=64, help="size of the hidden state [64]")
    add("--out", type=Path, default=Path("runs/sharded"), help="[runs/sharded]")
    add("--save-every", type=many, default=50, metavar="STEPS", help="[50]")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--devices", type=many, help="so many CPU devices in this process")
    add("--coordinator", metavar="HOST:PORT", help="where process 0 is")
    add("--processes", type=many, help="how many there are")
    add("--process-id", type=integer(0, 9998), help="which of them this one is")
    add("--distributed", action="store_true", help="let JAX find the three above")
    args = parser.parse_args()
    given = [x is not None for x in (args.coordinator, args.processes, args.process_id)]
    if any(given) and (args.distributed or not all(given)):
        parser.error(
            "--coordinator, --processes and --process-id go together, and without "
            "--distributed"
        )
    if not args.resume and checkpoints.has_steps(args.out / "checkpoints"):
        parser.error(
            f"argument --out: there are checkpoints in {args.out}: --resume goes on "
            "from them, and another folder leaves them alone"
        )
    return args


def say(text: str) -> None:
    """Once, however many processes there are."""
    if jax.process_index() == 0:
        print(text, flush=True)


def train(
    state: State,
    step: int,
    data: tuple[Any, ...],
    config: dict[str, Any],
    mesh: Mesh,
    manager: ocp.CheckpointManager,
    save_every: int,
    metrics: Path,
) -> State:
    is_first = jax.process_index() == 0
    num_steps, size, seed = (config[k] for k in ("steps", "batch_size", "seed"))
    rows = local_rows(mesh, size)
    file = open_metrics(metrics, step) if is_first else None
    with progress_bar(num_steps, step, disable=not is_first) as bar:
        while step < num_steps:
            local = local_batch(*data, size=size, seed=seed, step=step, rows=rows)
            images, labels = global_batch(mesh, *local)
            state, figures = train_step(state, images, labels, num_steps, mesh)
            step += 1
            row = {k: v.item() for k, v in jax.device_get(figures).items()}
            if file is not None:
                write_row(file, {"step": step, **row})
            bar.set_description_str(
                f"loss {row['loss']:.3f}, accuracy {row['accuracy']:.1%}, "
                f"steps {row['forward_steps']:.1f} forward "
                f"{row['backward_steps']:.1f} back",
                refresh=False,
            )
            bar.update()
            # JAX catches SIGTERM, by which schedulers take a machine back, and lets all
            # processes agree on a step to save at.
            is_told_to_end = manager.reached_preemption(step)
            if is_told_to_end or step % save_every == 0 or step == num_steps:
                checkpoints.save(manager, step, state, config)
            if is_told_to_end and step < num_steps:
                say(f"\nTold to end, after {step} steps; --resume goes on from there.")
                sys.exit(128 + signal.SIGTERM)  # As a shell reports it.
    if file is not None:
        file.close()
    return state


def finish(
    state: State, held_out: list[Any], config: dict[str, Any], mesh: Mesh, out: Path
) -> None:
    images, labels = held_out
    place = lambda x: jax.make_array_from_process_local_data(replicated(mesh), x)
    figures = assess(state.model, place(images), place(labels), mesh)
    if jax.process_index() != 0:
        return
    assessed = {k: v.item() for k, v in jax.device_get(figures).items()}
    rows = read_rows(out / "metrics.jsonl")
    with open(out / "metrics.jsonl", "a", buffering=1) as file:
        write_row(file, {"step": config["steps"], **assessed})
    model = jax.device_get(eqx.filter(state.model, eqx.is_array))
    replace_file(out / "final.eqx", serialise(model))
    draw(out / "train_sharded.png", rows, describe(mesh))
    print(f"\n{table(rows, assessed, config['batch_size'])}\n")
    print(f"In {out}: checkpoints, final.eqx, metrics.jsonl, train_sharded.png")


def run_all(args: argparse.Namespace) -> None:
    where = (args.coordinator, args.processes, args.process_id)
    join(args.devices, *where, args.distributed)
    mesh = make_mesh()
    if args.batch_size % mesh.size:
        sys.exit(
            f"train_sharded.py: error: argument --batch-size: {mesh.size} devices must "
            f"divide it; got {args.batch_size}"
        )
    # How many devices and processes there are is no part of it: a run may go on with
    # others.
    config = {
        "seed": args.seed,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "features": args.features,
        "tolerance": TOLERANCE,
        "largest_norm": LARGEST_NORM,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    state = start(args.features, args.seed, args.steps, mesh)
    manager = checkpoints.make_manager(args.out / "checkpoints")
    try:
        state, step = checkpoints.restore(manager, state, config, replicated(mesh))
    except CheckpointError as error:
        sys.exit(f"train_sharded.py: error: argument --resume: {error}")
    say(
        f"{describe(mesh)}, "
        f"{'from the start' if step == 0 else f'going on after {step} steps'}."
    )
    images, labels, *held_out = load_data()
    data, metrics = (images, labels), args.out / "metrics.jsonl"
    state = train(state, step, data, config, mesh, manager, args.save_every, metrics)
    manager.close()
    finish(state, held_out, config, mesh, args.out)


def main() -> None:
    run_resumable(run_all, parse_args())


if __name__ == "__main__":
    main()
