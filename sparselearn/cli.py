"""The `sparselearn` command."""

import argparse
import sys
from pathlib import Path

from sparselearn.errors import SparsityError

EXAMPLES = """examples:
  sparselearn recipes
  sparselearn train digits variant=rigl sparsity=0.95
  sparselearn sweep digits variant=dense,static,rigl seed=0,1,2 --out runs/digits
  sparselearn report runs/digits-rigl-seed0 --out report.html
"""
TRAIN_EXAMPLES = """examples:
  sparselearn train digits
  sparselearn train fashion_mnist variant=set method.every=200 seed=1 --out runs/set
  sparselearn train fashion_mnist variant=set method.every=200 seed=1 --out runs/set --resume
"""
SWEEP_EXAMPLES = """examples:
  sparselearn sweep digits variant=dense,static,rigl
  sparselearn sweep fashion_mnist variant=static,rigl sparsity=0.9,0.95 seed=0,1,2 --out runs/fashion --jobs 2
A finished run is never repeated: give the same command again to go on after an interruption.
"""


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "sparselearn", description="Dynamic sparse training for PyTorch.", epilog=EXAMPLES, formatter_class=raw
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="{recipes,train,sweep,report,inspect,verify,export,diff}")
    commands.add_parser(
        "recipes", help="list the packaged recipes", epilog="example:\n  sparselearn recipes", formatter_class=raw
    )
    train = commands.add_parser("train", help="train one recipe", epilog=TRAIN_EXAMPLES, formatter_class=raw)
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    sweep = commands.add_parser("sweep", help="a grid of runs", epilog=SWEEP_EXAMPLES, formatter_class=raw)
    sweep.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at a time (default 1), spread over the GPUs; small networks share one well, best under NVIDIA MPS",
    )
    for command in (train, sweep):
        command.add_argument("recipe", help="the name of a packaged recipe, or the path of a YAML file")
        command.add_argument("changes", nargs="*", metavar="key=value", help="keys of the recipe, dotted where nested")
        command.add_argument("--out", type=Path, help="folder of the results (default: runs/ and the name)")
        command.add_argument("--quiet", action="store_true", help="no progress bar")
    from sparselearn.checkpoint.command import add_commands
    from sparselearn.recipes.report import add_command

    add_command(commands)
    add_commands(commands)
    return parser


def _recipes() -> int:
    from omegaconf import OmegaConf

    from sparselearn.config import packaged

    for name, path in packaged().items():
        recipe = OmegaConf.load(path)
        variants = ", ".join(OmegaConf.select(recipe, "variants") or {})
        print(f"{name:24}{OmegaConf.select(recipe, 'description')}\n{'':24}variants: {variants}")
    return 0


def _train(args: argparse.Namespace) -> int:
    from sparselearn.config import load

    config = load(args.recipe, args.changes)
    from sparselearn.recipes.train import train

    out = args.out or Path("runs") / f"{config.name}-{config.variant}-seed{config.seed}"
    result = train(config, out, resume=args.resume, progress=not args.quiet)
    if result.get("interrupted"):
        print(
            f"Stopped at step {result['step']}. Go on with the same command and --out {out} --resume", file=sys.stderr
        )
        return 130
    print(
        f"{config.name} {config.variant}: test accuracy {100 * result['test_accuracy']:.2f} %, "
        f"sparsity {100 * result['sparsity']:.3f} %, {result['nnz']:,} of {result['parameters']:,} parameters nonzero, "
        f"training FLOPs {result['training_flops']:.3f} of dense, {result['seconds']:.0f} s -> {out}"
    )
    if result["diverged"]:
        print("The run diverged: weights are not finite. Lower optimizer.lr.", file=sys.stderr)
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from sparselearn.recipes.sweep import sweep

    grid: dict[str, list[str]] = {}
    for change in args.changes:
        key, equals, values = change.partition("=")
        if not equals:
            raise SparsityError(f"`{change}` must have the form key=value or key=a,b,c, as in seed=0,1,2.")
        grid[key] = [values] if values.startswith("[") else values.split(",")
    sweep(args.recipe, grid, args.out or Path("runs") / Path(args.recipe).stem, jobs=args.jobs, progress=not args.quiet)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code (2 for a user's mistake, 130 after Ctrl-C)."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)  # key=value may also come after options
    if unknown := [item for item in rest if item.startswith("-") or args.command not in ("train", "sweep")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.changes += rest
    if args.version:
        from sparselearn import __version__

        print(__version__)
        return 0
    try:
        if args.command == "recipes":
            return _recipes()
        if args.command == "train":
            return _train(args)
        if args.command == "sweep":
            return _sweep(args)
        if args.command == "report":
            from sparselearn.recipes.report import command

            return command(args)
        if args.command is not None:
            return int(args.run(args))
    except SparsityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. Finished runs are kept; give the same command again to go on.", file=sys.stderr)
        return 130
    parser.print_help()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
