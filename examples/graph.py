"""Train an implicit graph network on a class that only the end of a chain knows.

    python examples/graph.py

Each node is to tell its class, which the features of the first node alone give away.
`k` graph convolutions see `k` edges far; an equilibrium of the same parameters sees the
whole chain (Gu et al. 2020). The model is in `graph_model.py`.
"""

import argparse

import graph_data
import graph_model
import jax.numpy as jnp
import jax.random as jr
import training
from command_line import integer, run_resumable
from graph_report import finish


FIGURES = ("loss", "accuracy", "steps", "failed")
DEPTHS = {"equilibrium": None, "8 layers": 8, "32 layers": 32}


def train(args: argparse.Namespace, name: str, config: dict) -> training.Run:
    depth, optimiser = DEPTHS[name], graph_model.make_optimiser(args.steps)
    model = graph_model.Classifier(args.features, depth, key=jr.key(args.seed))
    run = training.start_run(model, optimiser, num_steps=args.steps, names=FIGURES)
    file = name.replace(" ", "_")
    config = {**config, "depth": depth}
    run, save = training.checkpoints(args, run, config, name=file)
    adjacency = graph_data.chain(args.nodes)

    def step(model, opt_state, i):
        data = graph_data.batch(args.batch_size, args.nodes, seed=args.seed, step=i)
        inputs, labels = map(jnp.asarray, data)
        return graph_model.train_step(
            model, opt_state, optimiser, inputs, labels, adjacency
        )

    show = lambda row: (
        f"{name}, loss {row['loss']:.3f}, accuracy {row['accuracy']:.0%}, "
        f"solve {row['steps']:.0f}"
    )
    return training.train(
        run,
        step,
        num_steps=args.steps,
        save=save,
        save_every=args.save_every,
        show=show,
    )


def run_all(args: argparse.Namespace) -> None:
    config = {
        "seed": args.seed,
        "steps": args.steps,
        "nodes": args.nodes,
        "features": args.features,
        "batch_size": args.batch_size,
        "tolerance": graph_model.TOLERANCE,
        "largest_norm": graph_model.LARGEST_NORM,
        "learning_rate": graph_model.LEARNING_RATE,
        "dtype": jnp.zeros(()).dtype.name,
    }
    runs = {name: train(args, name, config) for name in DEPTHS}
    finish(runs, config, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an implicit graph network.")
    training.add_arguments(parser, steps=200, name="graph")
    add, many = parser.add_argument, integer(2, 9999)
    add("--nodes", type=many, default=50, help="length of the chains trained on [50]")
    add("--batch-size", type=many, default=32, help="chains a step [32]")
    add("--features", type=many, default=16, help="size of a node's state [16]")
    run_resumable(run_all, training.parse(parser, steps=200))


if __name__ == "__main__":
    main()
